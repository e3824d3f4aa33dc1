"""The self-test behind ``nla-monitor doctor``: is this NLA wired as it was trained? In words, with numbers.

Wrong wiring does not crash: it gives fluent text about nothing. The checks look for the known signatures (texts that do
not depend on the vector, CJK text about the marker, truncation, a reconstruction that does not depend on the text).
An advisory check that fails is a remark; the others make the report fail.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nla_monitor.errors import ActivationError
from nla_monitor.nla.base import Verbalization
from nla_monitor.nla.fidelity import cosines
from nla_monitor.nla.injection import marker_fault
from nla_monitor.nla.loading import embedding_weight
from nla_monitor.nla.reconstructor import TransformersReconstructor, suffix_tail
from nla_monitor.nla.verbalizer_transformers import TransformersVerbalizer

RANDOM_VECTORS = 8
MOSTLY_CJK = 0.3
"""Share of CJK among a text's characters from which the text counts as CJK."""
_CJK = re.compile(r"[\u3000-\u30ff\u3200-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_SAME = 0.9999
"""Cosine above which two reconstructions are the same."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    """What was found, with numbers; when not ok, what to do."""
    advisory: bool = False
    """True: a remark, the report passes without it."""


@dataclass(frozen=True, slots=True)
class SelfTestReport:
    """All checks, and what they amount to."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check that is not advisory passed."""
        return all(check.ok or check.advisory for check in self.checks)

    @property
    def verdict(self) -> str:
        """One or two sentences for a person."""
        failed = [check for check in self.checks if not check.ok and not check.advisory]
        remarks = [check.name for check in self.checks if not check.ok and check.advisory]
        passed = sum(check.ok for check in self.checks)
        head = f"{passed} of {len(self.checks)} checks passed"
        if failed:
            told = "; ".join(f"{check.name}: {check.detail}" for check in failed)
            return f"Not usable: {head}. {told}"
        return f"Usable: {head}." + (f" Look at: {', '.join(remarks)}." if remarks else "")


def run_selftest(
    verbalizer: TransformersVerbalizer,
    reconstructor: TransformersReconstructor | None = None,
    *,
    activations: npt.NDArray[np.float32] | None = None,
    seed: int = 0,
) -> SelfTestReport:
    """Checks an AV, and an AR with it.

    Args:
        verbalizer: the AV.
        reconstructor: its AR, when there is one.
        activations: some real activations ``[n, d_model]``: adds the mean vector and a round trip to the checks.
        seed: of the random vectors.
    """
    random = np.random.default_rng(seed).standard_normal((RANDOM_VECTORS, verbalizer.d_model)).astype(np.float32)
    readings = verbalizer.verbalize(random)
    known = random if activations is None else activations
    checks = [
        *_contract_checks(verbalizer),
        _refusal_check(verbalizer),
        *_text_checks("random", readings),
        _mean_check(verbalizer, known, "random" if activations is None else "given"),
    ]
    if reconstructor is not None:
        checks += _reconstructor_checks(verbalizer, reconstructor)
        if activations is not None and len(activations) > 1:
            checks.append(_round_trip_check(verbalizer, reconstructor, activations))
    return SelfTestReport(tuple(checks))


def cjk_share(text: str) -> float:
    """Share of CJK characters among the characters that are not blank."""
    characters = "".join(text.split())
    return len(_CJK.findall(characters)) / len(characters) if characters else 0.0


def _contract_checks(verbalizer: TransformersVerbalizer) -> list[Check]:
    contract, prompt = verbalizer.contract, verbalizer.prompt
    fault = marker_fault(prompt.ids, contract)
    found = (
        f"{contract.marker!r} (id {contract.marker_id}) once, at position {prompt.marker} of {len(prompt.ids)}, "
        f"between ids {contract.left_id} and {contract.right_id}"
    )
    norms = embedding_weight(verbalizer.model).float().norm(dim=1)
    scale = contract.injection_scale
    told = "vectors go in as they are" if scale is None else f"vectors go in at norm {scale:g}"
    layer, depth = verbalizer.layer, verbalizer.model.config.get_text_config().num_hidden_layers
    return [
        Check("marker", not fault, fault or found),
        Check(
            "injection_scale", ok=True, detail=f"{told}; embedding rows have median norm {float(norms.median()):.3g}"
        ),
        Check("layer", layer is not None and layer < depth, _layer_detail(layer, depth), advisory=True),
        Check(
            "stop_tokens",
            bool(verbalizer.stop_ids),
            f"generation stops at ids {sorted(verbalizer.stop_ids)}"
            if verbalizer.stop_ids
            else "no end token is known, so texts run to the cap: set eos_token_id in generation_config.json",
        ),
    ]


def _layer_detail(layer: int | None, depth: int) -> str:
    if layer is None:
        return "the sidecar names no layer: set capture.layer yourself to the block it was trained on"
    return f"reads the output of block {layer} (hidden_states[{layer + 1}]); the AV itself has {depth} blocks"


def _refusal_check(verbalizer: TransformersVerbalizer) -> Check:
    accepted = []
    for name, value in (("zero", 0.0), ("NaN", np.nan), ("Inf", np.inf)):
        try:
            verbalizer.verbalize(np.full((1, verbalizer.d_model), value, dtype=np.float32))
        except ActivationError:
            continue
        accepted.append(name)
    told = f"accepted {', '.join(accepted)} vectors" if accepted else "zero, NaN and Inf vectors are refused"
    return Check("refuses_unusable_vectors", not accepted, told)


def _text_checks(name: str, readings: Sequence[Verbalization]) -> list[Check]:
    total = len(readings)
    distinct = len({reading.text for reading in readings})
    empty = sum(not reading.text for reading in readings)
    cut = sum(reading.truncated for reading in readings)
    cjk = sum(cjk_share(reading.text) > MOSTLY_CJK for reading in readings)
    same = "all texts are the same: the vector does not reach the model, or injection_scale is far off"
    return [
        Check(
            "depends_on_vector",
            distinct > 1,
            f"{distinct} distinct texts for {total} {name} vectors" if distinct > 1 else same,
        ),
        Check("not_empty", empty < total, f"{empty} of {total} explanations of {name} vectors are empty"),
        Check(
            "cjk_share",
            cjk <= total // 2,
            f"{cjk} of {total} texts are mostly CJK"
            + ("" if cjk <= total // 2 else ": they describe the marker, so the injection is missed"),
        ),
        Check(
            "truncation",
            cut <= total // 2,
            f"{cut} of {total} texts have no closing tag" + ("" if cut <= total // 2 else ": raise nla.max_new_tokens"),
            advisory=True,
        ),
    ]


def _mean_check(verbalizer: TransformersVerbalizer, vectors: npt.NDArray[np.float32], which: str) -> Check:
    reading = verbalizer.verbalize(vectors.mean(axis=0, keepdims=True))[0]
    text = reading.text[:80]
    return Check("mean_vector", bool(text), f"mean of {len(vectors)} {which} vectors reads {text!r}", advisory=True)


def _reconstructor_checks(verbalizer: TransformersVerbalizer, reconstructor: TransformersReconstructor) -> list[Check]:
    ids = reconstructor.token_ids(["A sentence."])[0]
    tail, bos = suffix_tail(reconstructor.contract), reconstructor.tokenizer.bos_token_id
    has_bos = bos is not None and ids[0] == bos
    vectors = reconstructor.reconstruct(["Couplet about rain.", "A log of failing tests."])
    cosine = float(cosines(vectors[:1], vectors[1:])[0])
    named = reconstructor.denominator
    return [
        Check(
            "suffix",
            tail != () and tuple(ids[-len(tail) :]) == tail,
            f"the AR prompt ends in ids {list(tail)}"
            if tail
            else "the sidecar names no suffix, so its end is not checked",
            advisory=not tail,
        ),
        Check(
            "bos",
            has_bos or bos is None,
            f"the AR prompt starts with id {ids[0]}; the tokenizer's BOS is {bos if bos is not None else 'none'}",
            advisory=True,
        ),
        Check(
            "value_head", ok=True, detail=f"finite, largest absolute weight {float(reconstructor.head.abs().max()):.3g}"
        ),
        Check("depends_on_text", cosine < _SAME, f"reconstructions of two different texts have cosine {cosine:.4f}"),
        _pair_check(verbalizer, reconstructor),
        _depth_check(reconstructor),
        Check(
            "denominator",
            named is not None,
            f"FVE is over {named.value:.4g} ({named.name})" if named else "no denominator is known: FVE is left out",
            advisory=True,
        ),
    ]


def _pair_check(verbalizer: TransformersVerbalizer, reconstructor: TransformersReconstructor) -> Check:
    left = (verbalizer.d_model, verbalizer.layer)
    right = (reconstructor.d_model, reconstructor.layer)
    agree = left[0] == right[0] and (None in (left[1], right[1]) or left[1] == right[1])
    told = f"AV and AR read (d_model, layer) {left} and {right}"
    return Check("pair", agree, told if agree else f"{told}: they are halves of different NLAs")


def _depth_check(reconstructor: TransformersReconstructor) -> Check:
    blocks, layer = reconstructor.model.config.get_text_config().num_hidden_layers, reconstructor.layer
    told = f"the AR has {blocks} blocks for layer {layer}"
    usual = layer is None or blocks == layer + 1
    return Check("depth", usual, told if usual else f"{told}; usual are {(layer or 0) + 1}", advisory=True)


def _round_trip_check(
    verbalizer: TransformersVerbalizer, reconstructor: TransformersReconstructor, activations: npt.NDArray[np.float32]
) -> Check:
    predicted = reconstructor.reconstruct([reading.text for reading in verbalizer.verbalize(activations)])
    own = float(np.median(cosines(activations, predicted)))
    shuffled = float(np.median(cosines(activations, np.roll(predicted, 1, axis=0))))
    told = f"median cosine {own:.3f} on {len(activations)} activations, {shuffled:.3f} when texts are shuffled"
    return Check(
        "round_trip", own > shuffled, told if own > shuffled else f"{told}: the texts say nothing of the vectors"
    )
