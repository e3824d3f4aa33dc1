"""Which vectors may go in, and where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nla_checkpoints import MARKER, marker_position, prompt_ids, sidecar, tokenizer_of

from nla_monitor.errors import ActivationError, TokenizerContractError
from nla_monitor.nla.injection import bad_rows, build_prompt, check_vectors, rescale
from nla_monitor.nla.sidecar import VerbalizerContract, parse_sidecar


def contract_of(family: str, **changes: object) -> VerbalizerContract:
    return parse_sidecar(sidecar(family, "av")).verbalizer_contract()._replace(**changes)


def test_bad_rows_name_each_unusable_row_and_spare_the_others() -> None:
    rows = np.ones((6, 4), dtype=np.float32)
    rows[1, 2], rows[2, 0], rows[3], rows[5] = np.nan, -np.inf, 0, 3e38
    bad = bad_rows(rows, 4)
    assert sorted(bad) == [1, 2, 3, 5]
    assert "1 NaN" in bad[1]
    assert "1 Inf" in bad[2]
    assert "zero norm" in bad[3]
    assert "beyond float32" in bad[5]


def test_rows_of_other_widths_are_told_apart() -> None:
    bad = bad_rows([np.ones(4), np.ones(5), np.ones((4, 1))], 4)
    assert sorted(bad) == [1, 2]
    assert "shape (5,) instead of (4,)" in bad[1]


def test_float64_that_overflows_float32_is_caught() -> None:
    assert "Inf" in bad_rows(np.full((1, 4), 1e300), 4)[0]


def test_check_vectors_names_the_row_and_what_to_do() -> None:
    rows = np.ones((3, 4))
    rows[1] = 0
    with pytest.raises(ActivationError, match=r"row 1: zero norm.*drop the sample.*bad_rows"):
        check_vectors(rows, 4)
    with pytest.raises(ActivationError, match=r"row 0: shape \(4,\) instead of \(5,\).*3 of 3 rows"):
        check_vectors(rows, 5)
    with pytest.raises(ActivationError, match=r"must be \[batch, 4\], found shape \(4,\)"):
        check_vectors(np.ones(4), 4)


def test_half_precision_comes_in_as_float32() -> None:
    assert check_vectors(np.ones((2, 4), dtype=np.float16), 4).dtype == np.float32


@given(st.floats(1e-6, 1e6), st.floats(1e-2, 1e5))
def test_rescaled_rows_have_the_injection_norm_and_keep_their_direction(norm: float, scale: float) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32) * np.float32(norm)
    scaled = rescale(rows, scale)
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), scale, rtol=1e-5)
    np.testing.assert_allclose(scaled * np.linalg.norm(rows, axis=1, keepdims=True), rows * scale, rtol=1e-4)
    assert rescale(rows, None) is rows


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
def test_the_prompt_is_the_chat_templated_user_message(family: str) -> None:
    prompt = build_prompt(tokenizer_of(family), contract_of(family))
    assert list(prompt.ids) == prompt_ids(family)
    assert prompt.marker == marker_position(family)
    assert [*prompt.prefix, prompt.ids[prompt.marker], *prompt.suffix] == prompt_ids(family)


def test_a_tokenizer_that_splits_the_marker_is_refused_with_the_ids_found() -> None:
    """A character that the vocabulary does not hold falls apart into bytes."""
    with pytest.raises(
        TokenizerContractError, match=r"expected once .*, found 0 times.*marker alone tokenizes to \[\d+, \d+"
    ):
        build_prompt(tokenizer_of("llama"), contract_of("llama", marker="\u321c"))


def test_a_marker_that_stands_twice_is_refused() -> None:
    template = f"{MARKER} <concept>{{injection_char}}</concept>"
    with pytest.raises(TokenizerContractError, match="found 2 times"):
        build_prompt(tokenizer_of("llama"), contract_of("llama", template=template))


@pytest.mark.parametrize("side", ["left_id", "right_id"])
def test_a_wrong_neighbour_is_refused_with_expected_and_found(side: str) -> None:
    contract = contract_of("llama", **{side: 5})
    with pytest.raises(TokenizerContractError, match=r"neighbours of marker.*expected \(.*5.*\), found \(\d+, \d+\)"):
        build_prompt(tokenizer_of("llama"), contract)


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("llama").backend_tokenizer)
    with pytest.raises(TokenizerContractError, match="no chat template"):
        build_prompt(bare, contract_of("llama"))
