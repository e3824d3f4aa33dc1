"""Where a sampled token stands in a transcript: right, or not said."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from nla_monitor.placing import Placer, Spot
from nla_monitor.records import AgentContext, Phase
from nla_monitor.store.messages import Message, Said
from nla_monitor.store.queries import SampleView

TEMPLATE = "<|{role}|>\n{text}<end>\n"


def conversation(*pairs: tuple[str, str]) -> list[Said]:
    """Messages of one chain, the last one written by the call ``now``, earlier assistants' by ``call-<place>``."""
    made: list[Said] = []
    for place, (role, text) in enumerate(pairs):
        last = place == len(pairs) - 1
        made.append(
            Said(
                message_id=f"m{place}",
                parent_id=f"m{place - 1}" if place else None,
                run_id="run",
                conversation="talk",
                root_run_id="root",
                agent_run_id="now" if last or role != "assistant" else f"call-{place}",
                node=None,
                place=place,
                written=role == "assistant",
                created_at=float(place),
                message=Message(role, text),
            )
        )
    return made


def view(context: str | None, token: str | None, agent: AgentContext | None, **changes: Any) -> SampleView:
    fields: dict[str, Any] = dict.fromkeys(SampleView.__slots__)
    fields |= {"sample_id": "s", "phase": Phase.AGENT, "context": context, "token_text": token, "agent": agent}
    return SampleView(**{**fields, **changes})


def prompt_of(messages: list[Said]) -> str:
    return (
        "".join(TEMPLATE.format(role=one.message.role, text=one.message.text) for one in messages[:-1])
        + "<|assistant|>\n"
    )


READS = AgentContext("now")
WRITES = AgentContext("now", generated=True, token_index=0)
TALK = conversation(
    ("system", "Be brief."), ("user", "ok"), ("assistant", "Yes. ok"), ("user", "ok"), ("assistant", "ok ok")
)


def spot(messages: list[Said], sample: SampleView) -> Spot:
    return Placer(messages).spot(sample)


def test_a_written_token_stands_in_the_answer() -> None:
    prompt = prompt_of(TALK)
    found = spot(TALK, view(f"{prompt}ok ok", " ok", WRITES))
    assert (found.message, found.start, found.end) == (TALK[4], 2, 5)
    found = spot(TALK, view(f"{prompt}ok", "ok", WRITES))
    assert (found.start, found.end) == (0, 2)


def test_equal_messages_are_told_apart_by_what_stands_before_them() -> None:
    prompt = prompt_of(TALK)
    for place, upto in ((1, prompt.index("ok") + 2), (3, prompt.rindex("ok") + 2)):
        found = spot(TALK, view(prompt[:upto], "ok", READS))
        assert (found.message, found.start) == (TALK[place], 0)


def test_long_equal_messages_are_told_apart_too() -> None:
    long = "Please look at the file again, and say what is in it."
    talk = conversation(("user", long), ("assistant", "I see a list."), ("user", long), ("assistant", "The same."))
    prompt = prompt_of(talk)
    for place, upto in ((0, prompt.index("again") + 5), (2, prompt.rindex("again") + 5)):
        assert spot(talk, view(prompt[:upto], " again", READS)).message is talk[place]


def test_a_long_prompt_that_was_cut_is_found_by_its_end() -> None:
    talk = conversation(("user", "word " * 300 + "trophy and more"), ("assistant", "yes"))
    text = talk[0].message.text
    upto = text.index("trophy") + 6
    found = spot(talk, view(text[upto - 60 : upto], "trophy", READS))
    assert (found.start, found.end) == (upto - 6, upto)


def test_the_frameworks_own_word_for_the_role_narrows_it() -> None:
    prompt = prompt_of(TALK)
    role = dataclasses.replace(READS, message_role="system")
    assert spot(TALK, view(prompt[: prompt.index("brief") + 5], " brief", role)).message is TALK[0]
    tools = [
        Said(**{**{n: getattr(TALK[1], n) for n in Said.__slots__}, "message": Message("tool", "4 rows", "f", key)})
        for key in ("a", "b")
    ]
    both = [
        dataclasses.replace(tools[0], message_id="x"),
        dataclasses.replace(tools[1], message_id="y", parent_id="x", place=2),
    ]
    answer = dataclasses.replace(TALK[4], parent_id="y")
    agent = dataclasses.replace(READS, message_role="tool", tool_call_id="a")
    found = spot([*both, answer], view("4 rows", " rows", agent))
    assert found.message is not None
    assert found.message.message.tool_call_id == "a"


def test_the_turns_own_opening_belongs_to_the_answer() -> None:
    opening = dataclasses.replace(READS, message_role="assistant", span_start=40, span_end=None)
    assert spot(TALK, view(prompt_of(TALK), "<|assistant|>", opening)) == Spot(TALK[4])
    plain = conversation(("user", "Do it"), ("assistant", "Done"))
    assert spot(plain, view("Do it\n", "\n", READS)) == Spot(plain[1])


def test_what_cannot_be_placed_is_not() -> None:
    prompt = prompt_of(TALK)
    assert spot(TALK, view(f"{prompt}ok ok", " ok", dataclasses.replace(WRITES, agent_run_id="other"))).message is None
    assert spot(TALK, view(prompt, "nothing like it", READS)).message is None
    assert spot(TALK, view(None, None, READS)).message is None
    assert spot(TALK, view(prompt, " ok", None)).message is None
    assert spot([], view(prompt, " ok", READS)).message is None
    elsewhere = "words that stand in no message of it, ok"
    assert spot(TALK, view(elsewhere, " ok", READS)).start is None


words = st.text(alphabet="ab .\n", max_size=12)


@given(st.lists(st.tuples(st.sampled_from(["user", "tool"]), words), min_size=1, max_size=4), words, st.data())
def test_a_place_is_right_whenever_one_is_given(
    messages: list[tuple[str, str]], answer: str, data: st.DataObject
) -> None:
    """Any token of any message: the place shows the same token, with the same text before it."""
    talk = conversation(*messages, ("assistant", answer))
    which = data.draw(st.integers(0, len(talk) - 1))
    text = talk[which].message.text
    assume(text)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    before = "".join(TEMPLATE.format(role=one.message.role, text=one.message.text) for one in talk[:which])
    context = f"{before}<|{talk[which].message.role}|>\n{text[:end]}"
    agent = WRITES if which == len(talk) - 1 else READS
    found = spot(talk, view(context, text[start:end], agent))
    if found.start is not None:
        assert found.message is not None
        shown = found.message.message.text
        assert (
            shown[found.start : found.end] == text[start:end].lstrip()
            or shown[found.start : found.end] == text[start:end]
        )
        assert context.endswith(shown[: found.end][-min(found.end or 0, 12) :])
    if agent is WRITES:
        assert found.message is talk[-1]
    if agent is WRITES and not answer[:1].isspace():  # else the template's line break looks like the answer's own
        assert (found.start, found.end) == (start, end)
