"""A hub on loopback: the endpoints of the Hugging Face hub that push and pull use.

It keeps repositories in memory, takes files inline, and refuses the owner 'locked'.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from urllib.parse import unquote, urlsplit


class Repositories:
    """Name -> list of commits, each a dict of file name -> bytes."""

    def __init__(self):
        self.commits = {}
        self.requests = []

    def files(self, name, revision):
        """The files of a commit, and its sha; None if there is no such thing."""
        commits = self.commits.get(name)
        if not commits:
            return None
        shas = [sha_of(name, number) for number in range(len(commits))]
        if revision in shas:
            return commits[shas.index(revision)], revision
        return (commits[-1], shas[-1]) if revision == "main" else None


def sha_of(name, number):
    return hashlib.sha1(f"{name} {number}".encode()).hexdigest()


@contextlib.contextmanager
def serving():
    """Yields the address and the Repositories."""
    store = Repositories()

    class Handler(_Handler):
        repositories = store

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", store
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            kind, revision = rest[:2] if len(rest) > 1 else ("revision", "main")
            self._describe(name, kind, revision)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "EntryNotFound")

    def do_POST(self):
        path = urlsplit(self.path).path
        parts = path.strip("/").split("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.repositories.requests.append(path)
        if path == "/api/validate-yaml":
            if b"no-such" in body:
                wrong = {"errors": [{"message": "unknown licence"}], "warnings": []}
                return self._send(400, json.dumps(wrong).encode(), {})
            return self._answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name.startswith("locked/"):
                return self._refuse(403, None)
            there = self.repositories.commits.setdefault(name, [])
            there or there.append({".gitattributes": b""})
            return self._answer({"url": f"{self._endpoint()}/{name}"})
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = json.loads(body)["files"]
            regular = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in files
            ]
            return self._answer({"files": regular})
        return self._commit(name, [json.loads(line) for line in body.splitlines()])

    def _commit(self, name, lines):
        commits = self.repositories.commits[name]
        files = dict(commits[-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commits.append(files)
        sha = sha_of(name, len(commits) - 1)
        url = f"{self._endpoint()}/{name}/commit/{sha}"
        self._answer({"commitOid": sha, "commitUrl": url, "success": True})

    def _describe(self, name, kind, revision):
        if name.startswith("locked/"):
            return self._refuse(403, None)
        if name not in self.repositories.commits:
            return self._refuse(404, "RepoNotFound")
        found = self.repositories.files(name, revision)
        if found is None:
            return self._refuse(404, "RevisionNotFound")
        files, sha = found
        if kind == "tree":
            return self._answer(
                [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(data),
                        "oid": _etag(data),
                    }
                    for path, data in files.items()
                ]
            )
        siblings = [{"rfilename": path} for path in files]
        return self._answer({"id": name, "sha": sha, "siblings": siblings})

    def _file(self, name, revision, path):
        found = self.repositories.files(name, revision)
        if found is None or path not in found[0]:
            return self._refuse(404, "EntryNotFound")
        data = found[0][path]
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": found[1]}
        return self._send(200, data, headers)

    def _endpoint(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def _answer(self, value):
        self._send(
            200, json.dumps(value).encode(), {"Content-Type": "application/json"}
        )

    def _refuse(self, status, code):
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status, data, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _etag(data):
    return hashlib.sha1(data).hexdigest()
