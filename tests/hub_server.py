"""A stand-in for the hub on loopback: it speaks the hub's file protocol, serves folders, and fails on request.

    <root>/models/<owner>/<name>/...      repositories of models
    <root>/datasets/<owner>/<name>/...    repositories of data

As on the hub, weights and tables are large files: `resolve` redirects to where they lie, under the SHA-256 that the
repository's listing states. Only what `huggingface_hub` and `datasets` ask for is answered.
"""

import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem, constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".parquet", "tokenizer.json")
TOKENS = {"hf_licensed": True, "hf_unlicensed": False}  # known ones, and whether their owner accepted the licence
WRONG_TOKEN = "Invalid credentials in Authorization header"


@dataclasses.dataclass
class Fault:
    """What goes wrong on paths that `on` is found in, `times` times.

    An integer is a status, with `headers`. "cut" ends the connection half-way through the file, "spoilt" changes one
    byte of it, "stall" sends nothing at all until the server is closed.
    """

    on: str
    what: int | str
    times: int = 10**9
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """Serves `root`. `gated` repositories give their files only to a token whose owner accepted the licence."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.url = Path(root), f"http://127.0.0.1:{self.server_port}"
        self.faults: list[Fault] = []
        self.gated: set[str] = set()
        self.asked: list[str] = []  # "GET /path" in order
        self.closing, self.lock = threading.Event(), threading.Lock()

    def fault_on(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.on, path):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """A hub of `root` for as long as the block lasts."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


@pytest.fixture
def live_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of <tmp_path>/served that this process takes for the real one: online, logged out, with empty caches."""
    import datasets  # slow

    with serve(tmp_path / "served") as hub:
        for place, name, value in (
            (constants, "ENDPOINT", hub.url),
            (constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
            (constants, "HF_HUB_CACHE", str(tmp_path / "hub")),
            (constants, "HF_TOKEN_PATH", str(tmp_path / "token")),
            (constants, "HF_HUB_OFFLINE", False),
            (datasets.config, "HF_ENDPOINT", hub.url),
            (datasets.config, "HF_HUB_OFFLINE", False),
            (datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets"),
        ):
            monkeypatch.setattr(place, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("SUITE_CACHE", str(tmp_path / "suite"))
        HfFileSystem.clear_instance_cache()
        yield hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def log_message(self, *arguments) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        fault = self.server.fault_on(path)
        if fault is None or fault.what in ("cut", "spoilt"):
            self._route(path, fault and fault.what)
        elif fault.what == "stall":
            self.server.closing.wait()
            self.close_connection = True
        else:
            self._send(fault.what, b"", fault.headers)

    def _route(self, path: str, damage: str | None) -> None:
        if found := re.fullmatch(r"/large/(\w+)/([^/]+/[^/]+)/(.+)", path):
            kind, repo, name = found.groups()
            return self._send(200, (self._folder(kind, repo) / name).read_bytes(), damage=damage)
        if found := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(/.*)?)?", path
        ):
            kind, repo, what, _, below = found.groups()
            return self._describe(self._folder(kind, repo), repo, what, (below or "").strip("/"))
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._resolve("datasets" if found[1] else "models", found[2], found[3], damage)
        self._refuse(404, "RepoNotFound")

    def _folder(self, kind: str, repo: str) -> Path:
        return self.server.root / kind / repo

    def _describe(self, folder: Path, repo: str, what: str | None, below: str) -> None:
        if self._token_refused():
            return
        if not folder.is_dir():
            return self._refuse(401 if self._token() is None else 404, "RepoNotFound")
        if what == "tree" and not (folder / below).is_dir():
            return self._refuse(404, "EntryNotFound")
        if what == "tree":
            return self._json([_entry(folder, path) for path in sorted((folder / below).rglob("*"))])
        if what == "paths-info":
            asked = [folder / path for path in json.loads(self.body)["paths"]]
            return self._json([_entry(folder, path) for path in asked if path.exists()])
        files = [{"rfilename": path.relative_to(folder).as_posix()} for path in _files(folder)]
        self._json({"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": files})

    def _resolve(self, kind: str, repo: str, name: str, damage: str | None) -> None:
        file = self._folder(kind, repo) / name
        if self._token_refused():
            return
        if repo in self.server.gated and not TOKENS.get(self._token(), False):
            return self._refuse(401 if self._token() is None else 403, "GatedRepo")
        if not self._folder(kind, repo).is_dir():
            return self._refuse(401 if self._token() is None else 404, "RepoNotFound")
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": COMMIT})
        content = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_blob_id(content)}"'}
        if not name.endswith(LARGE):
            return self._send(200, content, headers, damage)
        elsewhere = f"http://localhost:{self.server.server_port}"  # another host, so that the library stops there
        place = {"Location": f"{elsewhere}/large/{kind}/{repo}/{name}"}
        sizes = {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", headers | place | sizes)

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _token_refused(self) -> bool:
        wrong = self._token() not in (None, *TOKENS)
        if wrong:
            self._send(401, b"", {"X-Error-Message": WRONG_TOKEN})
        return wrong

    def _refuse(self, status: int, code: str, headers: dict | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

    def _json(self, content) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict | None = None, damage: str | None = None) -> None:
        first, last = self._range(len(content))
        partial = status == 200 and "Range" in self.headers
        if damage == "spoilt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        part = content[first : last + 1] if partial else content
        self.send_response(206 if partial else status)
        span = {"Content-Range": f"bytes {first}-{last}/{len(content)}"} if partial else {}
        for name, value in {"Content-Length": str(len(part)), **span, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part[: len(part) // 2] if damage == "cut" else part)
        self.close_connection |= damage == "cut"

    def _range(self, size: int) -> tuple[int, int]:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        return (int(asked[1]), min(int(asked[2] or size - 1), size - 1)) if asked else (0, size - 1)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, path: Path) -> dict:
    """A file or folder as the listing of a repository has it."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    content = path.read_bytes()
    entry = {"type": "file", "path": name, "oid": _blob_id(content), "size": len(content)}
    large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry | ({"lfs": large} if name.endswith(LARGE) else {})


def _blob_id(content: bytes) -> str:
    """Git's name for this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
