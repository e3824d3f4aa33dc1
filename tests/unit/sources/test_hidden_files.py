"""vLLM's files of hidden states: those that are ours give a tap's samples, whatever else lies in the folder."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sources_kit import Outlet, assert_same, by_place, started, tapped

from nla_monitor.errors import ConfigError
from nla_monitor.records import AgentContext, Completion
from nla_monitor.sources import HiddenStatesFolder
from tests.langchain_support import byte_tokenizer, tiny_llama

TOLERANCE = 1e-5
TOKENIZER = byte_tokenizer()
MODEL = tiny_llama()
PROMPT = tuple(TOKENIZER("Is this a test?", add_special_tokens=False)["input_ids"])
ANSWER = tuple(TOKENIZER("It may well be.", add_special_tokens=False)["input_ids"])


def tensors(ids: Sequence[int], layer_ids: Sequence[int] = (2,)) -> dict[str, torch.Tensor]:
    """What vLLM saves for a request: column i is what goes into block ``layer_ids[i]``."""
    tokens = torch.tensor(list(ids))
    with torch.no_grad():
        states = MODEL(tokens[None], output_hidden_states=True).hidden_states
    return {
        "hidden_states": torch.stack([states[one][0] for one in layer_ids], dim=1).contiguous(),
        "token_ids": tokens,
    }


def write(folder: Path, name: str, ids: Sequence[int], **settings: Any) -> Path:
    """A whole file with its lock, as the connector leaves them."""
    path = folder / f"{name}.safetensors"
    Path(f"{path}.lock").touch()
    save_file(tensors(ids, **settings), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Outlet]:
    source = HiddenStatesFolder(tmp_path, TOKENIZER, timeout=0.4)
    with started(source) as outlet:
        yield outlet


def test_prompt_and_answer_give_what_a_tap_takes(tmp_path: Path, folder: Outlet) -> None:
    path = write(tmp_path, "cmpl-1", [*PROMPT, *ANSWER[:-1]])
    found = folder.read((PROMPT, Completion(token_ids=ANSWER)))
    assert_same(tapped(MODEL, TOKENIZER, PROMPT, ANSWER), found, tolerance=TOLERANCE)
    assert {(sample.attributes["source"], sample.attributes.get("proxy")) for sample in found} == {("vllm", None)}
    assert not path.exists(), "files are large: what was read is deleted"
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_prompt_alone_gives_the_prompts_samples(tmp_path: Path, folder: Outlet) -> None:
    """Without ``include_output_tokens`` vLLM saves no written token."""
    write(tmp_path, "cmpl-1", PROMPT)
    found = folder.read((PROMPT, Completion(text="It may well be.")))
    expected = [one for one in tapped(MODEL, TOKENIZER, PROMPT, ANSWER) if one.agent and not one.agent.generated]
    assert_same(expected, found, tolerance=TOLERANCE)


def test_several_layers_are_found_by_the_servers_ids_whatever_their_order(tmp_path: Path) -> None:
    source = HiddenStatesFolder(tmp_path, TOKENIZER, layer_ids=(4, 1, 2), timeout=5)
    with started(source, layers=(0, 1)) as outlet:
        write(tmp_path, "cmpl-1", [*PROMPT, *ANSWER[:-1]], layer_ids=(4, 1, 2))
        found = outlet.read((PROMPT, Completion(token_ids=ANSWER)))
    assert_same(tapped(MODEL, TOKENIZER, PROMPT, ANSWER, layers=(0, 1)), found, tolerance=TOLERANCE)


def test_a_layer_that_the_server_does_not_write_is_an_error_that_knows_the_off_by_one(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"layer K \(the output of block K\) has id K \+ 1.*layer_ids \[1, 2\]"),
        started(HiddenStatesFolder(tmp_path, layer_ids=(1,))),
    ):
        pass


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"), started(HiddenStatesFolder(tmp_path / "no")):
        pass


def test_the_same_prompt_at_once_gives_each_call_a_file_and_each_answer_its_own(tmp_path: Path, folder: Outlet) -> None:
    other = tuple(reversed(ANSWER))
    write(tmp_path, "cmpl-1", [*PROMPT, *other[:-1]])
    write(tmp_path, "cmpl-2", [*PROMPT, *ANSWER[:-1]])
    found = folder.read((PROMPT, Completion(token_ids=ANSWER)), (PROMPT, Completion(token_ids=other)))
    for run, answer in (("run-0", ANSWER), ("run-1", other)):
        mine = [one for one in found if one.agent is not None and one.agent.agent_run_id == run]
        written = [one for one in mine if one.agent is not None and one.agent.generated]
        assert written
        assert all(one.token_id == answer[one.position - len(PROMPT)] for one in written)
    assert folder.source.stats.forwards == 2


def test_a_file_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    """The lock is held before the client knows of the file; half of it is there for a while."""
    path = tmp_path / "cmpl-1.safetensors"
    lock = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    whole = tmp_path / "elsewhere"
    save_file(tensors(PROMPT), whole)
    with started(HiddenStatesFolder(tmp_path, TOKENIZER, timeout=20)) as outlet:
        path.write_bytes(whole.read_bytes()[:700])

        def finish() -> None:
            time.sleep(0.3)
            path.write_bytes(whole.read_bytes())
            os.close(lock)

        thread = threading.Thread(target=finish)
        thread.start()
        found = outlet.read((PROMPT, None))
        thread.join()
        assert found
        assert outlet.source.stats.skipped == {}


def test_a_file_without_a_lock_counts_as_whole_when_it_has_been_still(tmp_path: Path) -> None:
    """``use_synchronization_lock: false``."""
    with started(HiddenStatesFolder(tmp_path, TOKENIZER, timeout=10)) as outlet:
        save_file(tensors(PROMPT), tmp_path / "cmpl-1.safetensors")
        begun = time.monotonic()
        assert outlet.read((PROMPT, None))
        assert time.monotonic() - begun > 0.8


def _truncated(folder: Path) -> None:
    path = write(folder, "bad", PROMPT)
    path.write_bytes(path.read_bytes()[:-100])


def _garbage(folder: Path) -> None:
    write(folder, "bad", PROMPT).write_bytes(os.urandom(500))


def _empty(folder: Path) -> None:
    write(folder, "bad", PROMPT).write_bytes(b"")


def _of_something_else(folder: Path) -> None:
    save_file({"weight": torch.zeros(3, 3)}, write(folder, "bad", PROMPT))


def _of_another_model(folder: Path) -> None:
    states = torch.zeros(len(PROMPT), 1, 64)
    save_file({"hidden_states": states, "token_ids": torch.tensor(PROMPT)}, write(folder, "bad", PROMPT))


def _of_other_layers(folder: Path) -> None:
    write(folder, "bad", PROMPT, layer_ids=(1, 2))


def _with_fewer_rows(folder: Path) -> None:
    states = torch.zeros(len(PROMPT) - 2, 1, 32)
    save_file({"hidden_states": states, "token_ids": torch.tensor(PROMPT)}, write(folder, "bad", PROMPT))


@pytest.mark.parametrize(
    ("spoil", "reason", "words"),
    [
        (_truncated, "unreadable_file", "cut short"),
        (_garbage, "unreadable_file", "cannot be read"),
        (_empty, "unreadable_file", "cannot be read"),
        (_of_something_else, "foreign_file", r"holds \['weight'\]"),
        (_of_another_model, "foreign_file", r"hidden_states \[15, 1, 64\] for 15 tokens; expected \[15, 1, 32\]"),
        (_of_other_layers, "foreign_file", r"\[15, 2, 32\].*Correct source.layer_ids"),
        (_with_fewer_rows, "foreign_file", r"\[13, 1, 32\] for 15 tokens.*chunked prefill off"),
    ],
)
def test_a_file_that_is_of_no_use_is_counted_said_and_left_where_it_is(
    spoil: Any, reason: str, words: str, folder: Outlet, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path = folder.source.folder
    spoil(tmp_path)
    with caplog.at_level(logging.WARNING, "nla_monitor"):
        assert folder.read((PROMPT, None)) == []
    assert folder.source.stats.skipped == {reason: 1, "no_file": 1}
    assert re.search(words, caplog.text)
    assert (tmp_path / "bad.safetensors").exists()
    write(tmp_path, "good", PROMPT)
    assert folder.read((PROMPT, None)), "and the next one is read"
    assert folder.source.stats.skipped[reason] == 1, "it is looked at once"


def test_vectors_that_are_not_finite_are_dropped_and_counted(tmp_path: Path, folder: Outlet) -> None:
    held = tensors(PROMPT)
    held["hidden_states"][:] = torch.nan
    save_file(held, write(tmp_path, "nan", PROMPT))
    assert folder.read((PROMPT, None)) == []
    assert folder.source.stats.dropped["non_finite"] >= 2


def test_half_precision_is_read_as_it_is(tmp_path: Path, folder: Outlet) -> None:
    held = tensors(PROMPT)
    held["hidden_states"] = held["hidden_states"].bfloat16()
    save_file(held, write(tmp_path, "half", PROMPT))
    expected = [one for one in tapped(MODEL, TOKENIZER, PROMPT, ANSWER) if one.agent and not one.agent.generated]
    found = folder.read((PROMPT, None))
    assert by_place(found).keys() == by_place(expected).keys()
    for place, sample in by_place(found).items():
        assert torch.equal(
            torch.tensor(sample.vector), torch.tensor(by_place(expected)[place].vector).bfloat16().float()
        )


def test_older_files_and_those_of_other_calls_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = write(tmp_path, "old", PROMPT)
    with started(HiddenStatesFolder(tmp_path, TOKENIZER, timeout=0.3)) as outlet:
        other = write(tmp_path, "other", ANSWER)
        (tmp_path / "notes.txt").write_text("mine")
        assert outlet.read((PROMPT, None)) == []
        assert outlet.source.stats.skipped == {"no_file": 1}
    assert old.exists()
    assert other.exists()
    assert "An API model has no activations to read" in caplog.text
    assert "proxy: true" in caplog.text


def test_files_can_be_kept_and_are_read_once(tmp_path: Path) -> None:
    with started(HiddenStatesFolder(tmp_path, TOKENIZER, keep_files=True, timeout=0.3)) as outlet:
        path = write(tmp_path, "kept", PROMPT)
        assert outlet.read((PROMPT, None))
        assert path.exists()
        assert outlet.read((PROMPT, None)) == []
        assert outlet.source.stats.skipped == {"no_file": 1}


def test_calls_that_wait_for_files_wait_together(tmp_path: Path) -> None:
    """Twenty calls of an API model cost one waiting time, not twenty."""
    with started(HiddenStatesFolder(tmp_path, TOKENIZER, timeout=0.5)) as outlet:
        begun = time.monotonic()
        assert outlet.read(*[(PROMPT, None)] * 20) == []
        assert time.monotonic() - begun < 3
        assert outlet.source.stats.skipped == {"no_file": 20}


def test_the_end_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    source = HiddenStatesFolder(tmp_path, TOKENIZER, timeout=100)
    with started(source):
        source.close_session(source.open_session(AgentContext("run"), PROMPT))
        begun = time.monotonic()
        assert not source.close(0.5)
        assert time.monotonic() - begun < 5


def test_a_folder_that_vanishes_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NLA_MONITOR_STRICT", "0")
    inside = tmp_path / "hidden"
    inside.mkdir()
    with started(HiddenStatesFolder(inside, TOKENIZER, timeout=5)) as outlet:
        inside.rmdir()
        assert outlet.read((PROMPT, None)) == []
        assert outlet.source.stats.unmatched_sessions == 1
        inside.mkdir()
        write(inside, "cmpl-1", PROMPT)
        assert outlet.read((PROMPT, None))
