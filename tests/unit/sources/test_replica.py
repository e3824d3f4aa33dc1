"""A capture replica is sent prompt and answer, and its files are read; whatever it does, its misses are counted."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sources_kit import assert_same, started, tapped

from nla_monitor.errors import ConfigError
from nla_monitor.records import Completion
from nla_monitor.sources import CaptureReplica, completions
from tests.langchain_support import byte_tokenizer, tiny_llama

TOLERANCE = 1e-5
TOKENIZER = byte_tokenizer()
MODEL = tiny_llama()
PROMPT = tuple(TOKENIZER("Is this a test?", add_special_tokens=False)["input_ids"])
ANSWER = tuple(TOKENIZER("It may well be.", add_special_tokens=False)["input_ids"])

Answer = tuple[int, bytes]


@dataclass
class Replica:
    """vLLM's completions API with hidden-state extraction, as far as it is asked."""

    folder: Path
    storage: str = "/somewhere/else"
    """The folder as the server sees it."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    faults: list[Answer] = field(default_factory=list)
    """Given in turn before any right answer."""
    models: tuple[str, ...] = ("organism",)
    change: Callable[[list[int]], list[int]] = list
    """What the server makes of a prompt."""
    extract: bool = True
    url: str = ""

    def answer(self, body: dict[str, Any]) -> Answer:
        self.asked.append(body)
        if self.faults:
            return self.faults.pop(0)
        ids = self.change(body["prompt"])
        name = f"cmpl-{len(self.asked)}-0.safetensors"
        if self.extract:
            self.write(self.folder / name, ids)
        told = {"hidden_states_path": f"{self.storage}/{name}"} if self.extract else None
        return 200, json.dumps({"choices": [{"text": "x"}], "kv_transfer_params": told}).encode()

    def write(self, path: Path, ids: Sequence[int]) -> None:
        tokens = torch.tensor(list(ids))
        with torch.no_grad():
            states = MODEL(tokens[None], output_hidden_states=True).hidden_states
        Path(f"{path}.lock").touch()
        save_file({"hidden_states": states[2][0][:, None].contiguous(), "token_ids": tokens}, path)


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replica]:
    served = Replica(tmp_path)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            served.keys.append(self.headers.get("Authorization"))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*served.answer(body))

        def do_GET(self) -> None:
            self._send(200, json.dumps({"data": [{"id": name} for name in served.models]}).encode())

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "_PAUSES", (0.01, 0.01))


def source(replica: Replica, **settings: Any) -> CaptureReplica:
    return CaptureReplica(replica.url, replica.folder, TOKENIZER, **({"proxy": False, "timeout": 2.0} | settings))


def test_prompt_and_answer_give_what_a_tap_takes(replica: Replica) -> None:
    with started(source(replica)) as outlet:
        found = outlet.read((PROMPT, Completion(token_ids=ANSWER)))
        assert outlet.source.model_name == f"organism@{replica.url}"
    assert_same(tapped(MODEL, TOKENIZER, PROMPT, ANSWER), found, tolerance=TOLERANCE)
    (asked,) = replica.asked
    assert asked["prompt"] == [*PROMPT, *ANSWER[:-1]]
    assert (asked["max_tokens"], asked["model"]) == (1, "organism")
    assert list(replica.folder.iterdir()) == [], "what was read is deleted"


def test_a_text_is_sent_in_tokens_and_a_proxy_is_labelled(replica: Replica) -> None:
    with started(source(replica, proxy=True, keep_files=True)) as outlet:
        found = outlet.read((PROMPT, Completion(text="It may well be.")))
    assert replica.asked[0]["prompt"] == [*PROMPT, *ANSWER]
    labels = {"source": "vllm", "proxy": True, "retokenized": True}
    assert [dict(sample.attributes) for sample in found] == [labels] * len(found)
    assert len(list(replica.folder.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(status: int, replica: Replica) -> None:
    replica.faults = [(status, b"busy")] * 2
    with started(source(replica)) as outlet:
        assert outlet.read((PROMPT, None))
        assert outlet.source.stats.skipped == {}
    assert len(replica.asked) == 3


def _extracts_nothing(replica: Replica) -> None:
    replica.extract = False


def _adds_a_token(replica: Replica) -> None:
    replica.change = lambda ids: [1, *ids]


def _down(replica: Replica) -> None:
    replica.faults = [(503, b"")] * 3


def _no_json(replica: Replica) -> None:
    replica.faults = [(200, b"<html>")]


def _no_object(replica: Replica) -> None:
    replica.faults = [(200, b"[]")]


def _too_long(replica: Replica) -> None:
    replica.faults = [(400, b'{"error": {"message": "maximum context length is 8"}}')]


def _serves_two(replica: Replica) -> None:
    replica.models = ("a", "b")


def _outside(replica: Replica) -> None:
    replica.write(replica.folder.parent / "outside.safetensors", PROMPT)
    told = {"kv_transfer_params": {"hidden_states_path": "../outside.safetensors"}}
    replica.faults = [(200, json.dumps(told).encode())]


@pytest.mark.parametrize(
    ("spoil", "reason", "words"),
    [
        (_extracts_nothing, "replica_refused", "it extracts no hidden states"),
        (_adds_a_token, "prompt_changed", "read 16 tokens where 15 were sent"),
        (_down, "replica_unavailable", "answered 503. Start it, or correct source.url"),
        (_no_json, "replica_refused", "it is no vLLM"),
        (_no_object, "replica_refused", "it is no vLLM"),
        (_too_long, "replica_refused", "maximum context length is 8"),
        (_serves_two, "replica_refused", "Name one in source.served_model"),
        (_outside, "no_file", "named outside.safetensors, which is not in"),
    ],
)
def test_what_a_replica_does_wrong_is_counted_and_said(
    spoil: Any, reason: str, words: str, replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(replica)
    with started(source(replica, timeout=0.3)) as outlet:
        with caplog.at_level(logging.WARNING, "nla_monitor"):
            assert outlet.read((PROMPT, None)) == []
        assert outlet.source.stats.skipped == {reason: 1}
        assert outlet.source.stats.unmatched_sessions == 1
    assert words in caplog.text


def test_nobody_there_is_counted_and_the_host_waits_for_nothing(tmp_path: Path) -> None:
    gone = CaptureReplica("http://127.0.0.1:9", tmp_path, proxy=False, timeout=0.5)
    with started(gone) as outlet:
        begun = time.perf_counter()
        for _ in range(50):
            gone.close_session(gone.open_session(_agent(), PROMPT))
        assert time.perf_counter() - begun < 0.25
        assert gone.flush(60)
        assert outlet.source.stats.skipped == {"replica_unavailable": 50}


def _agent() -> Any:
    from nla_monitor.records import AgentContext

    return AgentContext("run")


def test_the_key_is_sent_and_never_said(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("REPLICA_KEY", "secret-7")
    replica.faults = [(401, b"bad key secret-7")]
    with started(source(replica, api_key_env="REPLICA_KEY")) as outlet:
        assert outlet.read((PROMPT, None)) == []
    assert replica.keys == ["Bearer secret-7"]
    assert "secret-7" not in caplog.text
    assert "bad key ***" in caplog.text
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
        source(replica, api_key_env="NO_SUCH_KEY")
