"""Which message of a transcript a sampled token stands in, and where.

Samples carry the text up to their token as the model saw it, template and all; messages are kept as people see them.
The two are brought together by their ends: the place in a message is where its text up to there agrees longest with
the end of what the model saw. Where nothing agrees (a token of the template, a text that was changed on the way), no
place is made up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from nla_monitor.records import AgentContext
from nla_monitor.store.messages import Said
from nla_monitor.store.queries import SampleView

_AGREEING: Final = 12
"""Characters that must agree before a token, where the message has so many before it."""
_COMPARED: Final = 400
_BEFORE: Final = 40
"""Characters of the message before that tell two equal messages apart."""


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a token stands."""

    message: Said | None
    """None: in no message that is stored."""
    start: int | None = None
    """Character of the message at which the token begins; None: not known."""
    end: int | None = None


_NOWHERE: Final = Spot(None)


class Placer:
    """Finds the places of samples in the messages of one conversation."""

    def __init__(self, messages: Sequence[Said]) -> None:
        self._by_id: Mapping[str, Said] = {said.message_id: said for said in messages}
        self._answers: dict[str, Said] = {}
        self._newest: dict[str, Said] = {}
        for said in messages:
            if said.written:
                self._answers[said.agent_run_id] = said
            elif said.agent_run_id not in self._newest or said.place >= self._newest[said.agent_run_id].place:
                self._newest[said.agent_run_id] = said

    def answer(self, agent_run_id: str) -> Said | None:
        """What a model call answered."""
        return self._answers.get(agent_run_id)

    def spot(self, sample: SampleView) -> Spot:
        """The place of a sample's token."""
        agent = sample.agent
        if agent is None:
            return _NOWHERE
        answer = self._answers.get(agent.agent_run_id)
        if agent.generated:
            return _NOWHERE if answer is None else _in(sample, [answer], self._by_id)
        if _opens_the_answer(agent):
            return Spot(answer)
        last = self._newest.get(agent.agent_run_id) if answer is None else self._parent(answer)
        candidates = [said for said in self._chain(last) if _fits(said, agent)]
        behind = _behind(sample, candidates)
        if behind is not None and behind is last:
            return Spot(answer)
        return _in(sample, candidates, self._by_id) if behind is None else Spot(behind)

    def _parent(self, said: Said) -> Said | None:
        return self._by_id.get(said.parent_id or "")

    def _chain(self, said: Said | None) -> Iterator[Said]:
        """What a model call read, newest first."""
        while said is not None:
            yield said
            said = self._parent(said)


def _opens_the_answer(agent: AgentContext) -> bool:
    """Whether a prompt's token belongs to the turn that the model is about to write."""
    return agent.message_role == "assistant" and agent.span_start is not None and agent.span_end is None


def _fits(said: Said, agent: AgentContext) -> bool:
    role = agent.message_role
    if role is not None and said.message.role not in (role, "prompt"):
        return False
    return role != "tool" or agent.tool_call_id is None or said.message.tool_call_id in (None, agent.tool_call_id)


def _behind(sample: SampleView, candidates: Sequence[Said]) -> Said | None:
    """The message that ends right before the token: a line break or a mark of the template, in no message's text."""
    token, context = sample.token_text, sample.context
    if not token or not context or token.strip():
        return None
    seen = context.removesuffix(token).rstrip()
    return next((said for said in candidates if (text := said.message.text.strip()) and _ends_with(seen, text)), None)


def _ends_with(seen: str, text: str) -> bool:
    return seen.endswith(text[-_COMPARED:]) or (len(seen) < len(text) and text.endswith(seen) and bool(seen))


def _in(sample: SampleView, candidates: Sequence[Said], by_id: Mapping[str, Said]) -> Spot:
    """The best place in the candidates; of two equal ones the newer."""
    alone = len(candidates) == 1
    found = [
        (*place, said)
        for said in candidates
        for place in _places(sample, said, by_id.get(said.parent_id or ""), alone=alone)
    ]
    if found:
        _, start, end, said = max(found, key=lambda one: one[0])
        return Spot(said, start, end)
    return Spot(candidates[0]) if alone else _NOWHERE


def _places(sample: SampleView, said: Said, before: Said | None, *, alone: bool) -> Iterator[tuple[int, int, int]]:
    """``(agreement, start, end)`` of each place of the token in a message.

    Where the message is not the only one (``alone``), a few characters that agree are not enough: the message before
    must stand before them.
    """
    text, token, context = said.message.text, sample.token_text, sample.context
    if not token or not context:
        return
    for start, end in _occurrences(token, text):
        agreed = _common_end(context, text[:end])
        if agreed < min(end, len(context), _AGREEING + end - start):
            continue
        follows = agreed == end and _follows(context[:-end], before)
        if follows or alone or agreed > _AGREEING:
            yield agreed + follows, start, end


def _occurrences(token: str, text: str) -> Iterator[tuple[int, int]]:
    start = text.find(token)
    while start >= 0:
        yield start, start + len(token)
        start = text.find(token, start + 1)
    stripped = token.lstrip()
    if stripped != token and stripped and text.startswith(stripped):
        yield 0, len(stripped)  # the blank before a message's first word is the template's


def _follows(context: str, before: Said | None) -> bool:
    tail = before.message.text.strip()[-_BEFORE:] if before is not None else ""
    return tail in context[-(_BEFORE + len(tail)) :]


def _common_end(one: str, other: str) -> int:
    """How many characters the ends of two texts have in common, as far as it is looked."""
    count, most = 0, min(len(one), len(other), _COMPARED)
    while count < most and one[-1 - count] == other[-1 - count]:
        count += 1
    return count


def spots(samples: Iterable[SampleView], messages: Sequence[Said]) -> dict[str, Spot]:
    """The place of each sample, by its id."""
    placer = Placer(messages)
    return {sample.sample_id: placer.spot(sample) for sample in samples}
