"""Run a function in several processes that find each other as those of ``torchrun`` do.

The processes are forked from one server that has imported torch once, and not from the test process, whose threads a
fork would leave in an undefined state. A function to run has to be importable: those of the tests are in this folder.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TIMEOUT = 300  # seconds


def run(function: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2) -> list[Any]:
    """What ``function(*arguments)`` returns in each process; raises with the traceback of the first that failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ear_ops.recipes.training.run"])  # and with it torch and transformers
    port = free_port()
    files = [folder / f"rank{rank}.pt" for rank in range(count)]
    processes = [
        context.Process(target=_worker, args=(function, arguments, rank, count, port, files[rank]), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
    outcomes = []
    for rank, file in enumerate(files):
        if not file.exists():
            raise AssertionError(f"process {rank} left no result (exit code {processes[rank].exitcode})")
        result, failure = torch.load(file, weights_only=False)
        file.unlink()
        if failure is not None:
            raise AssertionError(f"process {rank} failed:\n{failure}")
        if processes[rank].exitcode != 0:
            raise AssertionError(f"process {rank} ended with exit code {processes[rank].exitcode} after its result")
        outcomes.append(result)
    return outcomes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _worker(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, count: int, port: int, file: Path
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    faulthandler.enable()  # a process that aborts shows where
    result, failure = None, None
    try:
        result = function(*arguments)
    except BaseException:
        failure = traceback.format_exc()
    torch.save((result, failure), file)
    if failure is None and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
