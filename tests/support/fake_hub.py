"""A server on loopback that speaks as much of the Hub's API as an upload and a download need, and
fails where it is told to."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml

TOKEN, USER = "hf_goodTokenForTests", "ann"


class FakeHub(ThreadingHTTPServer):
    """``repos``: commits of each repository, oldest first, as {path: bytes}. ``failures``: status,
    or "cut", by a pattern of "METHOD path"."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.failures: dict[str, int | str] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A connection that was cut on purpose is no news."""

    def files(self, repo):
        return self.repos[repo][-1]

    def commit_id(self, repo, index):
        return hashlib.sha1(f"{repo} {index}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args):
        pass

    def answer(self, status, content=None, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self):
        path = unquote(self.path.partition("?")[0])
        what = f"{self.command} {path}"
        self.server.requests.append(what)
        length = int(self.headers.get("Content-Length") or 0)
        for pattern, failure in self.server.failures.items():
            if re.search(pattern, what):
                if failure == "cut":
                    self.rfile.read(length // 2)
                    self.close_connection = True
                    self.connection.close()
                    return
                self.rfile.read(length)
                self.answer(failure, {"error": "as told"})
                return
        body = self.rfile.read(length)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/lfs/"):
            self.answer(401, {"error": "Invalid username or password."})
            return
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, what)
            if match:
                method(self, body, *match.groups())
                return
        self.answer(404, {"error": what}, X_Error_Code="EntryNotFound")

    do_GET = do_POST = do_PUT = do_HEAD = serve

    def whoami(self, body):
        self.answer(
            200, {"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        )

    def create(self, body):
        wanted = json.loads(body)
        owner = wanted["organization"] or USER
        repo = f"{owner}/{wanted['name']}"
        if owner != USER:
            self.answer(403, {"error": "no right"})
            return
        known = repo in self.server.repos
        self.server.repos.setdefault(repo, [])
        if not known:
            self.server.private[repo] = wanted.get("visibility") == "private"
        self.answer(409 if known else 200, {"url": f"{self.server.endpoint}/{repo}", "error": "exists"})

    def may_write(self, body, repo):
        self.answer(200 if repo.startswith(f"{USER}/") else 403, {})

    def info(self, body, repo):
        if repo in self.server.repos:
            self.answer(
                200, {"id": repo, "sha": self.server.commit_id(repo, len(self.server.repos[repo]) - 1)}
            )
        else:
            self.answer(404, {}, X_Error_Code="RepoNotFound")

    def validate(self, body):
        front = json.loads(body)["content"].split("---")[1]
        errors = [] if isinstance(yaml.safe_load(front), dict) else [{"message": "not a mapping"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body, repo):
        names = [file["path"] for file in json.loads(body)["files"]]
        large = (".safetensors", ".png")
        self.answer(
            200,
            {
                "files": [
                    {
                        "path": n,
                        "uploadMode": "lfs" if n.endswith(large) else "regular",
                        "shouldIgnore": False,
                    }
                    for n in names
                ]
            },
        )

    def batch(self, body, repo):
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body, oid):
        self.server.blobs[oid] = body
        self.answer(200 if hashlib.sha256(body).hexdigest() == oid else 400, {})

    def commit(self, body, repo):
        files = dict(self.server.repos[repo][-1]) if self.server.repos[repo] else {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        self.server.repos[repo].append(files)
        oid = self.server.commit_id(repo, len(self.server.repos[repo]) - 1)
        self.answer(200, {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{oid}", "commitOid": oid})

    def tree(self, body, repo, revision, path):
        ids = [self.server.commit_id(repo, index) for index in range(len(self.server.repos[repo]))]
        files = self.server.repos[repo][ids.index(revision)]
        found = [name for name in files if name.rpartition("/")[0] == path]
        if not found:
            self.answer(404, {}, X_Error_Code="EntryNotFound")
            return
        self.answer(200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in found])

    def resolve(self, body, repo, revision, path):
        commits = self.server.repos.get(repo)
        if not commits:
            self.answer(404, {}, X_Error_Code="RepoNotFound")
            return
        ids = [self.server.commit_id(repo, index) for index in range(len(commits))]
        if revision != "main" and revision not in ids:
            self.answer(404, {}, X_Error_Code="RevisionNotFound")
            return
        index = len(commits) - 1 if revision == "main" else ids.index(revision)
        content = commits[index].get(path)
        if content is None:
            self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=ids[index])
            return
        self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=ids[index])


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (rf"GET /api/models/{_REPO}/auth-check/write", Handler.may_write),
    (rf"GET /api/models/{_REPO}", Handler.info),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{_REPO}/preupload/main", Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(\w+)", Handler.put),
    (rf"POST /api/models/{_REPO}/commit/main", Handler.commit),
    (rf"GET /api/models/{_REPO}/tree/(\w+)/(.+)", Handler.tree),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(\w+)/(.+)", Handler.resolve),
]


@contextmanager
def running():
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
