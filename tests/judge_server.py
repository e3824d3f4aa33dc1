"""A real HTTP server that speaks OpenAI's chat completions, as a test tells it to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Asked"], "Reply | str"]
FENCED = re.compile(r"<<<(\w+)\n(.*)\n\1>>>", re.DOTALL)


@dataclass
class Asked:
    """One question as it arrived."""

    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][-1]["content"])

    @property
    def fence(self) -> str:
        return FENCED.search(self.prompt)[1]

    @property
    def text(self) -> str:
        """What stands between the fences."""
        return FENCED.search(self.prompt)[2]


@dataclass
class Reply:
    """A raw answer of the server."""

    status: int = 200
    body: bytes = b""
    wait: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class JudgeServer:
    """Where it listens, and what it was asked."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    most_at_once: int = 0


def says(verdict: str, quote: str = "") -> str:
    return json.dumps({"verdict": verdict, "quote": quote})


@contextmanager
def judge_server(answer: Answer) -> Iterator[JudgeServer]:
    """Runs a server that answers each question with what ``answer`` makes of it."""
    server = JudgeServer("")
    lock, busy = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            asked = Asked(json.loads(raw), dict(self.headers))
            with lock:
                server.asked.append(asked)
                busy[0] += 1
                server.most_at_once = max(server.most_at_once, busy[0])
            reply = answer(asked)
            if isinstance(reply, str):
                reply = Reply(body=json.dumps({"choices": [{"message": {"content": reply}}]}).encode())
            time.sleep(reply.wait)
            with lock:
                busy[0] -= 1
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)
            except OSError:
                self.close_connection = True  # the judge's client gave up waiting

        def log_message(self, *args: Any) -> None:
            """Silent."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    server.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
