"""A real HTTP receiver that answers as told: with a status, late, drop by drop, or never."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Receiver:
    """What it got, and how it answers."""

    url: str = ""
    answer: Callable[[Any], int] = lambda _body: 200
    """Status for a body; may take its time."""
    drips: bool = False
    """Its answer comes byte by byte, for ever."""
    hangs: bool = False
    """Takes the request and says nothing until the test is over."""
    date: str | None = None
    """The ``Date`` that it tells; None: its own."""
    got: list[tuple[str, Any]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)


@contextmanager
def receiver() -> Iterator[Receiver]:
    """A server on a free port, until the end of the block."""
    state = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.got.append((self.path, body))
            if state.hangs:
                state.over.wait()
                return
            if state.drips:
                self._drip()
                return
            self.send_response_only(state.answer(body))
            self.send_header("Date", state.date or self.date_time_string())
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _drip(self) -> None:
            while not state.over.wait(0.05):
                try:
                    self.wfile.write(b"H")
                except OSError:
                    return

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- its name in the standard library
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        state.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
