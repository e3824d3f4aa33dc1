"""The one question that a capture replica is asked: one token after these, and where are the hidden states?"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, Final

from nla_monitor.errors import ConfigError, MissingExtraError
from nla_monitor.sources.recorded import SkipError
from nla_monitor.untraced import untraced

try:
    import httpx
except ModuleNotFoundError:
    httpx = None  # type: ignore[assignment]  # asked for when a client is made

UNAVAILABLE: Final = "replica_unavailable"
REFUSED: Final = "replica_refused"
_PATH: Final = "/v1/completions"
_PASSING: Final = frozenset({408, 409, 425, 429})
_PAUSES: Final = (0.5, 2.0)
"""Seconds before the second and the third attempt."""
_SHOWN: Final = 300


class CompletionsClient:
    """vLLM's ``POST /v1/completions`` with token ids, read in vLLM 0.32 (``entrypoints/openai/completion``).

    Args:
        url: base URL of the server.
        served_model: its name there; None: the only one that it serves.
        api_key_env: environment variable that holds the API key.
        timeout: seconds of silence that count as a failure.

    Raises:
        ConfigError: the environment variable is not set.
        MissingExtraError: httpx is not installed.
    """

    def __init__(self, url: str, served_model: str | None, *, api_key_env: str | None, timeout: float) -> None:
        if httpx is None:
            raise MissingExtraError("httpx", "engines", "a capture replica")
        key = None if api_key_env is None else os.environ.get(api_key_env)
        if api_key_env is not None and not key:
            raise ConfigError(
                f"source.api_key_env: the environment variable {api_key_env} is not set; the replica's key goes there"
            )
        headers = {"User-Agent": "nla-monitor"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout)
        self._url, self._key = url, key
        self._model = served_model

    @property
    def name(self) -> str:
        """Of the served model as far as it is known, with the server."""
        return f"{self._model or 'vllm'}@{self._url}"

    def close(self) -> None:
        """End the connections."""
        self._http.close()

    def hidden_states_path(self, ids: Sequence[int]) -> str:
        """Where the server writes the hidden states of ``ids`` ``[token]``, as it names the file.

        Raises:
            SkipError: it cannot be reached, refuses, or extracts no hidden states.
        """
        body = {"prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "stream": False, "model": self._served()}
        answer = self._ask("POST", _PATH, body)
        path = (answer.get("kv_transfer_params") or {}).get("hidden_states_path")
        if not isinstance(path, str) or not path:
            raise SkipError(
                REFUSED,
                f"the server at {self._url} answers without kv_transfer_params.hidden_states_path: it extracts no "
                "hidden states. Start it with --speculative-config and --kv-transfer-config for extract_hidden_states",
            )
        return path

    def _served(self) -> str:
        if self._model is None:
            names = [str(one.get("id")) for one in self._ask("GET", "/v1/models").get("data") or ()]
            if len(names) != 1:
                raise SkipError(REFUSED, f"the server at {self._url} serves {names}. Name one in source.served_model")
            self._model = names[0]
        return self._model

    @untraced()
    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        last = ""
        for pause in (*_PAUSES, None):
            try:
                response = self._http.request(method, path, json=body)
            except httpx.HTTPError as error:
                last = f"cannot be reached or broke off: {type(error).__name__}"
            else:
                if response.status_code == 200:
                    return self._json(response)
                if response.status_code not in _PASSING and response.status_code < 500:
                    raise SkipError(REFUSED, self._refusal(path, response))
                last = f"answered {response.status_code}"
            if pause is not None:
                time.sleep(pause)
        raise SkipError(UNAVAILABLE, f"the server at {self._url} {last}. Start it, or correct source.url")

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise SkipError(
                REFUSED, f"the server at {self._url} gave no JSON object: it is no vLLM. Correct source.url"
            )
        return answer

    def _refusal(self, path: str, response: httpx.Response) -> str:
        words = " ".join(response.text.split())
        shown = (words.replace(self._key, "***") if self._key else words)[:_SHOWN]
        return (
            f"the server at {self._url} answered {response.status_code} to {path}. It says: {shown}. Correct "
            "source.url, source.served_model, source.api_key_env or source.max_tokens"
        )
