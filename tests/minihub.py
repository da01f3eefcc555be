# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""A Hugging Face Hub on the loopback interface, in memory: takes `push_to_hub` and serves `from_pretrained`.

    with MiniHub() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(cache)})
        hub.files("name/model")["config.json"]

It knows commits, branches and tags, private repositories, kernel repositories ("kernels/name/kernel"), and large files:
weights travel by LFS (batch, PUT, verify), everything else inside the commit. `huggingface_hub` reads its endpoint at
import, so a client is best a subprocess.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote


OWNER = "of-no-use-elsewhere"
STRANGER = "of-no-use-here-either"
# What the real Hub's .gitattributes sends through LFS.
LARGE = (".safetensors", ".bin")


class MiniHub:
    """The server; listens between `__enter__` and `__exit__`."""

    def __init__(self):
        # Each repository is its list of commits, (id, {path: content}); `refs` are its branches and tags.
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.refs: dict[str, dict[str, dict[str, str]]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.verified: set[str] = set()
        # What becomes of the next LFS uploads: None (all is well), a status, or "drop" (the line goes dead halfway).
        self.upload_faults: list[int | str | None] = []
        # Downloads of large files that lose their connection halfway.
        self.dropped_downloads = 0
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

    def environment(self, cache: str | Path, token: str = OWNER) -> dict[str, str]:
        """Variables that send a client here, with its cache in the folder `cache`; an empty token is none."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def add(self, repo: str, folder: Path) -> None:
        """Makes the files of `folder` the next commit of `repo`."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.commit(repo, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of `repo`, the newest unless told otherwise."""
        return self.find(repo, revision)[1]

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        commits = self.repos.setdefault(repo, [])
        commit_id = hashlib.sha1(f"{repo}/{len(commits)}".encode()).hexdigest()
        commits.append((commit_id, files))
        self.refs.setdefault(repo, {"branches": {}, "tags": {}})["branches"][branch] = commit_id
        return commit_id

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        refs = self.refs[repo]
        named = {**refs["tags"], **refs["branches"], "HEAD": refs["branches"]["main"]}
        wanted = named.get(revision, revision)
        return next((commit for commit in self.repos[repo] if commit[0] == wanted), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> MiniHub:
        return self.server.hub

    def log_message(self, *_):
        """Silent: the requests are in `MiniHub.requests`."""

    def do_POST(self):
        body, path = self._body(), self._path()
        if self._token() not in (OWNER, STRANGER):
            return self._json({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/(batch|verify)", path):
            repo, what, revision = match[1], match[2], None
        elif match := re.fullmatch(r"/api/(models|kernels)/([^/]+/[^/]+)/(preupload|commit|branch|tag)/([^/]+)", path):
            kind, repo, what, revision = match.groups()
            repo, revision = f"kernels/{repo}" if kind == "kernels" else repo, unquote(revision)
        else:
            return self._missing("RepoNotFound")
        if self._hidden(repo):
            return None
        content = json.loads(body) if body and what != "commit" else {}
        if what == "batch":
            return self._batch(repo, content["objects"])
        if what == "verify":
            self.hub.verified.add(content["oid"])
            known = len(self.hub.objects.get(content["oid"], b"")) == content["size"]
            return self._json({}, 200 if known else 422)
        if what == "preupload":
            return self._preupload(content["files"])
        if what == "commit":
            return self._commit(repo, revision, body)
        start = self.hub.find(repo, content.get("startingPoint", "main" if what == "branch" else revision))
        if start is None:
            return self._missing("RevisionNotFound")
        names = self.hub.refs[repo]["branches" if what == "branch" else "tags"]
        names[revision if what == "branch" else content["tag"]] = start[0]
        return self._json({})

    def do_PUT(self):
        path, oid = self._path(), self.path.rpartition("/")[2]
        fault = self.hub.upload_faults.pop(0) if self.hub.upload_faults else None
        if fault is not None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            return None if fault == "drop" else self._json({"error": "out of order"}, fault)
        body = self._body()
        if not path.startswith("/lfs/") or hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "not what was announced"}, 400)
        self.hub.objects[oid] = body
        return self._json({})

    def do_GET(self):
        path = self._path()
        if path == "/api/whoami-v2":
            return self._json({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        pattern = r"/api/(models|kernels)/([^/]+/[^/]+?)(?:/(revision|tree|refs)(?:/([^/]+)(?:/(.*))?)?)?"
        if match := re.fullmatch(pattern, path):
            repo = f"kernels/{match[2]}" if match[1] == "kernels" else match[2]
            return self._describe(repo, match[3], unquote(match[4] or "main"), unquote(match[5] or ""))
        if match := re.fullmatch(r"/((?:kernels/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*map(unquote, match.groups()))
        return self._missing("RepoNotFound")

    do_HEAD = do_GET

    def _path(self) -> str:
        self.hub.requests.append(f"{self.command} {self.path}")
        return self.path.partition("?")[0]

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _hidden(self, repo: str) -> bool:
        """Answers, and says so, where this client must not know of `repo`: 401 for nobody, 404 for somebody else."""
        if repo in self.hub.repos and (repo not in self.hub.private or self._token() == OWNER):
            return False
        self._missing("RepoNotFound", status=404 if self._token() in (OWNER, STRANGER) else 401)
        return True

    def _create(self, wanted: dict):
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        repo = f"kernels/{repo}" if wanted.get("type") == "kernel" else repo
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repos:
            return self._json({"error": "exists", "url": url}, status=409)
        self.hub.commit(repo, {})
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(repo)
        return self._json({"url": url, "name": repo, "id": repo})

    def _preupload(self, files: list[dict]):
        modes = {file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular" for file in files}
        return self._json(
            {"files": [{"path": x, "uploadMode": mode, "shouldIgnore": False} for x, mode in modes.items()]}
        )

    def _batch(self, repo: str, objects: list[dict]):
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"},
                    "verify": {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"},
                }
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, branch: str, body: bytes):
        if branch not in self.hub.refs[repo]["branches"]:
            return self._missing("RevisionNotFound")
        files = dict(self.hub.files(repo, branch))
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                if entry["value"]["oid"] not in self.hub.objects:
                    return self._json({"error": f"{entry['value']['path']} was never uploaded"}, 400)
                files[entry["value"]["path"]] = self.hub.objects[entry["value"]["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(entry["value"]["path"], None)
        commit_id = self.hub.commit(repo, files, branch)
        url = f"{self.hub.url}/{repo}/commit/{commit_id}"
        return self._json({"commitUrl": url, "commitOid": commit_id, "commitMessage": "", "success": True})

    def _describe(self, repo: str, what: str | None, revision: str, folder: str):
        if self._hidden(repo):
            return None
        if what == "refs":
            refs = self.hub.refs[repo]
            listed = {
                kind: [{"name": x, "ref": f"refs/{kind}/{x}", "targetCommit": y} for x, y in refs[kind].items()]
                for kind in refs
            }
            return self._json({**listed, "converts": []})
        commit = self.hub.find(repo, revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        commit_id, files = commit
        if what == "tree":
            asked = parse_qs(self.path.partition("?")[2]).get("recursive", ["false"])
            return self._json(self._tree(files, folder, asked[0].lower() in ("true", "1")))
        siblings = [{"rfilename": path} for path in files]
        described = {"id": repo, "modelId": repo, "sha": commit_id, "private": repo in self.hub.private}
        return self._json({**described, "tags": [], "siblings": siblings})

    def _tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
        prefix, entries, folders = f"{folder}/" if folder else "", [], set()
        for path, content in files.items():
            if not path.startswith(prefix):
                continue
            below = path.removeprefix(prefix)
            if "/" in below and not recursive:
                folders.add(prefix + below.partition("/")[0])
            else:
                oid = hashlib.sha1(content).hexdigest()
                entries.append({"type": "file", "path": path, "size": len(content), "oid": oid})
        return entries + [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]

    def _file(self, repo: str, revision: str, path: str):
        if self._hidden(repo):
            return None
        commit = self.hub.find(repo, revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        commit_id, files = commit
        if path not in files:
            return self._missing("EntryNotFound", {"X-Repo-Commit": commit_id})
        content, status = files[path], 200
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit_id}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        return self._send(content, "application/octet-stream", status, {"Accept-Ranges": "bytes", **headers})

    def _missing(self, what: str, headers: dict[str, str] | None = None, status: int = 404):
        self._json({"error": what}, status, {"X-Error-Code": what, "X-Error-Message": what, **(headers or {})})

    def _json(self, content, status: int = 200, headers: dict[str, str] | None = None):
        self._send(json.dumps(content).encode(), "application/json", status, headers)

    def _send(self, content: bytes, content_type: str, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", content_type)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.path.endswith(LARGE) and self.hub.dropped_downloads:
            self.hub.dropped_downloads -= 1
            self.close_connection = True
            content = content[: len(content) // 2]
        self.wfile.write(content)
