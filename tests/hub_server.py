# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""As much of the Hub as its own client needs to create, upload to and download from a repository."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


USER, TOKEN = "me", "hf_mine"


class Hub:
    """
    `files[repo][revision]` holds what was committed, by path. `faults` maps a piece of a path to what to answer
    instead, one after the other: a status with headers, or `"drop"` to close the connection.
    """

    def __init__(self):
        self.files, self.private, self.blobs, self.commits, self.faults, self.requests = {}, {}, {}, [], {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fault(self, path: str) -> str | tuple[int, dict] | None:
        for piece, answers in self.faults.items():
            if piece in path and answers:
                return answers.pop(0)
        return None


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content=None, status: int = 200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        fault = self.hub.fault(path)
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault is not None:
            self.answer({"error": "fault"}, fault[0], **fault[1])
        elif path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == oid
            self.hub.blobs[oid] = body
            self.answer({})
        elif "/resolve/" in path:
            self.resolve(*path.removeprefix("/").split("/resolve/"))
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif not path.startswith("/api/") and not path.endswith("/batch") or path.count("/") < 3:
            self.answer({"error": "Not found"}, 404)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}" and self.command != "GET":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
            self.answer({"objects": objects, "transfer": "basic"})
        else:
            _, _, _, user, name, *rest = path.split("/")
            self.repository(f"{user}/{name}", rest, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, wanted):
        user = wanted["organization"] or USER
        repo = f"{user}/{wanted['name']}"
        if user != USER:
            self.answer({"error": f"You don't have the rights to create a model under {user}."}, 403)
        elif repo in self.hub.files:
            self.answer({"error": "You already created this.", "url": f"{self.hub.endpoint}/{repo}"}, 409)
        else:
            self.hub.files[repo] = {"main": {}}
            self.hub.private[repo] = wanted.get("visibility") == "private"
            self.answer({"url": f"{self.hub.endpoint}/{repo}"})

    def repository(self, repo, rest, body):
        if repo not in self.hub.files:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif rest == [] or (rest[0] == "revision" and rest[1] in self.hub.files[repo]):
            names = [{"rfilename": name} for name in self.hub.files[repo][rest[1] if rest else "main"]]
            self.answer(
                {"id": repo, "sha": "0" * 40, "siblings": names, "private": self.hub.private[repo], "tags": []}
            )
        elif not repo.startswith(f"{USER}/"):
            self.answer({"error": "Forbidden"}, 403)
        elif rest[0] == "auth-check":
            self.answer({})
        elif rest[0] == "branch":
            exists = rest[1] in self.hub.files[repo]
            self.hub.files[repo].setdefault(rest[1], {})
            self.answer({"error": "exists"} if exists else {}, 409 if exists else 200)
        elif rest[1] not in self.hub.files[repo]:
            self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        elif rest[0] == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png", ".pt")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif rest[0] == "commit":
            self.commit(repo, rest[1], [json.loads(line) for line in body.splitlines()])

    def commit(self, repo, revision, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "file":
                self.hub.files[repo][revision][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[repo][revision][value["path"]] = self.hub.blobs[value["oid"]]
        self.answer({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def resolve(self, repo, place):
        revision, name = place.split("/", 1)
        content = self.hub.files[repo]["main" if revision == "0" * 40 else revision].get(name)
        if content is None:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit="0" * 40)
        else:
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.answer(content, ETag=etag, X_Repo_Commit="0" * 40)
