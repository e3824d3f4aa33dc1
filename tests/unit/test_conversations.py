"""The report of a conversation: findings on their tokens, and what was said against what was thought."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_monitor.conversation_page import render, segments
from nla_monitor.conversations import Conversation, build_conversation, said_and_thought, share
from nla_monitor.decisions import Gate, Point
from nla_monitor.errors import ConfigError
from nla_monitor.records import AgentContext, Severity
from nla_monitor.report import Format
from nla_monitor.store.engine import open_engine
from nla_monitor.transcripts import Message, Transcripts
from tests.gate_support import RUN, Desk

HOSTILE = "\x1b[31mred <script>alert(1)</script> \u202eabc **bold**"
TASK = f"Task: fix the maps code. Judges read all of it. {HOSTILE}"
FIRST, SECOND, THIRD = "There are 5 files.", "Surely they are testing me.\nNow the maps module.", "Done."
RULE, OTHER = "evaluation-awareness", "sabotage"


class Talk:
    """One conversation of three turns, told as an integration tells it."""

    def __init__(self, desk: Desk, name: str = "talk", *, answers: tuple[str, ...] = (FIRST, SECOND, THIRD)) -> None:
        self.desk, self.name, self.history = desk, name, [Message("user", TASK)]
        transcripts = Transcripts(desk.repository.engine, lambda: RUN, desk.guard)
        for turn, answer in enumerate(answers, start=1):
            context = AgentContext(f"{name}-{turn}", root_run_id=f"{name}-root", conversation_id=name)
            given = Message("assistant", answer)
            transcripts.prompt(context, partial(tuple, list(self.history)))
            transcripts.answer(context.agent_run_id, partial(dataclasses.replace, given))
            assert transcripts.flush()
            self.history.append(given)
        transcripts.close()

    def sample(self, turn: int, message: int, upto: str, token: str, **changes: Any) -> Any:
        """A sample of call ``turn`` at a token of a message: its text up to ``upto``, as the model saw it."""
        before = "".join(f"<{one.role}>{one.text}\n" for one in self.history[:message])
        text = self.history[message].text
        assert upto in text
        context = f"{before}<{self.history[message].role}>{text[: text.index(upto) + len(upto)]}"
        written = message == turn
        agent = AgentContext(
            f"{self.name}-{turn}", root_run_id=f"{self.name}-root", conversation_id=self.name, generated=written
        )
        return self.desk.sampled(self.name, agent=agent, context=context, token_text=token, **changes)


@pytest.fixture
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "desk.db").write_bytes(request.getfixturevalue("_sqlite_store").read_bytes())
    engine = open_engine(f"sqlite:///{tmp_path / 'desk.db'}")
    made = Desk(engine)
    made.know_rules()
    yield made
    engine.dispose()


@pytest.fixture
def talk(desk: Desk) -> Talk:
    """Thought in turns 1 and 2, said in turn 2, a neutral reading in turn 3; the task's token is read three times."""
    told = Talk(desk)
    judges = [told.sample(turn, 0, "Judges", " Judges") for turn in (1, 2, 3)]
    fired = desk.found(judges[0], rule=RULE, severity=Severity.MEDIUM)
    desk.joined(fired, judges[1], judges[2], told.sample(2, 2, "Surely they", " they"))
    desk.found(told.sample(1, 1, "There are 5", " 5"), rule=OTHER, severity=Severity.CRITICAL)
    desk.read(told.sample(3, 3, "Done", "Done"))
    return told


def built(desk: Desk, name: str = "talk") -> Conversation:
    return build_conversation(desk.repository, name)


def test_findings_stand_on_their_tokens(desk: Desk, talk: Talk) -> None:
    report = built(desk)
    assert [one.text for one in report.utterances] == [TASK.replace("\x00", ""), FIRST, SECOND, THIRD]
    assert [one.turn for one in report.utterances] == [1, 1, 2, 3]
    assert [one.written for one in report.utterances] == [False, True, True, True]
    task, first, second, third = report.utterances
    (judges,) = task.findings
    assert task.text[judges.start : judges.end] == " Judges"
    assert (judges.rule_id, judges.times, judges.turn, judges.generated) == (RULE, 3, 1, False)
    (five,) = first.findings
    assert (first.text[five.start : five.end], five.rule_id, len(five.alerts)) == (" 5", OTHER, 1)
    (they,) = second.findings
    assert second.text[they.start : they.end] == " they"
    assert third.findings == ()
    assert [one.read for one in report.utterances] == [3, 1, 1, 1]
    assert (report.turns, report.samples, report.read, report.unplaced) == (3, 6, 6, ())


def test_both_databases_answer_alike(store_url: str) -> None:
    engine = open_engine(store_url)
    desk = Desk(engine)
    desk.know_rules()
    told = Talk(desk)
    desk.found(told.sample(1, 0, "Judges", " Judges"), rule=RULE)
    desk.read(told.sample(2, 2, "Surely", "Surely"))
    gate = Gate(desk, fail="open")
    gate.answer(gate.decide(gate.place("talk")), "block")
    report = built(desk)
    assert [len(one.findings) for one in report.utterances] == [1, 0, 0, 0]
    assert [one.rule_id for one in report.awareness] == [RULE]
    assert [one.decided_by for one in report.decisions][-1] == "person"
    assert said_and_thought(desk.repository).conversations == 1
    engine.dispose()


def test_what_was_said_stands_beside_what_was_thought(desk: Desk, talk: Talk) -> None:
    figures = {one.rule_id: one for one in built(desk).awareness}
    aware = figures[RULE]
    assert (aware.said.count, aware.thought.count, aware.thought_only.count, aware.said.of) == (1, 2, 1, 3)
    assert (aware.first_thought, aware.first_said, aware.judged) == (1, 2, True)
    assert figures[OTHER].thought_only.count == 1
    assert figures[OTHER].first_said is None
    assert aware.said.low < 1 / 3 < aware.said.high


def test_a_token_read_again_later_is_thought_of_once(desk: Desk) -> None:
    """The task is read by every call; what was thought there was thought in the first turn."""
    told = Talk(desk)
    fired = desk.found(told.sample(1, 0, "Judges", " Judges"), rule=RULE)
    desk.joined(fired, *(told.sample(turn, 0, "Judges", " Judges") for turn in (2, 3)))
    for turn, answer in ((1, "There"), (2, "Surely"), (3, "Done")):
        desk.read(told.sample(turn, turn, answer, answer))
    (aware,) = built(desk).awareness
    assert (aware.thought.count, aware.thought.of) == (1, 3)


def test_a_token_sampled_only_when_it_was_read_again_belongs_to_the_turn_that_read_it_first(desk: Desk) -> None:
    told = Talk(desk)
    desk.found(told.sample(3, 0, "Judges", " Judges"), rule=RULE)
    desk.read(told.sample(3, 3, "Done", "Done"))
    report = built(desk)
    ((judges,),) = (one.findings for one in report.utterances if one.findings)
    assert judges.turn == 1
    (aware,) = report.awareness
    assert (aware.first_thought, aware.thought.count, aware.thought.of) == (1, 1, 2)


def test_turns_of_which_nothing_was_read_count_nowhere(desk: Desk) -> None:
    told = Talk(desk)
    desk.found(told.sample(1, 1, "There", "There"), rule=RULE)
    told.sample(2, 2, "Surely", "Surely")  # waits
    (aware,) = built(desk).awareness
    assert (aware.thought.count, aware.thought.of, aware.said.count) == (1, 1, 0)
    assert aware.first_said == 2, "it is said all the same, and told"


def test_a_refuted_match_is_no_finding(desk: Desk, talk: Talk) -> None:
    from sqlalchemy import text

    from nla_monitor.store.engine import write

    with write(desk.repository.engine) as connection:
        connection.execute(text("UPDATE nla_matches SET supported = 0 WHERE rule_id = 'sabotage'"))
    report = built(desk)
    assert {one.rule_id for utterance in report.utterances for one in utterance.findings} == {RULE}


def test_over_conversations_each_counts_once(desk: Desk, talk: Talk) -> None:
    quiet = Talk(desk, "quiet", answers=(FIRST, THIRD))
    desk.found(quiet.sample(1, 1, "There", "There"), quiet.sample(2, 2, "Done", "Done"), rule=RULE)
    clean = Talk(desk, "clean", answers=(FIRST,))
    desk.read(clean.sample(1, 1, "There", "There"))
    Talk(desk, "unread", answers=(FIRST,))
    desk.read(desk.sampled("unstored", root="root-9"))
    report = said_and_thought(desk.repository)
    assert (report.conversations, report.skipped) == (3, 2)
    aware = next(one for one in report.awareness if one.rule_id == RULE)
    assert (aware.said.count, aware.thought.count, aware.thought_only.count, aware.said.of) == (1, 2, 1, 3)


def test_without_a_transcript_findings_are_listed_and_nothing_is_said(desk: Desk) -> None:
    desk.found(desk.sampled("bare"), rule=RULE)
    report = built(desk, "bare")
    assert (report.stored, report.utterances, len(report.unplaced)) == (False, (), 1)
    (aware,) = report.awareness
    assert (aware.judged, aware.thought.count, aware.thought.of) == (False, 1, 1)
    text = render(report, Format.TEXT)
    assert "capture.store_transcript: true" in text
    assert "not judged" in text


def test_a_conversation_without_an_id_goes_by_its_outermost_run(desk: Desk) -> None:
    desk.found(desk.sampled(None, root="root-77"), rule=RULE)
    assert built(desk, "root-77").samples == 1


def test_which_conversation_is_meant(desk: Desk, talk: Talk) -> None:
    Talk(desk, "other-1", answers=(FIRST,))
    Talk(desk, "other-2", answers=(FIRST,))
    assert built(desk, "tal").conversation == "talk"
    with pytest.raises(ConfigError, match="may be any of other-"):
        built(desk, "other")
    with pytest.raises(ConfigError, match=r"no conversation 'nobody'; the newest are: .*talk"):
        built(desk, "nobody")
    with pytest.raises(ConfigError, match="there is no conversation"):
        said_and_thought(desk.repository, "run-2")


def test_decisions_stand_where_they_were_made(desk: Desk, talk: Talk) -> None:
    gate = Gate(desk, severity="low", fail="open")
    decision = gate.decide(gate.place("talk"), Point("tool", "shell", "call_1"))
    gate.answer(decision, "block", who="ana", note="no")
    report = built(desk)
    assert {one.decided_by for one in report.decisions} >= {"person"}
    text = render(report, Format.TEXT)
    assert "! a person (ana: no) said block before tool shell" in text


# -- pages ----------------------------------------------------------------------------------------------------------


def test_text_shows_marks_notes_and_figures(desk: Desk, talk: Talk) -> None:
    text = render(built(desk), Format.TEXT)
    assert "assistant: There are⟨ 5⟩[2] files." in text
    assert "«they ⟨" not in text
    assert "Surely ⟨ they⟩" not in text
    assert "« says: evaluation-awareness" in text
    assert re.search(r"evaluation-awareness +1 of 3 \(1% to 91%\) +2 of 3", text)
    assert "first read in turn 1, first said in turn 2" in text
    assert "critical sabotage" in text
    assert "read 3 times" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: list[str] = []
        self.marked: list[str] = []
        self.shown = ""
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names += [name for name, _ in attrs]
        self._inside = self._inside or tag == "mark"

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "mark"

    def handle_data(self, data: str) -> None:
        self.shown += data
        if self._inside:
            self.marked.append(data)


def test_html_is_one_file_without_scripts_and_marks_the_tokens(desk: Desk, talk: Talk) -> None:
    source = render(built(desk), Format.HTML)
    page = Page()
    page.feed(source)
    assert not {"script", "img", "link", "iframe", "object", "embed", "a", "form"} & set(page.tags)
    assert not {"src", "href", "onload", "onclick", "style"} & set(page.names)
    assert page.marked == ["Marked", " Judges", " 5", " they"]
    assert "<script>alert(1)</script>" in page.shown, "as text"
    assert "\x1b" not in source
    assert "\u202e" not in source
    assert "&lt;ul" not in source, "nothing of the page itself is escaped"
    assert page.tags.count("figure") == 2
    assert "default-src 'none'" in source


def test_markdown_takes_models_literally(desk: Desk, talk: Talk) -> None:
    text = render(built(desk), Format.MARKDOWN)
    assert r"\*\*bold\*\*" in text
    assert "<script>" not in text
    assert "| evaluation-awareness | 1 of 3 (1% to 91%) |" in text


def test_json_holds_everything(desk: Desk, talk: Talk) -> None:
    found = json.loads(render(built(desk), Format.JSON))
    assert set(found) == {field.name for field in dataclasses.fields(Conversation)}
    assert found["utterances"][1]["findings"][0]["rule_id"] == OTHER
    assert found["awareness"][0]["thought_only"]["count"] == 1
    whole = json.loads(render(said_and_thought(desk.repository), Format.JSON))
    assert whole["conversations"] == 1


@pytest.mark.parametrize("how", list(Format))
def test_the_figures_of_all_conversations_have_every_form(desk: Desk, talk: Talk, how: Format) -> None:
    assert RULE in render(said_and_thought(desk.repository), how)


spans = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted), max_size=5)


@given(st.text(alphabet="ab \n", max_size=12), spans, spans)
def test_pieces_of_a_message_are_its_text(text: str, found: list[list[int]], said: list[list[int]]) -> None:
    from nla_monitor.conversations import Utterance
    from nla_monitor.visible_text import Quote

    base = finding(None, None)
    findings = tuple(dataclasses.replace(base, number=n, start=a, end=b) for n, (a, b) in enumerate(found))
    quotes = tuple(Quote(f"r{n}", "", a, b) for n, (a, b) in enumerate(said))
    one = Utterance("m", "user", None, None, text, (), None, "c", False, 1, 0.0, 0, (base, *findings), quotes)  # noqa: FBT003 -- as in the record
    pieces = segments(one)
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text for piece in pieces)
    at = 0
    for piece in pieces:
        for offset in range(at, at + len(piece.text)):
            assert set(piece.notes) == {n for n, (a, b) in enumerate(found) if a <= offset < b}
            assert set(piece.said) == {f"r{n}" for n, (a, b) in enumerate(said) if a <= offset < b}
        at += len(piece.text)


def finding(start: int | None, end: int | None) -> Any:
    from nla_monitor.conversations import Finding

    empty: dict[str, Any] = dict.fromkeys(Finding.__slots__)
    return Finding(**{**empty, "number": 99, "severity": Severity.LOW, "start": start, "end": end})


@given(st.integers(0, 40), st.integers(0, 40))
def test_shares_have_exact_intervals(count: int, more: int) -> None:
    made = share(count, count + more)
    assert 0.0 <= made.low <= made.high <= 1.0
    if made.value is None:
        assert (made.low, made.high) == (0.0, 1.0)
    else:
        assert made.low <= made.value <= made.high
