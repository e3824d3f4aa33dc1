"""Asks a server many things at once: bounded, patient where it helps, and without a word of content in logs.

Attempts that failed in a way that may pass (no connection, silence, an answer cut off, 408, 409, 425, 429, 5xx) are
made again after growing pauses with jitter, or after what ``Retry-After`` says. Other refusals are final. One event
loop in one thread serves all callers; a caller that is interrupted takes its requests back.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar

import anyio
import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal

from nla_monitor.config import NLAConfig
from nla_monitor.errors import ConfigError, EngineError, EngineRefusedError, EngineUnavailableError
from nla_monitor.untraced import untraced

T = TypeVar("T")

PASSING: Final = frozenset({408, 409, 425, 429})
_LONGEST_PAUSE: Final = 8.0
_LONGEST_WAIT: Final = 60.0
"""Seconds up to which ``Retry-After`` is waited out; a server that wants more counts as unavailable."""
_SHOWN: Final = 300
"""Characters of a server's own message that are repeated."""


class _PassingError(Exception):
    """An attempt that failed in a way that may pass."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class Client:
    """HTTP to one server. Safe for several threads.

    Args:
        config: ``url``, ``concurrency``, ``timeout_seconds``, ``retries`` and ``api_key_env`` are used.

    Raises:
        ConfigError: the environment variable with the key is not set.
    """

    def __init__(self, config: NLAConfig) -> None:
        self.url = config.url or ""
        self._retries = config.retries
        self._concurrency = config.concurrency
        self._timeout = config.timeout_seconds
        self._key = _key(config.api_key_env)
        self._lock = threading.Lock()  # guards the start and the end of the loop
        self._running: tuple[BlockingPortal, httpx.AsyncClient, ExitStack] | None = None

    def ask_all(
        self, path: str, bodies: Sequence[Callable[[], bytes]], parse: Callable[[Any], T], *, retry: bool = True
    ) -> list[T | EngineError]:
        """Post every body; each gets its parsed answer or its error, in order.

        Args:
            path: below the server's URL.
            bodies: made when their turn comes, so that few are in memory at a time.
            parse: makes something of an answer's JSON; a ``ValueError`` counts as an attempt that failed.
            retry: False: one attempt each.
        """
        portal, client, _ = self._start()
        retries = self._retries if retry else 0
        future = portal.start_task_soon(self._all, client, path, bodies, parse, retries)
        try:
            answers: list[T | EngineError] = future.result()
        except BaseException:  # Ctrl-C, above all: nobody waits for the answers any more
            future.cancel()
            raise
        return answers

    def get(self, path: str) -> Any:
        """The JSON at a path, in one attempt; None where there is no JSON.

        Raises:
            EngineUnavailableError: the server cannot be reached or is out of order.
            EngineRefusedError: it refuses.
        """
        portal, client, _ = self._start()
        return portal.call(self._get, client, path)

    def close(self) -> None:
        """End connections and the thread; the next request starts them again."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            portal, client, stack = running
            portal.call(client.aclose)
            stack.close()

    def _start(self) -> tuple[BlockingPortal, httpx.AsyncClient, ExitStack]:
        with self._lock:
            if self._running is None:
                stack = ExitStack()
                portal = stack.enter_context(start_blocking_portal(name="nla-monitor-engine"))
                self._running = portal, portal.call(self._make), stack
            return self._running

    async def _make(self) -> httpx.AsyncClient:
        headers = {"Content-Type": "application/json", "User-Agent": "nla-monitor"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=self._timeout, limits=limits)

    async def _all(
        self,
        client: httpx.AsyncClient,
        path: str,
        bodies: Sequence[Callable[[], bytes]],
        parse: Callable[[Any], T],
        retries: int,
    ) -> list[T | EngineError]:
        found: dict[int, T | EngineError] = {}
        limiter = anyio.CapacityLimiter(self._concurrency)

        async def one(number: int) -> None:
            async with limiter:
                try:
                    found[number] = await self._patiently(client, path, bodies[number](), parse, retries)
                except EngineError as error:
                    found[number] = error

        async with anyio.create_task_group() as group:
            for number in range(len(bodies)):
                group.start_soon(one, number)
        return [found[number] for number in range(len(bodies))]

    async def _patiently(
        self, client: httpx.AsyncClient, path: str, body: bytes, parse: Callable[[Any], T], retries: int
    ) -> T:
        for attempt in range(retries + 1):
            try:
                return parse(_json(await self._send(client, "POST", path, body)))
            except (_PassingError, ValueError) as error:
                last = error if isinstance(error, _PassingError) else _PassingError(f"gave no usable answer: {error}")
            wait = _pause(attempt, last.after)
            if attempt == retries or wait > _LONGEST_WAIT:
                break
            await anyio.sleep(wait)
        told = f"after {attempt + 1} attempts" if attempt else "at the first attempt"
        raise EngineUnavailableError(f"the server at {self.url} {last} ({told})") from last

    async def _get(self, client: httpx.AsyncClient, path: str) -> Any:
        try:
            response = await self._send(client, "GET", path)
        except _PassingError as error:
            raise EngineUnavailableError(
                f"the server at {self.url} {error}. Start it, or correct nla.url; samples wait in the spool."
            ) from error
        try:
            return _json(response)
        except ValueError:  # /health answers with an empty body
            return None

    async def _send(self, client: httpx.AsyncClient, method: str, path: str, body: bytes | None = None) -> bytes:
        try:
            with untraced():
                response = await client.request(method, path, content=body)
        except httpx.HTTPError as error:
            raise _PassingError(f"cannot be reached or broke off: {type(error).__name__}") from error
        status = response.status_code
        if status in PASSING or status >= 500:
            raise _PassingError(f"answered {status}", _retry_after(response.headers))
        if status != 200:
            raise EngineRefusedError(self._refusal(path, response))
        return response.content

    def _refusal(self, path: str, response: httpx.Response) -> str:
        status = response.status_code
        head = f"the server at {self.url} answered {status} to {path}"
        if status in {401, 403}:
            return f"{head}: it wants another API key. Name the environment variable that holds it in nla.api_key_env."
        if status == 404:
            return f"{head}: correct nla.url, nla.engine or nla.served_model. {self._said(response)}"
        return f"{head}. {self._said(response)}"

    def _said(self, response: httpx.Response) -> str:
        """The server's own words, cut short, and never with the key in them."""
        words = " ".join(_message(response).split())
        return f"It says: {words.replace(self._key, '***') if self._key else words}"[:_SHOWN]


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    value = os.environ.get(name)
    if not value:
        raise ConfigError(
            f"nla.api_key_env: the environment variable {name} is not set; the server's API key goes there"
        )
    return value


def _message(response: httpx.Response) -> str:
    """OpenAI's ``error.message``, SGLang's the same or ``error``, older vLLM's ``message``; else the text."""
    try:
        found = response.json()
    except ValueError:
        return response.text
    for key in ("error", "message", "detail"):
        found = found.get(key, found) if isinstance(found, Mapping) else found
    return found if isinstance(found, str) else json.dumps(found)


def _json(content: bytes) -> Any:
    return json.loads(content)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that ``Retry-After`` asks for: a number, or a date."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return None
        # A date without a zone (RFC 5322's -0000) is in universal time.
        seconds = ((when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _pause(attempt: int, wanted: float | None) -> float:
    grown = min(math.ldexp(0.5, attempt), _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
    return max(grown, wanted or 0.0)
