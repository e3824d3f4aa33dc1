"""Replay: prompt and answer are run once more through a local copy of the model, and its residual stream is read.

A residual stream is a function of weights and tokens alone, however the tokens were chosen: greedy or sampled, here or
elsewhere. One pass over prompt and answer gives what the passes of the generation gave, up to the rounding of other
matrix shapes. It stops behind the last block that is read. Where the copy is not the model that answered, what is read
is how another model takes this text: every sample says so (``proxy``).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from nla_monitor.capture import DecoderBlocks, find_blocks
from nla_monitor.capture.assembly import Job
from nla_monitor.capture.layers import forward_names
from nla_monitor.errors import AttachError
from nla_monitor.records import IMPLAUSIBLE, RETOKENIZED, Scalar
from nla_monitor.sources.base import Call, SourceContext
from nla_monitor.sources.plausibility import DOUBT, MOST_TOKENS, surprise
from nla_monitor.sources.recorded import NO_PROMPT, RecordedSource, SkipError
from nla_monitor.sources.tokens import CallTokens

REPLAY: Final = "replay"
TRAINING: Final = "training_mode"


@dataclass(frozen=True, slots=True)
class Checks:
    """What came of asking whether the local copy would have given the answers."""

    checked: int
    implausible: int


class _EnoughError(Exception):
    """The last block that is read has given its output; ends a pass of ours, and is seen by nobody else."""


class _Take(threading.local):
    """What a thread of ours takes of its pass; other threads that run the same modules are not touched."""

    rows: Tensor | None = None
    found: dict[int, Tensor]
    to_the_end: bool = False
    """Whether the pass goes on behind the last block that is read."""


class _BlockHook:
    """Takes the wanted rows of a block's output ``[1, seq, d_model]``, in threads that ask for it.

    A copied or pickled model loses it: the copy is not read.
    """

    def __init__(self, take: _Take, layer: int, *, last: bool) -> None:
        self._take, self._layer, self._last = take, layer, last

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002 -- torch's signature
        rows = self._take.rows
        if rows is None:
            return
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        flat = hidden.reshape(-1, hidden.shape[-1])
        self._take.found[self._layer] = flat.index_select(0, rows.to(flat.device)).to("cpu")
        if self._last and not self._take.to_the_end:
            raise _EnoughError

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _inert

    def __reduce__(self) -> Any:
        return _make_inert, ()


def _inert(*_: object) -> None:
    """What the hook becomes in a copied model."""


def _make_inert() -> Any:
    return _inert


class ReplaySource(RecordedSource):
    """Reads calls by running them again through ``model``, on a thread of low priority.

    Args:
        model: a transformers decoder model in evaluation mode, whose owner does not train it meanwhile. It may be on
            any device; on a GPU the passes run in a stream of their own.
        tokenizer: of the model. Without it answers must come as token ids, and samples have no text.
        proxy: whether ``model`` is another model than the one that answers: other weights, or another adapter. Its
            samples then carry ``proxy``: they are no evidence of what the answering model represents.
        max_tokens: prompt and answer of a call that is read, together; default: what the model's config allows.
        check_every: of so many calls one is asked whether this model would have given that answer (``plausibility``);
            0: none. Only where it is no proxy. An implausible answer's samples carry ``implausible``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        proxy: bool,
        max_tokens: int | None = None,
        check_every: int = 8,
    ) -> None:
        super().__init__(REPLAY, tokenizer, proxy=proxy)
        self._model = model
        self._max_tokens = max_tokens
        self._check_every = 0 if proxy else check_every
        self._turn = self._checked = self._implausible = 0
        self._take = _Take()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def model(self) -> nn.Module:
        """What is run."""
        return self._model

    @property
    def checks(self) -> Checks:
        """How many answers were asked about, and how many are implausible."""
        return Checks(self._checked, self._implausible)

    @property
    def model_name(self) -> str:
        """See ``ActivationSource``."""
        config = getattr(self._model, "config", None)
        return str(getattr(config, "name_or_path", "") or type(self._model).__name__)

    def _prepare(self, context: SourceContext) -> Any:
        found = find_blocks(self._model)
        self._check(found, context)
        # Modules that are moved to a device for their turn (accelerate) would stay there after half a pass.
        moved = any(hasattr(module, "_hf_hook") for module in found.base.modules())
        last = None if moved else max(context.layers)
        for layer in context.layers:
            found.block(layer).register_forward_hook(_BlockHook(self._take, layer, last=layer == last))
        self._stack = found.stack
        if "logits_to_keep" not in forward_names(self._model):
            self._check_every = 0  # the logits of all tokens at once would not fit
        config = getattr(found.base, "config", None)
        text = getattr(config, "get_text_config", lambda: config)()
        longest = self._max_tokens or getattr(text, "max_position_embeddings", None)
        self._tokens = CallTokens(self._tokenizer, _vocabulary(found.base, text), longest)
        return config

    def _check(self, found: DecoderBlocks, context: SourceContext) -> None:
        if found.after_encoder:
            raise AttachError(
                f"{type(found.base).__name__} has an encoder: prompt and answer are not one sequence for it. Replay "
                "needs a decoder-only model; attach() reads the others while they generate"
            )
        if found.base.training:
            raise AttachError("the model is in training mode, where dropout changes what is read. Call model.eval()")
        config = getattr(found.base, "config", None)
        width = getattr(getattr(config, "get_text_config", lambda: config)(), "hidden_size", None)
        if width is not None and width != context.width:
            raise AttachError(
                f"the local copy's residual stream has d_model {width}, but the AV reads {context.width}: this NLA was "
                "trained on another model. Replay through the model that the NLA was trained on"
            )

    def _read(self, call: Call) -> list[Job]:
        if call.prompt is None:
            raise SkipError(NO_PROMPT)
        if self._stack.training:
            raise SkipError(TRAINING, "the local copy was put into training mode, where dropout changes what is read")
        written = self._tokens.of(call.prompt, call.completion)
        plan = self._reader.plan(call.session, call.prompt, written.fed)
        if plan is None:
            return []
        said: dict[str, Scalar] = {RETOKENIZED: True} if written.retokenized else {}
        found, doubted = self._run([*call.prompt, *written.fed], plan.rows, written.ids, len(call.prompt))
        if doubted:
            said[IMPLAUSIBLE] = True
        call.session.attributes = {**call.session.attributes, **said}
        return self._reader.jobs(plan, found)

    def _run(
        self, ids: Sequence[int], rows: Tensor, answer: Sequence[int], start: int
    ) -> tuple[dict[int, Tensor], bool]:
        """One pass over ``ids`` ``[token]``.

        Args:
            ids: prompt and answer.
            rows: ``[n]`` tokens whose vectors are wanted.
            answer: written tokens, the first of them at ``start`` in ``ids``.
            start: length of the prompt.

        Returns:
            By layer the vectors ``[n, d_model]``; and whether the answer is implausible, as far as it was asked.
        """
        device, doubted = next(self._stack.parameters()).device, False
        take = self._take
        take.rows, take.found, take.to_the_end = rows, {}, bool(answer) and self._is_turn()
        try:
            with torch.no_grad(), self._beside(device):
                tokens = torch.tensor([list(ids)], dtype=torch.int64, device=device)
                inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
                if take.to_the_end:
                    with self._context.guard("sources.check"):  # a question that fails must not cost the samples
                        doubted = self._doubts(inputs, answer[:MOST_TOKENS], start)
                take.to_the_end = False
                if len(take.found) < len(self._context.layers):
                    self._stack(**inputs)
        except _EnoughError:
            pass
        finally:
            found, take.found, take.rows = take.found, {}, None
        return found, doubted

    def _is_turn(self) -> bool:
        """Whether this call is one of those that are asked about."""
        self._turn += 1
        return self._check_every > 0 and self._turn % self._check_every == 1 % self._check_every

    def _doubts(self, inputs: dict[str, Any], answer: Sequence[int], start: int) -> bool:
        """A pass to the end: would this model have given that answer?"""
        device = inputs["input_ids"].device
        before = torch.arange(start - 1, start - 1 + len(answer), device=device)
        logits = self._model(**inputs, logits_to_keep=before).logits[0]
        z = surprise(logits, torch.tensor(list(answer), dtype=torch.int64, device=device))
        self._checked += z is not None
        doubted = z is not None and z > DOUBT
        self._implausible += doubted
        if doubted:
            self._warn(
                "implausible",
                f"an answer is implausible for the local copy (z = {z:.1f}, see nla_monitor.sources.plausibility): "
                "another model answered, or the tokens are another tokenizer's, or it was sampled above temperature 1 "
                "or forced by a grammar. If the models differ, say proxy: true. Counted in checks, not said again",
            )
        return doubted

    def _beside(self, device: torch.device) -> AbstractContextManager[object]:
        """On a GPU a stream of our own, of the lowest priority, so that nothing of the host's waits behind a pass."""
        if device.type != "cuda":
            return nullcontext()
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device, priority=0)  # type: ignore[no-untyped-call]  # torch annotates no streams
        return torch.cuda.stream(stream)


def _vocabulary(model: nn.Module, config: Any) -> int | None:
    """Rows of the input embedding, or what the config says."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embeddings, "num_embeddings", None)
    size = rows if rows is not None else getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None
