"""A chat endpoint on this machine whose answers a test chooses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Endpoint:
    """What came in, and where."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    """Lets an answer that hangs go on."""


Reply = Callable[[dict[str, Any], Endpoint], tuple[int, str | dict[str, Any]]]
"""(request, endpoint) -> (status, body)"""


def says(text: str | None, **message: Any) -> dict[str, Any]:
    """A chat completion with this content."""
    return {"choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}]}


@contextmanager
def endpoint(reply: Reply) -> Iterator[Endpoint]:
    """Serve until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802 - http.server's name
            there.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            there.headers.append({"path": self.path, **dict(self.headers)})
            status, body = reply(there.bodies[-1], there)
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client did not wait

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there = Endpoint(url=f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield there
    finally:
        there.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
