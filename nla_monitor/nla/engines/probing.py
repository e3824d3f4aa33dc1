"""Is this server one that reads vectors? A wrong one does not fail: it writes fluent text about something else.

The questions: the AV's prompt once as token ids and once as embeddings (the same model must say the same), then several
random vectors and the first of them again. Each known trap has an error of its own, with the flag that helps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, cast

import torch

from nla_monitor.errors import (
    EmbedsDisabledError,
    EmbedsIgnoredError,
    EngineError,
    EngineRefusedError,
    PrefixCacheError,
    PromptChangedError,
    ServedModelError,
)
from nla_monitor.nla.engines.client import Client
from nla_monitor.nla.engines.wire import Completion, Sampling, Wire

PROBE_TOKENS: Final = 48
"""Long enough for random vectors to lead to different texts, short enough to cost little."""
_AGREE: Final = 0.25
"""Share of two continuations that must be common: rounding may part them late, another model parts them at once."""
_ENABLE: Final = {
    "vllm": "start it with --enable-prompt-embeds",
    "sglang": "use SGLang 0.5.6 or newer, started with --disable-radix-cache",
}
_CACHE: Final = {
    "vllm": "start it with --no-enable-prefix-caching, or upgrade vLLM",
    "sglang": "start it with --disable-radix-cache",
}


@dataclass(frozen=True, slots=True)
class Findings:
    """What a usable server was found to be."""

    model: str | None
    """As it calls the AV."""
    distinct: int
    """Different texts for the random vectors."""
    vectors: int
    repeatable: bool
    """Whether the same vector gave the same text again; without it, replays may differ."""
    length_known: bool
    """Whether it says how long the prompt was, so that an addition to it would have been seen."""

    def __str__(self) -> str:
        """One sentence for a person."""
        again = "the same vector gave the same text" if self.repeatable else "the same vector gave two texts"
        length = "" if self.length_known else "; it does not say how long prompts are, so additions would be missed"
        return f"serves {self.model or 'the AV'}; {self.distinct} texts for {self.vectors} vectors; {again}{length}"


class Probe:
    """One check of a server.

    Args:
        client: how it is asked.
        wire: its language; learns the model's name and the form that the server knows.
        ids: the AV's prompt.
        sampling: greedy, as it will be used.
    """

    def __init__(self, client: Client, wire: Wire, ids: tuple[int, ...], sampling: Sampling) -> None:
        self._client = client
        self._wire = wire
        self._ids = ids
        self._sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, PROBE_TOKENS))
        self._wanted = len(ids) + sampling.max_new_tokens
        self._where = f"the server at {client.url} ({wire.name})"

    def run(self, rows: Sequence[torch.Tensor]) -> Findings:
        """Ask, and judge the answers.

        Args:
            rows: at least two different rows to inject, ``[d_model]`` each.

        Raises:
            EngineError: the server cannot be used; see the subclasses.
        """
        self._client.get("/health")
        model = self._model()
        as_ids = self._one(partial(self._wire.ids_body, self._ids, self._sampling))
        as_embeddings = self._embedded()
        self._judge_prompt([as_ids, as_embeddings])
        # One after the other at first: an answer can only be taken from a cache after it has been put there.
        first = self._one(partial(self._wire.body, rows[0], self._sampling))
        others = self._ask([partial(self._wire.body, row, self._sampling) for row in rows[1:]])
        again = self._one(partial(self._wire.body, rows[0], self._sampling))
        texts = [first.text, *(other.text for other in others)]
        self._judge_vectors(as_ids, as_embeddings, texts)
        known = None not in (as_ids.prompt_tokens, as_embeddings.prompt_tokens)
        return Findings(model, len(set(texts)), len(rows), repeatable=first.text == again.text, length_known=known)

    def _model(self) -> str | None:
        """The name under which the AV is served.

        Raises:
            ServedModelError: vLLM serves several or others, or does not leave room for prompt and explanation.
        """
        told = self._models()
        if self._wire.name != "vllm":
            return str(told["model_path"]) if isinstance(told, dict) and "model_path" in told else None
        listed = told.get("data") if isinstance(told, dict) else None
        served = {str(one["id"]): one for one in listed or () if isinstance(one, dict) and "id" in one}
        wanted = self._wire.model or (next(iter(served)) if len(served) == 1 else None)
        if wanted is None or (served and wanted not in served):
            raise ServedModelError(
                f"{self._where} serves {', '.join(sorted(served)) or 'nothing'}; nla.served_model is {wanted!r}. Set "
                "it to the name of the AV there."
            )
        room = served.get(wanted, {}).get("max_model_len")
        if isinstance(room, int) and room < self._wanted:
            raise EngineRefusedError(
                f"{self._where} has a context of {room} tokens, and prompt and explanation need {self._wanted}. Start "
                f"it with --max-model-len {self._wanted} or more, or lower nla.max_new_tokens."
            )
        self._wire.model = wanted
        return wanted

    def _models(self) -> Any:
        for path in self._wire.models_paths[:-1]:
            try:
                return self._client.get(path)
            except EngineRefusedError:  # an older server knows the older path
                continue
        return self._client.get(self._wire.models_paths[-1])

    def _embedded(self) -> Completion:
        """The prompt as embeddings, in the richest form that the server knows."""
        body = partial(self._wire.body, None, self._sampling)
        try:
            return self._one(body)
        except (EngineRefusedError, EmbedsDisabledError):
            if not self._wire.simpler():
                raise
        return self._one(body)

    def _one(self, body: Any) -> Completion:
        return self._ask([body])[0]

    def _ask(self, bodies: Sequence[Any]) -> list[Completion]:
        found = self._client.ask_all(self._wire.path, bodies, self._wire.completion)
        for error in found:
            if isinstance(error, EngineError):
                raise self._named(error) from error
        return cast("list[Completion]", found)

    def _named(self, error: EngineError) -> EngineError:
        """A refusal by its reason, as far as the server tells."""
        said = str(error).lower()
        if not isinstance(error, EngineRefusedError):
            return error
        if "radix" in said or "prefix-cach" in said:
            return PrefixCacheError(f"{error} Remedy: {_CACHE[self._wire.name]}.")
        if "hidden_size" in said or "hidden size" in said or "vocab" in said:
            return ServedModelError(f"{error} It runs another model than the AV checkpoint in nla.av.")
        if "enable-prompt-embeds" in said or "either text, input_ids" in said or "prompt must be provided" in said:
            return EmbedsDisabledError(f"{error} Remedy: {_ENABLE[self._wire.name]}.")
        return error

    def _judge_prompt(self, answers: Sequence[Completion]) -> None:
        for answer in answers:
            if answer.prompt_tokens not in (None, len(self._ids)):
                raise PromptChangedError(
                    f"{self._where} read {answer.prompt_tokens} tokens where {len(self._ids)} were sent: it adds a "
                    "chat template or a BOS, and the AV's template is in the prompt already. Use its plain endpoint "
                    f"({self._wire.path}), with no proxy before it that rewrites prompts."
                )

    def _judge_vectors(self, as_ids: Completion, as_embeddings: Completion, texts: Sequence[str]) -> None:
        same_model = agreement(as_ids, as_embeddings) >= _AGREE
        if len(set(texts)) > 1:
            if not same_model:
                raise ServedModelError(
                    f"{self._where} continues the AV's prompt otherwise as tokens than as embeddings: its model is not "
                    "the checkpoint in nla.av (another revision, say), it scales embeddings for itself (Gemma), or it "
                    "wraps prompts into a template. Serve the very checkpoint that nla.av names."
                )
            return
        if same_model:
            raise PrefixCacheError(
                f"{self._where} gave {len(texts)} different vectors the same text, though it reads "
                f"embeddings: its cache does not tell them apart. Remedy: {_CACHE[self._wire.name]}."
            )
        raise EmbedsIgnoredError(
            f"{self._where} gave {len(texts)} different vectors the same text ({len(texts[0].strip())} characters that "
            "are not blank), and it is not that of the prompt: it drops the embeddings (SGLang's multimodal Gemma 3 "
            "wrapper does, and repeats line breaks). Serve the text model alone, or use vLLM or nla.engine: "
            "transformers."
        )


def agreement(one: Completion, other: Completion) -> float:
    """Length of the common beginning of two continuations, as a share of the longer one."""
    left: Sequence[Any] = one.tokens or one.text
    right: Sequence[Any] = other.tokens or other.text
    common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))))
    return common / max(len(left), len(right), 1)
