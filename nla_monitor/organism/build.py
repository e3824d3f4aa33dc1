"""Rebuilds the organisms from a seed: ``python -m nla_monitor.organism.build [--seed N] [--out DIR] [--seeds N ...]``.

Trains target, AV and AR of each variant and writes their checkpoints, a few minutes a variant on two CPU cores. Then,
unless
``--no-card`` is given, measures everything from the written weights, for this seed and for the further ``--seeds``
(trained for the card only), and writes ``CARD.md`` and ``card.json``: beside this file for the bundled weights, into
``--out`` otherwise.
``--work DIR`` keeps the further seeds and all figures, and takes up from there what an interrupted call left.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from nla_monitor.organism import WEIGHTS, captions, card, checkpoints, corpus, evaluate, recipe, tokenization, train
from nla_monitor.organism.recipe import Recipe

BUNDLED_SEED = 0


def build(
    variant: str, *, seed: int, out: Path, how: Recipe | None = None, progress: recipe.Progress = recipe.silent
) -> None:
    """Trains one variant and writes ``out/<variant>/{target,av,ar}``.

    Args:
        variant: ``planted`` or ``natural``.
        seed: Decides corpus, initial weights and all sampling; the same seed gives the same on the same machine.
        out: Folder that holds the variants.
        how: Lengths and sizes; the recipe of the bundled weights of that variant by default.
        progress: Told of every training step.
    """
    how = how or recipe.of(variant)
    tokenizer = tokenization.train_tokenizer(seed, vocabulary=how.vocabulary)
    target, heads = train.train_target(tokenizer, seed, how, planted=variant == "planted", progress=progress)
    checkpoints.round_to_disk(target)
    data = train.training_activations(target, tokenizer, seed, how)
    statistics, denominator = checkpoints.activation_statistics(data.vectors)
    scale = round(how.injection_factor * float(data.vectors.norm(dim=-1).mean()), 2)
    av = train.train_av(target, tokenizer, data, seed, how, injection_scale=scale, progress=progress)
    ar = train.train_ar(target, tokenizer, data, seed, how, progress=progress)
    statistics["cosine_quantiles"] = _caption_cosines(ar, tokenizer, data, seed).quantile(
        torch.tensor([0.01, 0.05, 0.5])
    )
    training = {
        "variant": variant,
        "seed": seed,
        "activations": len(data.sources),
        "fve_denominator": denominator,
        "fve_denominator_name": "training",
    }
    base = out / variant
    checkpoints.write_target(base / "target", target, heads, tokenizer)
    checkpoints.write_av(base / "av", av, tokenizer, injection_scale=scale, training=training)
    checkpoints.write_ar(base / "ar", ar, tokenizer, statistics=statistics, training=training)


def _caption_cosines(
    ar: train.Reconstruct,
    tokenizer: PreTrainedTokenizerFast,
    data: train.Activations,
    seed: int,
    count: int = 1000,
) -> torch.Tensor:
    """Cosine between activation and reconstruction from its true caption, ``[count]``."""
    rng = corpus.keyed_rng(seed, "cosine-quantiles")
    cosines = []
    for start in range(0, min(count, len(data.sources)), 100):
        chosen = range(start, min(start + 100, len(data.sources)))
        texts = [" ".join(captions.write(rng, *data.sources[index])) for index in chosen]
        rows = tokenizer([recipe.AR_TEMPLATE.format(explanation=text) for text in texts])["input_ids"]
        with torch.inference_mode():
            cosines.append(functional.cosine_similarity(ar(rows), data.vectors[list(chosen)], dim=-1))
    return torch.cat(cosines)


class _Bars:
    """Shows training steps as one bar a stage."""

    def __init__(self, bars: Progress, label: str) -> None:
        self._bars, self._label = bars, label
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, loss: float) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(f"{self._label} {stage}", total=total, loss=loss)
        self._bars.update(self._tasks[stage], completed=done, loss=loss)


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    return Progress(
        *columns,
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=BUNDLED_SEED, help="seed of the organisms that are kept")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2], help="further seeds, trained for the card only")
    parser.add_argument("--variants", nargs="+", choices=recipe.VARIANTS, default=list(recipe.VARIANTS))
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder that gets <variant>/{target,av,ar}")
    parser.add_argument("--work", type=Path, help="folder for further seeds and figures; a temporary one by default")
    parser.add_argument("--samples", type=int, default=200, help="held-out transcripts behind each row of the card")
    parser.add_argument("--threads", type=int, default=2, help="torch threads; one is as fast on a busy machine")
    parser.add_argument("--no-card", action="store_true", help="write weights only")
    parser.add_argument("--card-only", action="store_true", help="keep the weights in --out, measure them again")
    parser.add_argument("--smoke", action="store_true", help="a few steps only: checks the path, learns nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m nla_monitor.organism.build``."""
    chosen = _arguments(arguments)
    torch.set_num_threads(chosen.threads)
    how = recipe.SMOKE if chosen.smoke else None
    console = Console()
    with _progress(console) as bars:
        for variant in () if chosen.card_only else chosen.variants:
            build(
                variant,
                seed=chosen.seed,
                out=chosen.out,
                how=how,
                progress=_Bars(bars, f"{variant} seed {chosen.seed}"),
            )
        console.print(f"weights in {chosen.out}")
        if not chosen.no_card:
            folder = card.CARD_FOLDER if chosen.out == WEIGHTS else chosen.out
            with tempfile.TemporaryDirectory() as temporary:
                figures = _measure(chosen, chosen.work or Path(temporary), how, bars)
            card.write_card(figures, chosen.seed, folder)
            console.print(f"card in {folder / 'CARD.md'}")


def _measure(chosen: argparse.Namespace, work: Path, how: Recipe | None, bars: Progress) -> card.AllFigures:
    seeds = [chosen.seed, *(seed for seed in chosen.seeds if seed != chosen.seed)]
    task = bars.add_task("measuring", total=len(seeds) * len(chosen.variants), loss=0.0)
    figures: dict[str, dict[int, Mapping[str, Any]]] = {variant: {} for variant in chosen.variants}
    for seed in seeds:
        for variant in chosen.variants:
            root = chosen.out if seed == chosen.seed else work / f"seed-{seed}"
            if not (root / variant / "ar" / "nla_meta.yaml").is_file():
                build(variant, seed=seed, out=root, how=how, progress=_Bars(bars, f"{variant} seed {seed}"))
            kept = work / f"figures-{variant}-{seed}.json" if seed != chosen.seed else None
            figures[variant][seed] = _figures(variant, root, chosen.samples, kept)
            bars.advance(task)
    return figures


def _figures(variant: str, root: Path, samples: int, kept: Path | None) -> Mapping[str, Any]:
    """Measured now, or taken from the file of an earlier, interrupted call."""
    if kept is not None and kept.is_file():
        loaded: Mapping[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return loaded
    figures = evaluate.evaluate(variant, root=root, samples=samples)
    if kept is not None:
        kept.write_text(json.dumps(figures), encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
