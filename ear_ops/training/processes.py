"""Several processes of one run, as `torchrun` and `accelerate launch` start them: who writes, and that a mistake stops
all of them. They share the folder of the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # how long a process may wait for another one, which reads data or scores a language


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def start() -> None:
    """Let the processes find each other; with one there is nothing to do."""
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


def say(text: str) -> None:
    """Print, once."""
    if rank() == 0:
        print(text, flush=True)
