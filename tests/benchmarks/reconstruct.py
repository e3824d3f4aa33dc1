"""Texts per second of the in-process AR, by batch, beside one text at a time.

An AR of a real shape with random weights, and the organism's. Both ways read the same texts and must give the same
vectors.

    python -m tests.benchmarks.reconstruct --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModel

from nla_monitor.config import NLAConfig
from nla_monitor.nla.loading import drop_final_norm, quiet
from nla_monitor.nla.reconstructor import TransformersReconstructor, load_reconstructor
from nla_monitor.organism import resolve
from nla_monitor.organism.captions import write
from nla_monitor.organism.corpus import documents, keyed_rng
from tests.benchmarks.nla_checkpoints import SIZES, texts, write_ar
from tests.benchmarks.nla_timing import alternate, machine

ORGANISM = "organism:planted/ar"
_SINGLE_TEXTS = 16

Vectors = npt.NDArray[np.float32]


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
    parser.add_argument("--size", choices=sorted(SIZES), default="50m", help="of the AV; its AR has 2/3 of the blocks")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--words", type=int, default=40, help="of a text, one token each, a quarter more or less")
    parser.add_argument("--repeats", type=int, default=5, help="that are counted, of each way")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--no-organism", dest="organism", action="store_false")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    config = NLAConfig(device=options.device, dtype=options.dtype, batch_size=max(options.batches))
    count = max(_SINGLE_TEXTS, *options.batches)
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        with quiet():
            write_ar(Path(folder), SIZES[options.size], options.device)
        ar = load_reconstructor(folder, config)
        plain = PlainAR(Path(folder), ar)
        found = compare(ar, plain, texts(count, options.words), options, progress)
        found["parameters"] = sum(weight.numel() for weight in ar.model.parameters())
        if options.organism:
            own = Path(resolve(ORGANISM))
            ar = load_reconstructor(own, config)
            found["organism"] = compare(ar, PlainAR(own, ar), explanations(count), options, progress)
    return found | {"size": options.size, "words": options.words, "machine": machine(options.device)}


class PlainAR:
    """The same checkpoint as the reference client uses it: the library's model, one text a forward pass."""

    def __init__(self, folder: Path, ar: TransformersReconstructor) -> None:
        self._model = AutoModel.from_pretrained(folder, dtype=ar.model.dtype, local_files_only=True)
        self._model = self._model.eval().to(ar.model.device)
        drop_final_norm(self._model)
        self._ar = ar

    @torch.inference_mode()
    def reconstruct(self, read: Sequence[str]) -> Vectors:
        """``[texts, d_model]``."""
        rows = [self._one(text) for text in read]
        return torch.stack(rows).cpu().numpy()

    def _one(self, text: str) -> torch.Tensor:
        ids = torch.tensor(self._ar.token_ids([text]), device=self._model.device)
        last = self._model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        predicted: torch.Tensor = self._ar.head @ last.float()
        return predicted


def compare(
    ar: TransformersReconstructor,
    plain: PlainAR,
    read: Sequence[str],
    options: argparse.Namespace,
    progress: Progress,
) -> dict[str, Any]:
    """Rates at each batch and one at a time, their ratios, and how far apart the vectors are."""
    single = read[:_SINGLE_TEXTS]
    ways: dict[str, Callable[[], Vectors]] = {"one": partial(plain.reconstruct, single)}
    for batch in options.batches:
        ways[str(batch)] = partial(in_batches, ar, read[:batch], batch)
    seconds, made = alternate(ways, options.repeats, progress, "texts", device=options.device)
    one = len(single) / seconds["one"]
    rates = {str(batch): batch / seconds[str(batch)] for batch in options.batches}
    return {
        "texts_per_second": {key: round(rate, 3) for key, rate in rates.items()} | {"one_at_a_time": round(one, 3)},
        "ratio_to_one_at_a_time": {key: round(rate / one, 3) for key, rate in rates.items()},
        "largest_cosine_distance": max(_distance(made["one"], made[str(batch)]) for batch in options.batches),
        "tokens_per_text": round(float(np.mean([len(ids) for ids in ar.token_ids(read)])), 1),
    }


def in_batches(ar: TransformersReconstructor, read: Sequence[str], batch: int) -> Vectors:
    """The product's way, at most ``batch`` texts a forward pass."""
    ar.batch_size = batch
    return ar.reconstruct(read)


def explanations(count: int) -> list[str]:
    """Explanations as the organism's AV learned to write them, of different documents."""
    rng = keyed_rng("benchmark", "reconstruct")
    found: dict[str, None] = {}
    for document in documents(0, "benchmark", 4 * count):
        found[" ".join(write(rng, document, len(document.text)))] = None
    return list(found)[:count]


def _distance(left: Vectors, right: Vectors) -> float:
    """Largest ``1 - cosine`` of the rows that both have."""
    shared = min(len(left), len(right))
    one, other = left[:shared].astype(np.float64), right[:shared].astype(np.float64)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float((1 - (one * other).sum(axis=1) / norms).max())


if __name__ == "__main__":
    sys.exit(main())
