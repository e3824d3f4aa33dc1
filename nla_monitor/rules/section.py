"""What all sections of a rule file share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False)


def one_is_a_list(value: object) -> object:
    """A single text where a list of texts may stand."""
    return (value,) if isinstance(value, str) else value
