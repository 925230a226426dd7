"""A Hugging Face hub on this machine: as much of its HTTP interface as `huggingface_hub` and `datasets` ask for."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Repository:
    """A data set: its commits, each with its files, and the commit of each branch."""

    commits: dict[str, Mapping[str, bytes]]
    branches: dict[str, str]
    card: dict = field(default_factory=dict)


@dataclass
class Hub:
    """The server, and what it was asked for."""

    endpoint: str
    repositories: dict[str, Repository]
    asked: list[str]


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer()

        def _answer(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            words = path.strip("/").split("/")
            api = words[0] == "api"
            words = words[1:] if api else words
            if words[0] != "datasets" or len(words) < 3:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            name, rest = "/".join(words[1:3]), words[3:]
            repository = hub.repositories.get(name)
            if repository is None:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            revision = rest[1] if len(rest) > 1 else "main"
            commit = repository.branches.get(revision, revision)
            if commit not in repository.commits:
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = repository.commits[commit]
            if not api:
                return self._file(commit, files.get("/".join(rest[2:])))
            if not rest or rest[0] == "revision":
                info = {
                    "id": name,
                    "sha": commit,
                    "cardData": repository.card,
                    "siblings": [{"rfilename": file} for file in files],
                }
                return self._send(200, json.dumps(info).encode())
            if rest[0] == "tree":
                return self._tree(files, "/".join(rest[2:]))
            if rest[0] == "paths-info":
                asked = urllib.parse.parse_qs(self._body.decode()).get("paths") or json.loads(self._body)["paths"]
                return self._send(
                    200, json.dumps([_entry(file, files[file]) for file in asked if file in files]).encode()
                )
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

        def _tree(self, files: Mapping[str, bytes], below: str) -> None:
            prefix = f"{below}/" if below else ""
            folders = {
                file[len(prefix) :].split("/")[0]
                for file in files
                if file.startswith(prefix) and "/" in file[len(prefix) :]
            }
            rows = [
                {"type": "directory", "path": prefix + name, "oid": "0" * 40, "size": 0} for name in sorted(folders)
            ]
            rows += [_entry(file, content) for file, content in files.items() if file.startswith(prefix)]
            if below and len(rows) == 0:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return self._send(200, json.dumps(rows).encode())

        def _file(self, commit: str, content: bytes | None) -> None:
            headers = {"X-Repo-Commit": commit}
            if content is None:
                return self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
            return self._send(200, content, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

        def _send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


def _entry(file: str, content: bytes) -> dict:
    return {"type": "file", "path": file, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """A running hub with these data sets."""
    hub = Hub("", repositories, [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
