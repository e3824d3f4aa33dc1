"""Every bad input of the issue as users meet it: one clear line and an exit code, or a degradation that is counted.

No traceback, and training goes on with the same losses, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sqlalchemy import event

from nla_monitor import Monitor, NLAMonitorCallback
from nla_monitor.cli.app import app
from nla_monitor.errors import AttachError, ConfigError, NLAMonitorError, SidecarError, StoreError
from nla_monitor.organism import load_target, paths
from tests.cli_support import fill
from tests.integration.training import train
from tests.store_support import new_database

NLA_MONITOR = str(Path(sys.executable).parent / "nla-monitor")
ROOT = Path(__file__).parents[2]
CAPTURE = {"positions": "prompt", "triggers": ["\n"], "tokens_per_sequence": 1, "sequences_per_step": 4}
ONE_RULE = """
title: Plans to hack
id: my-rule
severity: high
detection:
  words: [hack]
  condition: words
tests:
  positive: [hack]
  negative: [fix]
"""


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NLA_MONITOR_")}
    return subprocess.run(
        [NLA_MONITOR, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=240,
        check=False,
    )


def assert_refused(done: Any, code: int, *words: str) -> None:
    """One line of ours that holds the words, and the exit code that the help promises."""
    text = done.stderr
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("nla-monitor: ")]
    assert lines, text
    for word in words:
        assert word in text, text
    assert done.returncode == code, text


# -- checkpoints ---------------------------------------------------------------------------------------------------


def copied(folder: Path, role: str) -> Path:
    target = folder / role
    shutil.copytree(getattr(paths("planted"), role), target)
    return target


def sidecar(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "nla_meta.yaml"
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")


def split_marker(folder: Path) -> None:
    """A tokenizer that never heard of the marker."""
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "㈎"]
    data["model"]["vocab"].pop("㈎", None)
    file.write_text(json.dumps(data), encoding="utf-8")


def spoil_head(folder: Path) -> None:
    file = folder / "value_head.safetensors"
    tensors = load_file(file)
    tensors["weight"][7, 3] = float("nan")
    save_file(tensors, file)


def field(**changes: Any) -> Callable[[Path], object]:
    """A sidecar with other values at its top."""
    return lambda folder: sidecar(folder, lambda data: data.update(changes))


def token(**changes: Any) -> Callable[[Path], object]:
    """A sidecar with other values among its tokens; None takes one away."""

    def change(data: dict[str, Any]) -> None:
        data["tokens"] = {key: value for key, value in (data["tokens"] | changes).items() if value is not None}

    return lambda folder: sidecar(folder, change)


def gone(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


LAYER_1 = field(extraction_layer_index=1, critic={"extraction_layer_index": 1})
LAYER_9 = field(extraction_layer_index=9, critic={"extraction_layer_index": 9})
CHECKPOINTS: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "no-sidecar": ("av", gone("nla_meta.yaml"), ["nla_meta.yaml"]),
    "field-missing": ("av", token(injection_token_id=None), ["injection_token_id"]),
    "field-wrong": ("av", field(d_model="wide"), ["d_model", "wide"]),
    "not-yaml": ("av", lambda folder: (folder / "nla_meta.yaml").write_text("a: ["), ["nla_meta.yaml"]),
    "marker-id": ("av", token(injection_token_id=5), ["5"]),
    "marker-split": ("av", split_marker, ["㈎"]),
    "width": ("av", field(d_model=64), ["64", "128"]),
    "wrong-role": ("av", field(role="ar"), ["role"]),
    "head-nan": ("ar", spoil_head, ["value_head.safetensors", "NaN"]),
    "head-missing": ("ar", gone("value_head.safetensors"), ["value_head.safetensors"]),
    "weights-cut": ("av", lambda folder: os.truncate(folder / "model.safetensors", 5000), ["cannot be loaded"]),
    "other-layer": ("ar", LAYER_1, ["1"]),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_by_the_worker(tmp_path: Path, name: str) -> None:
    """Exit code 2, and one line that names what is wrong."""
    from typer.testing import CliRunner

    role, spoil, words = CHECKPOINTS[name]
    spoil(copied(tmp_path, role))
    result = CliRunner().invoke(
        app, ["worker", "--once", "--database", str(tmp_path / "w.db"), f"--{role}", str(tmp_path / role)]
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("nla-monitor: ")]
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    "name", ["no-sidecar", "field-missing", "field-wrong", "not-yaml", "wrong-role", "other-layer"]
)
def test_a_bad_sidecar_is_refused_before_training(tmp_path: Path, name: str) -> None:
    role, spoil, words = CHECKPOINTS[name]
    spoil(copied(tmp_path, role))
    with pytest.raises(NLAMonitorError) as caught:
        NLAMonitorCallback(database=str(tmp_path / "m.db"), **{role: str(tmp_path / role)})
    assert isinstance(caught.value, SidecarError | ConfigError)
    assert all(word in str(caught.value) for word in words)


def test_a_bad_checkpoint_is_one_line_of_the_real_command(tmp_path: Path) -> None:
    spoil_head(copied(tmp_path, "ar"))
    done = command("worker", "--once", "--ar", tmp_path / "ar", cwd=tmp_path)
    assert_refused(done, 2, "value_head.safetensors", "NaN")


# -- config and rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("capture:\n  tokens_per_sequnce: 3\n", ["capture.tokens_per_sequnce", "tokens_per_sequence"]),
        ("wroker: {}\n", ["wroker", "worker"]),
        ("nla: {batch_size: 0}\n", ["nla.batch_size", "0"]),
        ("nla: {batch_size: many}\n", ["nla.batch_size", "many"]),
        ("- a\n- b\n", ["mapping"]),
        ("a: [", ["YAML"]),
        ("\x00\x01", ["YAML"]),
        ("database: mysql://me:secret@host/x\n", ["mysql"]),
        ("nla: {device: toaster}\n", ["toaster"]),
    ],
)
def test_a_wrong_config_says_what_would_be_right(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "m.yaml").write_text(text, encoding="utf-8")
    done = command("worker", "--once", "--config", "m.yaml", cwd=tmp_path)
    assert_refused(done, 2, *words)
    assert "secret" not in done.stderr


def test_windows_line_ends_and_byte_order_marks_are_no_fault(tmp_path: Path) -> None:
    """A config and a rule as Notepad saves them."""
    rule = "\ufeff" + ONE_RULE.replace("\n", "\r\n")
    (tmp_path / "rule.yaml").write_bytes(rule.encode())
    (tmp_path / "m.yaml").write_bytes(b"\xef\xbb\xbfrules: rule.yaml\r\ndatabase: w.db\r\nnla:\r\n  ar: null\r\n")
    done = command("worker", "--once", "--json", "--config", "m.yaml", cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["read"]) == (0, 0), done.stderr
    assert command("rules", "lint", "rule.yaml", cwd=tmp_path).returncode == 0
    assert command("rules", "test", "rule.yaml", cwd=tmp_path).returncode == 0
    plain = tmp_path / "plain.yaml"
    plain.write_text(ONE_RULE, encoding="utf-8")
    versions = [
        json.loads(command("rules", "list", name, "--json", cwd=tmp_path).stdout)[0]["version"]
        for name in ("rule.yaml", "plain.yaml")
    ]
    assert versions[0] == versions[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ONE_RULE.replace("severity: high", "severity: loud"), ["rule.yaml:4", "severity"]),
        (ONE_RULE.replace("condition: words", "condition: wrods"), ["rule.yaml:7", "words"]),
        (ONE_RULE.replace("words: [hack]", "words: {regex: ['(']}"), ["rule.yaml:6"]),
        (ONE_RULE.replace("title:", "titel:"), ["rule.yaml", "title"]),
        ("title: [", ["rule.yaml"]),
        ("", ["rule.yaml"]),
    ],
)
def test_a_malformed_rule_is_named_by_file_line_and_key(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "rule.yaml").write_text(text, encoding="utf-8")
    assert_refused(command("rules", "test", "rule.yaml", cwd=tmp_path), 2, *words)
    with pytest.raises(NLAMonitorError) as caught:
        Monitor(database=str(tmp_path / "m.db"), rules=str(tmp_path / "rule.yaml"))
    assert all(word in str(caught.value) for word in words)


# -- databases -----------------------------------------------------------------------------------------------------


def newer(path: Path) -> None:
    new_database(path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE nla_alembic_version SET version_num = '9999_from_the_future'")
    connection.close()


def truncated(path: Path) -> None:
    fill(path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    os.truncate(path, path.stat().st_size // 2)


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE customers (id INTEGER)")
    connection.close()


DATABASES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "newer": (newer, ["newer"]),
    "text": (lambda path: path.write_text("Dear diary, " * 500), ["not an SQLite database"]),
    "truncated": (truncated, ["damaged"]),
    "foreign": (foreign, ["nla-monitor db upgrade"]),
    "folder": (lambda path: path.mkdir(), ["is a folder"]),
    "empty": (lambda path: path.touch(), ["nla-monitor db upgrade"]),
}


@pytest.mark.parametrize("name", DATABASES)
def test_a_database_that_cannot_be_used_is_one_line(tmp_path: Path, name: str) -> None:
    """Reading commands end with 3 and say why; nothing is changed by them."""
    make, words = DATABASES[name]
    path = tmp_path / "nla-monitor.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for arguments in (["report"], ["samples"], ["alerts", "list"]):
        assert_refused(command(*arguments, cwd=tmp_path), 3, *words)
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize("name", sorted(set(DATABASES) - {"empty"}))
def test_training_is_refused_a_database_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    """Before training, in the constructor."""
    make, _ = DATABASES[name]
    make(tmp_path / "m.db")
    with pytest.raises(StoreError, match=r"m\.db"):
        NLAMonitorCallback(database=str(tmp_path / "m.db"))


READ_ONLY = """
import os, sys
os.chmod(f"{sys.argv[1]}/m.db", 0o444)
os.chmod(sys.argv[1], 0o555)
if os.geteuid() == 0:
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    # Without DAC_OVERRIDE (and its read and ownership companions) root is bound by permissions like anybody.
    for capability in (1, 2, 3):
        libc.prctl(24, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for word in range(3):
        sets[word] &= ~0b1110
    assert libc.capset(header, sets) == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities")
def test_a_read_only_database_can_be_read_and_refuses_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "ro"
    folder.mkdir()
    fill(folder / "m.db")
    code = READ_ONLY + (
        "from nla_monitor.cli.app import run\n"
        "print('CODES', [run([*words.split(), '--database', sys.argv[1] + '/m.db']) for words in sys.argv[2:]])\n"
        "from nla_monitor import NLAMonitorCallback\n"
        "try:\n"
        "    NLAMonitorCallback(database=sys.argv[1] + '/m.db').monitor._start_run(None)\n"
        "except Exception as error:\n"
        "    print('ERROR', type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), "alerts list", "report", "worker --once"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    folder.chmod(0o700)
    assert "CODES [0, 0, 3]" in done.stdout, done.stdout + done.stderr
    assert "ERROR StoreUnavailableError" in done.stdout
    assert "read-only" in done.stdout
    assert "Traceback" not in done.stderr, done.stderr


def test_a_run_without_samples_has_a_report(tmp_path: Path) -> None:
    """The model was attached and never ran."""
    model, tokenizer = load_target("planted")
    with Monitor(database=str(tmp_path / "nla-monitor.db"), worker="external", run_name="idle") as monitor:
        monitor.attach(model, tokenizer)
    for arguments in (["report"], ["samples"], ["alerts", "list"]):
        done = command(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    assert "idle" in command("report", cwd=tmp_path).stdout
    assert json.loads(command("report", "--json", cwd=tmp_path).stdout)
    new_database(tmp_path / "none.db")
    done = command("report", "--database", "none.db", cwd=tmp_path)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 2)


# -- attach --------------------------------------------------------------------------------------------------------


def test_a_layer_out_of_range_and_a_model_without_blocks_are_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2}
    shallow = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shape))
    with Monitor(database=str(tmp_path / "m.db"), worker="external") as monitor:
        with pytest.raises(AttachError, match="2"):
            monitor.attach(shallow)
        with pytest.raises(AttachError, match="block"):
            monitor.attach(torch.nn.Linear(128, 128))
        assert not monitor.repository.runs(), "a refused model makes no run"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses without a monitor."""
    losses, _, _ = train(tmp_path_factory.mktemp("bare"))
    return losses


def test_a_model_that_cannot_be_watched_trains_unwatched_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bare: list[float]
) -> None:
    """The callback's constructor cannot know the model: at the start of training the fault is logged and counted."""
    monkeypatch.setenv("NLA_MONITOR_STRICT", "0")
    LAYER_9(copied(tmp_path, "av"))
    watch = NLAMonitorCallback(
        database=str(tmp_path / "m.db"), av=str(tmp_path / "av"), ar=None, capture=CAPTURE, worker="external"
    )
    losses, _, _ = train(tmp_path, [watch])
    assert losses == bare
    assert watch.monitor.stats.faults == {"callback.attach": 1}
    assert "9" in caplog.text


def test_an_ar_that_cannot_be_loaded_is_said_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bare: list[float]
) -> None:
    """Only the worker looks into the weights: it says what is wrong, is not started again, and the samples stay."""
    monkeypatch.setenv("NLA_MONITOR_STRICT", "0")
    spoil_head(copied(tmp_path, "ar"))
    watch = NLAMonitorCallback(
        database=str(tmp_path / "m.db"), ar=str(tmp_path / "ar"), capture=CAPTURE, close_timeout=120.0
    )
    losses, _, _ = train(tmp_path, [watch])
    assert losses == bare
    assert watch.monitor.stats.worker_restarts == 0
    assert watch.monitor.stats.written > 0
    assert watch.monitor.repository.reading_counts().waiting == watch.monitor.stats.written
    assert caplog.text.count("the worker cannot start") == 1
    assert "hold NaN" in caplog.text
    assert "nla-monitor worker reads the rest" in caplog.text
    assert "Traceback" not in caplog.text


# -- a full disk ---------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_samples_that_are_counted_and_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bare: list[float]
) -> None:
    """Training goes on with the same losses; when there is room again, the report tells what was dropped."""
    path = tmp_path / "nla-monitor.db"
    watch = NLAMonitorCallback(
        database=str(path), capture=CAPTURE, worker="external", queue={"max_samples": 10}, close_timeout=5.0
    )
    engine = watch.monitor.repository.engine
    room = [True]

    @event.listens_for(engine, "checkout")
    def limit(connection: Any, *_: Any) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={10**9 if room[0] else pages}")

    from transformers import TrainerCallback

    class Fills(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            room[0] = state.global_step < 2
            time.sleep(0.3)  # the queue overflows between attempts to write

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            room[0] = True

    losses, _, _ = train(tmp_path, [Fills(), watch])
    assert losses == bare
    stats = watch.monitor.stats
    assert stats.dropped["store_unavailable"] > 0
    assert not stats.faults
    assert stats.written + sum(stats.dropped.values()) == stats.sampled
    assert watch.monitor.repository.drops(watch.monitor.run_id) == dict(stats.dropped)
    done = command("report", "--json", cwd=tmp_path)
    assert json.dumps(sum(stats.dropped.values())) in done.stdout
    assert "store_unavailable" in done.stdout


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
sys.argv = ["training_program", sys.argv[1]]
runpy.run_module("tests.acceptance.training_program", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file size")
def test_a_file_that_cannot_grow_harms_no_training(tmp_path: Path, bare: list[float]) -> None:
    """The operating system itself refuses to write: same losses, exit code 0, drops counted, no traceback."""
    new_database(tmp_path / "m.db")
    size = (tmp_path / "m.db").stat().st_size
    queue, worker = {"max_samples": 8}, {"mode": "external"}
    settings = {"database": str(tmp_path / "m.db"), "capture": CAPTURE, "queue": queue, "worker": worker, "steps": 6}
    (tmp_path / "m.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "m.json"), str(size + 20_000)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NLA_MONITOR_STRICT": "0"},
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["losses"] == bare
    assert sum(said["dropped"].values()) > 0
    assert said["written"] + sum(said["dropped"].values()) == said["sampled"]
    assert "Traceback" not in done.stderr, done.stderr
