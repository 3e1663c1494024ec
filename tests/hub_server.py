"""A stand-in for the Hugging Face Hub: the few endpoints that its own client uses, on this machine, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER = "user"


class Repository:
    """Branches, each a list of commits, each the files by name."""

    def __init__(self, private):
        self.private = private
        self.branches = {"main": [{}]}
        self.messages = []

    def files(self, revision):
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((f for commits in self.branches.values() for f in commits if sha(f) == revision), None)


def sha(files):
    """What names a commit: a hash of all that it holds."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Hub:
    """What the server holds, and what it was asked for."""

    def __init__(self):
        self.repositories = {}
        self.requests = []
        self.downloaded = []
        self.token = "hf_right"

    def add(self, repo_id, files, private=False):
        self.repositories[repo_id] = Repository(private)
        self.repositories[repo_id].branches["main"].append(dict(files))
        return self.repositories[repo_id]

    def files(self, repo_id, revision="main"):
        return self.repositories[repo_id].files(revision)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code, status=404):
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def visible(self, repo_id):
        repository = self.hub.repositories.get(repo_id)
        right = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        return repository if repository and (right or not repository.private) else None

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = info or file
        repository = self.visible(match[1]) if match else None
        if repository is None:
            return self.refuse("RepoNotFound", 401)
        revision = (info[3] if info else file[2]) or "main"
        files = repository.files(revision)
        if files is None:
            return self.refuse("RevisionNotFound")
        if info and info[2] == "tree":
            return self.answer(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
            )
        if info:
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": match[1], "sha": sha(files), "siblings": siblings, "private": repository.private})
        if file[3] not in files:
            return self.refuse("EntryNotFound")
        if self.command == "GET":
            self.hub.downloaded.append(file[3])
        content = files[file[3]]
        return self.answer(content, X_Repo_Commit=sha(files), ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    do_HEAD = do_GET

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/validate-yaml":
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.refuse("Unauthorized", 401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        repo_id, call, revision = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path).groups()
        repository = self.hub.repositories[repo_id]
        if call == "branch":
            new = revision not in repository.branches
            repository.branches.setdefault(revision, [repository.files("main")])
            return self.answer({}, 200 if new else 409)
        if call == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self.answer({"files": modes})
        return self.commit(repository, repo_id, revision, [json.loads(line) for line in body.splitlines()])

    def create(self, given):
        repo_id = f"{given.get('organization') or OWNER}/{given['name']}"
        url = f"http://{self.headers['Host']}/{repo_id}"
        if repo_id in self.hub.repositories:
            return self.answer({"url": url, "error": "there already"}, 409)
        private = bool(given.get("private") or given.get("visibility") == "private")
        self.hub.repositories[repo_id] = Repository(private)
        return self.answer({"url": url})

    def commit(self, repository, repo_id, revision, lines):
        files = dict(repository.files(revision))
        for line in lines:
            if line["key"] == "header":
                repository.messages.append(line["value"]["summary"])
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        repository.branches[revision].append(files)
        url = f"http://{self.headers['Host']}/{repo_id}/commit/{sha(files)}"
        self.answer({"commitUrl": url, "commitOid": sha(files), "pullRequestUrl": None})


@contextmanager
def serving():
    """A hub, and the address it has while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OnThisHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
