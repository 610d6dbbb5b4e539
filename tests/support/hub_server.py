"""A server on loopback that plays the hub's HTTP API as far as pushing a model needs it, with faults on request."""

import hashlib
import json
import socket
import struct
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class HubServer:
    """The hub of one user, in memory.

    Attributes:
        repositories: by name, their branches: by name, the commits: (oid, files by path).
        requests: (method, path) of everything that was asked for.
        faults: called with (method, path) before an answer: None, a status code, or "cut" to cut the connection.
    """

    def __init__(self, user="ada", role="write", orgs=()):
        self.user, self.role, self.orgs = user, role, orgs
        self.repositories, self.private, self.blobs = {}, {}, {}
        self.requests, self.faults = [], lambda method, path: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def files(self, name, branch="main"):
        """The files of a branch's last commit."""
        return self.repositories[name][branch][-1][1]

    def titles(self, name, branch="main"):
        return [title for _, _, title in self.repositories[name][branch]]

    def count(self, method, part):
        return sum(asked == method and part in path for asked, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def _answer(self, method):
        path = unquote(urlparse(self.path).path)
        body = self._body()
        self.hub.requests.append((method, path))
        fault = self.hub.faults(method, path)
        if fault == "cut":
            # A reset rather than a proper end, as when a cable is pulled.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault is not None:
            self._send(fault, {"error": "injected"})
            return
        if not self.headers.get("Authorization") and not path.startswith("/upload/"):
            self._send(401, {"error": "no token"})
            return
        self._send(*self._route(method, path, body))

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(data)

    def _route(self, method, path, body):
        hub = self.hub
        words = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            orgs = [{"name": name, "roleInOrg": role} for name, role in hub.orgs]
            return 200, {"name": hub.user, "orgs": orgs, "auth": {"accessToken": {"role": hub.role}}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or hub.user}/{asked['name']}"
            if name in hub.repositories:
                return 409, {"url": f"{hub.endpoint}/{name}", "error": "it exists"}
            hub.repositories[name] = {"main": [("0" * 40, {}, "initial commit")]}
            hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return 200, {"url": f"{hub.endpoint}/{name}"}
        if words[0] == "upload":
            hub.blobs[words[1]] = body
            assert hashlib.sha256(body).hexdigest() == words[1]
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"objects": [self._lfs(one) for one in json.loads(body)["objects"]], "transfer": "basic"}
        if words[:2] == ["api", "models"]:
            return self._model(method, "/".join(words[2:4]), words[4:], body)
        return 404, {"error": path}

    def _lfs(self, asked):
        if asked["oid"] in self.hub.blobs:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.hub.endpoint}/upload/{asked['oid']}"}}}

    def _model(self, method, name, words, body):
        hub = self.hub
        if name not in hub.repositories:
            return 404, {"error": "no such repository"}
        branches = hub.repositories[name]
        match words:
            case ["refs"]:
                refs = [
                    {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commits[-1][0]}
                    for branch, commits in branches.items()
                ]
                return 200, {"branches": refs, "converts": [], "tags": [], "pullRequests": []}
            case ["branch", branch]:
                if branch in branches:
                    return 409, {"error": "it exists"}
                branches[branch] = list(branches["main"])
                return 200, {}
            case ["preupload", _]:
                files = json.loads(body)["files"]
                large = [one["path"].endswith((".safetensors", ".distcp")) for one in files]
                return 200, {
                    "files": [
                        {"path": one["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
                        for one, is_large in zip(files, large, strict=True)
                    ]
                }
            case ["commit", branch]:
                return self._commit(name, branches[branch], body)
            case [] | ["revision", _]:
                return 200, {"id": name, "sha": branches["main"][-1][0], "siblings": []}
        return 404, {"error": f"{method} {words}"}

    def _commit(self, name, commits, body):
        files, title = dict(commits[-1][1]), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        oid = hashlib.sha1(repr(sorted(files.items())).encode() + title.encode()).hexdigest()
        commits.append((oid, files, title))
        return 200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True}
