"""Hidden states from vLLM: of the server that answers, through its folder, or of a replica that is sent the call again.

``vllm serve MODEL --speculative-config '{"method": "extract_hidden_states", "num_speculative_tokens": 1,
"draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [K + 1]}}}' --kv-transfer-config
'{"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer", "kv_connector_extra_config":
{"shared_storage_path": "/dev/shm/hidden"}}' --no-enable-chunked-prefill``

Such a server cannot use speculative decoding for what it is meant for. Where that costs too much, a replica of the
same weights is started so, and the other one answers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from nla_monitor.capture.assembly import Job
from nla_monitor.errors import ConfigError
from nla_monitor.records import RETOKENIZED
from nla_monitor.sources.base import Call, SourceContext
from nla_monitor.sources.completions import CompletionsClient
from nla_monitor.sources.hidden_files import SUFFIX, Columns, columns_of, is_whole, remove, token_ids, vectors_of
from nla_monitor.sources.recorded import NO_PROMPT, RecordedSource, SkipError
from nla_monitor.sources.tokens import CallTokens

VLLM: Final = "vllm"
NO_FILE: Final = "no_file"
CHANGED: Final = "prompt_changed"
_LOOK_SECONDS: Final = 0.05
_MOST_FILES: Final = 16_384
"""Files whose tokens, or whose uselessness, are remembered."""


class _VllmSource(RecordedSource):
    """What both share: files in a folder."""

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Any,
        *,
        proxy: bool,
        layer_ids: tuple[int, ...],
        keep_files: bool,
        timeout: float,
    ) -> None:
        super().__init__(VLLM, tokenizer, proxy=proxy)
        self._folder = Path(folder)
        self._layer_ids = layer_ids
        self._keep_files = keep_files
        self._timeout = timeout
        self._columns = Columns({}, 0, 0)

    @property
    def folder(self) -> Path:
        """Where files are looked for."""
        return self._folder

    def _prepare(self, context: SourceContext) -> Any:
        if not self._folder.is_dir():
            raise ConfigError(
                f"source.folder: there is no folder {str(self._folder)!r}. Name the server's shared_storage_path as "
                "this process sees it, and create it"
            )
        self._columns = columns_of(context.layers, self._layer_ids, context.width)

    def _take(self, call: Call, path: Path, ids: tuple[int, ...]) -> list[Job]:
        """The jobs of a call whose hidden states a file holds; ``ids`` are the file's tokens."""
        prompt = call.prompt or ()
        plan = self._reader.plan(call.session, prompt, ids[len(prompt) :])
        jobs = [] if plan is None else self._reader.jobs(plan, vectors_of(path, plan.rows, self._columns))
        if not self._keep_files:
            remove(path)
        return jobs


class HiddenStatesFolder(_VllmSource):
    """Reads what the answering server itself writes.

    A file belongs to the call whose prompt its tokens begin with; of two such calls each gets one. Written tokens are
    read where the requests ask for them: ``"kv_transfer_params": {"include_output_tokens": true}``.

    Args:
        folder: the server's ``shared_storage_path``, as this process sees it. Files that were there before, or
            that belong to no call, are left alone.
        tokenizer: of the served model, for the text of samples and for triggers.
        layer_ids: ``eagle_aux_hidden_state_layer_ids`` of the server; default ``K + 1`` of each layer that is read.
        keep_files: whether a file that was read stays; otherwise it is deleted (they are large).
        timeout: seconds after the end of a call at which its file counts as missing.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Any = None,
        *,
        layer_ids: tuple[int, ...] = (),
        keep_files: bool = False,
        timeout: float = 30.0,
    ) -> None:
        super().__init__(folder, tokenizer, proxy=False, layer_ids=layer_ids, keep_files=keep_files, timeout=timeout)
        self._known: dict[str, tuple[int, ...] | None] = {}
        """Tokens of the files that wait for their call, by name; None: of no use."""

    @property
    def model_name(self) -> str:
        """See ``ActivationSource``."""
        return f"vllm:{self._folder}"

    def _prepare(self, context: SourceContext) -> Any:
        super()._prepare(context)
        self._known = dict.fromkeys(name for name in os.listdir(self._folder) if name.endswith(SUFFIX))  # noqa: PTH208 -- names

    def _read(self, call: Call) -> list[Job]:
        if call.prompt is None:
            raise SkipError(NO_PROMPT)
        deadline = call.closed_at + self._timeout
        while True:
            name, ids = self._match(call)
            if name is not None:
                self._known[name] = None
                return self._take(call, self._folder / name, ids)
            if time.monotonic() >= deadline or self._closing:
                raise SkipError(
                    NO_FILE,
                    f"no file in {str(self._folder)!r} begins with its prompt. An API model has no activations to read "
                    "(replay: proxy: true reads how a local model takes its text); for the served model check that the "
                    "server extracts hidden states into this folder, and that the handler has its tokenizer",
                )
            time.sleep(_LOOK_SECONDS)

    def _match(self, call: Call) -> tuple[str | None, tuple[int, ...]]:
        """The oldest whole file that begins with the call's prompt, and goes on as its answer where that is known."""
        for name, path in self._new():
            try:
                self._known[name] = token_ids(path, self._columns)
            except SkipError as error:
                self._known[name] = None
                self._skip(error)
        while len(self._known) > _MOST_FILES:
            self._known.pop(next(iter(self._known)))
        for name, ids in self._known.items():
            if ids is not None and _belongs(ids, call):
                return name, ids
        return None, ()

    def _new(self) -> Iterator[tuple[str, Path]]:
        with os.scandir(self._folder) as found:
            entries = [entry for entry in found if entry.name.endswith(SUFFIX) and entry.name not in self._known]
        dated = []
        for entry in entries:
            try:
                dated.append((entry.stat().st_mtime, entry.name))
            except FileNotFoundError:  # somebody else deleted it between the two looks
                continue
        for _, name in sorted(dated):
            if is_whole(self._folder / name):
                yield name, self._folder / name


def _belongs(ids: tuple[int, ...], call: Call) -> bool:
    prompt = call.prompt or ()
    if ids[: len(prompt)] != prompt:
        return False
    answer = None if call.completion is None else call.completion.token_ids
    written = ids[len(prompt) :]
    return answer is None or written == answer[: len(written)]


class CaptureReplica(_VllmSource):
    """Sends prompt and answer to a second server of the same weights, which writes their hidden states.

    Args:
        url: of the replica, such as ``http://localhost:8001``.
        folder: its ``shared_storage_path``, as this process sees it.
        tokenizer: of the served model. Without it answers must come as token ids.
        proxy: whether the replica has other weights than the server that answers.
        served_model: its name there; default: the only one that it serves.
        layer_ids, keep_files: as of ``HiddenStatesFolder``.
        timeout: seconds of silence after which a request, or a file, counts as failed.
        max_tokens: prompt and answer of a call that is read, together; one less than the replica's ``max_model_len``.
        api_key_env: environment variable that holds its API key.

    Raises:
        ConfigError: the environment variable is not set.
        MissingExtraError: httpx is not installed.
    """

    def __init__(
        self,
        url: str,
        folder: str | Path,
        tokenizer: Any = None,
        *,
        proxy: bool,
        served_model: str | None = None,
        layer_ids: tuple[int, ...] = (),
        keep_files: bool = False,
        timeout: float = 30.0,
        max_tokens: int | None = None,
        api_key_env: str | None = None,
    ) -> None:
        super().__init__(folder, tokenizer, proxy=proxy, layer_ids=layer_ids, keep_files=keep_files, timeout=timeout)
        self._client = CompletionsClient(url, served_model, api_key_env=api_key_env, timeout=timeout)
        self._tokens = CallTokens(tokenizer, None, max_tokens)

    @property
    def model_name(self) -> str:
        """See ``ActivationSource``."""
        return self._client.name

    def close(self, timeout: float) -> bool:
        """See ``ActivationSource``."""
        done = super().close(timeout)
        self._client.close()
        return done

    def _read(self, call: Call) -> list[Job]:
        if call.prompt is None:
            raise SkipError(NO_PROMPT)
        written = self._tokens.of(call.prompt, call.completion)
        if written.retokenized:
            call.session.attributes = {**call.session.attributes, RETOKENIZED: True}
        sent = (*call.prompt, *written.fed)
        # Its name alone: the folder may be mounted elsewhere here, and a path from a server is not to be followed.
        path = self._folder / Path(self._client.hidden_states_path(sent)).name
        self._await(path)
        ids = token_ids(path, self._columns)
        if ids != sent:
            raise SkipError(
                CHANGED,
                f"the replica read {len(ids)} tokens where {len(sent)} were sent: it adds to prompts or cuts them. "
                "Let it take token ids as they are (no chat template, no truncation)",
            )
        return self._take(call, path, ids)

    def _await(self, path: Path) -> None:
        deadline = time.monotonic() + self._timeout
        while not is_whole(path):
            if time.monotonic() >= deadline or self._closing:
                raise SkipError(
                    NO_FILE,
                    f"the replica named {path.name}, which is not in {str(self._folder)!r} after {self._timeout:g} s. "
                    "Let source.folder be its shared_storage_path as this process sees it",
                )
            time.sleep(_LOOK_SECONDS)
