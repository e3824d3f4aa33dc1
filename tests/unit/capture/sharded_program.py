"""One of two processes of a tensor-parallel model; says as JSON what the capture made of its residual stream.

Usage: ``python sharded_program.py MODE RANK PORT``, with MODE ``replicated``, ``plain``, ``transformers``, ``sequence``
or ``local``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import torch
from capture_kit import capturing, make_model, token_batch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from nla_monitor.guard import STRICT_VARIABLE

K = 1


class Placed(nn.Module):
    """A block whose output is a ``DTensor``, or one rank's part as a plain tensor, as parallel styles make them."""

    def __init__(self, inner: nn.Module, mesh: Any, mode: str) -> None:
        super().__init__()
        self.self_attn = nn.Identity()  # what tells a block from other modules
        self.inner, self.mesh, self.mode = inner, mesh, mode

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(hidden, *args, **kwargs)
        whole = DTensor.from_local(output, self.mesh, [Replicate()], run_check=False)
        if self.mode == "replicated":
            return whole
        part = whole.redistribute(placements=[Shard(1)])
        return part if self.mode == "sequence" else part.to_local()


class Gathered(nn.Module):
    """The next block, which makes the stream whole again."""

    def __init__(self, inner: nn.Module, mesh: Any) -> None:
        super().__init__()
        self.self_attn = nn.Identity()
        self.inner, self.mesh = inner, mesh

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(hidden, DTensor) and hidden.shape[1] < 12:
            hidden = DTensor.from_local(hidden, self.mesh, [Shard(1)], run_check=False)
        if isinstance(hidden, DTensor):
            hidden = hidden.full_tensor()
        return self.inner(hidden, *args, **kwargs)


def _by_transformers(model: Any, mesh: Any) -> Any:
    """As ``from_pretrained(..., tp_plan=...)`` does it, which is for accelerators only."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    styles = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    plan = {
        f"model.layers.{number}.mlp.{name}": style
        for number in range(len(model.model.layers))
        for name, style in styles.items()
    }
    for name, style in list(plan.items()):
        plan[f"{name}.weight"] = style
    return apply_tensor_parallelism(model, mesh, plan)


def build(mode: str, mesh: Any) -> Any:
    """The model, parallel over ``mesh``."""
    model = make_model()
    if mode == "transformers":
        return _by_transformers(model, mesh)
    if mode == "plain":
        for block in model.model.layers:
            plan = {
                "mlp.gate_proj": ColwiseParallel(),
                "mlp.up_proj": ColwiseParallel(),
                "mlp.down_proj": RowwiseParallel(),
            }
            parallelize_module(block, mesh, plan)
        return model
    blocks = model.model.layers
    blocks[K], blocks[K + 1] = Placed(blocks[K], mesh, mode), Gathered(blocks[K + 1], mesh)
    return model


def main() -> None:
    """Run two forwards and print what came of them."""
    mode, rank, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    os.environ[STRICT_VARIABLE] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = build(mode, init_device_mesh("cpu", (2,)))
    ids = token_batch(2, 12)
    with torch.no_grad():
        expected = make_model()(ids, output_hidden_states=True).hidden_states[K + 1]
        with capturing(model, layer=K, tokens_per_sequence=12) as captured:
            model(ids, use_cache=False)
            samples = captured.samples()
            problem = captured.capture.check_fired()
            skipped = captured.capture.stats.skipped
    rows = {tuple(np.round(one.vector, 4)) for one in samples}
    same = rows == {tuple(np.round(row.numpy(), 4)) for row in expected.reshape(-1, expected.shape[-1])}
    sys.stdout.write(json.dumps({"samples": len(samples), "same": same, "skipped": skipped, "problem": problem}) + "\n")
    sys.stdout.flush()
    torch.distributed.destroy_process_group()
    # Gloo's threads can abort a process that ends in the ordinary way (pytorch issue 190489). What our own threads do
    # to the end of a process is tested in test_leaving.py.
    os._exit(0)


if __name__ == "__main__":
    main()
