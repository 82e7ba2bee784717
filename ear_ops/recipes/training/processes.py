"""Several processes of one run, as `torchrun` and `accelerate launch` start them: who writes, and that a mistake stops
all of them. They share the folder of the run, and each holds the whole model (DDP)."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ear_ops.recipes.training.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # how long a process may wait for another one, which reads data or scores a language

# As torchrun, Intel MPI, Open MPI and MVAPICH say it; `accelerate launch --cpu` starts its processes by mpirun.
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")

_SHARDED = {  # what `accelerate launch` sets where the processes are to share the model, too
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def count() -> int:
    return _number(_COUNT, 1)


def rank() -> int:
    return _number(_RANK, 0)


def start(bf16: bool) -> None:
    """Let the processes find each other; with one there is nothing to do.

    Args:
        bf16: whether the configuration of the run asks for bfloat16 autocast.

    Raises:
        ConfigError: the launcher asks for what would train otherwise than the configuration says.
    """
    _check_launcher(bf16)
    if count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def on_main(function: Callable[[], T]) -> T:
    """Call `function` in the first process; all processes wait, and get what it returns or raises."""
    if count() == 1:
        return function()
    result: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = function()
        except Exception as raised:
            error = raised
    from torch.distributed import broadcast_object_list

    outcome = [result, error]
    broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise error
    return result


def gather(values: dict[str, T]) -> dict[str, T]:
    """The dictionaries of all processes in one."""
    if count() == 1:
        return values
    from torch.distributed import all_gather_object

    parts: list[dict[str, T]] = [{} for _ in range(count())]
    all_gather_object(parts, values)
    return {name: value for part in parts for name, value in part.items()}


def add_up(values: Tensor) -> Tensor:
    """The sum over all processes of tensors of one shape, without gradient."""
    if count() > 1:
        from torch.distributed import all_reduce

        values = values.detach().clone()
        all_reduce(values)
    return values


def say(text: str) -> None:
    """Print, once."""
    if rank() == 0:
        print(text, flush=True)


def _number(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)


def _check_launcher(bf16: bool) -> None:
    """The Trainer would follow what the launcher says, and the saved configuration would not tell."""
    for variable, name in _SHARDED.items():
        if os.environ.get(variable, "").lower() in ("true", "1"):
            raise ConfigError(
                f"the launcher asks for {name} ({variable}), but every process of `ear-ops train` holds the whole "
                f"model: start it with torchrun, or with `accelerate launch --multi_gpu`. In a loop of your own the "
                f"regularisers run under FSDP2 too, see docs/trainers.md"
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    if precision not in ("no", "bf16" if bf16 else "no"):
        raise ConfigError(
            f"the launcher asks for mixed precision {precision!r} (ACCELERATE_MIXED_PRECISION), which is for the "
            f"configuration of the run to say: leave it out there and pass --bf16"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND") or "no"
    if backend.lower() != "no":
        raise ConfigError(
            f"the launcher asks for torch.compile ({backend!r} in ACCELERATE_DYNAMO_BACKEND), which is for the "
            f"configuration of the run to say: leave it out there and pass --compile"
        )
