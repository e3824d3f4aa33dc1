"""Rules over stored explanations: how long a replay of many rules over many readings takes, and what one rule costs.

A real SQLite store is filled with readings of a made-up training run (``rules_data``), most of them different, about
one in fifty with words that some rule looks for. The replay goes through the product's own ``replay``: columns from the
store, prefilter, selections, CEL conditions, windows, alerts. Filling is not timed.

    python -m tests.benchmarks.rules --json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from nla_monitor.records import Reading
from nla_monitor.replay import replay
from nla_monitor.rules import RuleSet
from nla_monitor.store.codec import reading_row, sample_row
from nla_monitor.store.engine import open_engine, write
from nla_monitor.store.models import ReadingRow, SampleRow
from nla_monitor.store.session import upgrade
from nla_monitor.store.stream import stream_readings
from tests.benchmarks.rules_data import explanations, make_rules, readings

RUN = "benchmark"
_PAGE = 2_000
_SINGLE = 4_000
_KINDS = ("keywords", "regex", "cel", "both", "numeric")


def main() -> int:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--explanations", type=int, default=100_000)
    parser.add_argument("--rules", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2, help="of the replay, its own included")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.explanations, options.rules, options.processes)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{key}: {value}\n" for key, value in found.items())
    return 0


def measure(count: int, rule_count: int, processes: int) -> dict[str, Any]:
    """All figures. The replay runs in a process of its own, so that its memory is not that of the filling."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'rules.db'}"
        texts = fill(url, count, rule_count)
        with ProcessPoolExecutor(1) as pool:
            figures = pool.submit(timed, url, rule_count, processes).result()
    return {
        **figures,
        "explanations": count,
        "distinct_explanations": texts,
        "rules": rule_count,
        "processes": processes,
        "single_rule": single_rules(min(count, _SINGLE), rule_count),
        "machine": machine(),
    }


def fill(url: str, count: int, rule_count: int) -> int:
    """Store the readings; returns how many different explanations they have."""
    engine = open_engine(url)
    upgrade(engine)
    seen: set[int] = set()
    made = readings(explanations(count, make_rules(rule_count)), RUN)
    for start, page in enumerate(_pages(made)):
        seen.update(hash(reading.explanation.text) for reading in page)
        places = range(start * _PAGE, start * _PAGE + len(page))
        rows = [reading_row(one) | {"seq": at, "created_at": 0.0} for at, one in zip(places, page, strict=True)]
        with write(engine) as connection:
            connection.execute(insert(SampleRow), [sample_row(reading.sample) for reading in page])
            connection.execute(insert(ReadingRow), rows)
    engine.dispose()
    return len(seen)


def _pages(made: Iterator[Reading]) -> Iterator[list[Reading]]:
    while page := list(islice(made, _PAGE)):
        yield page


def timed(url: str, rule_count: int, processes: int) -> dict[str, Any]:
    """The replay, end to end; then loading alone, to tell where the time goes."""
    engine = open_engine(url, read_only=True)
    rules = make_rules(rule_count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, worked = time.perf_counter(), time.process_time()
    result = replay(rules, engine, processes=processes)
    seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    loaded = sum(len(page) for page in stream_readings(engine, vectors=False))
    load = time.perf_counter() - started
    if loaded != result.readings:
        raise RuntimeError(f"{loaded} readings were loaded, {result.readings} replayed")
    matching = len({match.sample_id for match in result.matches})
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "load_seconds": round(load, 3),
        "evaluate_seconds": round(seconds - load, 3),
        "peak_memory_mb": round(peak / 1024, 1),
        "memory_before_mb": round(before / 1024, 1),
        "matches": len(result.matches),
        "matching_explanations": matching,
        "alerts": len(result.alerts),
    }


def single_rules(count: int, rule_count: int) -> dict[str, float]:
    """Microseconds per explanation of one rule alone, by kind, median over the rules of the kind, in memory."""
    rules = make_rules(rule_count)
    page = list(readings(explanations(count, rules, seed=1), RUN, seed=1))
    found: dict[str, list[float]] = {f"{kind}_us": [] for kind in _KINDS}
    found["pack_us"] = []
    for rule in rules.rules:
        kind = rule.id.partition("-")[0]
        costs = found[f"{kind}_us" if kind in _KINDS else "pack_us"]
        if len(costs) < 5:
            costs.append(_cost(RuleSet([rule]), page))
    return {kind: round(sorted(costs)[len(costs) // 2], 2) for kind, costs in found.items() if costs}


def _cost(rule: RuleSet, page: Sequence[Reading]) -> float:
    rule.evaluate(page[:1])  # compiles the screens
    started = time.perf_counter()
    rule.evaluate(page)
    return (time.perf_counter() - started) / len(page) * 1e6


def machine() -> str:
    """What the figures were measured on."""
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}, load {load:.1f}"


if __name__ == "__main__":
    sys.exit(main())
