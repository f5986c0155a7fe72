"""A hub on this machine that can be as bad as the real ones: it cuts, lies, refuses and redirects.

Files are served as Hugging Face does it (`/owner/repo/resolve/main/file` redirects to a content host, with the sha256
in `X-Linked-Etag`), as ModelScope does it, and as a plain web server does it (`/plain/file`). A fault answers one GET
of bytes in place of the server; probes (`Range: bytes=0-0`) do not use faults up unless the path is in `fault_probes`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["Handler", bytes], None]


class FakeHub:
    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self.fault_probes: set[str] = set()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.linked = True  # whether the first answer carries size and hash
        self.ranges = True
        self.etags = True
        self.content_host = ""  # where redirects lead; "" is the hub itself
        self.released = threading.Event()  # what a stalled answer waits for
        self.stalled = threading.Event()  # set when an answer stalls
        self.url = ""

    def add(self, name: str, content: bytes) -> str:
        """`name`: owner/repo/file. Returns its hf: source."""
        self.files[name] = content
        return f"hf:{name}"

    def fail(self, name: str, *faults: Fault) -> None:
        self.faults[name].extend(faults)

    def asked(self, part: str) -> list[dict[str, str]]:
        return [headers for path, headers in self.requests if part in path]

    def bodies(self, part: str) -> list[dict[str, str]]:
        """Requests for bytes, without the probes."""
        return [headers for headers in self.asked(part) if headers.get("range") != "bytes=0-0"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *unused: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append((self.path, headers))
        if path.startswith("/api/v1/models/"):
            return self.modelscope_listing(path.removeprefix("/api/v1/models/").removesuffix("/repo/files"))
        if path.startswith("/api/models/"):
            return self.listing(path.removeprefix("/api/models/").partition("/tree/")[0])
        name = path.strip("/").removeprefix("plain/").removeprefix("content/").removeprefix("models/")
        name = name.replace("/resolve/main/", "/").replace("/resolve/master/", "/")
        content = hub.files.get(name)
        probe = headers.get("range") == "bytes=0-0"
        if hub.faults[name] and (not probe or name in hub.fault_probes) and not self.will_redirect(path):
            return hub.faults[name].popleft()(self, content or b"")
        if content is None:
            return self.answer(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
        if self.will_redirect(path):
            return self.redirect(f"{hub.content_host}/content/{name}?signature=secret", content)
        return self.serve(content)

    def will_redirect(self, path: str) -> bool:
        return "/resolve/main/" in path and "/models/" not in path

    def redirect(self, location: str, content: bytes) -> None:
        headers = {"Location": location}
        if self.hub.linked:
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
        self.answer(302, b"", headers)

    def serve(self, content: bytes, *, etag: str | None = None) -> None:
        headers = {"ETag": etag or f'"{hashlib.md5(content).hexdigest()}"'} if self.hub.etags else {}
        asked = self.headers.get("Range")
        match = self.headers.get("If-Range")
        if asked and self.hub.ranges and (match is None or match == headers.get("ETag")):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) if last else len(content) - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self.answer(206, content[start : end + 1], headers)
        return self.answer(200, content, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def listing(self, repository: str) -> None:
        entries = [
            {"type": "file", "path": name.removeprefix(f"{repository}/"), "size": len(content), "oid": "0" * 40}
            for name, content in self.hub.files.items()
            if name.startswith(f"{repository}/")
        ]
        if not entries:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"})
        return self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def modelscope_listing(self, repository: str) -> None:
        files = [
            {
                "Path": name.removeprefix(f"{repository}/"),
                "Type": "blob",
                "Size": len(content),
                "Sha256": hashlib.sha256(content).hexdigest(),
            }
            for name, content in self.hub.files.items()
            if name.startswith(f"{repository}/")
        ]
        self.answer(200, json.dumps({"Code": 200, "Data": {"Files": files}}).encode())


def status(code: int, headers: dict[str, str] | None = None) -> Fault:
    return lambda handler, content: handler.answer(code, b"no", headers)


def cut(after: int) -> Fault:
    """Announces everything from the asked byte on, sends `after` bytes of it and closes."""

    def fault(handler: Handler, content: bytes) -> None:
        start = _start(handler)
        _announce(handler, content, start, len(content) - start)
        handler.wfile.write(content[start : start + after])
        handler.wfile.flush()
        handler.close_connection = True

    return fault


def stall(after: int) -> Fault:
    """Sends some, says that it has, and goes silent until it is released."""

    def fault(handler: Handler, content: bytes) -> None:
        start = _start(handler)
        _announce(handler, content, start, len(content) - start)
        handler.wfile.write(content[start : start + after])
        handler.wfile.flush()
        handler.hub.stalled.set()
        handler.hub.released.wait(60)
        handler.close_connection = True

    return fault


def announce(length: int) -> Fault:
    """The right bytes under a wrong Content-Length."""

    def fault(handler: Handler, content: bytes) -> None:
        handler.answer(200, content[:length], {"Content-Length": str(length), "ETag": '"x"'})
        handler.close_connection = True

    return fault


def serve(content: bytes, *, etag: str | None = None) -> Fault:
    return lambda handler, _: handler.serve(content, etag=etag)


def chunked(content: bytes) -> Fault:
    """Without any length."""

    def fault(handler: Handler, _: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            for at in range(0, len(content), 5000):
                block = content[at : at + 5000]
                handler.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))
            handler.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True

    return fault


def redirect(location: str) -> Fault:
    return lambda handler, _: handler.answer(302, b"", {"Location": location})


def _start(handler: Handler) -> int:
    asked = handler.headers.get("Range", "bytes=0-")
    return int(asked.removeprefix("bytes=").partition("-")[0])


def _announce(handler: Handler, content: bytes, start: int, length: int) -> None:
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(length))
    handler.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    handler.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *unused: Any) -> None:
        """A client that goes away is what these tests are about."""


@contextmanager
def running(hub: FakeHub | None = None, *, host: str = "127.0.0.1") -> Iterator[FakeHub]:
    hub = hub or FakeHub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = _Server((host, 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://{host}:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
