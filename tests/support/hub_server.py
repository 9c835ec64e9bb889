"""A hub on a loopback address: what huggingface_hub asks of it to make a repository and to commit files to it."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_planted"


class Hub:
    """What was uploaded."""

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[str, dict[str, bytes]] = {}
        """By repository and path."""
        self.commits: list[tuple[str, str]] = []
        """Repository and message of each."""
        self.private: dict[str, bool] = {}
        self.failures = 0
        """As many commits are answered with `error` first."""
        self.error = 503
        self.refused = 0
        """The number of commits that were."""
        self.hold: threading.Event | None = None
        """If given, a commit waits for it."""

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            if name.startswith("forbidden/"):
                return 403, {"error": f"You don't have the rights to create a model under {name}."}
            self.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
            status = 409 if name in self.files else 200
            self.files.setdefault(name, {})
            return status, {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "someone", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", path):
            known = self.files[found[1]]
            paths = [file["path"] for file in json.loads(body)["files"]]
            fixed = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": p, "oid": p if p in known else None, **fixed} for p in paths]}
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", path):
            return self._commit(found[1], body)
        return 404, {"error": f"{method} {path}"}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        if self.hold is not None:
            self.hold.wait(30)
        if self.failures:
            self.failures, self.refused = self.failures - 1, self.refused + 1
            return self.error, {"error": "The hub is having a rest"}
        lines = [json.loads(line) for line in body.splitlines()]
        header, *files = (line["value"] for line in lines)
        for file in files:
            self.files[name][file["path"]] = base64.b64decode(file["content"])
        self.commits.append((name, header["summary"]))
        return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{name}/commit/{'0' * 40}"}


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, document = hub.answer(self.command, self.path.partition("?")[0], body, token)
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
