"""A Hugging Face hub on this machine: as much of its HTTP API as pushing and opening a model takes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest


class Hub:
    """Models by name, each a list of commits, and a commit is files by name.

    Attributes:
        models: ORG/NAME -> commit -> file -> content; the last commit is main.
        visibility: What was asked for when a model was made.
        messages: What the commits say.
        refuses: What the next commit is answered with, an HTTP status and a message, if not with success.
    """

    TOKEN = "hf_of_a_test"

    def __init__(self) -> None:
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.visibility: dict[str, str | None] = {}
        self.messages: list[str] = []
        self.refuses: tuple[int, str] | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.get(self)

            do_HEAD = do_GET

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.post(self, body)

            def log_message(self, *_) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def files(self, model: str) -> dict[str, bytes]:
        """What a model's last commit holds."""
        return list(self.models[model].values())[-1]

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        parts = unquote(urlsplit(handler.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            model, rest = "/".join(parts[2:4]), parts[4:]
        else:
            model, rest = "/".join(parts[:2]), parts[2:]
        commits = self.models.get(model)
        if commits is None:
            answer(handler, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        asked = rest[1] if len(rest) > 1 else "main"
        sha = list(commits)[-1] if asked == "main" else asked
        if sha not in commits:
            answer(handler, 404, {"error": f"Invalid rev id: {asked}"}, {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] in ([], ["revision"]):
            files = [{"rfilename": name} for name in commits[sha]]
            answer(handler, 200, {"id": model, "sha": sha, "siblings": files})
        elif rest[0] == "tree":
            sizes = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in commits[sha].items()
            ]
            answer(handler, 200, sizes)
        elif rest[0] == "resolve" and (content := commits[sha].get("/".join(rest[2:]))) is not None:
            answer(handler, 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha})
        else:
            answer(handler, 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})

    def post(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        path = unquote(urlsplit(handler.path).path)
        if handler.headers.get("Authorization") != f"Bearer {self.TOKEN}":
            answer(handler, 401, {"error": "Invalid user token."})
        elif path == "/api/validate-yaml":
            answer(handler, 200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            model = f"{asked['organization']}/{asked['name']}"
            if model in self.models:
                answer(handler, 409, {"url": f"{self.address}/{model}"})
                return
            self.models[model] = {"0" * 40: {".gitattributes": b""}}
            self.visibility[model] = asked.get("visibility")
            answer(handler, 200, {"url": f"{self.address}/{model}"})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            answer(handler, 200, {"files": files})
        elif "/commit/" in path:
            self._commit(handler, "/".join(path.split("/")[3:5]), [json.loads(line) for line in body.splitlines()])

    def _commit(self, handler: BaseHTTPRequestHandler, model: str, lines: list[dict]) -> None:
        if self.refuses is not None:
            answer(handler, self.refuses[0], {"error": self.refuses[1]})
            return
        files = dict(self.files(model))
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        sha = hashlib.sha1(b"".join(files.values())).hexdigest()
        self.models[model][sha] = files
        self.messages.append(lines[0]["value"]["summary"])
        answer(handler, 200, {"commitUrl": f"{self.address}/{model}/commit/{sha}", "commitOid": sha})


def answer(
    handler: BaseHTTPRequestHandler, status: int, content: object, headers: dict[str, str] | None = None
) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, logged in to, with an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
    yield hub
    hub.http.shutdown()
