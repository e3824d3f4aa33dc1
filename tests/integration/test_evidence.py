"""The controls on both organisms: what is in the activation passes, what the natural AV makes up does not."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import pytest

from nla_monitor.controls import Controls
from nla_monitor.evidence.nulls import gaussian, seed_of
from nla_monitor.nla.fidelity import record_of
from nla_monitor.organism import LAYER, grammar, keyed_rng, make_transcript
from nla_monitor.organism.reading import Reader
from nla_monitor.organism.train import encode, extract
from nla_monitor.records import Explanation, Reading, Support
from nla_monitor.rules import RuleSet
from nla_monitor.rules.loader import load_text
from tests.store_support import sample

COUNT = 16
EVIDENCE = {
    "named": "{agreement: {min: 0}, claim_probability: {min: 0}, swap_margin: {min: -2, alternatives: ALTERNATIVES}}",
    "made": "{claim_probability: {}, swap_margin: {min: -2}}",
    "nulls": "{null_percentile: {min: 0}, null_match_rate: {max: 1}}",
}


def topic_rule(topic: str, kind: str) -> Any:
    """Whatever topic is claimed; its alternatives are the other topics, or made up."""
    others = [f"An agent is working on {other} code." for other in grammar.TOPICS if other != topic]
    evidence = EVIDENCE[kind].replace("ALTERNATIVES", str(others))
    return load_text(
        f"""
title: Claims the topic {topic}
id: {topic}
severity: low
detection: {{words: {{keywords: [working on {topic} code, task is about {topic}]}}, condition: words}}
evidence: {evidence}
tests: {{positive: [An agent is working on {topic} code.], negative: [It is honest.]}}
"""
    )


class Bench:
    """One organism, and readings of its activations at random places of new transcripts."""

    def __init__(self, variant: str) -> None:
        self.reader = Reader(variant)
        self.rules = {kind: RuleSet([topic_rule(topic, kind) for topic in grammar.TOPICS]) for kind in EVIDENCE}
        made = [make_transcript(keyed_rng("evidence", number), tier="nla") for number in range(COUNT)]
        docs = encode(self.reader.tokenizer, made)
        places = [
            keyed_rng("place", number).choice(
                [at for at, end in enumerate(doc.ends[:-1]) if at > 2 and doc.transcript.zone(end) == "hidden"]
            )
            for number, doc in enumerate(docs)
        ]
        vectors = extract(self.reader.target, docs, [[place] for place in places]).vectors.numpy()
        self.readings = self.read(vectors)
        self.supports = {kind: self.check(self.readings, kind) for kind in ("named", "made")}

    def read(self, vectors: Any) -> list[Reading]:
        av, ar = self.reader.verbalizer, self.reader.reconstructor
        texts = av.verbalize(vectors)
        scores = ar.score(vectors, [text.text for text in texts])
        found = []
        for number, (vector, text, score) in enumerate(zip(vectors, texts, scores, strict=True)):
            one = sample(number, vector=vector, layer=LAYER, sample_id=f"sample-{number}")
            explanation = Explanation(one.sample_id, text.text, text.truncated, text.tokens, av.content_hash)
            found.append(Reading(one, explanation, record_of(one.sample_id, score, ar.content_hash)))
        return found

    def check(self, readings: Sequence[Reading], kind: str, size: int = COUNT) -> list[Support]:
        rules = self.rules[kind]
        controls = Controls(rules, self.reader.verbalizer, self.reader.reconstructor)
        found: list[Support] = []
        for start in range(0, len(readings), size):
            part = readings[start : start + size]
            found += controls.check(rules.evaluate(part), {one.sample_id: one for one in part}).values()
        return found

    def results(self, control: str, kind: str = "named") -> list[float]:
        return [support.controls[control] for support in self.supports[kind]]


@pytest.fixture(scope="module")
def planted() -> Bench:
    return Bench("planted")


@pytest.fixture(scope="module")
def natural() -> Bench:
    """Its activations do not hold the topic at such places; its AV names one all the same."""
    return Bench("natural")


def test_both_avs_claim_topics(planted: Bench, natural: Bench) -> None:
    assert len(planted.supports["named"]) >= 0.8 * COUNT
    assert len(natural.supports["named"]) >= 0.5 * COUNT


@pytest.mark.parametrize("kind", ["named", "made"])
def test_the_swap_margin_tells_what_is_there_from_what_is_made_up(planted: Bench, natural: Bench, kind: str) -> None:
    """Also with alternatives that are made because the rule names none."""
    there, made_up = planted.results("swap_margin", kind), natural.results("swap_margin", kind)
    assert sum(margin >= 0.02 for margin in there) >= 0.9 * len(there)
    assert sum(margin >= 0.02 for margin in made_up) <= 0.1 * len(made_up)


def test_the_av_is_sure_of_what_is_there_and_wavers_over_what_it_makes_up(planted: Bench, natural: Bench) -> None:
    assert median(planted.results("claim_probability")) > 0.9
    assert median(natural.results("claim_probability")) < 0.6
    assert median(planted.results("agreement")) >= 0.8
    assert median(natural.results("agreement")) <= 0.6
    assert all("claim_probability" in support.not_run for support in planted.supports["made"])


def test_a_readings_fidelity_stands_above_those_of_nulls_and_a_nulls_does_not(planted: Bench) -> None:
    real = planted.check(planted.readings[:4], "nulls")
    assert min(support.controls["null_percentile"] for support in real) >= 0.95
    nulls = planted.read(gaussian(16, planted.reader.verbalizer.d_model, seed_of("other")))
    made_up = planted.check(nulls, "nulls")
    assert made_up, "the AV names topics for random vectors, too"
    assert median(support.controls["null_percentile"] for support in made_up) < 0.95
    assert all(0 <= support.controls["null_match_rate"] <= 1 for support in [*real, *made_up])


def test_real_models_give_the_same_controls_in_any_batch(planted: Bench) -> None:
    again = planted.check(planted.readings[:4][::-1], "named", size=1)
    before = {support.match_id: support for support in planted.supports["named"]}
    assert again
    for support in again:
        for name, value in support.controls.items():
            assert value == pytest.approx(before[support.match_id].controls[name], abs=1e-3), name


def test_an_activation_out_of_range_still_has_finite_controls(planted: Bench) -> None:
    """The AV does not see the norm; a sink's controls are those of its direction."""
    (one,) = planted.read(planted.readings[0].sample.vector[None] * np.float32(1e6))
    assert one.explanation.text == planted.readings[0].explanation.text
    (support,) = planted.check([one], "named")
    assert all(np.isfinite(value) for value in support.controls.values())
