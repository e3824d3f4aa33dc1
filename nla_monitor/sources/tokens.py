"""Token ids of a whole call: what the model that is read is fed, from what a handler knows of prompt and answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from nla_monitor.records import Completion
from nla_monitor.sources.recorded import NO_ANSWER, SkipError

TOKENIZER: Final = "tokenizer_mismatch"
TOO_LONG: Final = "too_long"


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote, in tokens of the model that is read."""

    ids: tuple[int, ...]
    retokenized: bool = False
    """Made from the text: where the answering model spelled its answer otherwise, these are other tokens."""
    whole: bool = True
    """Whether the last id is the last that was written; from text, an end of sequence may be missing."""

    @property
    def fed(self) -> tuple[int, ...]:
        """The tokens that went into the model: the last one that was written never does."""
        return self.ids[:-1] if self.whole else self.ids


class CallTokens:
    """Checks token ids against a tokenizer and a vocabulary; makes ids of text where there are no others.

    Args:
        tokenizer: of the model that is read; copied (tokenizers carry state), None: ids only.
        vocabulary: number of token ids that the model knows; None: not known.
        longest: tokens of the longest call that is read; None: any.
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None, longest: int | None) -> None:
        self._tokenizer = None if tokenizer is None else copy.deepcopy(tokenizer)
        self._vocabulary = vocabulary
        self._longest = longest

    def of(self, prompt: Sequence[int], completion: Completion | None) -> Written:
        """What was written after ``prompt``.

        Raises:
            SkipError: another tokenizer made the ids, or prompt and answer are too long together.
        """
        if not self._known(prompt):
            raise SkipError(
                TOKENIZER,
                f"its prompt has token ids beyond the vocabulary of {self._vocabulary} of the model that is read, so "
                "that another tokenizer made them. Give the handler that model's tokenizer (tokenizer=...)",
            )
        written = Written((), whole=False) if completion is None else self._written(completion)
        number = len(prompt) + len(written.ids)
        if self._longest is not None and number > self._longest:
            raise SkipError(
                TOO_LONG,
                f"it has {number} tokens, and the model that is read takes {self._longest}. Shorten the prompt",
            )
        return written

    def _written(self, completion: Completion) -> Written:
        ids, text = completion.token_ids, completion.text
        if ids is not None and self._known(ids) and (text is None or self._says(ids, text)):
            return Written(ids)
        if text is not None and self._tokenizer is not None:
            made = tuple(int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"])
            if self._says(made, text):
                return Written(made, retokenized=True, whole=False)
        if ids is None and self._tokenizer is None:
            raise SkipError(
                NO_ANSWER, "its answer is known as text only, and the source has no tokenizer. Give the source one"
            )
        raise SkipError(
            TOKENIZER,
            "its answer cannot be written in tokens of the model that is read: the tokenizer of the source says "
            "another text than the one that was answered. Give the source the tokenizer of its model",
        )

    def _known(self, ids: Sequence[int]) -> bool:
        return all(token >= 0 and (self._vocabulary is None or token < self._vocabulary) for token in ids)

    def _says(self, ids: Sequence[int], text: str) -> bool:
        """Whether the tokens begin with the text, which a stop text or the end of the sequence may have cut short."""
        if self._tokenizer is None:
            return True
        said = [
            self._tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            for skip in (True, False)
        ]
        return any(_plain(one).startswith(_plain(text)) for one in said)


def _plain(text: str) -> str:
    """Without white space, which tokenizers and frameworks strip and add in many ways, and half characters."""
    return "".join(text.split()).rstrip("\ufffd")
