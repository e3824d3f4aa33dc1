"""The self-test behind ``nla-monitor doctor``: is this NLA wired as it was trained? In words, with numbers.

Wrong wiring does not crash: it gives fluent text about nothing. The checks look for the known signatures (texts that do
not depend on the vector, CJK text about the marker, truncation, a reconstruction that does not depend on the text), and
read the same vectors by the other dialect: the trained one makes the better round trip.
An advisory check that fails is a remark; the others make the report fail.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nla_monitor.config import NLAConfig
from nla_monitor.errors import ActivationError, SidecarError
from nla_monitor.nla.base import Verbalization
from nla_monitor.nla.contract import Dialect
from nla_monitor.nla.fidelity import cosines
from nla_monitor.nla.injection import marker_fault, rescale
from nla_monitor.nla.injectors import injector_for
from nla_monitor.nla.loading import blocks_of, embedding_weight
from nla_monitor.nla.reconstructor import TransformersReconstructor, suffix_tail
from nla_monitor.nla.verbalizer_transformers import TransformersVerbalizer

RANDOM_VECTORS = 8
MOSTLY_CJK = 0.3
"""Share of CJK among a text's characters from which the text counts as CJK."""
_CJK = re.compile(r"[\u3000-\u30ff\u3200-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_SAME = 0.9999
"""Cosine above which two reconstructions are the same."""
_NORM_RANGE = (0.4, 1.5)
"""Activation norms over the injection scale, for the bulk of tokens: scales were set near the 75th percentile of norms,
and in the released examples the norms of a reply span 0.45 to 1.3 of it."""
_BETTER, _SKILL, _SKILL_OF_OWN = 0.15, 0.3, 0.6
"""The other dialect is the trained one if it explains so much more of the vectors, and at least so much of activations,
or of the AR's own vectors."""
_SAYS_NOTHING = ": the texts say nothing of the vectors"
_STRENGTH = 0.02
"""Relative deviation of the injected norm that rounding (bfloat16) explains."""


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
        activations: some real activations ``[n, d_model]``: means, norms and round trips are theirs then.
        seed: of the random vectors.
    """
    random = _random_vectors(verbalizer, activations, seed)
    readings = verbalizer.verbalize(random)
    known = random if activations is None else activations
    checks = [
        *_contract_checks(verbalizer),
        _refusal_check(verbalizer),
        *_text_checks("random", readings, tagged=verbalizer.contract.tagged),
        _norm_check(verbalizer, activations),
        _mean_check(verbalizer, known, "random" if activations is None else "given"),
    ]
    if reconstructor is not None:
        checks += _reconstructor_checks(verbalizer, reconstructor)
        checks += _round_trip_checks(verbalizer, reconstructor, activations, random)
    return SelfTestReport(tuple(checks))


def cjk_share(text: str) -> float:
    """Share of CJK characters among the characters that are not blank."""
    characters = "".join(text.split())
    return len(_CJK.findall(characters)) / len(characters) if characters else 0.0


def _random_vectors(
    verbalizer: TransformersVerbalizer, activations: npt.NDArray[np.float32] | None, seed: int
) -> npt.NDArray[np.float32]:
    """Gaussian directions at the norm of the activations, or at that of injection where none are given."""
    rows = np.random.default_rng(seed).standard_normal((RANDOM_VECTORS, verbalizer.d_model)).astype(np.float32)
    known = None if activations is None else float(np.median(np.linalg.norm(activations, axis=1)))
    norm = known or verbalizer.contract.injection_scale or 1.0
    return rescale(rows, norm)


def _contract_checks(verbalizer: TransformersVerbalizer) -> list[Check]:
    contract, prompt = verbalizer.contract, verbalizer.prompt
    fault = marker_fault(prompt.ids, contract._replace(marker_id=prompt.ids[prompt.marker]))
    at = f"at position {prompt.marker} of {len(prompt.ids)}"
    found = (
        f"{contract.marker!r} (id {contract.marker_id}) once, {at}, between ids {contract.left_id} and "
        f"{contract.right_id}"
        if contract.marker_id is not None
        else f"{contract.marker!r} (id {prompt.ids[prompt.marker]}) {contract.markers} times, from {at}"
    )
    layer, depth = verbalizer.layer, verbalizer.model.config.get_text_config().num_hidden_layers
    return [
        Check("marker", not fault, fault or found),
        _bos_check(verbalizer),
        Check("dialect", ok=True, detail=_dialect_detail(verbalizer)),
        _injection_check(verbalizer),
        Check("layer", layer is not None and layer < depth, _layer_detail(layer, depth), advisory=True),
        Check(
            "stop_tokens",
            bool(verbalizer.stop_ids),
            f"generation stops at ids {sorted(verbalizer.stop_ids)}"
            if verbalizer.stop_ids
            else "no end token is known, so texts run to the cap: set eos_token_id in generation_config.json",
        ),
    ]


def _bos_check(verbalizer: TransformersVerbalizer) -> Check:
    """Two BOS are the sign of a chat template that was applied to text which had one."""
    bos, ids = verbalizer.tokenizer.bos_token_id, verbalizer.prompt.ids
    if bos is None:
        return Check("av_bos", ok=True, detail="the tokenizer has no BOS")
    count = ids.count(bos)
    told = f"BOS (id {bos}) stands {count} times in the AV prompt, which starts with id {ids[0]}"
    return Check("av_bos", count < 2, told if count < 2 else f"{told}: correct the chat template")


def _dialect_detail(verbalizer: TransformersVerbalizer) -> str:
    contract = verbalizer.contract
    if contract.dialect.by_row:
        scale = contract.injection_scale
        norms = embedding_weight(verbalizer.model).float().norm(dim=1)
        told = "as they are" if scale is None else f"at norm {scale:g}"
        return (
            f"{contract.dialect}: vectors take the marker's embedding row {told}; embedding rows have median norm "
            f"{float(norms.median()):.3g}"
        )
    return (
        f"{contract.dialect}: vectors are added after block {contract.block} at {contract.coefficient:g} times the "
        f"norm of the stream, at {contract.markers} position{'s' if contract.markers > 1 else ''}"
    )


@torch.inference_mode()
def _injection_check(verbalizer: TransformersVerbalizer) -> Check:
    """What the model was given, measured in a forward pass: the row's norm, or by how much the stream moved."""
    contract, prompt = verbalizer.contract, verbalizer.prompt
    vectors = np.eye(2, verbalizer.d_model, dtype=np.float32)
    block = blocks_of(verbalizer.model)[0 if contract.dialect.by_row else contract.block]
    inputs, seen = verbalizer.prompt_embeddings(vectors), list[torch.Tensor]()
    rows = torch.from_numpy(vectors).to(inputs)

    def keep(hidden: Any) -> None:
        seen.append((hidden[0] if isinstance(hidden, tuple) else hidden).float())

    with ExitStack() as stack:
        if contract.dialect.by_row:
            stack.callback(
                block.register_forward_pre_hook(
                    lambda _block, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
                ).remove
            )
        else:
            stack.callback(block.register_forward_hook(lambda _block, _inputs, output: keep(output)).remove)
            injector = injector_for(verbalizer.model, contract, prompt.offsets)
            stack.enter_context(injector.during(rows, prompt.marker))
            stack.callback(block.register_forward_hook(lambda _block, _inputs, output: keep(output)).remove)
        verbalizer.model(inputs_embeds=inputs, use_cache=False, logits_to_keep=1)
    if contract.dialect.by_row:
        wanted, found = contract.injection_scale or 1.0, float(seen[0][:, prompt.marker].norm(dim=-1).mean())
        told = f"the marker's row enters the first block at norm {found:.4g}"
    else:
        before, after = (part[:, [prompt.marker + offset for offset in prompt.offsets]] for part in seen)
        wanted = contract.coefficient
        found = float(((after - before).norm(dim=-1) / before.norm(dim=-1)).mean())
        told = f"at the marker the stream moves by {found:.4g} of its norm"
    ok = abs(found - wanted) <= _STRENGTH * wanted
    return Check("injection", ok, told if ok else f"{told}, and {wanted:g} was meant: the vector does not arrive")


def _norm_check(verbalizer: TransformersVerbalizer, activations: npt.NDArray[np.float32] | None) -> Check:
    """Which norms the injection scale foretells, and whether the given activations have them."""
    scale = verbalizer.contract.injection_scale
    if scale is None:
        return Check("norm_range", ok=True, detail="no injection scale, so it foretells no norms", advisory=True)
    low, high = (scale * share for share in _NORM_RANGE)
    told = f"activations of most tokens should have norms between {low:.4g} and {high:.4g}"
    if activations is None:
        return Check("norm_range", ok=True, detail=told, advisory=True)
    median = float(np.median(np.linalg.norm(activations, axis=1)))
    ok, told = low <= median <= high, f"{told}; the {len(activations)} given have median {median:.4g}"
    remedy = ": another layer or model than the AV was trained on, or another scale"
    return Check("norm_range", ok, told if ok else told + remedy, advisory=True)


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


def _text_checks(name: str, readings: Sequence[Verbalization], *, tagged: bool) -> list[Check]:
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
            f"{cut} of {total} texts have no {'closing tag' if tagged else 'end token'}"
            + ("" if cut <= total // 2 else ": raise nla.max_new_tokens"),
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


def _round_trip_checks(
    verbalizer: TransformersVerbalizer,
    reconstructor: TransformersReconstructor,
    activations: npt.NDArray[np.float32] | None,
    random: npt.NDArray[np.float32],
) -> list[Check]:
    """Vectors to text and back, by this dialect and by the other one.

    Without activations the AR makes the vectors, from texts that the AV wrote either way: no more than consistency.
    """
    other, given = _other_dialect(verbalizer), activations is not None and len(activations) > 1
    readers = (verbalizer,) if other is None else (verbalizer, other)
    texts = list(dict.fromkeys(reading.text for reader in readers for reading in reader.verbalize(random)))
    if not given and len(texts) < 2:  # depends_on_vector has said so
        return []
    vectors = activations if given and activations is not None else reconstructor.reconstruct(texts)
    own = _round_trip(verbalizer, reconstructor, vectors)
    which = f"{len(vectors)} activations" if given else f"{len(vectors)} vectors of the AR's own"
    told = f"median cosine {own.own:.3f} on {which}, {own.shuffled:.3f} when texts are shuffled"
    sound = own.own > own.shuffled
    trip = Check("round_trip", sound, told + ("" if sound else _SAYS_NOTHING), advisory=not given)
    if other is None:
        return [trip]
    rival = _round_trip(other, reconstructor, vectors)
    wrong = rival.skill > max(_SKILL if given else _SKILL_OF_OWN, own.skill + _BETTER)
    told = (
        f"beyond shuffled texts, reading by {verbalizer.contract.dialect} explains {own.skill:.2f} of the vectors, by "
        f"{other.contract.dialect} {rival.skill:.2f}"
    )
    remedy = f": that is how it was trained, so set nla.dialect to {other.contract.dialect}"
    return [trip, Check("dialect_reads_best", not wrong, told + (remedy if wrong else ""))]


class _RoundTrip(NamedTuple):
    """Median cosines of vectors with what their texts, or another's, are read back as."""

    own: float
    shuffled: float

    @property
    def skill(self) -> float:
        """Share of the error with another's text that the own text takes away."""
        return 1 - (1 - self.own) / max(1 - self.shuffled, 1e-9)


def _round_trip(
    verbalizer: TransformersVerbalizer, reconstructor: TransformersReconstructor, vectors: npt.NDArray[np.float32]
) -> _RoundTrip:
    predicted = reconstructor.reconstruct([reading.text for reading in verbalizer.verbalize(vectors)])
    shuffled = np.roll(predicted, 1, axis=0)
    return _RoundTrip(float(np.median(cosines(vectors, predicted))), float(np.median(cosines(vectors, shuffled))))


def _other_dialect(verbalizer: TransformersVerbalizer) -> TransformersVerbalizer | None:
    """The same AV taking vectors the other way; None where there is none or its scale is not known."""
    sidecar, contract = verbalizer.sidecar, verbalizer.contract
    if sidecar.oracle is not None:
        return None
    by_row = Dialect.DEPTH if sidecar.depth_conditioned else Dialect.REPLACE
    other = sidecar.model_copy(update={"dialect": Dialect.ADD if contract.dialect.by_row else by_row})
    try:
        other.verbalizer_contract()
    except SidecarError:
        return None
    config = NLAConfig(batch_size=verbalizer.batch_size, max_new_tokens=verbalizer.max_new_tokens)
    provenance = verbalizer.content_hash
    return TransformersVerbalizer(
        verbalizer.model, verbalizer.tokenizer, other, verbalizer.prompt, config=config, content_hash=provenance
    )
