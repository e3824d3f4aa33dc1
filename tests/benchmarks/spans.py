"""What ``NLASpanProcessor`` costs: the host's time for each span, and for each forward that asks whose it is.

Spans without any work inside, as an agent step of two (agent and model call); the least of several rounds, because what
else the machine does only adds. The forward's part is what the tap asks in the host's thread, without the model.

    python -m tests.benchmarks.spans --json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from nla_monitor_opentelemetry import NLASpanProcessor
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import Tracer

from tests.agents_support import CaptureMonitor
from tests.langchain_support import byte_tokenizer, tiny_llama

AGENT = {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "clerk"}
CHAT = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "tiny"}
ROUNDS = 5


def tracer_with(*processors: SpanProcessor) -> Tracer:
    """A tracer whose spans go to these processors only."""
    provider = TracerProvider(shutdown_on_exit=False)
    for processor in processors:
        provider.add_span_processor(processor)
    return provider.get_tracer("benchmark")


def least(work: Callable[[int], None], count: int) -> float:
    """Microseconds for one of ``count``, the least of the rounds."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work(count)
        times.append((time.perf_counter() - started) / count * 1e6)
    return round(min(times), 2)


def spans(tracer: Tracer) -> Callable[[int], None]:
    """Pairs of spans, an agent's and its model call's."""

    def work(count: int) -> None:
        for _ in range(count // 2):
            with (
                tracer.start_as_current_span("agent", attributes=AGENT),
                tracer.start_as_current_span("chat", attributes=CHAT),
            ):
                pass

    return work


def measure(count: int) -> dict[str, Any]:
    """All figures, in microseconds."""
    with CaptureMonitor(tiny_llama(), byte_tokenizer()) as monitor:
        sessions = monitor.capture.sessions

        def ask(count: int) -> None:
            for _ in range(count):
                _ = sessions.view

        before = least(ask, count)
        watched = tracer_with(NLASpanProcessor(monitor))
        without, with_it = least(spans(tracer_with()), count), least(spans(watched), count)
        outside = least(ask, count)
        with (
            watched.start_as_current_span("agent", attributes=AGENT),
            watched.start_as_current_span("chat", attributes=CHAT),
        ):
            inside = least(ask, count)
        faults = monitor.guard.faults
    return {
        "span_us": {"without": without, "with": with_it},
        "per_event_us": round((with_it - without) / 2, 2),
        "forward_us": {"without": before, "outside_spans": outside, "inside_a_call": inside},
        "faults": faults,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit code 1 if a fault of ours was swallowed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--count", type=int, default=10_000, help="spans, and forwards, in a round")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result = measure(options.count)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:16} {value}")
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
