"""HTTP servers that speak vLLM's and SGLang's embeddings APIs as documented, and misbehave as a test tells them to."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Asked:
    """One request as it arrived."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    embeds: Tensor | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        found = self.body.get("sampling_params", self.body)
        return {**found, "limit": found.get("max_new_tokens", found.get("max_tokens")), "seed": self.seed}

    @property
    def seed(self) -> int | None:
        return self.body.get("seed", self.body.get("sampling_params", {}).get("sampling_seed"))


@dataclass
class Fault:
    """What happens to a request instead of, or before, its answer."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": {"message": "out of order"}}'
    wait: float = 0.0
    cut: int | None = None
    """The answer's body ends after so many bytes, and with it the connection (a reset)."""
    truncated: bool = False
    """Half of the JSON, as if it were all."""


Brain = Callable[[Tensor, dict[str, Any]], list[int]]
"""Tokens for embeddings ``[tokens, d_model]`` under sampling parameters."""


def model_brain(model: PreTrainedModel) -> Brain:
    """Plain ``generate(inputs_embeds=...)``, one request at a time."""
    lock = threading.Lock()

    def think(embeds: Tensor, sampling: dict[str, Any]) -> list[int]:
        hot = sampling["temperature"] > 0
        options = (
            {"do_sample": True, "temperature": sampling["temperature"], "top_k": 0} if hot else {"do_sample": False}
        )
        with lock, torch.inference_mode():
            if hot:
                torch.manual_seed(sampling["seed"])
            found = model.generate(
                inputs_embeds=embeds[None].to(model.dtype),
                attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
                max_new_tokens=sampling["limit"],
                eos_token_id=sampling["stop_token_ids"],
                **options,
            )
        return found[0].tolist()

    return think


def toy_brain(tokenizer: PreTrainedTokenizerBase) -> Brain:
    """No model: words that follow from the embeddings' bits, the end tag, an end token."""
    ids = tokenizer.encode("alpha beta gamma delta test model plan rain log vector", add_special_tokens=False)
    end = tokenizer.encode("</explanation>", add_special_tokens=False)

    def think(embeds: Tensor, sampling: dict[str, Any]) -> list[int]:
        key = embeds.to(torch.bfloat16).view(torch.int16).numpy().tobytes() + repr(sampling["seed"]).encode()
        words = [ids[byte % len(ids)] for byte in hashlib.sha256(key).digest()[:12]]
        return [*words, *end, tokenizer.eos_token_id][: sampling["limit"]]

    return think


@dataclass
class EngineServer:
    """A server: ``kind`` is vllm or sglang; the rest is how it deviates from a good one."""

    kind: str
    brain: Brain
    table: Tensor
    """Its own input embeddings, scaled as its model does, ``[vocabulary, d_model]``."""
    tokenizer: PreTrainedTokenizerBase
    models: tuple[str, ...] = ("the-av",)
    max_model_len: int = 4096
    embeds_enabled: bool = True
    ignores: bool = False
    caches: bool = False
    radix: bool = False
    template: bool = False
    says_length: bool = True
    says_ids: bool = True
    packs: bool = False
    key: str | None = None
    fault: Callable[[Asked], Fault | None] = lambda _asked: None
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    most_at_once: int = 0
    forms: set[str] = field(default_factory=set)
    _cache: dict[int, list[int]] = field(default_factory=dict)
    _busy: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def counted(self, asked: Asked) -> Iterator[None]:
        """Around one request."""
        with self._lock:
            self.asked.append(asked)
            self._busy += 1
            self.most_at_once = max(self.most_at_once, self._busy)
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1

    def decode(self, body: dict[str, Any]) -> Tensor:
        """The prompt's embeddings, read exactly as documented. Raises ``Refused``."""
        if self.kind == "vllm":
            return self._decode_vllm(body)
        if "input_embeds_b64_bf16" in body and self.packs:
            self.forms.add("packed")
            raw = base64.b64decode(body["input_embeds_b64_bf16"], validate=True)
            shape = body["input_embeds_shape"]
            return torch.frombuffer(bytearray(raw), dtype=torch.int16).reshape(shape).view(torch.bfloat16).float()
        if "input_embeds" in body:
            if self.radix:
                raise Refused(
                    "input_embeds is provided while disable_radix_cache is False. Please add `--disable-radix-cache`"
                )
            rows = body["input_embeds"]
            if not isinstance(rows[0][0], float):
                raise Refused("a batch: input_embeds[0][0] is no float")
            assert "input_ids" not in body
            self.forms.add("floats")
            return torch.tensor(rows, dtype=torch.float32)
        if "input_ids" in body:
            return self.table[torch.tensor(body["input_ids"])]
        raise Refused("Either text, input_ids or input_embeds should be provided.")

    def _decode_vllm(self, body: dict[str, Any]) -> Tensor:
        if "prompt_embeds" not in body:
            return self.table[torch.tensor(body["prompt"])]
        if not self.embeds_enabled:
            raise Refused("You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
        raw = base64.b64decode(body["prompt_embeds"], validate=True)
        tensor = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
        if tensor.dim() != 2:
            raise Refused("`prompt_embeds` must be a 2D tensor of shape (num_tokens, hidden_size)")
        if tensor.shape[1] != self.table.shape[1]:
            raise Refused(f"`prompt_embeds` hidden_size {tensor.shape[1]} does not match the model's hidden_size 4")
        self.forms.add(str(tensor.dtype))
        return tensor

    def answer(self, asked: Asked) -> dict[str, Any]:
        """What a request gets. Raises ``Refused``."""
        embeds = self.decode(asked.body)
        asked.embeds = embeds
        is_ids = "prompt" in asked.body or "input_ids" in asked.body
        if self.template:
            embeds = torch.cat([self.table[:3].to(embeds), embeds])
        if self.ignores and not is_ids:
            tokens = self.tokenizer.encode("\n\n\n\n", add_special_tokens=False)
        elif self.caches and not is_ids:
            if len(embeds) not in self._cache:
                self._cache[len(embeds)] = self.brain(embeds, asked.sampling)
            tokens = self._cache[len(embeds)]
        else:
            tokens = self.brain(embeds, asked.sampling)
        return self._shaped(tokens, len(embeds), asked.sampling)

    def _shaped(self, tokens: list[int], length: int, sampling: dict[str, Any]) -> dict[str, Any]:
        stopped = tokens[-1] in sampling["stop_token_ids"]
        text = self.tokenizer.decode(tokens, skip_special_tokens=sampling["skip_special_tokens"])
        if self.kind == "vllm":
            usage = {"prompt_tokens": length, "completion_tokens": len(tokens)} if self.says_length else None
            choice = {"index": 0, "text": text, "finish_reason": "stop" if stopped else "length"}
            ids = {"token_ids": tokens} if self.says_ids and sampling.get("return_token_ids") else {}
            return {"object": "text_completion", "choices": [choice | ids], "usage": usage}
        finish = {"type": "stop", "matched": tokens[-1]} if stopped else {"type": "length", "length": len(tokens)}
        told = {"finish_reason": finish, "completion_tokens": len(tokens)}
        told |= {"prompt_tokens": length} if self.says_length else {}
        return {"text": text, "meta_info": told} | ({"output_ids": tokens} if self.says_ids else {})

    def get(self, path: str) -> dict[str, Any] | None:
        """What a GET gets: None for nothing there."""
        if path == "/health":
            return {}
        if self.kind == "vllm" and path == "/v1/models":
            return {"data": [{"id": name, "max_model_len": self.max_model_len} for name in self.models]}
        if self.kind == "sglang" and path == "/get_model_info":  # an older one
            return {"model_path": self.models[0], "is_generation": True}
        return None


class Refused(Exception):  # noqa: N818 -- the server's word for it
    """Answered with 400."""


class _Handler(BaseHTTPRequestHandler):
    """Takes requests for one ``EngineServer``."""

    protocol_version = "HTTP/1.1"
    engine: EngineServer

    def do_GET(self) -> None:
        found = self.engine.get(self.path)
        status = 401 if not self._may() else 404 if found is None else 200
        self._send(status, json.dumps(found or {}).encode())

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        asked = Asked(self.path, json.loads(raw), dict(self.headers))
        try:
            with self.engine.counted(asked):
                self._answer(asked)
        except OSError:
            self.close_connection = True  # the client gave up waiting

    def _answer(self, asked: Asked) -> None:
        fault = self.engine.fault(asked) or Fault()
        time.sleep(fault.wait)
        if not self._may():
            self._send(401, b'{"error": "Unauthorized"}')
        elif fault.status is not None:
            self._send(fault.status, fault.body, fault.headers)
        elif self.path != {"vllm": "/v1/completions", "sglang": "/generate"}[self.engine.kind]:
            self._send(404, b'{"detail": "Not Found"}')
        else:
            status, body = self._answered(asked)
            self._send(status, body[: len(body) // 2] if fault.truncated else body, cut=fault.cut)

    def _answered(self, asked: Asked) -> tuple[int, bytes]:
        try:
            return 200, json.dumps(self.engine.answer(asked)).encode()
        except Refused as error:
            return 400, json.dumps({"error": {"message": str(error)}}).encode()

    def _may(self) -> bool:
        return self.engine.key is None or self.headers.get("Authorization") == f"Bearer {self.engine.key}"

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            # Closing without lingering sends a reset instead of an end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        """Silent."""


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.open: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        """Connections are kept alive, so that a server that goes away has some to cut."""
        self.open.append(request)
        super().process_request(request, client_address)

    def cut(self) -> None:
        """End every connection."""
        for connection in self.open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *args: Any) -> None:
        """A reset of our own making is no news."""


@contextmanager
def serving(server: EngineServer, port: int = 0) -> Iterator[EngineServer]:
    """Runs a server; on a given port it can come back where it was."""
    httpd = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"engine": server}))
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    server.url = f"http://127.0.0.1:{httpd.server_port}"
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.cut()
        httpd.server_close()
        thread.join()
