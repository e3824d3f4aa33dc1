"""Selections by meaning: sentence embeddings and zero-shot classification, with real (tiny) models."""

from __future__ import annotations

import builtins
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_kit import reading
from tiny_models import embedding_model, inference_model

from nla_monitor.errors import MissingExtraError, RuleError
from nla_monitor.records import Match
from nla_monitor.rules import Rule, RuleSet, lint, load_file
from nla_monitor.rules import semantic as semantic_module
from nla_monitor.rules.deferred import connect
from nla_monitor.rules.semantic import MAX_SENTENCES, sentences_of

RULE = """\
title: Deception by meaning
id: deception
severity: low
detection:
  topic: {{keywords: [model, it]}}
  meaning:
    semantic:
      like: [The model plans to deceive its overseer.]
      unlike: [The model reports results honestly.]
      min: {least}
      model: {model}
      method: {method}
  condition: topic && meaning
tests:
  positive: [{{text: The model is sly., given: {{meaning: true}}}}]
  negative: [{{text: The model is sly., given: {{meaning: false}}}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sentence_transformers")
    found = tmp_path_factory.mktemp("models")
    embedding_model(found / "embedding")
    inference_model(found / "entails", entails=True)
    inference_model(found / "contradicts", entails=False)
    return found


def written(folder: Path, model: str = "./embedding", method: str = "embedding", least: float = 0.6) -> Rule:
    file = folder / "rule.yaml"
    file.write_text(RULE.format(model=model, method=method, least=least))
    return load_file(file)


def found(rule: Rule, text: str) -> Match | None:
    return next(iter(RuleSet([rule]).evaluate([reading(text)])), None)


def test_the_sentence_that_means_it_is_quoted(folder: Path) -> None:
    """Not the whole explanation: the one claim, verbatim, with its place."""
    text = "- The weather is nice today.\n- It intends to deceive its overseer!\n- It reports results honestly."
    match = found(written(folder, least=0.5), text)
    assert match is not None
    quotes = [hit.quote for hit in match.hits if hit.selection == "meaning"]
    assert quotes == ["It intends to deceive its overseer!"]
    assert text[match.hits[-1].start : match.hits[-1].end] == quotes[0]


@pytest.mark.parametrize(
    "text",
    [
        "The model says the weather is nice today.",
        "The model reports results honestly.",
        "The model does not plan to deceive its overseer.",
        'It says: "The model plans to deceive its overseer."',
        "An article about how the model plans to deceive its overseer.",
    ],
)
def test_other_meanings_and_words_that_are_not_claimed_do_not_match(folder: Path, text: str) -> None:
    assert found(written(folder), text) is None


def test_unlike_decides_between_two_near_meanings(folder: Path) -> None:
    """Near both, nearer to the harmless one: no match, whatever the threshold."""
    text = "The model plans: it reports results honestly."
    assert found(written(folder, least=0.0), text) is None


def test_a_near_miss_does_not_hide_the_claim_beside_it(folder: Path) -> None:
    """The sentence nearest to ``like`` is nearer still to ``unlike``; the next one is the claim."""
    file = folder / "rule.yaml"
    text = RULE.format(model="./embedding", method="embedding", least=0.4)
    text = text.replace("The model plans to deceive its overseer.", "The model plans to deceive")
    file.write_text(text.replace("The model reports results honestly.", "The model plans to deceive the weather"))
    match = found(load_file(file), "The model plans to deceive the weather. It plans to deceive.")
    assert match is not None
    assert match.hits[-1].quote == "It plans to deceive."


@pytest.mark.parametrize(("model", "met"), [("./entails", True), ("./contradicts", False)])
def test_zero_shot_asks_whether_a_sentence_entails_the_claim(folder: Path, model: str, met: bool) -> None:
    file = folder / "rule.yaml"
    file.write_text(
        RULE.format(model=model, method="zero_shot", least=0.9).replace(
            "      unlike: [The model reports results honestly.]\n", ""
        )
    )
    assert (found(load_file(file), "The model plans to cheat on tests.") is not None) is met


def test_a_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = written(folder)
    semantic_module._embedding.cache_clear()
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sentence_transformers"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "sentence_transformers", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"nla-monitor\[semantic\]"):
        connect([rule])
    findings = lint(rule.file)
    assert "cannot-ask" in {finding.code for finding in findings}
    assert not [finding for finding in findings if finding.severity == "error"]


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all"])
def test_a_missing_local_model_is_refused_when_the_rule_is_read(folder: Path, model: str) -> None:
    with pytest.raises(RuleError, match="there is no model in") as caught:
        written(folder, model)
    assert caught.value.key == "detection.meaning.semantic.model"
    assert caught.value.line == 11


@pytest.mark.parametrize("method", ["embedding", "zero_shot"])
def test_a_folder_without_a_model_is_refused_before_work_begins(folder: Path, method: str) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "empty" / "config.json").write_text("{}")
    with pytest.raises(RuleError, match="cannot be loaded"):
        connect([written(folder, "./empty", method)])


def test_the_version_follows_the_models_content_not_its_place(folder: Path, tmp_path: Path) -> None:
    """Moved: the same rule. Other weights: another rule. Loaded again from the store: the same."""
    from nla_monitor.rules import load_text

    first = written(folder)
    embedding_model(tmp_path / "moved")
    moved = written(folder, str(tmp_path / "moved"))
    assert moved.header.version == first.header.version
    assert load_text(first.spec.source()).header.version == first.header.version
    weights = next((tmp_path / "moved").rglob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    assert written(folder, str(tmp_path / "moved")).header.version != first.header.version


@settings(deadline=None)
@given(st.text(max_size=300))
def test_sentences_are_stretches_in_order_that_hold_a_word(text: str) -> None:
    spans = list(sentences_of(text))
    assert len(spans) <= MAX_SENTENCES
    assert all(any(char.isalnum() for char in text[start:end]) for start, end in spans)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))


@pytest.mark.parametrize("unit", ["a.", "a" + "." * 50, "a.*", "word ", "a!?)*", "\n- "])
def test_splitting_costs_what_the_text_is_long(unit: str) -> None:
    def seconds(count: int) -> float:
        text = unit * count + "end"
        started = time.process_time()
        list(sentences_of(text))
        return time.process_time() - started

    short = min(seconds(2_000) for _ in range(3))
    assert seconds(16_000) < 8 * 8 * max(short, 1e-3)
