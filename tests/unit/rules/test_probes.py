"""Probes: fitting, files, and selections on the raw activation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_kit import reading
from safetensors.numpy import save_file

from nla_monitor.errors import RuleError
from nla_monitor.records import Match, Reading
from nla_monitor.rules import Rule, RuleSet, lint, load_file, load_text
from nla_monitor.rules.deferred import connect
from nla_monitor.rules.embedded import run_rule_tests
from nla_monitor.rules.probe import Probe, fit_probe, load_probe, save_probe

WIDTH = 8
RULE = """\
title: A direction
id: direction
severity: low
detection:
  high: {probe: {file: probe.safetensors, gte: 0.5}}
  condition: high
tests:
  positive: [{text: any, given: {high: true}}]
  negative: [{text: any, given: {high: false}}]
"""


def axis(number: int = 0) -> np.ndarray:
    return np.eye(WIDTH)[number]


def written(folder: Path, probe: Probe | None = None, rule: str = RULE) -> Rule:
    """A rule beside its probe file."""
    save_probe(probe or Probe(axis(), layer=0), folder / "probe.safetensors")
    file = folder / "rule.yaml"
    file.write_text(rule)
    return load_file(file)


def at(vector: np.ndarray | list[float], layer: int = 0) -> Reading:
    found = reading("any", layer=layer)
    return dataclasses.replace(
        found, sample=dataclasses.replace(found.sample, vector=np.asarray(vector, dtype=np.float32))
    )


def match(rule: Rule, item: Reading) -> Match | None:
    return next(iter(RuleSet([rule]).evaluate([item])), None)


def test_a_probe_reads_the_activation_not_the_words(tmp_path: Path) -> None:
    """Met where the projection reaches the bound; the hit has no quote; the score is the projection."""
    rule = written(tmp_path)
    above, below = at(axis() * 0.75), at(axis() * 0.25)
    hit = match(rule, above)
    assert hit is not None
    assert [(item.selection, item.quote) for item in hit.hits] == [("high", "")]
    assert match(rule, below) is None
    assert rule.probe_value(above) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("bounds", "met"),
    [
        ("gt: 1", False),
        ("gte: 1", True),
        ("lt: 1", False),
        ("lte: 1", True),
        ("gte: 0, lt: 2", True),
        ("gte: 2, lt: 3", False),
    ],
)
def test_bounds_are_as_elsewhere(tmp_path: Path, bounds: str, met: bool) -> None:
    rule = written(tmp_path, rule=RULE.replace("gte: 0.5", bounds))
    assert (match(rule, at(axis())) is not None) is met


def test_low_values_speak_for_a_rule_that_asks_for_them(tmp_path: Path) -> None:
    rule = written(tmp_path, rule=RULE.replace("gte: 0.5", "lt: -1"))
    assert rule.probe_value(at(axis() * -3)) == pytest.approx(3)


def test_unit_probes_see_the_direction_only(tmp_path: Path) -> None:
    rule = written(tmp_path, Probe(axis(), layer=0, normalize="unit"))
    assert match(rule, at(axis() * 1e-3)) is not None
    assert match(rule, at(axis() * 0.4 + axis(1))) is None


@pytest.mark.parametrize(
    ("item", "why"),
    [
        (at(np.ones(WIDTH + 1)), "8 numbers, the activation has 9"),
        (at(axis(), layer=3), "made on layer 0, the activation is of layer 3"),
        (at(np.full(WIDTH, np.nan)), "not finite"),
    ],
)
def test_an_activation_that_it_cannot_read_is_not_met_and_said(tmp_path: Path, item: Reading, why: str) -> None:
    """Never a wrong number; and the match that comes all the same says which selection was left out."""
    rule = written(tmp_path)
    assert match(rule, item) is None
    assert rule.probe_value(item) is None
    either = written(tmp_path, rule=RULE.replace("condition: high", "condition: '!high'"))
    found = match(either, item)
    assert found is not None
    assert why in found.unjudged["high"]


def test_a_probe_for_other_activations_is_refused_before_work_begins(tmp_path: Path) -> None:
    rule = written(tmp_path)
    connect([rule], d_model=WIDTH, layer=0)
    with pytest.raises(RuleError, match="8 numbers"):
        connect([rule], d_model=WIDTH + 1)
    with pytest.raises(RuleError, match="layer 0"):
        connect([rule], d_model=WIDTH, layer=2)


def test_the_version_follows_the_probes_content(tmp_path: Path) -> None:
    """Another probe in the same file is another rule; the same in another place is the same rule."""
    first = written(tmp_path)
    again = load_text(first.spec.source())
    (tmp_path / "there").mkdir()
    moved = written(tmp_path / "there")
    other = written(tmp_path, Probe(axis(1), layer=0))
    assert first.header.version == again.header.version == moved.header.version
    assert other.header.version != first.header.version
    with pytest.raises(RuleError, match="another probe than the rule was written for"):
        load_text(first.spec.source())


BROKEN = [
    ({"weight": np.ones((2, 3), dtype=np.float32)}, {}, "must be [d_model]"),
    ({"weight": np.ones(3, dtype=np.float32), "bias": np.ones(2, dtype=np.float32)}, {}, "one number"),
    ({"other": np.ones(3, dtype=np.float32)}, {}, "no tensor 'weight'"),
    ({"weight": np.array([1, np.inf], dtype=np.float32)}, {}, "NaN or Inf"),
    ({"weight": np.ones(3, dtype=np.float32)}, {"kind": "tree"}, "kind is 'tree'"),
    ({"weight": np.ones(3, dtype=np.float32)}, {"normalize": "rms"}, "normalize is 'rms'"),
    ({"weight": np.ones(3, dtype=np.float32)}, {"d_model": "4"}, "states d_model 4"),
    ({"weight": np.ones(3, dtype=np.float32)}, {"layer": "two"}, "layer is 'two'"),
]


@pytest.mark.parametrize("row", BROKEN, ids=[row[2] for row in BROKEN])
def test_a_file_that_is_no_probe_names_file_line_and_key(
    tmp_path: Path, row: tuple[dict[str, np.ndarray], dict[str, str], str]
) -> None:
    tensors, about, message = row
    save_file(tensors, str(tmp_path / "probe.safetensors"), metadata=about or None)
    (tmp_path / "rule.yaml").write_text(RULE)
    with pytest.raises(RuleError) as caught:
        load_file(tmp_path / "rule.yaml")
    assert message in str(caught.value)
    assert (caught.value.line, caught.value.key) == (5, "detection.high.probe.file")


@pytest.mark.parametrize("content", [None, b"", b"not safetensors", b"\xff" * 100])
def test_no_probe_file_or_another_kind_of_file(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "probe.safetensors").write_bytes(content)
    (tmp_path / "rule.yaml").write_text(RULE)
    with pytest.raises(RuleError, match="the probe"):
        load_file(tmp_path / "rule.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gte: 0.5", "gtee: 0.5", "did you mean 'gte'?"),
        (", gte: 0.5", "", "name a bound"),
        ("file: probe.safetensors, ", "", "'file' is missing"),
        ("gte: 0.5", "gte: .nan", "gte"),
        ("{file: probe.safetensors, gte: 0.5}", "probe.safetensors", "must be a mapping"),
        ("gte: 0.5}", "gte: 0.5}, quotes: ignore", "'quotes' is for"),
        ("given: {high: true}", "given: {hihg: true}", "did you mean 'high'?"),
    ],
)
def test_a_malformed_probe_selection_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(RuleError) as caught:
        written(tmp_path, rule=RULE.replace(old, new, 1))
    assert message in str(caught.value)
    assert caught.value.line is not None
    assert caught.value.key


def test_embedded_tests_must_say_what_the_probe_says(tmp_path: Path) -> None:
    """A test that hangs on a vector which it does not have fails, and says what to write."""
    rule = written(tmp_path, rule=RULE.replace(", given: {high: true}", ""))
    results = run_rule_tests(rule)
    assert [result.passed for result in results] == [False, True]
    assert "given: {high: true}" in results[0].message


def test_lint_says_when_a_probe_does_not_know_its_layer(tmp_path: Path) -> None:
    written(tmp_path, Probe(axis()))
    assert "probe-without-layer" in {finding.code for finding in lint(tmp_path / "rule.yaml")}
    written(tmp_path)
    assert "probe-without-layer" not in {finding.code for finding in lint(tmp_path / "rule.yaml")}


def groups(count: int = 200, gap: float = 3.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two clouds whose means differ along the third axis, at different scales per axis."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2 == 0
    rows = generator.normal(size=(count, WIDTH)) * np.geomspace(0.1, 10, WIDTH)
    rows[labels, 2] += gap
    return rows.astype(np.float32), labels


@pytest.mark.parametrize("kind", ["direction", "logistic"])
@pytest.mark.parametrize("normalize", ["none", "unit"])
def test_a_fitted_probe_tells_new_activations_apart(tmp_path: Path, kind: str, normalize: str) -> None:
    """On held-out data, and the same after a trip through its file."""
    rows, labels = groups()
    probe = fit_probe(rows, labels, kind=kind, normalize=normalize, layer=4, model="m")
    save_probe(probe, tmp_path / "p.safetensors")
    loaded = load_probe(tmp_path / "p.safetensors")
    assert (loaded.kind, loaded.layer, loaded.model, loaded.normalize) == (kind, 4, "m", normalize)
    test, truth = groups(seed=1)
    middle = 0.5 if kind == "logistic" else 0.0
    said = np.array([loaded.value(row) > middle for row in test])
    # The mean difference ignores how noisy an axis is; the regression does not.
    assert (said == truth).mean() > (0.9 if kind == "logistic" and normalize == "none" else 0.55)
    assert [loaded.value(row) for row in test[:5]] == pytest.approx([probe.value(row) for row in test[:5]], rel=1e-3)


def test_a_direction_is_a_unit_vector_with_its_zero_half_way() -> None:
    rows, labels = groups()
    probe = fit_probe(rows, labels)
    assert np.linalg.norm(probe.weight) == pytest.approx(1)
    means = [probe.value(rows[labels].mean(axis=0)), probe.value(rows[~labels].mean(axis=0))]
    assert sum(means) == pytest.approx(0, abs=1e-6)
    assert means[0] > 0


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (np.ones((3, 2)), [1, 1, 1], "both kinds of labels"),
        (np.ones((3, 2)), [1, 0], r"\[n\] labels"),
        (np.ones(3), [1, 0, 1], r"\[n, d\]"),
        (np.array([[np.nan, 1], [0, 1]]), [1, 0], "NaN or Inf"),
        (np.ones((2, 2)), [1, 0], "same mean"),
    ],
)
def test_data_that_no_probe_can_be_made_of(rows: np.ndarray, labels: list[int], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        fit_probe(rows, labels)


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=WIDTH, max_size=WIDTH), st.sampled_from(["none", "unit"]))
def test_a_logistic_value_is_a_probability_or_said_to_be_none(values: list[float], normalize: str) -> None:
    probe = Probe(axis() * 1e6, 1e3, "logistic", normalize=normalize)
    value = probe.read(at(values).sample)
    assert isinstance(value, str) or 0 <= value <= 1


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    """Others can read and write it: ``[1, d_model]``, no bias, metadata as text."""
    save_file({"weight": np.ones((1, 3), dtype=np.float16)}, str(tmp_path / "p"), metadata={"layer": json.dumps(2)})
    probe = load_probe(tmp_path / "p")
    assert (probe.d_model, probe.bias, probe.kind, probe.layer) == (3, 0.0, "direction", 2)
