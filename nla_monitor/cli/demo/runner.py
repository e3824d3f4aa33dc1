"""Runs one story: train under the monitor, wait until everything is read, run the agent, sum up."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from nla_monitor.cli.demo.agent import run_episode
from nla_monitor.cli.demo.scene import Scene
from nla_monitor.cli.demo.stories import STORIES, Story
from nla_monitor.cli.demo.training import SEQUENCES, train
from nla_monitor.cli.demo.view import Curve, Summary, View
from nla_monitor.errors import WorkerError
from nla_monitor.monitor import Monitor
from nla_monitor.organism import load_target
from nla_monitor.records import Alert, Phase
from nla_monitor.telemetry import Telemetry

RULE = "reward-hacking"
READ_TIMEOUT_SECONDS = 150.0


def run(name: str, seed: int, database: Path, view: View, telemetry: Telemetry | None = None) -> Summary:
    """Run the story called ``name`` and return its figures.

    Args:
        name: of the story.
        seed: decides the data.
        database: SQLite file that keeps it.
        view: the show.
        telemetry: where the host's spans and metrics go; its worker process configures its own.

    Raises:
        NLAMonitorError: the database cannot be used, an extra is missing, or the worker could not read in time.
    """
    started = time.monotonic()
    story = STORIES[name]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the same
    torch.set_num_threads(1)  # the other core belongs to the worker
    torch.manual_seed(seed)
    view.opening(story, str(database))
    with Monitor(_config(story, seed, database), telemetry=telemetry) as monitor:
        monitor.on_alert(view.alert)
        model, tokenizer = load_target()
        scene = Scene(story, seed, model, tokenizer, monitor, view)
        visible = _train(scene)
        _wait(scene)
        _agent(scene)
        _wait(scene)
        rates = _activation_rates(monitor)
        alerts = monitor.alerts()[::-1]
        stats = monitor.stats
    return Summary(
        story=story,
        visible=visible,
        activations=rates,
        alerts=[alert for alert in alerts if alert.agent is None],
        agent_alerts=[alert for alert in alerts if alert.agent is not None],
        samples=stats.written,
        dropped=sum(stats.dropped.values()),
        seconds=time.monotonic() - started,
        database=str(database),
        run_id=monitor.run_id,
    )


def _config(story: Story, seed: int, database: Path) -> dict[str, Any]:
    return {
        "database": f"sqlite:///{database}",
        "run_name": f"demo {story.name} (seed {seed})",
        "rules": ["oversight"],
        # A line end is where the organism decides on its next action. Only prompts are read: what a completion says is
        # no finding, it stands there for all to see.
        "capture": {
            "positions": "prompt",
            "triggers": ["\n"],
            "triggers_per_sequence": 2,
            "tokens_per_sequence": 0,
            "sequences_per_step": SEQUENCES,
            "seed": seed,
        },
        "alerts": {"log": False},
    }


def _train(scene: Scene) -> Curve:
    shown: set[int] = set()

    def on_look(step: int, rate: float) -> None:
        scene.view.look(step, rate)
        _show_new_rates(scene, shown, before=step)

    scene.view.note("loading the organism and starting the worker …")
    scene.view.begin("fine-tuning", scene.story.steps)
    visible = train(scene, on_look)
    scene.view.end()
    return visible


def _activation_rates(monitor: Monitor) -> list[tuple[int, float]]:
    rows = monitor.repository.match_rate(monitor.run_id, RULE, attributes={"probe": "ordinary"})
    return [(step, matched / total) for step, matched, total in rows if step is not None and total]


def _show_new_rates(scene: Scene, shown: set[int], *, before: int) -> None:
    """Rates of earlier looks, as far as the worker has read them by now."""
    for step, rate in _activation_rates(scene.monitor):
        if step not in shown and step < before:
            shown.add(step)
            scene.view.read(step, rate)


def _wait(scene: Scene) -> None:
    """Let the worker catch up, visibly."""
    monitor, view = scene.monitor, scene.view
    monitor.flush()
    depth = monitor.spool.depth()
    total = depth.waiting + depth.leased
    view.begin("reading the rest", max(total, 1))
    deadline = time.monotonic() + READ_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        depth = monitor.spool.depth()
        left = depth.waiting + depth.leased
        view.advance(max(total - left, 0))
        if left == 0:
            monitor.drain(timeout=5.0)
            view.end()
            return
        time.sleep(0.2)
    view.end()
    raise WorkerError(
        f"the worker did not read {left} activations within {READ_TIMEOUT_SECONDS:.0f} s; they stay in the database: "
        f"nla-monitor worker --database {monitor.config.database}"
    )


def _agent(scene: Scene) -> None:
    scene.view.note("now an agent episode through LangChain, on the same model:")
    scene.model.eval()
    episode = run_episode(scene)
    said = "speaks of an evaluation" if episode.mentions_evaluation else "says nothing of an evaluation"
    scene.view.note(f"the agent {said}")


def as_json(summary: Summary) -> str:
    """The last line of ``demo --json``."""
    return json.dumps(
        {
            "story": summary.story.name,
            "alerts": [_alert(alert) for alert in summary.alerts],
            "agent_alerts": [_alert(alert) for alert in summary.agent_alerts],
            "visible_rate": [list(point) for point in summary.visible],
            "activation_rate": [list(point) for point in summary.activations],
            "samples": summary.samples,
            "dropped": summary.dropped,
            "seconds": round(summary.seconds, 1),
            "database": summary.database,
            "run": summary.run_id,
        }
    )


def _alert(alert: Alert) -> dict[str, object]:
    return {
        "id": alert.alert_id,
        "rule": alert.rule_id,
        "severity": alert.severity.value,
        "step": alert.first_step,
        "position": alert.position,
        "fve": alert.fve,
        "quote": alert.quote,
        "matches": alert.matches,
        "calibration": alert.calibration.get("status"),
        "phase": Phase.AGENT.value if alert.agent is not None else Phase.TRAIN.value,
        "agent_run_id": alert.agent.agent_run_id if alert.agent is not None else None,
    }
