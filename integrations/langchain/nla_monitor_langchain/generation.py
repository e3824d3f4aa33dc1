"""Pieces of local generation for ``ChatNLAModel``: sampling from a private random state, stop texts, streaming."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria, TextStreamer

from nla_monitor.leaving import busy, checkpoint


class GumbelSampler(LogitsProcessor):
    """Makes greedy decoding draw exact samples: ``argmax(logits / t + g)``, ``g`` i.i.d. standard Gumbel noise.

    (The Gumbel-max trick: Maddison, Tarlow, Minka 2014, "A* sampling", §2.) ``generate(do_sample=True)`` draws from
    torch's global random state, which belongs to the host: seeding it would change a training run in this process, and
    two threads would disturb each other. This draws from a generator of its own.

    Args:
        temperature: t > 0.
        seed: same seed, same prompt: same text. None: a new one each time.
        top_p: keep the smallest set of tokens with at least this probability mass.
        device: of the logits.
    """

    def __init__(self, temperature: float, seed: int | None, top_p: float, device: torch.device) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._generator = torch.Generator(device=device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, vocab]`` whose argmax is a sample."""
        scaled = _nucleus(scores.float() / self._temperature, self._top_p)
        uniform = torch.rand(scaled.shape, generator=self._generator, device=scaled.device)
        tiny = torch.finfo(uniform.dtype).tiny
        exponential = (-torch.log(uniform.clamp_min(tiny))).clamp_min(tiny)
        return scaled - torch.log(exponential)


def prompt_seed(seed: int, ids: Sequence[int]) -> int:
    """A seed of 63 bits for this prompt: the turns of an agent must not all draw the same noise."""
    digest = hashlib.blake2b(repr((seed, list(ids))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    if top_p >= 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    mass = ordered.softmax(dim=-1).cumsum(dim=-1)
    # A token stays while the mass *before* it is below top_p: the first one always stays.
    dropped = (mass - ordered.softmax(dim=-1)) >= top_p
    return logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))


class StopOnText(StoppingCriteria):
    """Ends a generation when one of the texts stands in what the model wrote, or when asked to.

    Args:
        tokenizer: decodes the newest tokens.
        stops: texts; only the end of the completion is decoded, as far back as the longest may reach.
        prompt_tokens: length of the prompt, which is never searched.
        cancelled: set from another thread to end the generation after the current token.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_tokens: int, cancelled: threading.Event) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        # A token is at least one byte, a character at most four: so many tokens surely hold the longest stop text.
        self._tail = 4 * max((len(stop) for stop in self._stops), default=0) + 4
        self._prompt_tokens = prompt_tokens
        self._cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """``[batch]`` of bool: this row is done."""
        checkpoint()
        done = [self._cancelled.is_set() or self._stopped(row) for row in input_ids]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def _stopped(self, row: torch.Tensor) -> bool:
        if not self._stops:
            return False
        written = row[self._prompt_tokens :][-self._tail :]
        text = self._tokenizer.decode(written, skip_special_tokens=True)
        return any(stop in text for stop in self._stops)


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop text, and whether there was one."""
    found = [text.index(stop) for stop in stops if stop and stop in text]
    return (text[: min(found)], True) if found else (text, False)


class TextThread(TextStreamer):
    """Runs a generation in a thread of its own and yields its text piece by piece.

    Prefill and all decode steps run in one thread, whatever thread (or event loop) consumes the text, so the capture
    session opened there sees them all. Unlike ``TextIteratorStreamer`` it passes an exception on instead of hanging,
    and leaving the loop ends the generation.

    Args:
        tokenizer: decodes.
        generate: called with this streamer in the thread.
        cancelled: set when the consumer leaves; the stopping criterion of ``generate`` must look at it.
    """

    def __init__(self, tokenizer: Any, generate: Callable[[TextThread], None], cancelled: threading.Event) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._generate = generate
        self._cancelled = cancelled
        self._pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of text is final."""
        self._pieces.put(text)

    def _run(self) -> None:
        try:
            with busy():
                self._generate(self)
        except BaseException as error:  # noqa: BLE001 -- handed to the consumer, which raises it
            self._pieces.put(error)
        else:
            self._pieces.put(None)

    def pieces(self) -> Iterator[str]:
        """Text pieces in order.

        Raises:
            BaseException: whatever ``generate`` raised.
        """
        thread = threading.Thread(target=self._run, name="nla-chat-generate", daemon=True)
        thread.start()
        try:
            while (piece := self._pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            self._cancelled.set()
            thread.join()


def hold_back(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Pieces cut at the first stop text; what may be the beginning of one waits for the next piece."""
    keep = max((len(stop) for stop in stops), default=1) - 1
    pending = ""
    for piece in pieces:
        pending, stopped = cut_at_stop(pending + piece, stops)
        if stopped:
            break
        if len(pending) > keep:
            yield pending[: len(pending) - keep]
            pending = pending[len(pending) - keep :]
    if pending:
        yield pending
