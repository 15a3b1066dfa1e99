"""A Hub on the loopback for the real client: serve folders as repositories, with faults on demand.

The server also accepts uploads from a client without Xet. Small files are part of the commit. LFS files are uploaded
before the commit and referred to by checksum.
"""

import base64
import functools
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

HUGE_BYTES = 10**13
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serve `root/<org>/<repo>/...` as the model repositories of a Hub, all at one commit.

    Attributes:
        url: Endpoint, the value of HF_ENDPOINT.
        requests: All requests in order, as "METHOD path".
        faults: Faults by a part of "METHOD path". A number is an HTTP status, optionally with an X-Error-Code after a
            colon ("403:GatedRepo"). "half" sends half of the body, "flip" changes one bit, "wrong" sends an HTML
            page instead, "slow" waits a second, "hang" never responds, "loop" redirects to the same address, "endless"
            sends more than the listed size without an end, "huge" states a size of 10 TB.
        refs: Commits by branch or tag.
        lfs: File endings stored in LFS, with a SHA-256. Other files have git's checksum.
        lists_checksums: Whether a repository's info has sizes and checksums. Its tree always has them.
        token: Token that a client needs for writing.
        commits: Message and paths of every accepted commit.
        objects: LFS objects by checksum.
    """

    def __init__(self, root: Path, commit: str = COMMIT) -> None:
        self.root, self.commit = root, commit
        self.requests: list[str] = []
        self.faults: dict[str, str | int] = {}
        self.refs = {"main": commit}
        self.lfs: tuple[str, ...] = (".pth", ".safetensors")
        self.lists_checksums = True
        self.token = "hf_writer"
        self.commits: list[tuple[str, list[str]]] = []
        self.objects: dict[str, bytes] = {}
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def requests_with(self, part: str) -> list[str]:
        """Return the requests that have `part` in their "METHOD path"."""
        return [request for request in self.requests if part in request]

    def files(self, repo: str) -> Iterator[dict[str, Any]]:
        """Yield the listing of each file."""
        for path in sorted(p for p in (self.root / repo).rglob("*") if p.is_file()):
            state = path.stat()
            blob, sha256 = _checksums(path, state.st_size, state.st_mtime_ns)
            file = {"path": path.relative_to(self.root / repo).as_posix(), "size": state.st_size, "oid": blob}
            if path.suffix in self.lfs:
                file["lfs"] = {"oid": sha256, "size": state.st_size, "pointerSize": 134}
            yield file


@functools.cache
def _checksums(path: Path, size: int, modified_ns: int) -> tuple[str, str]:
    """Return git's checksum and the SHA-256 of a file, once for each state of a file: large files take long."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % size + content).hexdigest(), hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_GET(self) -> None:
        self.respond()

    def do_HEAD(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        self.respond()

    def do_PUT(self) -> None:
        self.respond()

    def log_message(self, *_: object) -> None:
        pass

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = str(next((fault for part, fault in self.hub.faults.items() if part in request), ""))
        if fault == "hang":
            self.hub.closing.wait(60)
        elif fault == "loop":
            self.redirect(path)
        elif fault[:1].isdigit():
            self.refuse(*fault.split(":"))
        else:
            time.sleep(1 if fault == "slow" else 0)
            if self.command in ("POST", "PUT"):
                self.write(path, self.body())
            else:
                self.route(path, fault)

    def route(self, path: str, fault: str) -> None:
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?", path)
        match = match or re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path)
        if match is None:
            return self.refuse("404")
        repo, kind, revision, folder = match.groups()
        commit = self.hub.refs.get(revision or "main", revision)
        if not (self.hub.root / repo).is_dir():
            return self.refuse("404", "RepoNotFound")
        if commit not in {self.hub.commit, *self.hub.refs.values()}:
            return self.refuse("404", "RevisionNotFound")
        if kind == "resolve":
            return self.send_file(repo, str(commit), str(folder), fault)
        files = list(self.hub.files(repo))
        if kind == "tree":
            inside = [f for f in files if f["path"].rpartition("/")[0] == (folder or "")]
            if not inside:
                return self.refuse("404", "EntryNotFound")
            return self.send(json.dumps([{"type": "file", **f} for f in inside]).encode(), fault)
        siblings = [{"rfilename": f["path"], "size": f["size"], "blobId": f["oid"]} for f in files]
        if fault == "huge":
            siblings = [sibling | {"size": HUGE_BYTES} for sibling in siblings]
        for sibling, f in zip(siblings, files, strict=True):
            if not self.hub.lists_checksums:
                del sibling["size"], sibling["blobId"]
            elif lfs := f.get("lfs"):
                sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        info = {"id": repo, "sha": commit, "private": False, "tags": [], "downloads": 0, "siblings": siblings}
        return self.send(json.dumps(info).encode(), fault)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def write(self, path: str, body: bytes) -> None:
        """Respond to the steps of an upload."""
        hub = self.hub
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})(/verify)?", path):  # a signed address needs no token
            if not match[2]:
                hub.objects[match[1]] = body
            content = hub.objects.get(match[1])
            is_valid = content is not None and hashlib.sha256(content).hexdigest() == match[1]
            return self.send(b"{}", "") if is_valid else self.refuse("400")
        if path == "/api/validate-yaml":
            is_valid = json.loads(body)["content"].startswith("---\n")
            return self.send_json({"errors": [], "warnings": [] if is_valid else [{"message": "no metadata"}]})
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.refuse("403" if "Authorization" in self.headers else "401")
        if path == "/api/repos/create":
            created = json.loads(body)
            folder = hub.root / created["organization"] / created["name"]
            exists = folder.is_dir()
            folder.mkdir(parents=True, exist_ok=True)
            return self.send_json(
                {"url": f"{hub.url}/{created['organization']}/{created['name']}"}, 409 if exists else 200
            )
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.send_json(
                {"transfer": "basic", "objects": list(map(self.lfs_action, json.loads(body)["objects"]))}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            stored = {file["path"]: file for file in hub.files(match[1])}
            if match[2] == "preupload":
                return self.send_json(
                    {"files": [self.upload_mode(file["path"], stored) for file in json.loads(body)["files"]]}
                )
            return self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        return self.refuse("404")

    def upload_mode(self, path: str, stored: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return how to upload a file, and the checksum of its present content."""
        mode = "lfs" if path.endswith(self.hub.lfs) else "regular"
        checksum = stored[path].get("lfs", stored[path])["oid"] if path in stored else None
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": checksum}

    def lfs_action(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return where to upload an object, unless it is stored already."""
        if request["oid"] in self.hub.objects:
            return request
        href = f"{self.hub.url}/lfs/{request['oid']}"
        return request | {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        header, *operations = lines
        parent = header["value"].get("parentCommit", self.hub.refs["main"])
        if parent != self.hub.refs["main"]:
            return self.refuse("412")
        for operation in operations:
            value = operation["value"]
            path = self.hub.root / repo / value["path"]
            if operation["key"] == "deletedFile":
                path.unlink()
            elif operation["key"] == "lfsFile":
                path.write_bytes(self.hub.objects[value["oid"]])
            else:
                path.write_bytes(base64.b64decode(value["content"]))
        self.hub.commits.append((header["value"]["summary"], sorted(o["value"]["path"] for o in operations)))
        commit = hashlib.sha1(f"{parent} {repo}".encode()).hexdigest()
        self.hub.refs["main"] = commit
        return self.send_json(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"}
        )

    def send_json(self, data: Any, status: int = 200) -> None:
        self.send(json.dumps(data).encode(), "", status=status)

    def send_file(self, repo: str, commit: str, name: str, fault: str) -> None:
        file = next((f for f in self.hub.files(repo) if f["path"] == name), None)
        if file is None:
            return self.refuse("404", "EntryNotFound")
        etag = file["lfs"]["oid"] if "lfs" in file else file["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if "lfs" in file:
            headers |= {"X-Linked-Size": str(file["size"]), "X-Linked-ETag": f'"{etag}"'}
        return self.send((self.hub.root / repo / name).read_bytes(), fault, headers)

    def send(self, body: bytes, fault: str, headers: dict[str, str] | None = None, status: int = 200) -> None:
        headers, total = headers or {}, len(body)
        if fault == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif fault == "wrong":
            body = b"<html>Please log in to this network.</html>"
        length = HUGE_BYTES if fault in ("endless", "huge") else len(body)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or length - 1)
            body, status = body[start : end + 1], 206
            headers, length = headers | {"Content-Range": f"bytes {start}-{end}/{total}"}, len(body)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if fault == "half" else body)
            with suppress(ConnectionError):  # the client closes the connection
                while fault == "endless" and not self.hub.closing.is_set():
                    self.wfile.write(bytes(1 << 20))

    def redirect(self, path: str) -> None:
        self.send_response(302)
        self.send_header("Location", path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def refuse(self, status: str, code: str = "") -> None:
        self.send_response(int(status))
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
