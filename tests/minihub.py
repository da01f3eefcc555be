# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""A Hugging Face Hub on the loopback interface, in memory: takes `push_to_hub` and serves `from_pretrained`.

    with MiniHub() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(cache)})
        hub.files("name/model")["config.json"]

`huggingface_hub` reads its endpoint at import, so a client is best a subprocess. Every file travels inside the commit
("regular" upload): there is no LFS, which suits models of some megabytes.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class MiniHub:
    """The server; listens between `__enter__` and `__exit__`."""

    def __init__(self):
        # Each repository is its list of commits, (id, {path: content}).
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self

    def __enter__(self) -> "MiniHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, cache: str | Path) -> dict[str, str]:
        """Variables that send a client here, with its cache in the folder `cache`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "of-no-use-elsewhere",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def add(self, repo: str, folder: Path) -> None:
        """Makes the files of `folder` the next commit of `repo`."""
        self.commit(repo, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})

    def files(self, repo: str) -> dict[str, bytes]:
        """The newest files of `repo`."""
        return self.repos[repo][-1][1]

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        commits = self.repos.setdefault(repo, [])
        commit_id = hashlib.sha1(f"{repo}/{len(commits)}".encode()).hexdigest()
        commits.append((commit_id, files))
        return commit_id

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in ("main", "HEAD"):
            return self.repos[repo][-1]
        return next((commit for commit in self.repos[repo] if commit[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> MiniHub:
        return self.server.hub

    def log_message(self, *_):
        """Silent: the requests are in `MiniHub.requests`."""

    def do_POST(self):
        body, path = self._body(), self._path()
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/.+", path)
        if not match or match[1] not in self.hub.repos:
            return self._missing("RepoNotFound")
        if match[2] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._json({"files": [{"path": x, "uploadMode": "regular", "shouldIgnore": False} for x in names]})
        return self._commit(match[1], body)

    def do_GET(self):
        path = self._path()
        if path == "/api/whoami-v2":
            return self._json({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree|refs)(?:/([^/]+).*)?)?", path):
            return self._describe(match[1], match[2], match[3] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*match.groups())
        return self._missing("RepoNotFound")

    do_HEAD = do_GET

    def _path(self) -> str:
        self.hub.requests.append(f"{self.command} {self.path}")
        return self.path.partition("?")[0]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _create(self, wanted: dict):
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repos:
            return self._json({"error": "exists", "url": url}, status=409)
        self.hub.commit(repo, {})
        return self._json({"url": url, "name": repo, "id": repo})

    def _commit(self, repo: str, body: bytes):
        files = dict(self.hub.files(repo))
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                files.pop(entry["value"]["path"], None)
        commit_id = self.hub.commit(repo, files)
        url = f"{self.hub.url}/{repo}/commit/{commit_id}"
        return self._json({"commitUrl": url, "commitOid": commit_id, "commitMessage": "", "success": True})

    def _describe(self, repo: str, what: str | None, revision: str):
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        commit = self.hub.find(repo, revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        commit_id, files = commit
        if what == "tree":
            return self._json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in files.items()
                ]
            )
        siblings = [{"rfilename": path} for path in files]
        return self._json(
            {"id": repo, "modelId": repo, "sha": commit_id, "private": False, "tags": [], "siblings": siblings}
        )

    def _file(self, repo: str, revision: str, path: str):
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        commit = self.hub.find(repo, revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        commit_id, files = commit
        if path not in files:
            return self._missing("EntryNotFound", {"X-Repo-Commit": commit_id})
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        return self._send(files[path], "application/octet-stream", headers={"ETag": etag, "X-Repo-Commit": commit_id})

    def _missing(self, what: str, headers: dict[str, str] | None = None):
        self._json({"error": what}, 404, {"X-Error-Code": what, "X-Error-Message": what, **(headers or {})})

    def _json(self, content, status: int = 200, headers: dict[str, str] | None = None):
        self._send(json.dumps(content).encode(), "application/json", status, headers)

    def _send(self, content: bytes, content_type: str, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", content_type)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
