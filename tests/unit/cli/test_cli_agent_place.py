"""How the command line says where in an agent's messages a token stands."""

from __future__ import annotations

import pytest

from nla_monitor.cli.alert_page import message_of
from nla_monitor.records import AgentContext


@pytest.mark.parametrize(
    ("role", "start", "end", "said"),
    [
        ("tool", 12, 20, "tool, tokens 12 to 19"),
        ("assistant", 20, None, "assistant, tokens 20 on"),
        (None, None, None, None),
    ],
)
def test_a_message_and_its_tokens(role: str | None, start: int | None, end: int | None, said: str | None) -> None:
    assert message_of(AgentContext("run", message_role=role, span_start=start, span_end=end)) == said
