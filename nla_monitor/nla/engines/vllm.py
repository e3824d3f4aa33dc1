"""vLLM's wire format: ``POST /v1/completions`` with ``prompt_embeds``.

``prompt_embeds`` is base64 of what ``torch.save`` writes for a tensor ``[tokens, d_model]``; the server casts it to its
own dtype. The completions API applies no chat template. Read in vLLM 0.32 (``renderers/embed_utils.py``,
``entrypoints/openai/completion/protocol.py``). Whatever the checkpoint's ``generation_config.json`` says becomes the
server's default (Qwen2.5: a repetition penalty), so every sampling parameter is sent.
"""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import torch

from nla_monitor.nla.engines.prompting import PromptEmbeddings
from nla_monitor.nla.engines.wire import SEED_MASK, AnswerError, Completion, Sampling, decoding, integers


class VllmWire:
    """Requests to vLLM's completions API.

    Args:
        prompt: what vectors are put into.
        model: name under which the server knows the AV.
    """

    name = "vllm"
    path = "/v1/completions"
    models_paths = ("/v1/models",)

    def __init__(self, prompt: PromptEmbeddings, model: str | None = None) -> None:
        self._prompt = prompt
        self.model: str | None = model

    def body(self, row: torch.Tensor | None, sampling: Sampling) -> bytes:
        """See ``Wire``."""
        buffer = io.BytesIO()
        torch.save(self._prompt.filled(row), buffer)
        return self._body(sampling, prompt_embeds=base64.b64encode(buffer.getbuffer()).decode("ascii"))

    def ids_body(self, ids: tuple[int, ...], sampling: Sampling) -> bytes:
        """See ``Wire``."""
        return self._body(sampling, prompt=list(ids))

    def _body(self, sampling: Sampling, **prompt: object) -> bytes:
        seed = {} if sampling.seed is None else {"seed": sampling.seed & SEED_MASK}
        model = {} if self.model is None else {"model": self.model}
        request = {
            "max_tokens": sampling.max_new_tokens,
            **decoding(sampling),
            "include_stop_str_in_output": True,
            "return_token_ids": True,
            "stream": False,
        }
        return json.dumps(model | request | seed | prompt).encode()

    def completion(self, answer: Any) -> Completion:
        """See ``Wire``. ``token_ids`` are there since vLLM 0.10.2; older ones give the text alone."""
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            text = choice["text"]
        except (LookupError, TypeError, AttributeError) as error:
            raise AnswerError("no choices[0].text") from error
        if not isinstance(text, str):
            raise AnswerError("choices[0].text is no text")
        tokens = integers(choice.get("token_ids"))
        count = len(tokens) if tokens is not None else int(usage.get("completion_tokens") or 0)
        return Completion(tokens, text, count, usage.get("prompt_tokens"))

    def simpler(self) -> bool:
        """See ``Wire``: there is one form."""
        return False
