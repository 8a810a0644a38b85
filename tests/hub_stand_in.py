"""A stand-in of the Hugging Face hub: what it answers when `huggingface_hub` asks for files or sends some."""

import base64
import hashlib
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repositories, and what happened. Large files (weights) are redirected to another host, as the hub does it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.commits: dict[tuple[str, str], Files] = {}
        """Files by repository and commit."""
        self.names: dict[tuple[str, str], str] = {}
        """Commits by repository and branch or tag."""
        self.errors: dict[str, tuple[int, dict[str, str]]] = {}
        """Status and headers with which a repository refuses."""
        self.broken: Callable[[bytes], bytes] = bytes
        """What becomes of stored files on their way, after their length was told."""
        self.private: dict[str, bool] = {}
        """Whether a repository that was made here is private."""
        self.uploaded: dict[str, bytes] = {}
        """Large files by sha256, before they are committed."""
        self.tokens: set[str] = set()
        """What requests that write were authorised by."""
        self.requests: list[str] = []
        self.agents: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def push(self, name: str, files: Files, branch: str = "main") -> str:
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        self.commits[name, commit] = files
        self.names[name, branch] = self.names[name, commit] = commit
        return commit

    def asked(self) -> list[str]:
        """Return the names of the files that were asked for since the last time, each once, in order."""
        files = [request.rsplit("/", 1)[1] for request in self.requests if "/resolve/" in request]
        self.requests.clear()
        return list(dict.fromkeys(files))


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.agents.add(self.headers["User-Agent"])
        if self.path.startswith("/stored/"):
            every = [content for files in self.server.commits.values() for content in files.values()]
            content = next(item for item in every if hashlib.sha256(item).hexdigest() == self.path.split("/")[-1])
            return self.reply(200, {}, content, self.server.broken(content))
        if self.path.startswith("/api/models/"):
            return self.tell_of(self.path.removeprefix("/api/models/"))
        name, _, rest = self.path[1:].partition("/resolve/")
        revision, _, file = rest.partition("/")
        if name in self.server.errors:
            return self.reply(*self.server.errors[name], b"")
        if not any(name == known for known, _ in self.server.names):
            return self.reply(404, {"X-Error-Code": "RepoNotFound"}, b"")
        commit = self.server.names.get((name, revision))
        if commit is None:
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        files = self.server.commits[name, commit]
        if file not in files:
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"")
        content = files[file]
        if file.endswith(".json"):
            git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            return self.reply(200, {"X-Repo-Commit": commit, "ETag": f'"{git}"'}, content)
        sha256 = hashlib.sha256(content).hexdigest()
        self.reply(
            302,
            {
                "X-Repo-Commit": commit,
                "X-Linked-ETag": f'"{sha256}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"http://localhost:{self.server.server_port}/stored/{sha256}",
            },
            b"",
        )

    do_HEAD = do_GET

    def tell_of(self, name: str) -> None:
        if name in self.server.errors:
            return self.reply(*self.server.errors[name], b"")
        if name not in self.server.private:
            return self.reply(404, {"X-Error-Code": "RepoNotFound"}, b"")
        self.say({"id": name, "private": self.server.private[name], "siblings": []})

    def do_POST(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.tokens.add(self.headers.get("Authorization", ""))
        lines = self.rfile.read(int(self.headers["Content-Length"])).decode().splitlines()
        rows = [json.loads(line) for line in lines]
        url, api = self.server.url, "/api/models/"
        if self.path == "/api/repos/create":
            name = f"{rows[0]['organization']}/{rows[0]['name']}"
            if name in self.server.errors:
                return self.reply(*self.server.errors[name], b"{}")
            self.server.private[name] = rows[0]["visibility"] == "private"
            self.say({"url": f"{url}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self.say({})
        elif self.path.endswith("/preupload/main"):
            large = (".safetensors", ".bin")
            modes = {file["path"]: "lfs" if file["path"].endswith(large) else "regular" for file in rows[0]["files"]}
            self.say({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [o | {"actions": {"upload": {"href": f"{url}/upload/{o['oid']}"}}} for o in rows[0]["objects"]]
            self.say({"transfer": "basic", "objects": objects})
        elif self.path.endswith("/commit/main"):
            name = self.path.removeprefix(api).removesuffix("/commit/main")
            commit = self.server.push(name, dict(self.committed(row["key"], row["value"]) for row in rows[1:]))
            self.say({"commitUrl": f"{url}/{name}/commit/{commit}", "commitOid": commit})

    def committed(self, key: str, value: dict[str, str]) -> tuple[str, bytes]:
        if key == "lfsFile":
            return value["path"], self.server.uploaded[value["oid"]]
        return value["path"], base64.b64decode(value["content"])

    def do_PUT(self) -> None:
        content = b""
        if "Content-Length" in self.headers:
            content = self.rfile.read(int(self.headers["Content-Length"]))
        while "Content-Length" not in self.headers and (size := int(self.rfile.readline(), 16)):  # in chunks
            content += self.rfile.read(size)
            self.rfile.readline()
        self.server.uploaded[hashlib.sha256(content).hexdigest()] = content
        self.reply(200, {}, b"")

    def say(self, document: object) -> None:
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    def reply(self, status: int, headers: dict[str, str], content: bytes, sent: bytes | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if sent is None else sent)

    def log_message(self, format: str, *args: object) -> None:
        pass
