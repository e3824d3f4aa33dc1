"""How the capture matrix spreads a model over ranks."""

from __future__ import annotations

import datetime as dt
import importlib.util
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.benchmarks.capture_matrix_checks import NotRunError, Wrap
from tests.benchmarks.capture_matrix_data import RANKS, Case
from tests.benchmarks.capture_matrix_drive import LEARNING_RATE
from tests.benchmarks.capture_matrix_models import ROWS

_PATIENCE = dt.timedelta(seconds=120)
_TP_PLAN = {
    "self_attn.q_proj": "columns",
    "self_attn.k_proj": "columns",
    "self_attn.v_proj": "columns",
    "self_attn.o_proj": "rows",
    "mlp.gate_proj": "columns",
    "mlp.up_proj": "columns",
    "mlp.down_proj": "rows",
}


def join(rank: int, store: str) -> None:
    """Make this process rank ``rank`` of the group that meets at the file ``store``."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=_PATIENCE)


def leave() -> None:
    """The end of the group."""
    dist.destroy_process_group()


def everyone(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of all ranks, on all ranks."""
    answers: list[Any] = [None] * RANKS
    dist.all_gather_object(answers, answer)
    return answers


def wrapper(case: Case) -> Wrap:
    """What spreads the case's model over the ranks.

    Raises:
        NotRunError: what that needs is not installed.
    """
    if case.parallelism == "zero3" and importlib.util.find_spec("deepspeed") is None:
        raise NotRunError("DeepSpeed is not installed (pip install --no-build-isolation deepspeed)")
    return _WRAPPERS[case.parallelism]


def data_rank(case: Case, rank: int) -> int:
    """Whose data a rank sees: with tensor parallelism all see the same."""
    return 0 if case.parallelism == "tp" else rank


def reads(case: Case, rank: int) -> bool:
    """Whether samples are expected of a rank: of tensor-parallel ranks, which all have the same, one reads."""
    return case.parallelism != "tp" or rank == 0


def _ddp(model: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _fsdp2(model: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    whole: nn.Module = model
    return whole


def _tensor_parallel(model: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    styles = {"columns": ColwiseParallel, "rows": RowwiseParallel}
    mesh = _mesh()
    for block in model.model.layers:
        parallelize_module(block, mesh, {name: styles[style]() for name, style in _TP_PLAN.items()})
    whole: nn.Module = model
    return whole


def _accelerate(model: Any) -> nn.Module:
    from accelerate import Accelerator

    prepared: nn.Module = Accelerator(cpu=True).prepare(model)
    if not isinstance(prepared, nn.parallel.DistributedDataParallel):
        raise NotRunError(f"accelerate did not see the {RANKS} processes: it gave back a {type(prepared).__name__}")
    return prepared


def _zero3(model: Any) -> nn.Module:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,  # that one is compiled when it is first used
    }
    engine: nn.Module = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    return engine


def _mesh() -> Any:
    return torch.distributed.device_mesh.init_device_mesh("cpu", (RANKS,))


_WRAPPERS: dict[str, Wrap] = {
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "tp": _tensor_parallel,
    "accelerate": _accelerate,
    "zero3": _zero3,
}
