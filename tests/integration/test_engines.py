"""The AV behind a server, from spool to database: the organism's own AV answers, and servers come and go."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_monitor.config import MonitorConfig, NLAConfig, load_config
from nla_monitor.errors import ConfigError, EmbedsDisabledError
from nla_monitor.nla import TransformersVerbalizer, load_verbalizer
from nla_monitor.nla.engines import open_verbalizer
from nla_monitor.organism import paths
from nla_monitor.records import ActivationSample
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from nla_monitor.worker import Worker
from tests.engine_server import EngineServer, Fault, model_brain, serving, toy_brain
from tests.organism_support import training_samples
from tests.store_support import new_database

TOKENS = 20


@pytest.fixture(scope="module")
def organism() -> TransformersVerbalizer:
    return load_verbalizer(paths("planted").av, NLAConfig(max_new_tokens=TOKENS))


@pytest.fixture(scope="module")
def samples() -> list[ActivationSample]:
    return training_samples(4)


@pytest.fixture
def make(organism: TransformersVerbalizer) -> Callable[..., EngineServer]:
    embed = organism.model.get_input_embeddings()
    with torch.no_grad():
        table = embed(torch.arange(embed.num_embeddings))

    def server(kind: str, *, toy: bool = True, **deviations: Any) -> EngineServer:
        brain = toy_brain(organism.tokenizer) if toy else model_brain(organism.model)
        return EngineServer(kind, brain, table, organism.tokenizer, **deviations)

    return server


def config(folder: Path, server: EngineServer, **changes: Any) -> MonitorConfig:
    nla = {"engine": server.kind, "url": server.url, "dtype": "float32", "max_new_tokens": TOKENS, "retries": 0}
    return load_config(
        {
            "database": str(folder / "w.db"),
            "nla": nla | {"ar": None, "timeout_seconds": 10.0} | changes,
            "worker": {"poll_seconds": 0.01},
        }
    )


def fill(settings: MonitorConfig, samples: list[ActivationSample]) -> Repository:
    new_database(Path(settings.database.removeprefix("sqlite:///")))
    engine = open_engine(settings.database)
    SqlSpool(engine).put(samples)
    return Repository(engine)


def texts(repository: Repository, samples: list[ActivationSample]) -> list[str]:
    with repository.transaction() as tx:
        found = [tx.reading(sample.sample_id) for sample in samples]
    return [reading.explanation.text for reading in found if reading is not None]


@pytest.mark.parametrize("kind", ["vllm", pytest.param("sglang", marks=pytest.mark.slow)])
def test_a_served_av_writes_what_it_writes_in_process(
    tmp_path: Path, samples: list[ActivationSample], organism: TransformersVerbalizer, make: Any, kind: str
) -> None:
    """The organism answers over HTTP; its explanations, their provenance and the alerts' rules do not know it."""
    with serving(make(kind, toy=False)) as server:
        settings = config(tmp_path, server)
        repository = fill(settings, samples)
        reader = Worker(settings, sinks=[])
        while reader.run_once():
            pass
        reader.close()
    vectors = torch.tensor([sample.vector.tolist() for sample in samples]).numpy()
    assert texts(repository, samples) == [one.text for one in organism.verbalize(vectors)]
    assert reader.verbalizer.content_hash == organism.content_hash
    counts = repository.reading_counts()
    assert (counts.readings, counts.failed, counts.waiting, counts.leased) == (4, 0, 0, 0)


def test_samples_wait_for_a_server_that_is_down(
    tmp_path: Path, samples: list[ActivationSample], make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Down at the start, up, out of order, up again: the worker says so and goes on; no attempt is counted."""
    with serving(make("vllm")) as known:
        settings = config(tmp_path, known)
    repository = fill(settings, samples[:2])
    caplog.set_level(logging.WARNING)
    reader = Worker(settings, sinks=[])  # the server is down already
    assert "not there yet" in caplog.text
    stop = threading.Event()
    thread = threading.Thread(target=reader.run, args=(stop,))
    thread.start()
    try:
        time.sleep(0.5)
        counts = repository.reading_counts()
        assert (counts.readings, counts.failed) == (0, 0)
        assert "AV's server unavailable, trying again" in caplog.text
        with serving(make("vllm"), int(known.url.rpartition(":")[2])) as server:
            wait(lambda: repository.reading_counts().readings == 2)
            server.fault = lambda _asked: Fault(status=500)
            SqlSpool(repository.engine).put(samples[2:])
            time.sleep(0.5)
            counts = repository.reading_counts()
            assert (counts.readings, counts.failed) == (2, 0)
            server.fault = lambda _asked: None
            wait(lambda: repository.reading_counts().readings == 4)
    finally:
        stop.set()
        thread.join(30)
        reader.close()
    assert repository.reading_counts().failed == 0


def wait(met: Callable[[], bool], seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


def test_a_row_that_the_server_refuses_fails_alone(tmp_path: Path, samples: list[ActivationSample], make: Any) -> None:
    server = make("sglang")
    with serving(server):
        settings = config(tmp_path, server)
        repository = fill(settings, samples)
        reader = Worker(settings, sinks=[])
        assert hasattr(reader.verbalizer, "prompt_embeddings")
        poison = reader.verbalizer.prompt_embeddings(samples[1].vector[None])[0]
        server.fault = lambda asked: Fault(status=400) if torch.equal(server.decode(asked.body), poison) else None
        while reader.run_once():
            pass
        reader.close()
    counts = repository.reading_counts()
    assert (counts.readings, counts.failed, counts.waiting) == (3, 1, 0)
    assert len(texts(repository, samples)) == 3


def test_a_server_with_the_wrong_flags_stops_the_worker_at_the_start(
    tmp_path: Path, samples: list[ActivationSample], make: Any
) -> None:
    with serving(make("vllm", embeds_enabled=False)) as server:
        settings = config(tmp_path, server)
        repository = fill(settings, samples)
        with pytest.raises(EmbedsDisabledError, match="--enable-prompt-embeds"):
            Worker(settings, sinks=[])
    assert repository.reading_counts().waiting == 4


def test_doctor_says_what_is_wrong_with_a_server(tmp_path: Path, make: Any) -> None:
    from typer.testing import CliRunner

    from nla_monitor.cli.app import app

    def doctor(server: EngineServer) -> dict[str, Any]:
        file = tmp_path / "m.yaml"
        file.write_text(json.dumps({"nla": config(tmp_path, server).nla.model_dump()}), encoding="utf-8")
        result = CliRunner().invoke(app, ["doctor", "--config", str(file), "--json"])
        return {check["about"]: check for check in json.loads(result.stdout)["checks"]}

    with serving(make("sglang")) as good:
        engine = doctor(good)["engine"]
        assert engine["verdict"] == "ok"
        assert "4 texts for 4 vectors" in engine["detail"]
    engine = doctor(good)["engine"]
    assert (engine["verdict"], "nla.url" in engine["detail"]) == ("problem", True)
    with serving(make("sglang", radix=True)) as cached:
        assert "--disable-radix-cache" in doctor(cached)["engine"]["detail"]


# -- plug-ins -----------------------------------------------------------------------------------------------------

PLUGIN = '''
import numpy as np
from nla_monitor.nla.base import Verbalization


class Echo:
    """Says which coordinate is the greatest."""

    def __init__(self, config):
        self.d_model, self.layer, self.content_hash = 128, None, "echo-1"
        self.word = config.options["word"]

    def verbalize(self, vectors):
        return [Verbalization(f"{self.word} {int(np.argmax(row))}", False, 2) for row in vectors]


def broken(config):
    raise RuntimeError("no such probe")


def hollow(config):
    return object()
'''


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution as pip leaves it: a module and its dist-info."""
    site = tmp_path / "site"
    info = site / "echo_av-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "echo_av.py").write_text(PLUGIN, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-av\nVersion: 1.0\n", encoding="utf-8")
    lines = ["[nla_monitor.verbalizers]", "echo = echo_av:Echo", "broken = echo_av:broken", "hollow = echo_av:hollow"]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.syspath_prepend(str(site))
    yield site
    sys.modules.pop("echo_av", None)


def test_a_plug_in_reads_for_the_worker(tmp_path: Path, plugins: Path, samples: list[ActivationSample]) -> None:
    nla = {"engine": "echo", "ar": None, "options": {"word": "greatest"}}
    settings = load_config({"database": str(tmp_path / "w.db"), "nla": nla})
    repository = fill(settings, samples)
    reader = Worker(settings, sinks=[])
    while reader.run_once():
        pass
    reader.close()
    assert texts(repository, samples) == [f"greatest {sample.vector.argmax()}" for sample in samples]


def test_plug_ins_that_cannot_be_used_are_named(plugins: Path) -> None:
    for engine, told in (
        ("broken", "echo_av:broken, of echo-av.*RuntimeError: no such probe"),
        ("hollow", "object that is no verbalizer.*no method verbalize"),
        ("ekho", "did you mean 'echo'"),
        ("zzz", "known: transformers, vllm, sglang"),
    ):
        with pytest.raises(ConfigError, match=told):
            open_verbalizer("anywhere", NLAConfig(engine=engine))
    twice = plugins / "echo_two-1.0.dist-info"
    twice.mkdir()
    (twice / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-two\nVersion: 1.0\n", encoding="utf-8")
    (twice / "entry_points.txt").write_text("[nla_monitor.verbalizers]\necho = echo_av:Echo\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="more than once, by echo-av, echo-two"):
        open_verbalizer("anywhere", NLAConfig(engine="echo"))


def test_without_httpx_the_extra_is_named(tmp_path: Path) -> None:
    """Importing and running everything else needs no httpx."""
    code = (
        "import sys\n"
        "sys.meta_path.insert(0, type('No', (), {'find_spec': staticmethod(lambda name, *_: (_ for _ in ()).throw("
        "ModuleNotFoundError(name, name=name)) if name.split('.')[0] == 'httpx' else None)})())\n"
        "from nla_monitor.config import NLAConfig\n"
        "from nla_monitor.errors import MissingExtraError\n"
        "from nla_monitor.nla.engines import open_verbalizer\n"
        "try:\n    open_verbalizer('x', NLAConfig(engine='vllm', url='http://localhost:1'))\n"
        "except MissingExtraError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nla-monitor[engines]" in done.stdout
