"""From generated tokens to an explanation: where generation ends, and which words count. The same for each engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from nla_monitor.nla.base import Verbalization

OPEN_TAG = "<explanation>"
CLOSE_TAG = "</explanation>"


def stop_ids(tokenizer: PreTrainedTokenizerBase, *configured: object) -> set[int]:
    """Every end token that a config or the tokenizer names (Gemma has two), and the closing tag where it is one token.

    Args:
        tokenizer: the AV's.
        configured: ``eos_token_id`` of the generation config and of the model's: an id, a list of ids, or None.
    """
    return set().union(*(as_ids(value) for value in configured), as_ids(tokenizer.eos_token_id), closing_ids(tokenizer))


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> Collection[int]:
    """The closing tag's id, where it is one token."""
    ids = tokenizer.encode(CLOSE_TAG, add_special_tokens=False)
    return ids if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else ()


def as_ids(value: object) -> set[int]:
    """The token ids that a field of a config holds."""
    if isinstance(value, int):
        return {value}
    return {int(item) for item in value} if isinstance(value, list | tuple) else set()


class ExplanationReader:
    """Reads explanations off generated tokens.

    Args:
        tokenizer: the AV's.
        stops: tokens at which generation ends; see ``stop_ids``.
        tagged: whether explanations stand between tags; where not (oracles), all that is written is the text, cut
            short where no end token came.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Collection[int], *, tagged: bool = True) -> None:
        self._stops, self._tagged = set(stops), tagged
        self._tokenizer = tokenizer
        self._silent = set(stops) - set(closing_ids(tokenizer)) | as_ids(tokenizer.pad_token_id)

    def read(self, tokens: Sequence[int]) -> Verbalization:
        """The explanation that stands in generated ``tokens``, their stop token included."""
        # Not skip_special_tokens: where the tags are special tokens they would vanish with the rest.
        kept = [token for token in tokens if token not in self._silent]
        raw = str(self._tokenizer.decode(kept, skip_special_tokens=False))
        ended = bool(tokens) and tokens[-1] in self._stops
        text, truncated = parse_explanation(raw) if self._tagged else (raw.strip(), not ended)
        return Verbalization(text=text, truncated=truncated, tokens=len(tokens))

    def read_text(self, raw: str, tokens: int) -> Verbalization:
        """The explanation that stands in text of ``tokens`` tokens, where a server names no ids."""
        for token in self._silent:
            raw = raw.replace(str(self._tokenizer.decode([token], skip_special_tokens=False)), "")
        text, truncated = parse_explanation(raw)
        return Verbalization(text=text, truncated=truncated, tokens=tokens)


def parse_explanation(raw: str) -> tuple[str, bool]:
    """Text between the explanation tags, stripped, and whether the closing tag is missing.

    A missing opening tag is no fault (some templates end the prompt with it). Half a closing tag is cut off.
    """
    body = raw.partition(OPEN_TAG)[2] if OPEN_TAG in raw else raw
    text, closing, _ = body.partition(CLOSE_TAG)
    if closing:
        return text.strip(), False
    text = text.rstrip()
    partial = next((length for length in range(len(CLOSE_TAG) - 1, 1, -1) if text.endswith(CLOSE_TAG[:length])), 0)
    return text[: len(text) - partial].strip(), True
