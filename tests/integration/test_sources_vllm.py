"""A real vLLM server: its hidden states give a tap's samples, in both ways; and another one reads them as the AV.

Opt-in: ``VLLM_PYTHON=/path/to/python python -m pytest -m slow tests/integration/test_sources_vllm.py -n 0``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from nla_monitor import Monitor
from nla_monitor.config import NLAConfig
from nla_monitor.nla import load_verbalizer
from nla_monitor.nla.engines import open_verbalizer, release
from nla_monitor.organism import LAYER, agent_prompt, keyed_rng, load_target, paths
from nla_monitor.records import ActivationSample, AgentContext, Completion
from nla_monitor.sources import CaptureReplica, HiddenStatesFolder
from tests.organism_support import activations
from tests.vllm_server import bare_copy, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOLERANCE = 1e-5
CALLS = 12
POLICY = {"triggers": ["\n"], "tokens_per_sequence": 3, "generated_tokens": 6}


@dataclass
class Capturing:
    url: str
    folder: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Capturing]:
    """Extracts the layer that the AV reads, and one more."""
    root = tmp_path_factory.mktemp("vllm")
    folder = root / "hidden"
    folder.mkdir()
    layers = {"eagle_aux_hidden_state_layer_ids": [1, LAYER + 1]}
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": layers},
    }
    transfer = {
        "kv_connector": "CpuHiddenStatesConnector",
        "kv_connector_module_path": "cpu_hidden_states",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    arguments = ["--no-enable-chunked-prefill", "--speculative-config", json.dumps(speculative)]
    arguments += ["--kv-transfer-config", json.dumps(transfer)]
    model = bare_copy(Path(paths("planted").target), root / "target")
    with serving(model, root / "log", *arguments) as url:
        yield Capturing(url, folder)


def prompts(tokenizer: Any) -> list[list[int]]:
    return [
        tokenizer(agent_prompt(keyed_rng("vllm", number)).prompt.splitlines()[0] + "\n")["input_ids"]
        for number in range(CALLS)
    ]


def answered(url: str, prompt: list[int], *, seed: int) -> tuple[int, ...]:
    """What the server answers: every other time greedily, else sampled."""
    body = {
        "model": "organism",
        "prompt": prompt,
        "max_tokens": 12,
        "temperature": float(seed % 2),
        "seed": seed,
        "return_token_ids": True,
        "kv_transfer_params": {"include_output_tokens": True},
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120.0).raise_for_status().json()
    return tuple(answer["choices"][0]["token_ids"])


def samples_of(monitor: Monitor) -> dict[tuple[str, int, str], ActivationSample]:
    assert monitor.flush(120)
    assert monitor.stats.skipped == {}
    assert monitor.stats.dropped == {}
    found = list(monitor.spool.lease("test", 10_000, 60).samples)
    return {(one.agent.agent_run_id if one.agent else "", one.position, one.trigger): one for one in found}


def tapped(
    database: str, calls: list[tuple[list[int], tuple[int, ...]]]
) -> dict[tuple[str, int, str], ActivationSample]:
    """What a tap takes when a model of this process writes the same."""
    model, tokenizer = load_target("planted")
    with Monitor(database=database, worker="external", capture=POLICY).attach(model, tokenizer) as monitor:
        for number, (prompt, answer) in enumerate(calls):
            handle = monitor.open_session(AgentContext(f"run-{number}"), prompt)
            cache, tokens = None, [prompt, *([token] for token in answer[:-1])]
            with torch.no_grad():
                for one in tokens:
                    cache = model(torch.tensor([one]), past_key_values=cache, use_cache=True).past_key_values
            monitor.close_session(handle)
        return samples_of(monitor)


def assert_same(expected: dict[Any, ActivationSample], found: dict[Any, ActivationSample]) -> None:
    assert expected.keys() == found.keys()
    assert len(found) >= 5 * CALLS
    for place, one in expected.items():
        assert found[place].attributes["source"] == "vllm"
        assert float(np.linalg.norm(one.vector - found[place].vector)) <= TOLERANCE * one.norm


def test_what_the_answering_server_writes_gives_a_taps_samples(server: Capturing, tmp_path: Path) -> None:
    _, tokenizer = load_target("planted")
    calls = []
    source = HiddenStatesFolder(server.folder, tokenizer, layer_ids=(1, LAYER + 1))
    with Monitor(database=f"sqlite:///{tmp_path / 'a.db'}", worker="external", capture=POLICY) as monitor:
        monitor.attach_source(source)
        for number, prompt in enumerate(prompts(tokenizer)):
            handle = monitor.open_session(AgentContext(f"run-{number}"), prompt)
            answer = answered(server.url, prompt, seed=number)
            monitor.close_session(handle, completion=Completion(token_ids=answer))
            calls.append((prompt, answer))
        found = samples_of(monitor)
    assert_same(tapped(f"sqlite:///{tmp_path / 'b.db'}", calls), found)
    assert not list(server.folder.glob("*.safetensors")), "what was read is deleted"


def test_a_replica_that_is_sent_the_calls_again_gives_them_too(server: Capturing, tmp_path: Path) -> None:
    _, tokenizer = load_target("planted")
    calls = [(one, answered(server.url, one, seed=number)) for number, one in enumerate(prompts(tokenizer))]
    for file in server.folder.iterdir():
        file.unlink()
    source = CaptureReplica(server.url, server.folder, tokenizer, proxy=False, layer_ids=(1, LAYER + 1))
    with Monitor(database=f"sqlite:///{tmp_path / 'a.db'}", worker="external", capture=POLICY) as monitor:
        monitor.attach_source(source)
        for number, (prompt, answer) in enumerate(calls):
            handle = monitor.open_session(AgentContext(f"run-{number}"), prompt)
            monitor.close_session(handle, completion=Completion(token_ids=answer))
        found = samples_of(monitor)
    assert_same(tapped(f"sqlite:///{tmp_path / 'b.db'}", calls), found)
    assert not list(server.folder.glob("*.safetensors"))


def test_a_server_reads_activations_as_the_av(tmp_path: Path) -> None:
    """Prompt embeddings: the AV on vLLM says what the AV in this process says."""
    av = bare_copy(Path(paths("planted").av), tmp_path / "av")
    vectors = np.stack([activations(agent_prompt(keyed_rng("vllm", number)).prompt)[-1] for number in range(8)])
    with serving(av, tmp_path / "log", "--enable-prompt-embeds") as url:
        config = NLAConfig(av=str(av), engine="vllm", url=url, dtype="float32", max_new_tokens=64)
        served: Any = open_verbalizer(str(av), config)
        try:
            assert served.check().repeatable
            said = [one.text for one in served.verbalize(vectors)]
        finally:
            release(served)
    local = load_verbalizer(str(av), NLAConfig(av=str(av), max_new_tokens=64))
    assert said == [one.text for one in local.verbalize(vectors)]
