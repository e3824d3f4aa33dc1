"""``nla-monitor report --conversation`` and ``--conversations``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nla_monitor.records import AgentContext
from nla_monitor.store.engine import open_engine
from nla_monitor.transcripts import Message, Transcripts
from tests.gate_support import RUN, Desk


@pytest.fixture
def talk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The default database of the command's folder, with one conversation in it."""
    file = tmp_path / "nla-monitor.db"
    file.write_bytes(request.getfixturevalue("_sqlite_store").read_bytes())
    engine = open_engine(f"sqlite:///{file}")
    desk = Desk(engine)
    desk.know_rules()
    transcripts = Transcripts(engine, lambda: RUN, desk.guard)
    transcripts.prompt(
        AgentContext("call", root_run_id="root", conversation_id="talk"), lambda: [Message("user", "Go.")]
    )
    transcripts.answer("call", lambda: Message("assistant", "Surely they are testing me."))
    assert transcripts.close()
    at = {"context": "Go.\nSurely", "token_text": "Surely"}
    desk.found(desk.sampled("talk", **at), rule="evaluation-awareness")
    yield file
    engine.dispose()


def test_the_transcript_with_its_findings(cli: Any, talk: Path) -> None:
    out = cli("report", "--conversation", "talk").out
    assert "assistant: ⟨Surely⟩[1] they «are testing me»." in out
    assert "evaluation-awareness  1 of 1" in out


def test_json_is_what_programs_get(cli: Any, talk: Path) -> None:
    found = cli("report", "--conversation", "talk", "--json").json
    assert [one["text"] for one in found["utterances"]] == ["Go.", "Surely they are testing me."]
    assert found["utterances"][1]["findings"][0]["start"] == 0
    whole = cli("report", "--conversations", "--json").json
    assert (whole["conversations"], whole["awareness"][0]["said"]["count"]) == (1, 1)


@pytest.mark.parametrize(("suffix", "holds"), [("html", "<mark>Surely</mark>"), ("md", "**Surely** <sup>1</sup>")])
def test_the_file_name_chooses_the_form(cli: Any, talk: Path, tmp_path: Path, suffix: str, holds: str) -> None:
    result = cli("report", "--conversation", "talk", "-o", tmp_path / f"talk.{suffix}")
    assert holds in (tmp_path / f"talk.{suffix}").read_text(encoding="utf-8")
    assert (result.out, "written to" in result.err) == ("", True)


def test_what_is_wrong_is_said(cli: Any, talk: Path) -> None:
    assert "there is no conversation 'nobody'; the newest are: talk" in cli("report", "--conversation", "nobody").err
    both = cli("report", "--conversation", "talk", "--conversations")
    assert (both.code, "use one of them" in both.err) == (2, True)
    assert "--said is for" in cli("report", "--said", "x.yaml").err


def test_ones_own_words_for_a_concept(cli: Any, talk: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.yaml"
    file.write_text(
        json.dumps(
            {
                "title": "Says go",
                "id": "said-sabotage",
                "severity": "low",
                "detection": {"word": {"keywords": ["surely"]}, "condition": "word"},
                "tests": {"positive": ["surely"], "negative": ["no"]},
            }
        )
    )
    found = cli("report", "--conversation", "talk", "--said", file, "--json").json
    assert {one["rule_id"] for one in found["awareness"]} == {"evaluation-awareness", "sabotage"}
