"""A real OTLP/HTTP receiver for all three signals, which refuses, hangs or recovers as a test tells it to."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

HANG = 0
"""Instead of a status: the connection stays open, and no answer comes while the receiver lives."""
Behaviour = Callable[[str, int], int]
"""Status for the n-th request (from 0) of a path."""


def well(_path: str, _number: int) -> int:
    return 200


@dataclass
class Receiver:
    """What arrived, that is: was answered with 200."""

    url: str
    spans: list[Any] = field(default_factory=list)
    logs: list[Any] = field(default_factory=list)
    points: dict[str, list[Any]] = field(default_factory=dict)
    """Data points of the newest export, by name of the metric."""
    resources: list[dict[str, str]] = field(default_factory=list)
    requests: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)
    """Path, status and headers of each, also of those that were refused."""
    ending: threading.Event = field(default_factory=threading.Event)

    def take(self, path: str, body: bytes) -> None:
        if path.endswith("/v1/traces"):
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resources.append(attributes(resource.resource))
                self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        elif path.endswith("/v1/logs"):
            for resource in ExportLogsServiceRequest.FromString(body).resource_logs:
                self.logs += [record for scope in resource.scope_logs for record in scope.log_records]
        elif path.endswith("/v1/metrics"):
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
                    data = getattr(metric, metric.WhichOneof("data"))
                    self.points[metric.name] = list(data.data_points)
        else:
            raise AssertionError(path)

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]


def attributes(holder: Any) -> dict[str, Any]:
    """Attributes of a span, record, point or resource as plain values."""
    return {one.key: _value(one.value) for one in holder.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind)


@contextmanager
def receiver(behaviour: Behaviour = well, *, path: str = "") -> Iterator[Receiver]:
    """A receiver on a free port; it lives as long as the block. ``path`` is a prefix of its endpoints."""
    lock, counts = threading.Lock(), dict[str, int]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            with lock:
                number = counts[self.path] = counts.get(self.path, -1) + 1
                status = behaviour(self.path, number)
                found.requests.append((self.path, status, dict(self.headers)))
                if status == 200:
                    found.take(self.path, body)
            if status == HANG:
                found.ending.wait()
                self.close_connection = True
                return
            with suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- its name in the standard library
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found = Receiver(f"http://127.0.0.1:{server.server_port}{path}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found
    finally:
        found.ending.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def receiver_process() -> Iterator[str]:
    """The URL of a receiver in a process of its own, whose work is not on the clock of who measures."""
    command = [sys.executable, "-m", "tests.otlp_receiver"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the receiver has no pipes")
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


if __name__ == "__main__":
    with receiver() as serving:
        print(serving.url, flush=True)
        sys.stdin.read()
