"""Explanations per second of the in-process AV, beside what the same model gives through plain ``generate``.

An AV of a real shape with random weights reads the same vectors in three ways: ours, ``model.generate(inputs_embeds=)``
at the same batch, and one request at a time, as the reference client does. All write the same number of tokens. The
organism's AV, whose rows end by themselves, is measured beside it.

    python -m tests.benchmarks.verbalize --json
    python -m tests.benchmarks.verbalize --json --device cuda --size 7b --tokens 130
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM

from nla_monitor.config import NLAConfig
from nla_monitor.nla.loading import quiet
from nla_monitor.nla.verbalizer_transformers import TransformersVerbalizer, load_verbalizer
from nla_monitor.organism import load_target, resolve
from nla_monitor.organism.corpus import documents
from nla_monitor.organism.train import encode, extract
from tests.benchmarks.nla_checkpoints import SIZES, vectors, write_av
from tests.benchmarks.nla_limits import least_work, measured_limits
from tests.benchmarks.nla_timing import alternate, machine

VARIANT = "planted"
_ORGANISM_TOKENS = 200
_SINGLE_REQUESTS = 4

Tokens = list[list[int]]
Rows = npt.NDArray[np.float32]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the figures."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    found = measure(options)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{key}: {value}\n" for key, value in found.items())
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--size", choices=sorted(SIZES), default="50m")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--tokens", type=int, default=40, help="that every row gets")
    parser.add_argument("--repeats", type=int, default=3, help="that are counted, of each way")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--no-organism", dest="organism", action="store_false")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    count = max(_SINGLE_REQUESTS, *options.batches)
    config = NLAConfig(
        device=options.device, dtype=options.dtype, batch_size=max(options.batches), max_new_tokens=options.tokens
    )
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        with quiet():
            write_av(Path(folder), SIZES[options.size], options.device)
        av = load_verbalizer(folder, config)
        compared = Compared(av, plain_model(Path(folder), av), options, progress, options.size)
        found = compare(compared, vectors(count, av.d_model))
        found |= against_limits(av, found["explanations_per_second"]["ours"], options.tokens) | {
            "parameters": sum(weight.numel() for weight in av.model.parameters()),
            "prompt_tokens": len(av.prompt.ids),
            "marker_at": av.prompt.marker,
        }
        if options.organism:
            found["organism"] = compare(_organism(config, options, progress), organism_vectors(count))
    return found | {"size": options.size, "tokens": options.tokens, "machine": machine(options.device)}


@dataclass(frozen=True, slots=True)
class Compared:
    """One checkpoint in two hands."""

    av: TransformersVerbalizer
    plain: Any
    options: argparse.Namespace
    progress: Progress
    label: str


def _organism(config: NLAConfig, options: argparse.Namespace, progress: Progress) -> Compared:
    folder = Path(resolve(f"organism:{VARIANT}/av"))
    av = load_verbalizer(folder, config.model_copy(update={"max_new_tokens": _ORGANISM_TOKENS}))
    return Compared(av, plain_model(folder, av), options, progress, "organism")


def compare(compared: Compared, pool: Rows) -> dict[str, Any]:
    """Rates of the three ways at each batch, their ratios, and whether they wrote the same tokens."""
    av, plain, options = compared.av, compared.plain, compared.options
    single = _single_rate(compared, pool[:_SINGLE_REQUESTS])
    rates: dict[str, dict[str, float]] = {"ours": {}, "generate": {}}
    same: dict[str, float] = {}
    for batch in options.batches:
        rows = pool[:batch]
        ways: dict[str, Callable[[], Tokens]] = {
            "ours": partial(ours, av, rows),
            "generate": partial(generated, plain, av, rows),
        }
        label = f"{compared.label}, batch {batch}"
        seconds, written = alternate(ways, options.repeats, compared.progress, label, device=options.device)
        for name, by_batch in rates.items():
            by_batch[str(batch)] = batch / seconds[name]
        same[str(batch)] = same_rows(written["ours"], written["generate"])
    return {
        "explanations_per_second": {name: _rounded(by_batch) for name, by_batch in rates.items()}
        | {"one_at_a_time": round(single, 3)},
        "tokens_identical": {batch: share == 1 for batch, share in same.items()},
        "share_of_rows_identical": _rounded(same),
        "ratio_to_generate": _rounded({key: rates["ours"][key] / rates["generate"][key] for key in rates["ours"]}),
        "ratio_to_one_at_a_time": _rounded({key: rate / single for key, rate in rates["ours"].items()}),
        **_memory(options.device),
    }


def organism_vectors(count: int) -> Rows:
    """``[count, d_model]`` activations of the organism, at the last token of different documents."""
    target, tokenizer = load_target(VARIANT)
    docs = encode(tokenizer, list(documents(0, "benchmark", count)))
    taken: Rows = extract(target, docs, [[len(doc.ends) - 1] for doc in docs]).vectors.numpy()
    return taken


def ours(av: TransformersVerbalizer, rows: Rows) -> Tokens:
    """The product's way, all rows in one batch."""
    av.batch_size = len(rows)
    return av.generate(rows)


def plain_model(folder: Path, av: TransformersVerbalizer) -> Any:
    """The same checkpoint as the library loads it, untouched by ours."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=av.model.dtype, local_files_only=True)
    return plain.eval().to(av.model.device)


def generated(plain: Any, av: TransformersVerbalizer, rows: Rows) -> Tokens:
    """Plain greedy ``generate`` over whole prompts; what stands after a row's end is cut off."""
    embeddings = av.prompt_embeddings(rows)
    stop = sorted(av.stop_ids)
    written = plain.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device),
        max_new_tokens=av.max_new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=av.tokenizer.pad_token_id,
    )
    return [_up_to_end(row, frozenset(stop)) for row in written.tolist()]


def _up_to_end(row: list[int], stop: frozenset[int]) -> list[int]:
    end = next((at for at, token in enumerate(row) if token in stop), len(row) - 1)
    return row[: end + 1]


def _single_rate(compared: Compared, rows: Rows) -> float:
    """Explanations per second of one request after the other."""

    def one_by_one() -> Tokens:
        return [tokens for row in rows for tokens in generated(compared.plain, compared.av, row[None])]

    options, label = compared.options, f"{compared.label}, one at a time"
    seconds, _ = alternate({"one": one_by_one}, options.repeats, compared.progress, label, device=options.device)
    return len(rows) / seconds["one"]


def same_rows(left: Tokens, right: Tokens) -> float:
    """Share of rows with the same tokens."""
    return sum(one == other for one, other in zip(left, right, strict=True)) / len(left)


def against_limits(av: TransformersVerbalizer, rates: Mapping[str, float], tokens: int) -> dict[str, Any]:
    """How near rates by batch are to what the machine's memory and arithmetic allow."""
    limits = measured_limits(av.model)
    work = {batch: least_work(av, int(batch), tokens) for batch in rates}
    seconds = {batch: int(batch) / rate for batch, rate in rates.items()}
    return {
        "bandwidth_fraction": _rounded({key: work[key].bytes / limits.bandwidth / seconds[key] for key in rates}),
        "arithmetic_fraction": _rounded({key: work[key].flops / limits.arithmetic / seconds[key] for key in rates}),
        "copy_gb_per_second": round(limits.bandwidth / 1e9, 2),
        "matmul_gflop_per_second": round(limits.arithmetic / 1e9, 1),
    }


def _memory(device: str) -> dict[str, float]:
    if torch.device(device).type != "cuda":
        return {}
    return {"peak_memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2)}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 3) for key, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
