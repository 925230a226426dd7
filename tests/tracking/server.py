"""As much of W&B's server as `wandb sync` asks of it: it says where a run stands and takes its rows."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"


class Server:
    """What the server was told: the fields of each run and its rows, in the order of their arrival."""

    def __init__(self, address: str, refuses: bool) -> None:
        self.address, self.refuses = address, refuses
        self.runs: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.keys: set[str] = set()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.refuses:
            return 401, {"errors": [{"message": "user is not logged in"}]}
        if path.endswith("/file_stream"):
            return 200, self._stream(path.split("/")[-2], body.get("files", {}))
        if path != "/graphql":  # the content of a file
            return 200, {}
        asked, given = body["operationName"], body["variables"]
        return 200, {"data": getattr(self, f"_{asked}", lambda given: {})(given)}

    def _RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        rows = self.rows.get(given["name"])
        if rows is None:
            return {"model": None}
        tail = json.dumps([json.dumps(row) for row in rows[-1:]])
        bucket = {
            "id": "i",
            "name": given["name"],
            "summaryMetrics": "{}",
            "config": "{}",
            "historyLineCount": len(rows),
        }
        bucket |= {
            "historyTail": tail,
            "eventsTail": "[]",
            "logLineCount": 0,
            "eventsLineCount": 0,
            "tags": [],
            "wandbConfig": '{"t": {}}',
        }
        return {"model": {"id": "m", "name": given["project"], "entity": {"id": "e", "name": "us"}, "bucket": bucket}}

    def _UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.runs.setdefault(given["name"], {}).update(
            {key: value for key, value in given.items() if value is not None}
        )
        self.rows.setdefault(given["name"], [])
        project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": given["entity"] or "us"}}
        return {
            "upsertBucket": {
                "bucket": {"id": "i", "name": given["name"], "project": project, "config": "{}"},
                "inserted": True,
            }
        }

    def _CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        places = [{"name": name, "uploadUrl": f"{self.address}/upload/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": "i", "uploadHeaders": [], "files": places}}

    def _stream(self, run_id: str, files: dict[str, Any]) -> dict[str, Any]:
        told = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        kept = self.rows.setdefault(run_id, [])
        kept[told["offset"] :] = kept[told["offset"] :] if not told["content"] else map(json.loads, told["content"])
        return {"exitcode": None, "limits": {}}


@contextmanager
def serving(refuses: bool = False) -> Iterator[Server]:
    """A server at a free port of this machine; one that ``refuses`` takes every key for a wrong one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            self._reply(*server.answer(self.path, json.loads(body)) if body[:1] == b"{" else (200, {}))
            server.keys.add(str(self.headers.get("authorization")))

        do_PUT = do_GET = do_POST  # noqa: N815

        def _reply(self, status: int, value: dict[str, Any]) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: Any) -> None:
            """W&B hangs up without a word when it is done."""

    with Quiet(("127.0.0.1", 0), Handler) as http:
        server = Server(f"http://127.0.0.1:{http.server_port}", refuses)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield server
        http.shutdown()
