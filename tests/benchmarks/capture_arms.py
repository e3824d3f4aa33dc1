"""The competitors of the capture benchmark: one training step each, over the same model and the same data.

Every arm owns a copy of the model and an optimizer, trains on the same batches, and differs in one thing only: how the
output of block K gets to host memory while the step runs. The monitor's arms are the product as its users run it: a
``Monitor`` with an SQLite file, records, text and writing included. The peers copy as many vectors as the monitor's
default does, and stop at host memory: they build no record and write nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from nla_monitor import Monitor

FLUSH_SECONDS = 60.0
SPECIAL = ("<unk>", "<eos>", "<pad>", "<bos>")


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of the model and of a batch."""

    vocab: int
    width: int
    inner: int
    blocks: int
    heads: int
    batch: int
    length: int


SIZES = {
    "tiny": Size(vocab=256, width=64, inner=96, blocks=3, heads=4, batch=4, length=16),
    "thin": Size(vocab=512, width=64, inner=96, blocks=12, heads=8, batch=4, length=64),
    "50m": Size(vocab=16_384, width=512, inner=1536, blocks=12, heads=8, batch=4, length=64),
    "1b": Size(vocab=32_000, width=2048, inner=5632, blocks=22, heads=16, batch=8, length=512),
}
PRECISIONS = ("fp32", "bf16-autocast", "bf16")


@dataclass(frozen=True)
class Setting:
    """What all arms of one comparison share."""

    size: Size
    folder: Path
    device: str = "cpu"
    precision: str = "fp32"
    backend: str | None = None
    """``torch.compile`` backend; None: eager."""
    batches: int = 32

    @property
    def layer(self) -> int:
        """K: two thirds of the way up."""
        return 2 * self.size.blocks // 3

    @cached_property
    def data(self) -> list[Tensor]:
        """``[batch, length]`` token ids on the device, with word-like (Zipf) frequencies; no special tokens."""
        size, generator = self.size, torch.Generator().manual_seed(1)
        weights = 1.0 / torch.arange(1, size.vocab + 1 - len(SPECIAL), dtype=torch.float64)
        shape = (self.batches * size.batch, -1)
        ids = torch.multinomial(weights.expand(shape), size.length, replacement=True, generator=generator)
        return list((ids + len(SPECIAL)).view(self.batches, size.batch, size.length).to(self.device))

    @cached_property
    def sidecar(self) -> Path:
        """An AV's contract without weights: the host reads only this."""
        return write_sidecar(self.folder / "av", self.size.width, self.layer)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word, saved in a folder: TransformerLens reads it from there."""
        words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), self.size.vocab))]
        inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        folder = str(self.folder / "model")
        roles = dict(zip(("unk_token", "eos_token", "pad_token", "bos_token"), SPECIAL, strict=True))
        PreTrainedTokenizerFast(tokenizer_object=inner, **roles).save_pretrained(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def model(self, **changes: Any) -> Qwen2ForCausalLM:
        """The model, always with the same random weights."""
        torch.manual_seed(0)
        size = self.size
        config = Qwen2Config(
            vocab_size=size.vocab,
            hidden_size=size.width,
            intermediate_size=size.inner,
            num_hidden_layers=size.blocks,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            unk_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            bos_token_id=3,
            **changes,
        )
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return Qwen2ForCausalLM(config).to(device=self.device, dtype=dtype).train()


def write_sidecar(folder: Path, width: int, layer: int) -> Path:
    """The contract of an AV for this width and layer, without weights."""
    folder.mkdir(parents=True)
    sidecar = {
        "kind": "nla_model",
        "schema_version": 2,
        "role": "av",
        "d_model": width,
        "extraction_layer_index": layer,
        "extraction": {"injection_scale": 10.0},
        "tokens": {
            "injection_char": "\u320e",
            "injection_token_id": 3,
            "injection_left_neighbor_id": 1,
            "injection_right_neighbor_id": 2,
        },
        "prompt_templates": {"av": "vector: <concept>{injection_char}</concept> explain."},
    }
    (folder / "nla_meta.yaml").write_text(yaml.safe_dump(sidecar, allow_unicode=True), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": width}), encoding="utf-8")
    return folder


class Arm:
    """One way to train; this one captures nothing."""

    baseline = "plain"
    """Arm with the same forward and no capture."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        self.setting = setting
        self.model = self.build()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def build(self) -> nn.Module:
        """The model to train."""
        return self.compiled(self.setting.model())

    def compiled(self, model: nn.Module) -> nn.Module:
        """The model as the setting wants it to run."""
        backend = self.setting.backend
        return model if backend is None else torch.compile(model, backend=backend)  # type: ignore[return-value]

    def loss(self, ids: Tensor, number: int) -> Tensor:
        """The step's forward, its capture included."""
        return self.model(input_ids=ids, labels=ids).loss

    def step(self, number: int) -> Tensor:
        """One optimizer step over batch ``number``; its gradients stay until the next."""
        self.optimizer.zero_grad()
        with self._precision():
            loss = self.loss(self.setting.data[number % self.setting.batches], number)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.setting.precision != "bf16-autocast":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.setting.device).type, torch.bfloat16)

    def settle(self) -> None:
        """Finish what this arm does in the background."""

    def facts(self) -> dict[str, Any]:
        """What it captured."""
        return {}

    def close(self) -> None:
        """The last call."""


def captures(size: Size) -> dict[str, dict[str, Any]]:
    """The monitor's arms: settings of ``capture``."""
    tokens = size.batch * size.length
    every = {"tokens_per_sequence": size.length, "sequences_per_step": size.batch}
    per_sequence = max(1, round(size.length / 100))
    sequences = max(1, min(size.batch, round(tokens / 100 / per_sequence)))
    return {
        "default": {},
        "one_percent": {"tokens_per_sequence": per_sequence, "sequences_per_step": sequences},
        "all_tokens": {**every, "skip_first": 0, "skip_special_tokens": False, "norm_sink_factor": None},
    }


class Monitored(Arm):
    """Training under a ``Monitor``: capture, records and spool; verbalizing is another device's work."""

    monitor: Monitor

    def build(self) -> nn.Module:
        setting = self.setting
        self.monitor = Monitor(
            {
                "database": f"sqlite:///{setting.folder / self.name}.db",
                "nla": {"av": str(setting.sidecar), "ar": None},
                "worker": {"mode": "external"},
                "capture": captures(setting.size).get(self.name, {}),
            }
        )
        model = setting.model()
        self.monitor.attach(model, setting.tokenizer)
        return self.compiled(model)

    def loss(self, ids: Tensor, number: int) -> Tensor:
        self.monitor.step(number)
        return super().loss(ids, number)

    def settle(self) -> None:
        self.monitor.flush(FLUSH_SECONDS)

    def facts(self) -> dict[str, Any]:
        stats, capture = self.monitor.stats, self.monitor.capture
        captured = capture.stats if capture is not None else None
        return {
            "samples": stats.sampled,
            "written": stats.written,
            "dropped": dict(stats.dropped),
            "faults": dict(stats.faults),
            "forwards": captured.forwards if captured else 0,
            "hook_cpu_ms": round(1000 * captured.host_seconds / max(1, captured.forwards), 4) if captured else None,
        }

    def close(self) -> None:
        self.monitor.close(FLUSH_SECONDS)


class MonitoredHost(Monitored):
    """The monitor's default with its background work put off until the step is over: the host's thread alone.

    That is what a peer's figure holds: peers build no records and write nothing.
    """

    def build(self) -> nn.Module:
        model = super().build()
        capture = self.monitor.capture
        if capture is None:
            raise RuntimeError("the monitor is attached to nothing")
        stager, due = capture._stager, capture._stager._due
        stager._due = lambda: stager._urgent > 0 and due()
        return model


class _Peer(Arm):
    """Copies the vectors at some positions to host memory, as many as the monitor's default reads."""

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        size = setting.size
        rows = torch.arange(min(8, size.batch)).repeat_interleave(2)
        columns = torch.randint(0, size.length, (len(rows),), generator=torch.Generator().manual_seed(2))
        self.rows, self.columns = rows.to(setting.device), columns.to(setting.device)
        self.vectors = 0
        self.kept: Tensor | None = None

    def keep(self, hidden: Tensor) -> None:
        """``hidden`` ``[batch, seq, d_model]``: the wanted rows go to the host."""
        self.kept = hidden[self.rows, self.columns].detach().to("cpu", copy=True)
        self.vectors += len(self.kept)

    def facts(self) -> dict[str, Any]:
        return {"vectors": self.vectors}


class OutputHiddenStates(_Peer):
    """transformers' own ``output_hidden_states=True``."""

    def loss(self, ids: Tensor, number: int) -> Tensor:
        out = self.model(input_ids=ids, labels=ids, output_hidden_states=True)
        self.keep(out.hidden_states[self.setting.layer + 1])
        return out.loss


class Nnsight(_Peer):
    """``nnsight``: the forward as a trace."""

    def build(self) -> nn.Module:
        from nnsight import NNsight

        model = self.setting.model()
        self.traced = NNsight(model)
        return model

    def loss(self, ids: Tensor, number: int) -> Tensor:
        traced, layer, rows, columns = self.traced, self.setting.layer, self.rows, self.columns
        with traced.trace(input_ids=ids, labels=ids):
            hidden = traced.model.layers[layer].output
            kept = hidden[rows, columns].detach().to("cpu", copy=True).save()
            loss = traced.output.loss.save()
        self.kept = kept
        self.vectors += len(kept)
        return loss


class _Bridge(_Peer):
    """TransformerLens' ``TransformerBridge`` around the same model; it wants eager attention."""

    baseline = "transformer_lens_plain"

    def build(self) -> nn.Module:
        from transformer_lens.model_bridge import TransformerBridge

        setting = self.setting
        tokenizer = setting.tokenizer
        model = setting.model(attn_implementation="eager")
        model.config.save_pretrained(tokenizer.name_or_path)
        return TransformerBridge.boot_transformers(
            tokenizer.name_or_path, hf_model=model, tokenizer=tokenizer, device=setting.device, dtype=model.dtype
        ).train()


class TransformerLens(_Bridge):
    """``run_with_cache`` with a filter for one hook point."""

    def loss(self, ids: Tensor, number: int) -> Tensor:
        name = f"blocks.{self.setting.layer}.hook_out"
        loss, cache = self.model.run_with_cache(ids, return_type="loss", names_filter=name, return_cache_object=False)
        self.keep(cache[name])
        return loss


class TransformerLensPlain(_Bridge):
    """The bridge's own forward, nothing captured: what its cache is to be measured against."""

    def loss(self, ids: Tensor, number: int) -> Tensor:
        return self.model(ids, return_type="loss")

    def facts(self) -> dict[str, Any]:
        return {}


MONITOR = ("default", "one_percent", "all_tokens")
HOST = "default_host"
PEERS = ("output_hidden_states", "nnsight", "transformer_lens")
ARMS: Mapping[str, type[Arm]] = {
    "plain": Arm,
    "plain_again": Arm,
    **dict.fromkeys(MONITOR, Monitored),
    HOST: MonitoredHost,
    "output_hidden_states": OutputHiddenStates,
    "nnsight": Nnsight,
    "transformer_lens": TransformerLens,
    "transformer_lens_plain": TransformerLensPlain,
}
_NEEDS = {"nnsight": "nnsight", "transformer_lens": "transformer_lens", "transformer_lens_plain": "transformer_lens"}


def unavailable(name: str, backend: str | None) -> str | None:
    """Why an arm cannot run in this interpreter under this setting; None if it can."""
    package = _NEEDS.get(name)
    if package is None:
        return None
    if backend is not None:
        return f"{package} runs the model's Python at every forward: it cannot be compiled"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed in this interpreter (pip install {package.replace('_', '-')})"
    return None
