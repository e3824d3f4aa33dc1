"""How much of an agent's model call is kept: its run's budget, and a closer look at runs in which something was found.

A burst enlarges the draw of every forward; of agents' calls only those of a run with a match keep the whole of it. Both
rules cut at ranks and thresholds of the same keyed scores that chose the samples, so what remains has a known chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from nla_monitor.capture import sampling
from nla_monitor.capture.keys import FULL, SALT_THIN, score_int
from nla_monitor.capture.policy import FIRST_TRIGGER, RANDOM, Draw, Policy
from nla_monitor.capture.session import SessionHandle


class AgentDraws:
    """The draws of one captured forward, by the session that a row of it belongs to.

    Args:
        policy: outside bursts.
        draw: of the forward.
        generated: it read one generated token of each row.
    """

    def __init__(self, policy: Policy, draw: Draw, *, generated: bool) -> None:
        self._policy = policy
        self._draw = draw
        self._generated = generated
        self._of: dict[int, Draw] = {}
        self._ranks: Counter[tuple[int, bool]] = Counter()

    def of(self, session: SessionHandle | None) -> Draw:
        """The draw that the samples of this session stand for; the forward's own for rows of no agent."""
        if session is None:
            return self._draw
        found = self._of.get(id(session))
        if found is None:
            found = self._of[id(session)] = self._drawn(session)
        return found

    def allow(self, session: SessionHandle | None, row: Sequence[int]) -> bool:
        """Whether a chosen position is kept. Asked of every row of the forward, best score of each kind first.

        Args:
            session: that the row belongs to.
            row: of ``Choice.meta``.
        """
        if session is None or not row[sampling.VALID]:
            return True
        draw = self.of(session)
        if draw is self._draw:
            return True
        if not self._generated and not self._among_the_first(draw, row):
            return False
        keep = score_int(draw.policy.seed, SALT_THIN, row[sampling.HASH], row[sampling.POSITION]) < draw.rate
        session.run.left_out += not keep
        return keep

    def _drawn(self, session: SessionHandle) -> Draw:
        draw, plain = self._draw, self._policy
        if not session.closer and draw.policy.random > plain.random:
            sequences = min(draw.sequences, plain.sequences)
            draw = replace(draw, policy=plain, sequences=sequences, sure=min(draw.sure, sequences))
        share = session.run.share(plain.per_agent_run)
        return draw if share >= 1.0 else replace(draw, rate=min(draw.rate, int(share * FULL)))

    def _among_the_first(self, draw: Draw, row: Sequence[int]) -> bool:
        """Whether the plain policy would have chosen it, too: it takes the best of what a larger one takes."""
        kind = row[sampling.KIND]
        if kind != RANDOM and kind < FIRST_TRIGGER:
            return row[sampling.ROW] < draw.sequences
        key = row[sampling.ROW], kind == RANDOM
        self._ranks[key] += 1
        limit = draw.policy.random if kind == RANDOM else draw.policy.trigger_limit
        return row[sampling.ROW] < draw.sequences and self._ranks[key] <= limit
