"""No rule file and no text breaks the rules: every error is ours and says where, and cost grows as the input does."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_kit import reading

from nla_monitor.errors import RuleError
from nla_monitor.rules import RuleSet, lint, load_file, load_text, pack_names
from nla_monitor.rules.document import MAX_BYTES, MAX_DEPTH
from nla_monitor.rules.embedded import run_rule_tests
from nla_monitor.rules.foreign import import_rule
from nla_monitor.rules.loader import find_files
from nla_monitor.rules.rule import Rule

PACKS = {file.stem: file.read_text(encoding="utf-8") for name in pack_names() for file in find_files(name)}
SMALL = """\
title: Talks of cats
id: cats
severity: low
detection:
  cats:
    keywords: [a cat, cats]
    quotes: ignore
  known: {fidelity.fve|gte: 0.3, step|exists: true}
  judged: {judge: {question: 'Is it about cats?', endpoint: 'http://127.0.0.1:9', model: m}}
  pattern: {regex: ['\\bcats? (?P<quote>sleeps?)']}
  condition: (cats || pattern) && known && !judged
exceptions: [step > 5, {selection: {keywords: [toy cats]}}]
window: {group_by: [run_id], count: 2, distinct: step, within: 10 steps, for: 5m}
evidence: {swap_margin: {min: 0.02, alternatives: [dogs]}}
calibration: {alpha: 0.01}
response: [log]
tests:
  positive: [{text: cats, given: {judged: false}}]
  negative: [{text: dogs, fve: 0.1}]
"""
ALL = RuleSet([load_text(text, name) for name, text in PACKS.items()])


def load(text: str) -> Rule | None:
    """The rule; None when it is refused as it must be: with file, line, and a message."""
    rule, error = attempt(text)
    if error is not None:
        assert error.file == "fuzz.yaml"
        assert error.line is not None
        assert 1 <= error.line <= text.count("\n") + text.count("\r") + 2
        assert str(error).strip()
    return rule


def attempt(text: str) -> tuple[Rule | None, RuleError | None]:
    try:
        return load_text(text, "fuzz.yaml"), None
    except RuleError as error:
        return None, error


def everything(rule: Rule, texts: list[str]) -> None:
    """Whatever can be done with a loaded rule, without asking anybody."""
    assert load_text(rule.spec.source()).header == rule.header
    if not rule.questions:
        run_rule_tests(rule)
        RuleSet([rule]).evaluate([reading(text) for text in texts])


# -- rule files ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(max_size=400))
def test_any_text_is_a_rule_or_an_error_of_ours(text: str) -> None:
    load(text)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_file_is_a_rule_or_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(data)
    with pytest.raises(RuleError) as caught:
        load_file(file)
    assert caught.value.file == str(file)
    assert all(finding.severity == "error" for finding in lint(file))


NOISE = st.sampled_from(
    [
        *("\t", "\r\n", "\r", "\x00", "\ufeff", "\u2028", "\x85", "\u202e", "\U0001f600", "\ud800", "---\n", "...\n"),
        *(
            "&a ",
            "*a",
            "!!python/object:os.system ",
            "!x ",
            "? ",
            ": ",
            "- ",
            "{",
            "}",
            "[",
            "]",
            "'",
            '"',
            "|\n",
            ">\n",
        ),
        *("%YAML 1.1\n", "<<: ", "#", "null", "~", "0x1F", "1e999", ".inf", "-.inf", ".nan", "yes", "9" * 40, "\\"),
        *(
            "(",
            ")*",
            "(?=x)",
            "\\1",
            "{1000}",
            "[[:alpha:",
            "&&",
            "||",
            "!",
            "||||",
            "1 of them",
            "size(",
            ".all(x, x)",
        ),
    ]
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_mutated_rule_loads_or_says_where_it_is_wrong(data: st.DataObject) -> None:
    """Bits of YAML, CEL and RE2 put into, cut out of, or doubled in good rules."""
    text = data.draw(st.sampled_from([SMALL, SMALL, *PACKS.values()]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 40)))
        change = data.draw(st.sampled_from(["put", "cut", "double"]))
        middle = data.draw(NOISE) if change == "put" else text[start:end] * (2 if change == "double" else 0)
        text = text[:start] + middle + text[end if change != "put" else start :]
    rule = load(text)
    if rule is not None:
        everything(rule, ["cats sleep", ""])


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([10**30, "", " ", "a" * 5000]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_value_in_any_place_loads_or_says_where_it_is_wrong(data: st.DataObject) -> None:
    """Each place of a full rule holds anything: the error names a key on the way there, or the rule works."""
    rule = yaml.safe_load(SMALL)
    places = list(_places(rule))
    path = data.draw(st.sampled_from(places))
    changed = copy.deepcopy(rule)
    parent: Any = changed
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = data.draw(VALUES)
    found = load(json.dumps(changed))
    if found is not None:
        everything(found, ["cats sleep"])


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


@pytest.mark.parametrize("mark", ["\ufeff", ""])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_marks_change_nothing(tmp_path: Path, mark: str, end: str) -> None:
    for name, text in [*PACKS.items()][:2]:
        file = tmp_path / f"{name}.yaml"
        file.write_bytes((mark + text.replace("\n", end)).encode())
        assert load_file(file).header.version == load_text(text).header.version


HOSTILE = {
    "billion laughs": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "an alias of itself": "a: &a [*a]\n",
    "merge keys": SMALL + "<<: {title: x}\n",
    "deep flow": "a: " + "[" * 5000 + "]" * 5000 + "\n",
    "deep mappings": "a: " + "{a: " * 2000 + "1" + "}" * 2000 + "\n",
    "deep blocks": "".join(f"{' ' * depth}a:\n" for depth in range(MAX_DEPTH * 3)),
    "NUL": SMALL.replace("Talks", "Ta\x00lks"),
    "tabs": SMALL.replace("  cats:", "\tcats:"),
    "a huge number": SMALL.replace("count: 2", "count: " + "9" * 4000),
    "a huge key": SMALL + "k" * 100_000 + ": 1\n",
    "many keys": SMALL + "".join(f"key{number}: 1\n" for number in range(5000)),
    "a long condition": SMALL.replace("!judged", "!judged && " + "!" * 6000 + "cats"),
    "a deep condition": SMALL.replace("!judged", "!judged && " + "(" * 1500 + "cats" + ")" * 1500),
    "a huge repetition": SMALL.replace("\\bcats?", "(((a{1000}){1000}){1000})"),
    "too large": "# " + "x" * MAX_BYTES + "\n" + SMALL,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_a_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text(HOSTILE[name], encoding="utf-8")
    with pytest.raises(RuleError) as caught:
        load_file(file)
    assert caught.value.file == str(file)
    assert len(str(caught.value)) < 2000
    assert [finding.severity for finding in lint(file)].count("error") >= 1
    if name != "too large":
        assert caught.value.line is not None


@pytest.mark.parametrize("name", ["billion laughs", "an alias of itself", "deep blocks", "NUL", "tabs"])
def test_hostile_files_are_not_imported(name: str) -> None:
    with pytest.raises(RuleError):
        import_rule(HOSTILE[name], "x")


# -- texts --------------------------------------------------------------------------------------------------------

PHRASES = [
    "the model",
    "special-case the tests",
    "not",
    "the user",
    '"',
    "'",
    "`",
    "reward hack",
    "it plans to",
    ". ",
    "\n- ",
]
TEXTS = st.one_of(
    st.text(max_size=300),
    st.lists(st.one_of(st.sampled_from(PHRASES), st.text(max_size=5)), max_size=40).map(" ".join),
)


@settings(deadline=None)
@given(text=TEXTS, context=st.one_of(st.none(), TEXTS))
def test_any_explanation_and_context_can_be_judged(text: str, context: str | None) -> None:
    """Every quote stands where its hit says, word for word."""
    for match in ALL.evaluate([reading(text, context=context)]):
        for hit in match.hits:
            assert not hit.quote or text[hit.start : hit.end] == hit.quote


LONG = {
    "one word": "model",
    "claims": "The model plans a reward hack. ",
    "claims without ends": "it intends to special-case the tests ",
    "negated claims": "the model never intends to special-case the tests and ",
    "cues": "not never if whether about the user ",
    "quotation marks": '"',
    "apostrophes": "'a ",
    "open quotes": '"word ',
    "back-ticks": "`x",
    "brackets": "((((",
    "bullets": "\n- **Plan**: special-case the tests",
    "combining marks": "e\u0301",
    "emoji": "\U0001f600\u200d",
    "halves of pairs": "\ud83d",
    "NUL": "\x00",
    "line separators": "\u2028",
    "white space": " ",
    "hyphens": "special-",
    "no spaces": "specialcasethetests.",
}


def grows_at_most_linearly(work: Callable[[int], object], small: int, factor: int, generous: float) -> None:
    """``factor`` times the input costs at most ``generous * factor`` times the time; repeated, against noise."""

    def seconds(size: int) -> float:
        started = time.process_time()
        work(size)
        return time.process_time() - started

    short = max(min(seconds(small) for _ in range(3)), 5e-4)
    long = min(seconds(small * factor) for _ in range(2))
    assert long < generous * factor * short, f"{small}: {short:.4f} s, {small * factor}: {long:.4f} s"


@pytest.mark.parametrize("name", LONG)
def test_the_cost_of_a_text_grows_as_its_length(name: str) -> None:
    """All built-in rules, guards included, over texts made to be slow; a quadratic step would cost 64 times as much."""
    unit = LONG[name]

    def work(size: int) -> None:
        ALL.evaluate([reading((unit * (size // len(unit) + 1))[:size] + " end", context=unit * 50)])

    grows_at_most_linearly(work, 4_000, 8, 4.0)


def test_the_cost_of_a_file_grows_as_its_length() -> None:
    """Ten times the keywords, ten times the work to read them."""

    def work(size: int) -> None:
        words = "\n".join(f"      - phrase number {number}" for number in range(size))
        load_text(SMALL.replace("    keywords: [a cat, cats]\n", f"    keywords:\n{words}\n"))

    grows_at_most_linearly(work, 200, 8, 4.0)
