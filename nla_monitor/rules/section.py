"""What all sections of a rule file share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False)


def one_is_a_list(value: object) -> object:
    """A single text where a list of texts may stand."""
    return (value,) if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(one_is_a_list, json_schema_input_type=str | list[str])]
"""A list of texts; a single text stands for a list of one."""
