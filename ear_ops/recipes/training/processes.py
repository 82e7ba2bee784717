"""Several processes of one run, as `torchrun` and `accelerate launch` start them.

They share the folder of the run, and each holds the whole model (DDP). The first process writes. A mistake in it stops
all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ear_ops.recipes.training.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# How long a process may wait for another one, which reads data or scores a language.
_PATIENCE = timedelta(hours=2)

# accelerate reads these variables too: those of torchrun, Intel MPI, Open MPI and MVAPICH.
# `accelerate launch --cpu` starts its processes by mpirun.
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")

# The variables by which `accelerate launch` asks that the processes share the model.
_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def count() -> int:
    """How many processes there are. The environment says it, since the command line asks before accelerate is there."""
    return _number(_COUNT, 1)


def rank() -> int:
    """The number of this process, from 0."""
    return _number(_RANK, 0)


def start(bf16: bool) -> None:
    """Let the processes find each other. With one process there is nothing to do.

    Args:
        bf16: whether the configuration of the run asks for bfloat16 autocast.

    Raises:
        ConfigError: the launcher asks for a training that differs from the configuration.
    """
    _check_launcher(bf16)
    if count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
        # accelerate calls the device of a process without a GPU cpu:0 or cpu:1, where torch 2.11 can restore nothing.
        torch.serialization.register_package(
            100, lambda _: None, lambda storage, place: storage if place[:4] == "cpu:" else None
        )


def on_main(function: Callable[[], T]) -> T:
    """Call `function` in the first process. All processes wait, and get what it returns or raises."""
    if count() == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    result: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = function()
        except Exception as raised:
            error = raised
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise error
    return result


def gather(values: dict[str, T]) -> dict[str, T]:
    """One dictionary with the entries of all processes."""
    if count() == 1:
        return values
    from accelerate.utils import gather_object

    return {name: value for part in gather_object([values]) for name, value in part.items()}


def add_up(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without gradient. It has the same shape in all of them."""
    if count() == 1:
        return values
    from accelerate.utils import reduce

    total: Tensor = reduce(values.detach(), "sum")
    return total


def say(text: str) -> None:
    """Print in the first process."""
    if rank() == 0:
        print(text, flush=True)


def _number(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)


def _check_launcher(bf16: bool) -> None:
    """Refuse settings of the launcher that the Trainer would follow and the saved configuration would not show."""
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
            f"the launcher asks for mixed precision {precision!r} (ACCELERATE_MIXED_PRECISION), which is a setting of "
            f"the run: leave it out of the launcher's options and pass --bf16"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND") or "no"
    if backend.lower() != "no":
        raise ConfigError(
            f"the launcher asks for torch.compile ({backend!r} in ACCELERATE_DYNAMO_BACKEND), which is a setting of "
            f"the run: leave it out of the launcher's options and pass --compile"
        )
