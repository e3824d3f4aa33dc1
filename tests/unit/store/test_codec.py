"""Records survive the way through rows unchanged."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nla_monitor.errors import ActivationError
from nla_monitor.records import ActivationSample
from nla_monitor.store import codec
from tests.store_support import AGENT, alert, match, reading, run_info, sample

SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=20)


def same(one: ActivationSample, other: ActivationSample) -> bool:
    """Equal in every field, the vector to the bit (samples compare by identity)."""
    fields = [item.name for item in dataclasses.fields(one) if item.name != "vector"]
    equal = all(getattr(one, name) == getattr(other, name) for name in fields)
    return equal and one.vector.dtype == other.vector.dtype and one.vector.tobytes() == other.vector.tobytes()


@given(
    vector=hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32)),
    attributes=st.dictionaries(st.text(max_size=10), SCALARS, max_size=4),
    with_agent=st.booleans(),
)
def test_a_sample_comes_back_equal_to_the_bit(
    vector: np.ndarray[Any, Any], attributes: dict[str, Any], with_agent: bool
) -> None:
    """Also NaN payloads, infinities, signed zeros and subnormals: the store judges no vector."""
    attributes = codec.clean(attributes)
    taken = sample(1, vector=vector, norm=1.5, attributes=attributes, agent=AGENT if with_agent else None, rank=3)
    row = codec.sample_row(taken)
    row["attributes"] = json.loads(json.dumps(row["attributes"]))
    assert same(codec.sample_of(row), taken)


def test_a_vector_that_is_not_contiguous_is_stored_as_it_reads() -> None:
    wide = np.arange(32, dtype=np.float32)
    taken = sample(1, vector=wide[::2])
    assert same(codec.sample_of(codec.sample_row(taken)), taken)


def test_a_rebuilt_vector_may_be_written_to() -> None:
    codec.sample_of(codec.sample_row(sample(1))).vector[0] = 7.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vector": b"\x00" * 64}, "CRC-32"),
        ({"vector": b"\x00" * 63}, "63 bytes"),
        ({"d_model": 17}, "17 x float32"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_damaged_bytes_are_noticed_and_named(change: dict[str, Any], words: str) -> None:
    row = codec.sample_row(sample(1)) | change
    with pytest.raises(ActivationError, match=words) as caught:
        codec.sample_of(row)
    assert row["sample_id"] in str(caught.value)


def test_a_nan_norm_is_nan_again() -> None:
    row = codec.sample_row(sample(1, norm=math.nan))
    assert math.isnan(codec.sample_of(row | {"norm": None}).norm)  # SQLite stores NaN as NULL


@pytest.mark.parametrize("text", ["a\x00b", "a\ud800b"])
def test_characters_that_no_database_takes_are_replaced(text: str) -> None:
    row = codec.sample_row(sample(1, token_text=text, context=text, attributes={text: [text]}))
    cleaned = "a\ufffdb"
    assert (row["token_text"], row["context"], row["attributes"]) == (cleaned, cleaned, {cleaned: [cleaned]})


def test_readings_matches_alerts_and_runs_come_back_equal() -> None:
    taken = sample(1)
    was = reading(taken)
    row = codec.reading_row(was)
    assert (codec.explanation_of(row), codec.fidelity_of(row)) == (was.explanation, was.fidelity)
    found = match(taken, group={"b": 1, "a": None})
    assert codec.match_of(codec.match_row(found)) == found
    for shown in (alert(taken), alert(taken, agent=None, cosine=None, fve=None, denominator_name=None)):
        assert codec.alert_of(json.loads(json.dumps(codec.alert_row(shown)))) == shown
    assert codec.run_of(codec.run_row(run_info())) == run_info()


def test_a_reading_without_an_ar_has_no_fidelity() -> None:
    row = codec.reading_row(reading(sample(1), fidelity=None))
    assert codec.fidelity_of(row) is None


@given(st.dictionaries(st.text(max_size=5), SCALARS, max_size=5))
def test_a_group_has_one_key_whatever_its_order(group: dict[str, Any]) -> None:
    backwards = dict(reversed(list(group.items())))
    assert codec.group_key(group) == codec.group_key(backwards)
    assert codec.group_key(group | {"one more": 1}) != codec.group_key(group)
