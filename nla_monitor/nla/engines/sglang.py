"""SGLang's wire format: ``POST /generate`` with ``input_embeds`` and never ``input_ids`` beside them.

Two forms: bfloat16 bytes in base64 (``input_embeds_b64_bf16`` with ``input_embeds_shape``), which servers patched for
NLAs decode and which is several times smaller, and nested floats, which every server reads. The first is tried once,
where the embeddings are bfloat16. Read in SGLang 0.5.23 (``managers/io_struct.py``, ``managers/tokenizer_manager.py``,
``sampling/sampling_params.py``).
"""

from __future__ import annotations

import base64
import json
from typing import Any

import torch

from nla_monitor.nla.engines.prompting import PromptEmbeddings
from nla_monitor.nla.engines.wire import SEED_MASK, AnswerError, Completion, Sampling, decoding, integers


class SglangWire:
    """Requests to SGLang's native API.

    Args:
        prompt: what vectors are put into.
    """

    name = "sglang"
    path = "/generate"
    models_paths = ("/model_info", "/get_model_info")

    def __init__(self, prompt: PromptEmbeddings) -> None:
        self.model: str | None = None
        self._prompt = prompt
        self._packed = prompt.rows.dtype == torch.bfloat16
        # All of a prompt but one row is always the same: its floats are written out once.
        self._before = [_floats(row) for row in prompt.rows[: prompt.marker]]
        self._own = _floats(prompt.rows[prompt.marker])
        self._after = [_floats(row) for row in prompt.rows[prompt.marker + 1 :]]

    def body(self, row: torch.Tensor | None, sampling: Sampling) -> bytes:
        """See ``Wire``."""
        if self._packed:
            rows = self._prompt.filled(row).contiguous()
            packed = base64.b64encode(rows.view(torch.int16).numpy().tobytes()).decode("ascii")
            return _body(sampling, input_embeds_b64_bf16=packed, input_embeds_shape=list(rows.shape))
        middle = self._own if row is None else _floats(row.to(self._prompt.rows))
        embeds = ",".join([*self._before, middle, *self._after])
        return _body(sampling)[:-1] + b', "input_embeds": [' + embeds.encode("ascii") + b"]}"

    def ids_body(self, ids: tuple[int, ...], sampling: Sampling) -> bytes:
        """See ``Wire``."""
        return _body(sampling, input_ids=list(ids))

    def completion(self, answer: Any) -> Completion:
        """See ``Wire``. Some versions leave the matched stop token out of ``output_ids``."""
        try:
            text, told = answer["text"], answer["meta_info"]
            finish, count = told.get("finish_reason") or {}, int(told.get("completion_tokens") or 0)
        except (LookupError, TypeError, AttributeError) as error:
            raise AnswerError("no text and meta_info") from error
        if not isinstance(text, str):
            raise AnswerError("text is no text")
        tokens = integers(answer.get("output_ids"))
        matched = finish.get("matched") if isinstance(finish, dict) else None
        if tokens is not None and isinstance(matched, int) and tokens[-1:] != (matched,):
            tokens = (*tokens, matched)
        return Completion(tokens, text, len(tokens) if tokens is not None else count, told.get("prompt_tokens"))

    def simpler(self) -> bool:
        """See ``Wire``: from packed bytes to nested floats."""
        packed, self._packed = self._packed, False
        return packed


def _floats(row: torch.Tensor) -> str:
    """A row as JSON. Every number has a point or an exponent: by the first one's type the server tells batches."""
    return json.dumps(row.float().tolist())


def _body(sampling: Sampling, **prompt: object) -> bytes:
    seed = {} if sampling.seed is None else {"sampling_seed": sampling.seed & SEED_MASK}
    parameters = {
        "max_new_tokens": sampling.max_new_tokens,
        **decoding(sampling),
        "no_stop_trim": True,
    }
    return json.dumps({"sampling_params": parameters | seed, "stream": False} | prompt).encode()
