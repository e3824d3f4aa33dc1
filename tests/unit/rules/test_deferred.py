"""Dear selections are asked only where the outcome hangs on them, and their answers are remembered."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_kit import reading

from nla_monitor.errors import RuleError, StoreUnavailableError
from nla_monitor.records import Judgement, Match, Support
from nla_monitor.rules import Rule, RuleSet, lint, load_text
from nla_monitor.rules.deferred import (
    InMemory,
    Question,
    UnreachableError,
    ask_ahead,
    connect,
    unanswered,
    with_unjudged,
)
from nla_monitor.rules.embedded import run_rule_tests
from nla_monitor.store.engine import open_engine
from nla_monitor.store.judgements import SqlJudgements

JUDGE = "{judge: {question: 'Does the model say QQQ?', endpoint: http://x, model: m}}"


class Oracle:
    """Says yes where a word stands in the text, and counts."""

    kind = "judge"

    def __init__(self, word: str, *, away: bool = False) -> None:
        self.word, self.away = word, away
        self.definition = {"word": word}
        self.asked: list[str] = []

    def ask(self, texts: Sequence[str]) -> list[Judgement]:
        self.asked += texts
        if self.away:
            raise UnreachableError("the line is dead")
        return [
            Judgement("judge", "yes", self.word, None, "m")
            if self.word in text
            else Judgement("judge", "no", "", None, "m")
            for text in texts
        ]

    def check(self) -> None:
        """Always there."""


def rule(condition: str, *names: str, plain: str = "cats", exceptions: str = "") -> tuple[Rule, dict[str, Oracle]]:
    """A rule with keyword selection ``words`` and a judge for each name, who looks for that name in the text."""
    selections = "\n".join(f"  {name}: {JUDGE.replace('QQQ', name)}" for name in names)
    found = load_text(
        f"title: A rule\nid: a-rule\nseverity: low\ndetection:\n  words: {{keywords: [{plain}]}}\n{selections}\n"
        f"  condition: '{condition}'\n{exceptions}\ntests: {{positive: [x], negative: [y]}}\n"
    )
    oracles = {}
    for special in found.specials:
        oracles[special.name] = Oracle(special.name)
        special.questions[0].oracle = oracles[special.name]
    return found, oracles


def match(found: Rule, text: str) -> Match | None:
    return next(iter(RuleSet([found]).evaluate([reading(text)])), None)


@pytest.mark.parametrize(
    ("condition", "text", "asked", "met"),
    [
        ("words && one", "nothing", 0, False),
        ("words && one", "cats", 1, False),
        ("words && one", "cats one", 1, True),
        ("words || one", "cats one", 0, True),
        ("words || one", "one", 1, True),
        ("words && !one", "cats one", 1, False),
        ("one || !one", "cats", 0, True),
        ("words && (one || true)", "cats", 0, True),
        ("one && position > 5", "one", 0, False),
    ],
)
def test_asked_only_where_the_outcome_hangs_on_it(condition: str, text: str, asked: int, met: bool) -> None:
    found, oracles = rule(condition, "one")
    hit = match(found, text)
    assert (hit is not None, len(oracles["one"].asked)) == (met, asked)
    if hit is not None:
        assert [item.quote for item in hit.hits if item.selection == "one"] == (["one"] if asked else [])


@settings(deadline=None)
@given(st.data())
def test_the_same_as_asking_everybody(data: st.DataObject) -> None:
    """Whatever the condition and the answers: the match is that of the plain condition; each is asked once at most."""
    names = ["one", "two", "three"]

    def expressions() -> st.SearchStrategy[str]:
        leaf = st.sampled_from(["words", *names])
        return st.recursive(
            leaf,
            lambda inner: st.one_of(
                inner.map(lambda one: f"!({one})"),
                st.tuples(inner, st.sampled_from(["&&", "||"]), inner).map(lambda part: f"({' '.join(part)})"),
            ),
            max_leaves=8,
        )

    condition = data.draw(expressions())
    found, oracles = rule(condition, *names)
    for answers in itertools.product((False, True), repeat=4):
        present = [name for name, there in zip(["cats", *names], answers, strict=True) if there]
        for oracle in oracles.values():
            oracle.asked.clear()
        text = " ".join([*present, condition.replace("words", "W").replace("one", "1").replace("t", "T")])
        hit = match(found, text)
        python = condition.replace("&&", " and ").replace("||", " or ").replace("!", " not ")
        wanted = eval(python, {}, dict(zip(["words", *names], answers, strict=True)))  # noqa: S307 -- made above
        assert (hit is not None) == wanted
        assert all(len(oracle.asked) <= 1 for oracle in oracles.values())


def test_exceptions_may_ask_too() -> None:
    """An exception is asked only about what would match otherwise."""
    exceptions = f"exceptions: [{{reason: known, selection: {JUDGE.replace('QQQ', 'two')}}}]"
    found, oracles = rule("words", exceptions=exceptions)
    oracle = oracles["exceptions[0]"]
    oracle.word = "two"
    assert match(found, "dogs") is None
    assert oracle.asked == []
    assert match(found, "cats two") is None
    assert match(found, "cats") is not None
    assert len(oracle.asked) == 2


def test_words_in_the_same_selection_come_first() -> None:
    """``{keywords, judge}``: all must hold, and the judge sees only texts with the words."""
    found, _ = rule("words", plain="cats")
    mixed = load_text(
        "title: t\nid: t\nseverity: low\ndetection:\n  both:\n    keywords: [cats]\n    position|gte: 1\n"
        "    judge: {question: 'Is it about cats?', endpoint: http://x, model: m}\n  condition: both\n"
        "tests: {positive: [x], negative: [y]}\n"
    )
    oracle = mixed.specials[0].questions[0].oracle = Oracle("sleep")
    rules = RuleSet([mixed])
    assert rules.evaluate([reading("dogs sleep", position=3), reading("cats sleep", position=0)]) == []
    assert oracle.asked == []
    hits = rules.evaluate([reading("cats sleep", position=3)])[0].hits
    assert [(hit.selection, hit.quote) for hit in hits] == [("both", "cats"), ("both", "sleep")]
    assert found.id == "a-rule"


def test_a_list_of_mappings_holds_when_one_does() -> None:
    mixed = load_text(
        "title: t\nid: t\nseverity: low\ndetection:\n  either:\n    - {keywords: [cats]}\n"
        "    - {judge: {question: 'Is it about dogs?', endpoint: http://x, model: m}}\n  condition: either\n"
        "tests: {positive: [cats], negative: [{text: y, given: {either: false}}]}\n"
    )
    oracle = mixed.specials[0].questions[0].oracle = Oracle("dogs")
    assert match(mixed, "cats") is not None
    assert oracle.asked == []
    assert match(mixed, "dogs") is not None
    assert match(mixed, "birds") is None


def test_who_is_out_of_reach_is_said_only_where_it_matters() -> None:
    found, oracles = rule("words || one", "one")
    oracles["one"].away = True
    hit = match(found, "cats")
    assert hit is not None
    assert hit.unjudged == {}
    assert match(found, "dogs") is None
    assert unanswered([found]) == {"a-rule": 1}
    negated, oracles = rule("words && !one", "one")
    oracles["one"].away = True
    hit = match(negated, "cats")
    assert hit is not None
    assert hit.unjudged == {"one": "the line is dead"}
    supports = with_unjudged([hit], {hit.match_id: Support(hit.match_id, supported=True, not_run={"echo": "x"})})
    assert supports[hit.match_id].not_run == {"echo": "x", "selection one": "the line is dead"}


def test_at_most_four_selections_may_ask() -> None:
    with pytest.raises(RuleError, match="5 selections ask a model; at most 4"):
        rule("words", "a1", "a2", "a3", "a4", "a5")


def test_tests_of_a_rule_are_made_without_asking() -> None:
    """``given`` stands for the answer; without it, who cannot be asked makes the test fail, with what to write."""
    text = (
        "title: t\nid: t\nseverity: low\ndetection:\n  words: {keywords: [cats]}\n"
        "  judged: {judge: {question: 'Is it about cats?', endpoint: 'http://127.0.0.1:9', model: m, retries: 0}}\n"
        "  condition: words && judged\ntests:\n  positive: [{text: cats, given: {judged: true}}, cats]\n"
        "  negative: [dogs, {text: cats, given: {judged: false}}]\n"
        "  window: [{readings: [{text: cats, given: {judged: true}}], fires: true}]\n"
    )
    results = run_rule_tests(load_text(text))
    assert [result.passed for result in results] == [True, False, True, True, True]
    assert "given: {judged: true}" in results[1].message


def test_lint_says_when_a_judge_sees_every_reading() -> None:
    codes = {finding.code for finding in _linted("condition: judged")}
    assert "unguarded-judge" in codes
    assert "unguarded-judge" not in {finding.code for finding in _linted("condition: words && judged")}


def _linted(condition: str) -> Iterator[object]:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rule.yaml"
        file.write_text(
            "title: t\nid: t\nseverity: low\ndetection:\n  words: {keywords: [a plan]}\n"
            "  judged: {judge: {question: 'Is it a plan?', endpoint: 'http://127.0.0.1:9', model: m}}\n"
            f"  {condition}\ntests:\n  positive: [{{text: a plan, given: {{judged: true}}}}]\n"
            "  negative: [{text: a plan, given: {judged: false}}]\n"
        )
        yield from lint(file)


def test_a_replay_asks_nobody_and_says_the_same(store_url: str) -> None:
    """Answers are in the database: another process with no way to the judge finds the same matches."""
    engine = open_engine(store_url)
    readings = [reading(text, f"s{number}") for number, text in enumerate(["cats one", "cats", "cats \x00one", "dogs"])]
    first, oracles = rule("words && one", "one")
    connect([first], SqlJudgements(engine))
    ask_ahead([first], readings)
    before = RuleSet([first]).evaluate(readings)
    assert len(oracles["one"].asked) == 3
    again, others = rule("words && one", "one")
    others["one"].away = True
    connect([again], SqlJudgements(engine))
    stored = [
        replace(item, explanation=replace(item.explanation, text=item.explanation.text.replace("\x00", "\ufffd")))
        for item in readings
    ]
    after = RuleSet([again]).evaluate(stored)
    assert [item.match_id for item in after] == [item.match_id for item in before]
    assert [[(hit.start, hit.end) for hit in item.hits] for item in after] == [
        [(hit.start, hit.end) for hit in item.hits] for item in before
    ]
    assert others["one"].asked == []
    assert len(before) == 2
    engine.dispose()


def test_the_first_answer_stays(store_url: str) -> None:
    engine = open_engine(store_url)
    judgements = SqlJudgements(engine)
    yes, no = Judgement("judge", "yes", "quote \U0001f600", 0.5, "m"), Judgement("judge", "no", "", None, "m")
    assert judgements.get("key") is None
    judgements.put("key", yes)
    judgements.put("key", no)
    assert judgements.get("key") == yes
    memory = InMemory()
    memory.put("key", yes)
    memory.put("key", no)
    assert memory.get("key") == yes
    engine.dispose()


def test_a_store_that_is_away_costs_only_memory() -> None:
    class Away:
        def get(self, key: str) -> Judgement | None:
            raise StoreUnavailableError("gone")

        def put(self, key: str, judgement: Judgement) -> None:
            raise StoreUnavailableError("gone")

    found, oracles = rule("words && one", "one")
    connect([found], Away())
    assert match(found, "cats one") is not None
    assert match(found, "cats one") is not None
    assert len(oracles["one"].asked) == 1


def test_memory_is_bounded() -> None:
    memory = InMemory(size=3)
    for number in range(10):
        memory.put(str(number), Judgement("judge", "no", "", None, "m"))
    assert [number for number in range(10) if memory.get(str(number))] == [7, 8, 9]


def test_answers_belong_to_their_question_and_text() -> None:
    one, two = Question(Oracle("one")), Question(Oracle("two"))
    assert len({one.key("a"), one.key("b"), two.key("a"), two.key("b")}) == 4
    assert one.key("a") == Question(Oracle("one")).key("a")
