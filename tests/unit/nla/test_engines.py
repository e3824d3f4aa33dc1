"""An AV behind vLLM or SGLang: what is sent, what comes back, and what happens when the server is not right."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from nla_checkpoints import CONFIG, WIDTH, edit_sidecar, tokenizer_of

from nla_monitor.config import NLAConfig, load_config
from nla_monitor.errors import (
    ActivationError,
    CheckpointError,
    ConfigError,
    EmbedsDisabledError,
    EmbedsIgnoredError,
    EngineError,
    EngineRefusedError,
    EngineUnavailableError,
    PrefixCacheError,
    PromptChangedError,
    ServedModelError,
)
from nla_monitor.nla import TransformersVerbalizer, load_verbalizer
from nla_monitor.nla.base import ClaimScorer, PartialReadError, Resampler
from nla_monitor.nla.engines import open_verbalizer
from nla_monitor.nla.engines.prompting import embed_tokens, read_model_settings
from nla_monitor.nla.engines.served import ServedVerbalizer
from tests.engine_server import Asked, EngineServer, Fault, model_brain, serving, toy_brain

Vectors = npt.NDArray[np.float32]
KINDS = ("vllm", "sglang")


def settings(server: EngineServer, **changes: Any) -> NLAConfig:
    fields = {"engine": server.kind, "url": server.url, "dtype": "float32", "max_new_tokens": 24, "retries": 2}
    return NLAConfig(**(fields | {"timeout_seconds": 5.0} | changes))


@contextmanager
def connected(server: EngineServer, folder: Path, **changes: Any) -> Iterator[ServedVerbalizer]:
    """A verbalizer that talks to a server that runs."""
    with serving(server):
        verbalizer = open_verbalizer(folder, settings(server, **changes))
        assert isinstance(verbalizer, ServedVerbalizer)
        try:
            yield verbalizer
        finally:
            verbalizer.close()


@pytest.fixture(scope="session")
def in_process(checkpoints: Path, family: str) -> TransformersVerbalizer:
    return load_verbalizer(checkpoints / family / "av", CONFIG)


def table_of(verbalizer: TransformersVerbalizer) -> torch.Tensor:
    embed = verbalizer.model.get_input_embeddings()
    with torch.no_grad():
        return embed(torch.arange(embed.num_embeddings))


@pytest.fixture(scope="session")
def folder(checkpoints: Path) -> Path:
    return checkpoints / "qwen2" / "av"


@pytest.fixture(scope="session")
def toy(folder: Path) -> Callable[..., EngineServer]:
    """A quick server for the Qwen2 checkpoint; keywords make it deviate."""
    tokenizer = tokenizer_of("qwen2")
    count = read_model_settings(folder).vocab_size
    table = embed_tokens(folder, read_model_settings(folder), range(count), torch.float32)

    def make(kind: str = "vllm", **deviations: Any) -> EngineServer:
        return EngineServer(kind, toy_brain(tokenizer), table, tokenizer, **deviations)

    return make


# -- the same as in process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_sent_is_bit_for_bit_what_the_model_in_process_reads(
    checkpoints: Path, family: str, vectors: Vectors, dtype: Any
) -> None:
    """Gemma's embedding scale included; no model is loaded for it."""
    folder = checkpoints / family / "av"
    served = open_verbalizer(folder, NLAConfig(engine="vllm", url="http://localhost:1", dtype=dtype))
    local = load_verbalizer(folder, CONFIG.model_copy(update={"dtype": dtype}))
    assert isinstance(served, ServedVerbalizer)
    sent, read = served.prompt_embeddings(vectors), local.prompt_embeddings(vectors)
    assert sent.dtype == read.dtype
    assert torch.equal(sent, read)
    assert (served.d_model, served.layer, served.content_hash) == (local.d_model, local.layer, local.content_hash)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_explanations_are_those_of_the_model_in_process(
    checkpoints: Path, family: str, in_process: TransformersVerbalizer, vectors: Vectors, kind: str
) -> None:
    server = EngineServer(kind, model_brain(in_process.model), table_of(in_process), tokenizer_of(family))
    with connected(server, checkpoints / family / "av") as served:
        assert served.generate(vectors[:6]) == in_process.generate(vectors[:6])
        assert served.verbalize(vectors[:6]) == in_process.verbalize(vectors[:6])
        server.says_ids = False
        assert [one.text for one in served.verbalize(vectors[:6])] == [
            one.text for one in in_process.verbalize(vectors[:6])
        ]


def test_the_packed_form_is_used_where_the_server_knows_it(folder: Path, toy: Any, vectors: Vectors) -> None:
    """SGLang: tried once at the check; both forms carry the same bits."""
    texts = []
    for packs, form in ((True, "packed"), (False, "floats")):
        server = toy("sglang", packs=packs)
        with connected(server, folder, dtype="bfloat16") as served:
            texts.append(served.verbalize(vectors))
        assert server.forms == {form}
    assert texts[0] == texts[1]


def test_every_sampling_parameter_is_sent(folder: Path, toy: Any, vectors: Vectors) -> None:
    """Servers take defaults from generation_config.json, and a penalty would change greedy text without a word."""
    for kind in KINDS:
        server = toy(kind)
        with connected(server, folder) as served:
            served.verbalize(vectors[:1])
        sent = server.asked[-1].sampling
        assert sent["temperature"] == 0.0
        assert (sent["top_p"], sent["top_k"], sent["min_p"], sent["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)
        assert (sent["presence_penalty"], sent["frequency_penalty"], sent["skip_special_tokens"]) == (0.0, 0.0, False)
        assert sent["limit"] == 24
        assert tokenizer_of("qwen2").eos_token_id in sent["stop_token_ids"]


def test_draws_carry_seed_and_temperature(folder: Path, toy: Any, vectors: Vectors) -> None:
    seeds = [5, 2**80 + 5, 6]
    for kind in KINDS:
        server = toy(kind)
        with connected(server, folder) as served:
            assert isinstance(served, Resampler)
            assert not isinstance(served, ClaimScorer)
            drawn = served.resample(np.stack([vectors[0]] * 3), seeds, temperature=0.7)
            assert {(one.seed, one.sampling["temperature"]) for one in server.asked[-3:]} == {(5, 0.7), (6, 0.7)}
            assert drawn[0] == drawn[1] != drawn[2]
            with pytest.raises(ValueError, match="one seed for each"):
                served.resample(vectors[:2], [1])
            with pytest.raises(ValueError, match="above 0"):
                served.resample(vectors[:1], [1], temperature=0.0)


def test_requests_under_way_are_bounded(folder: Path, toy: Any, vectors: Vectors) -> None:
    server = toy(fault=lambda _asked: Fault(wait=0.02))
    with connected(server, folder, concurrency=3) as served:
        alone = [served.verbalize(vectors[[row]])[0] for row in range(3)]
        assert served.verbalize(vectors)[:3] == alone
        assert served.verbalize(vectors[:0]) == []
    assert server.most_at_once == 3


# -- what cannot be served ----------------------------------------------------------------------------------------


def test_what_needs_hooks_is_refused_with_the_reason(damaged: Callable[[str], Path]) -> None:
    config = NLAConfig(engine="sglang", url="http://localhost:1", dialect="add")
    with pytest.raises(ConfigError, match="cannot serve the dialect 'add'"):
        open_verbalizer(damaged("qwen2/av"), config)


def test_vectors_beyond_the_dtype_are_not_sent(damaged: Callable[[str], Path], toy: Any, vectors: Vectors) -> None:
    """A server takes Inf without a word and writes nothing."""
    av = damaged("qwen2/av")
    edit_sidecar(av, "extraction.injection_scale", 3e6)
    server = toy()
    with connected(server, av, dtype="float16") as served:
        with pytest.raises(ConfigError, match="do not fit into"):
            served.verbalize(vectors)
        with pytest.raises(ActivationError, match="row 1"):
            served.verbalize(np.stack([vectors[0], np.zeros_like(vectors[0])]))
    assert not server.asked


def test_a_folder_without_embeddings_says_what_is_missing(damaged: Callable[[str], Path]) -> None:
    av = damaged("qwen2/av")
    (av / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none is"):
        open_verbalizer(av, NLAConfig(engine="vllm", url="http://localhost:1"))


def test_urls_and_keys(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A secret in the URL is refused and not repeated; a key comes from the environment only."""
    with pytest.raises(ConfigError, match="needs a url"):
        load_config({"nla": {"engine": "vllm"}})
    with pytest.raises(ConfigError, match="asks no server"):
        load_config({"nla": {"url": "http://localhost:8000"}})
    with pytest.raises(ConfigError, match="api_key_env") as caught:
        load_config({"nla": {"engine": "vllm", "url": "http://me:hunter2@localhost"}})
    assert "hunter2" not in str(caught.value)
    monkeypatch.delenv("AV_KEY", raising=False)
    with pytest.raises(ConfigError, match="AV_KEY is not set"):
        open_verbalizer(folder, NLAConfig(engine="vllm", url="http://localhost:1", api_key_env="AV_KEY"))


def test_the_key_is_sent_and_never_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, folder: Path, toy: Any, vectors: Vectors
) -> None:
    monkeypatch.setenv("AV_KEY", "sk-secret")
    server = toy(key="sk-secret")
    with caplog.at_level(logging.DEBUG), connected(server, folder, api_key_env="AV_KEY") as served:
        text = served.verbalize(vectors[:1])[0].text
        server.key = "another"
        with pytest.raises(EngineRefusedError, match="wants another API key") as caught:
            served.verbalize(vectors[:1])
    assert "sk-secret" not in caplog.text + str(caught.value)
    assert text not in caplog.text


# -- traps, each by its name --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "deviation", "error", "remedy"),
    [
        ("vllm", {"embeds_enabled": False}, EmbedsDisabledError, "--enable-prompt-embeds"),
        ("sglang", {"radix": True}, PrefixCacheError, "--disable-radix-cache"),
        ("sglang", {"caches": True}, PrefixCacheError, "--disable-radix-cache"),
        ("vllm", {"caches": True}, PrefixCacheError, "--no-enable-prefix-caching"),
        ("sglang", {"ignores": True}, EmbedsIgnoredError, "drops the embeddings"),
        ("vllm", {"template": True}, PromptChangedError, "/v1/completions"),
        ("sglang", {"template": True}, PromptChangedError, "adds a chat template"),
        ("vllm", {"models": ("a", "b")}, ServedModelError, "serves a, b"),
        ("vllm", {"max_model_len": 40}, EngineRefusedError, "--max-model-len"),
    ],
)
def test_a_server_that_would_write_nonsense_is_refused(
    folder: Path, toy: Any, *, kind: str, deviation: dict[str, Any], error: type, remedy: str
) -> None:
    with connected(toy(kind, **deviation), folder) as served, pytest.raises(error, match=remedy) as caught:
        served.verbalize(np.eye(2, WIDTH, dtype=np.float32))
    assert type(caught.value) is error


def test_another_model_is_told_by_its_answers(folder: Path, toy: Any, vectors: Vectors) -> None:
    """Another revision, a scale applied twice, a template of unknown length: tokens and embeddings differ."""
    for kind in KINDS:
        server = toy(kind)
        server.table = server.table * 2
        with connected(server, folder) as served, pytest.raises(ServedModelError, match="very checkpoint"):
            served.check()
        server = toy(kind)
        server.table = server.table[:, :-1]
        with connected(server, folder) as served, pytest.raises(EngineError):
            served.check()


def test_a_good_server_is_described(folder: Path, toy: Any) -> None:
    with connected(toy("vllm"), folder) as served:
        found = served.check()
        assert (found.model, found.distinct, found.repeatable, found.length_known) == ("the-av", 4, True, True)
    with connected(toy("sglang", says_length=False), folder) as served:
        assert "does not say how long prompts are" in str(served.check())


# -- faults -------------------------------------------------------------------------------------------------------


def first_time(fault: Fault) -> Callable[[Asked], Fault | None]:
    """The fault for the first request with each body, and a good answer afterwards."""
    seen, lock = set[str](), threading.Lock()

    def strike(asked: Asked) -> Fault | None:
        with lock:
            new = (key := repr(asked.body)) not in seen
            seen.add(key)
        return fault if new else None

    return strike


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503),
        Fault(status=429, headers={"Retry-After": "0.1"}),
        Fault(cut=10),
        Fault(truncated=True),
        Fault(wait=1.0),
    ],
    ids=["503", "429", "reset", "truncated", "hang"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_may_pass_is_tried_again(folder: Path, toy: Any, vectors: Vectors, kind: str, fault: Fault) -> None:
    server = toy(kind)
    with connected(server, folder, timeout_seconds=0.4) as served:
        served.check()
        expected = served.verbalize(vectors[:3])
        server.asked.clear()
        server.fault = first_time(fault)
        assert served.verbalize(vectors[:3]) == expected
        assert len(server.asked) == 6


@pytest.mark.parametrize("dated", [False, True])
def test_retry_after_is_heeded(folder: Path, toy: Any, vectors: Vectors, dated: bool) -> None:
    server = toy()
    with connected(server, folder) as served:
        served.check()
        wish = formatdate(time.time() + 2, usegmt=True) if dated else "1.2"
        server.fault = first_time(Fault(status=429, headers={"Retry-After": wish}))
        started = time.monotonic()
        served.verbalize(vectors[:1])
        assert time.monotonic() - started >= 0.95
        server.fault = lambda _asked: Fault(status=429, headers={"Retry-After": "3600"})
        started = time.monotonic()
        with pytest.raises(EngineUnavailableError, match="answered 429"):
            served.verbalize(vectors[:1])
        assert time.monotonic() - started < 3


def test_a_bad_row_fails_alone(folder: Path, toy: Any, vectors: Vectors) -> None:
    """One that the server refuses, one that always breaks it: the others are there, and a 400 is not sent again."""
    server = toy()
    with connected(server, folder, retries=1) as served:
        expected = served.verbalize(vectors[:5])
        poison = served.prompt_embeddings(vectors[[1, 3]])

        def strike(asked: Asked) -> Fault | None:
            embeds = server.decode(asked.body)
            if torch.equal(embeds, poison[0]):
                return Fault(status=400, body=b'{"error": {"message": "too long"}}')
            return Fault(status=500) if torch.equal(embeds, poison[1]) else None

        server.fault = strike
        server.asked.clear()
        with pytest.raises(PartialReadError, match="2 of 5 vectors") as caught:
            served.verbalize(vectors[:5])
        assert caught.value.done == {row: expected[row] for row in (0, 2, 4)}
        refused, broken = caught.value.failed[1], caught.value.failed[3]
        assert isinstance(refused, EngineRefusedError)
        assert "too long" in str(refused)
        assert isinstance(broken, EngineUnavailableError)
        assert len(server.asked) == 6
        with pytest.raises(PartialReadError, match="1 of 1"):  # alone, too: the server is well, so it is the row
            served.verbalize(vectors[[3]])


def test_a_server_that_went_away_is_checked_again_when_it_is_back(folder: Path, toy: Any, vectors: Vectors) -> None:
    server = toy()
    with serving(server):
        served = open_verbalizer(folder, settings(server, retries=0))
        expected = served.verbalize(vectors[:2])
    with pytest.raises(EngineUnavailableError, match="cannot be reached"):
        served.verbalize(vectors[:2])
    port = int(server.url.rpartition(":")[2])
    with serving(toy(caches=True), port), pytest.raises(PrefixCacheError):
        served.verbalize(vectors[:2])
    with serving(toy(), port):
        assert served.verbalize(vectors[:2]) == expected
    served.close()


def test_an_interrupt_takes_requests_back(
    folder: Path, toy: Any, vectors: Vectors, request: pytest.FixtureRequest
) -> None:
    """Ctrl-C while the server thinks: the caller is free at once."""
    # A shell starts background jobs deaf to it.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, heard))
    server = toy()
    with connected(server, folder) as served:
        served.check()
        server.fault = lambda _asked: Fault(wait=3.0)
        timer = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            served.verbalize(vectors[:2])
        assert time.monotonic() - started < 2.0
        timer.join()
