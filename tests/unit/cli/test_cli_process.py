"""The command as a process: start, signals, pipes, exit codes; and the checks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nla_monitor import __version__
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.session import open_engine
from tests.cli_support import sample
from tests.interrupts import listen_to_ctrl_c

COMMAND = [sys.executable, "-c", "from nla_monitor.cli import main; main()"]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False, **options)


def test_importing_the_entry_point_is_light() -> None:
    code = (
        "import sys, nla_monitor.cli\n"
        "heavy = {'torch', 'transformers', 'sqlalchemy', 'opentelemetry', 'typer', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_commands_do_not_load_torch(database: Path) -> None:
    code = (
        "import sys\nfrom nla_monitor.cli.app import run\n"
        f"code = run(['alerts', 'list', '--json', '--database', {str(database)!r}])\n"
        "sys.stderr.write(repr((code, 'torch' in sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "(0, False)"
    assert len(json.loads(done.stdout)) == 4


def test_version_and_help_name_the_exit_codes() -> None:
    assert run("--version").stdout == f"nla-monitor {__version__}\n"
    done = run("--help", env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0
    for command in ("demo", "worker", "alerts", "samples", "rules", "report", "db", "doctor"):
        assert f" {command} " in done.stdout
    assert "3 the database cannot be used" in done.stdout


def test_wrong_usage_exits_2() -> None:
    assert run("nonesuch").returncode == 2
    assert run("alerts", "list", "--severity", "loud").returncode == 2


def test_an_error_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    done = run("alerts", "list", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("nla-monitor: error: there is no database")
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_pipe_is_quiet(database: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, "samples", "--limit", "100", "--json", "--database", str(database)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141


def test_a_terminal_that_knows_ascii_only_still_gets_its_page(database: Path) -> None:
    done = run(
        "alerts", "show", "000000000001", "--database", str(database), env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "special-case the visible tests" in done.stdout


@pytest.mark.skipif(shutil.which("script") is None, reason="needs script(1) for a terminal")
def test_a_terminal_gets_colours_unless_no_color_is_set(database: Path) -> None:
    inner = f"{sys.executable} -c 'from nla_monitor.cli import main; main()' alerts list --database {database}"
    for extra, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        env = {**os.environ, "TERM": "xterm-256color", **extra}
        env.pop("COLUMNS", None)
        done = subprocess.run(
            ["script", "-qec", inner, "/dev/null"], env=env, capture_output=True, text=True, timeout=60, check=True
        )
        assert ("\x1b[31m" in done.stdout) is coloured


# -- worker -------------------------------------------------------------------------------------------------------


def start_worker(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "worker", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_ctrl_c,
        **options,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> list[str]:
    """Lines of standard error up to the one that holds ``text``."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines))


def test_a_worker_ends_in_good_order_on_ctrl_c(tmp_path: Path) -> None:
    process = start_worker("--database", str(tmp_path / "w.db"), "--ar", "none")
    wait_for(process, "worker ready")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "finishing the batch in hand" in err
    assert "Traceback" not in err
    assert out == ""


def test_a_worker_serves_metrics_until_it_is_terminated(tmp_path: Path) -> None:
    import urllib.request

    pytest.importorskip("prometheus_client")
    process = start_worker("--database", str(tmp_path / "w.db"), "--metrics-port", "0")
    (url,) = [line.split()[-1] for line in wait_for(process, "worker ready") if line.startswith("metrics:")]
    with urllib.request.urlopen(url, timeout=30) as response:  # noqa: S310 -- our own server on localhost
        text = response.read().decode()
    assert "process_resident_memory_bytes" in text
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_worker_reads_what_waits_and_ends(cli: Any, tmp_path: Path) -> None:
    import numpy as np

    url = tmp_path / "w.db"
    assert cli("db", "upgrade", "--database", url).code == 0
    engine = open_engine(f"sqlite:///{url}")
    rows = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    SqlSpool(engine).put([sample(number, 1, vector=row) for number, row in enumerate(rows)])
    engine.dispose()
    result = cli("worker", "--once", "--json", "--database", url)
    assert (result.code, result.json["read"]) == (0, 6)
    found = cli("samples", "--json", "--explanations", "--database", url).json
    assert len(found) == 6
    for item in found:
        assert item["state"] == "read"
        assert item["explanation"]["text"]
        assert item["fidelity"]["denominator_name"] == "training"
    assert cli("worker", "--once", "--database", url).out == "0 samples read\n"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--config", "missing.yaml"], 2, "does not exist"),
        (["--rules", "nonesuch"], 2, "nonesuch"),
        (["--av", "missing-checkpoint"], 2, "missing-checkpoint"),
        (["--database", "/nonexistent/folder/x.db"], 3, "/nonexistent/folder/x.db"),
    ],
)
def test_a_worker_that_cannot_start_says_why(
    cli: Any, tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    result = cli("worker", "--database", tmp_path / "w.db", *options)
    assert result.code == code
    assert message in result.err


def test_a_second_interrupt_ends_a_command_with_130(tmp_path: Path) -> None:
    code = (
        "import sys, time, nla_monitor.report as r\n"
        "from nla_monitor.cli.app import run\n"
        "import nla_monitor.cli.report_command as c\n"
        "def slow(*a, **k):\n    sys.stderr.write('here\\n'); sys.stderr.flush(); time.sleep(30)\n"
        "r.build_report = slow\n"
        f"sys.exit(run(['report', '--database', {str(tmp_path / 'x.db')!r}]))"
    )
    run("db", "upgrade", "--database", str(tmp_path / "x.db"))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_ctrl_c,
    )
    wait_for(process, "here")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err


# -- rules --------------------------------------------------------------------------------------------------------

RULE = """
title: Plans to special-case tests
id: my-rule
severity: high
detection:
  intent: [special-case the visible tests]
  condition: intent
window: {count: 2, within: 20 steps}
tests:
  positive: ["It will special-case the visible tests."]
  negative: ["A recipe for soup."]
"""


def test_rules_lint_and_test_say_whether_a_rule_is_good(cli: Any, tmp_path: Path) -> None:
    good, bad, failing = (tmp_path / f"{name}.yaml" for name in ("good", "bad", "failing"))
    good.write_text(RULE)
    bad.write_text(RULE.replace("severity: high", "severity: lowd"))
    failing.write_text(RULE.replace("A recipe for soup.", "A plan to special-case the visible tests."))
    assert cli("rules", "lint", good).code == 0
    assert cli("rules", "lint", good, "--strict").code == 1
    assert cli("rules", "test", good).out == "2 of 2 tests passed\n"
    assert cli("rules", "list", good, "--json").json[0]["id"] == "my-rule"
    result = cli("rules", "lint", bad)
    assert result.code == 1
    assert f"{bad}:4: error" in result.out
    assert cli("rules", "test", bad).code == 2
    result = cli("rules", "test", failing)
    assert result.code == 1
    assert "1 of 2 tests passed" in result.out
    assert "should not match and does" in result.out
    assert [case["passed"] for case in cli("rules", "test", failing, "--json").json] == [True, False]
    assert cli("rules", "lint", failing, "--json").json[0]["severity"] in ("error", "warning")


def test_the_built_in_rules_are_clean(cli: Any) -> None:
    assert cli("rules", "lint").code == 0
    result = cli("rules", "test")
    assert result.code == 0
    assert not result.out.startswith("0 of 0")
    assert "window" in json.loads(cli("rules", "list", "--json").out)[0]


# -- doctor -------------------------------------------------------------------------------------------------------


def checks(result: Any) -> dict[str, dict[str, str]]:
    return {check["about"]: check for check in result.json["checks"]}


def test_doctor_finds_the_bundled_pair_usable(cli: Any, database: Path) -> None:
    result = cli("doctor", "--database", database, "--model", "organism:planted", "--json")
    found = checks(result)
    assert result.json["ok"] is (result.code == 0)
    for name in ("versions", "device", "database", "av", "ar", "pair", "model", "self-test", "rules"):
        assert found[name]["verdict"] != "problem", found[name]
    assert "given up" in found["database"]["detail"]


@pytest.mark.parametrize(
    ("options", "about", "message"),
    [
        (["--device", "cuda:7"], "device", "asked for"),
        (["--device", "toaster"], "device", "no torch device"),
        (["--av", "organism:planted/ar"], "av", "role"),
        (["--av", "missing"], "av", "missing"),
        (["--database", "/nonexistent/x.db"], "database", "no writable folder"),
        (["--config", "missing.yaml"], "config", "does not exist"),
        (["--model", "."], "model", "config.json"),
    ],
)
def test_doctor_says_what_is_not_usable_and_why(cli: Any, options: list[str], about: str, message: str) -> None:
    result = cli("doctor", "--no-self-test", "--json", *options)
    assert result.code == 1
    assert checks(result)[about]["verdict"] == "problem"
    assert message in checks(result)[about]["detail"]


def test_doctor_reads_given_activations_and_finds_a_wrong_dialect(cli: Any, tmp_path: Path) -> None:
    import numpy as np

    file = tmp_path / "activations.npy"
    np.save(file, np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32))
    result = cli("doctor", "--database", tmp_path / "none.db", "--json", "--dialect", "add", "--activations", file)
    found = checks(result)
    assert "6 given have median" in found["self-test norm_range"]["detail"] or "no injection scale" in str(found)
    assert "dialect add" in found["av"]["detail"]
    assert found["self-test dialect_reads_best"]["detail"].startswith("beyond shuffled texts, reading by add")
    (tmp_path / "broken.npy").write_bytes(b"no array")
    broken = cli("doctor", "--json", "--activations", tmp_path / "broken.npy")
    assert "cannot be read" in checks(broken)["self-test"]["detail"]
    assert "dialect = 'sideways'" in checks(cli("doctor", "--json", "--dialect", "sideways"))["config"]["detail"]


def test_doctor_refuses_a_model_of_another_shape(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 9})
    )
    told = checks(cli("doctor", "--no-self-test", "--json", "--model", tmp_path))["model"]["detail"]
    assert "d_model 64, the AV reads 128" in told
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 1})
    )
    told = checks(cli("doctor", "--no-self-test", "--json", "--model", tmp_path))["model"]["detail"]
    assert "1 blocks" in told


def test_doctor_leaves_no_file_behind(cli: Any, tmp_path: Path) -> None:
    cli("doctor", "--no-self-test")
    assert list(tmp_path.iterdir()) == []
