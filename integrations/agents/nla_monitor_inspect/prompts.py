"""Token ids of exactly what Inspect's ``hf/`` provider feeds its model."""

from __future__ import annotations

import copy
import threading
from typing import Any

from inspect_ai.hooks import BeforeModelGenerate
from inspect_ai.model import Model

from nla_monitor.errors import ConfigError


class HuggingFacePrompts:
    """The provider's own rendering and tokenization, on a private copy of the tokenizer.

    The provider tokenizes a batch with padding, in a thread of its own; a row without its padding is what a prompt
    gives alone.

    Raises:
        ConfigError: the model is not of the ``hf/`` provider.
    """

    def __init__(self, model: Model) -> None:
        self._name = str(model)
        api: Any = model.api
        self._api = api
        if not hasattr(api, "hf_chat") or getattr(api, "tokenizer", None) is None:
            raise ConfigError(
                f"model={self._name!r} is not of Inspect's hf/ provider: its prompts' tokens are not known. An API "
                "model has no activations to read here: replay it through a local model. For a provider of your own "
                "over local weights leave model= out: its forwards are found by their context"
            )
        self._tokenizer = copy.deepcopy(api.tokenizer)
        self._lock = threading.Lock()

    def encode(self, data: BeforeModelGenerate) -> list[int] | None:
        """Ids ``[token]`` of a call's prompt; None for a call of another model."""
        if data.model_name != self._name:
            return None
        text = self._api.hf_chat(list(data.input), list(data.tools))
        with self._lock:
            return list(self._tokenizer(text, **self._api.tokenizer_call_args)["input_ids"])
