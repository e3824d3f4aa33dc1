"""Token ids of a prompt that a span tells as text or messages."""

from __future__ import annotations

import copy
import threading
from typing import Any

from nla_monitor_opentelemetry.attributes import Attributes, prompt_messages, prompt_text


class PromptEncoder:
    """Messages through the tokenizer's chat template, text as it is; on a private copy of the tokenizer.

    Where the model is fed anything else (another template, tools in the prompt, cut messages), its tokens are others,
    and no forward is matched: a miss, never a mistake.
    """

    def __init__(self, tokenizer: Any) -> None:
        # A tokenizer carries padding and truncation state, and is not safe for two threads: the host's is left alone.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()

    def encode(self, attributes: Attributes) -> list[int] | None:
        """Ids ``[token]`` of the prompt; None where the span does not tell it."""
        messages = prompt_messages(attributes)
        with self._lock:
            if messages and getattr(self._tokenizer, "chat_template", None):
                encoded = self._tokenizer.apply_chat_template(
                    [message.plain() for message in messages],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                )
                return list(encoded["input_ids"])
            text = None if messages else prompt_text(attributes)
            return None if text is None else list(self._tokenizer(text)["input_ids"])
