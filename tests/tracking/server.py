"""As much of W&B's server as its client asks of it: it says where a run stands and takes rows, files and artifacts."""

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
    """What the server was told: the fields of each run, its rows in the order of their arrival, its summary, its artifacts."""

    def __init__(self, address: str, refuses: bool) -> None:
        self.address, self.refuses, self.refuses_rows = address, refuses, False
        self.answers = threading.Event()
        self.answers.set()
        self.takes_rows = threading.Event()
        self.takes_rows.set()
        self.runs: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.sessions: list[str] = []
        self.bodies: list[bytes] = []
        self.keys: set[str] = set()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.answers.wait()
        if self.refuses or (self.refuses_rows and path.endswith("/file_stream")):
            return 401, {"errors": [{"message": "user is not logged in"}]}
        if path.endswith("/file_stream"):
            if not self.takes_rows.is_set():  # the rows of this request are not taken
                self.takes_rows.wait()
                return 500, {}
            return 200, self._stream(path.split("/")[-2], body.get("files", {}))
        if path != "/graphql":
            return 200, {}
        asked = body["operationName"] or body["query"].split()[1].partition("(")[0]
        given = body.get("variables") or {}
        return 200, {"data": getattr(self, f"_{asked}", lambda given: {})(given)}

    def _Viewer(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"viewer": {"id": "v", "entity": "us", "username": "us", "email": ""}}

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
        self.sessions += [given["name"]] if given["displayName"] else []
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

    def _ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        described = given["input"]
        name = described["artifactCollectionName"]
        self.artifacts[name] = {**described, "files": [], "state": "PENDING"}
        return {"createArtifact": {"artifact": {"id": name, "state": "PENDING", "artifactSequence": {"id": "q"}}}}

    def _CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        place = {"id": given["artifactID"], "uploadUrl": f"{self.address}/upload/manifest", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": given["artifactID"], "file": place}}}

    def _UpdateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        place = {"uploadUrl": f"{self.address}/upload/manifest", "uploadHeaders": []}
        manifest = {"id": given["artifactManifestID"], "file": {"id": "f", **place}}
        return {"updateArtifactManifest": {"artifactManifest": manifest}}

    def _CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        nodes = []
        for file in given["input"]["artifactFiles"]:
            name = f"{file['artifactID']}/{file['name']}"
            self.artifacts[file["artifactID"]]["files"].append(file["name"])
            place = {"uploadUrl": f"{self.address}/upload/{name}", "uploadHeaders": [], "storagePath": name}
            nodes.append({"node": {**place, "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.artifacts[given["artifactID"]]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}

    def _stream(self, run_id: str, files: dict[str, Any]) -> dict[str, Any]:
        told = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        kept = self.rows.setdefault(run_id, [])
        kept[told["offset"] :] = kept[told["offset"] :] if not told["content"] else map(json.loads, told["content"])
        for text in files.get("wandb-summary.json", {"content": []})["content"]:
            self.summaries[run_id] = json.loads(text)
        return {"exitcode": None, "limits": {}}

    def history(self, run_id: str) -> list[dict[str, Any]]:
        """The rows of a run, without what W&B's client adds to them."""
        rows = self.rows.get(run_id, [])
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]

    def config(self, run_id: str) -> dict[str, Any]:
        """The settings of a run, as they were told last."""
        told = json.loads(self.runs[run_id]["config"])
        return {key: entry["value"] for key, entry in told.items() if not key.startswith("_")}


@contextmanager
def serving(refuses: bool = False) -> Iterator[Server]:
    """A server at a free port of this machine; one that ``refuses`` takes every key for a wrong one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            server.bodies.append(body)
            if self.path.startswith("/upload/"):
                server.files[self.path.removeprefix("/upload/")] = body
                self._reply(200, {})
            else:
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
        server.answers.set()
        server.takes_rows.set()
        http.shutdown()
