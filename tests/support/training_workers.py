"""What the tests of `ear-ops train` in several processes run in each of them."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}


def train(settings: dict[str, Any], die_at: int | None = None, started_by_mpi: bool = False) -> Any:
    """The results of a run, or the name and message of what a user can mend.

    The first process alone may write, the languages are shared, and the second process is late with its part of a
    checkpoint.

    Args:
        settings: of the configuration.
        die_at: the processes are killed before this step.
        started_by_mpi: as `accelerate launch --cpu` does.
    """
    from ear_ops.recipes.training import checkpoints, processes, run, scoring
    from ear_ops.recipes.training.config import TrainConfig
    from ear_ops.recipes.training.errors import ConfigError
    from ear_ops.recipes.training.folder import RunFolderError
    from ear_ops.recipes.training.pair_trainer import PairTrainer

    if started_by_mpi:
        for name, their in OPEN_MPI.items():
            os.environ[their] = os.environ.pop(name)
    checkpoints._sync = lambda path: None  # waiting for the disk is most of a tiny run
    scored: list[Any] = []
    predict, save_random_state = scoring.predict, PairTrainer._save_rng_state
    scoring.predict = lambda *args, **kwargs: (scored.append(args), predict(*args, **kwargs))[1]
    if processes.rank():
        checkpoints.write_atomically = lambda path, text: pytest.fail(f"the second process writes {path}")
        PairTrainer._save_rng_state = lambda *args: (time.sleep(0.5), save_random_state(*args))[1]
    training_step = PairTrainer.training_step

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, *args, **kwargs)

    PairTrainer.training_step = dying  # type: ignore[method-assign]
    try:
        results = run.train(TrainConfig(**settings))
        assert len(scored) <= -(-len(results["languages"]) // processes.count())
        return results
    except (ConfigError, RunFolderError) as error:
        return type(error).__name__, str(error)


def first_step(settings: dict[str, Any]) -> float:
    """The loss of the first batch in this process, all rows of which are the same in all processes."""
    import torch

    from ear_ops.recipes.training import run
    from ear_ops.recipes.training.config import TrainConfig
    from ear_ops.recipes.training.pair_trainer import PairTrainer

    losses = []
    training_loss = PairTrainer.training_loss

    def keep(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        ids = torch.full_like(inputs["input_ids"][:, :4], 7)
        same = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(inputs["labels"])}
        loss = training_loss(self, model, same)
        losses.append(loss.loss.item())
        return loss

    PairTrainer.training_loss = keep  # type: ignore[method-assign]
    run.train(TrainConfig(**settings))
    return losses[0]


def roles() -> dict[str, Any]:
    """What each process gets and does."""
    import torch
    from accelerate import PartialState

    from ear_ops.recipes.training import processes

    def fails() -> None:
        raise ValueError(f"in process {processes.rank()}")

    processes.start(bf16=False)
    try:
        processes.on_main(fails)
        raised = None
    except ValueError as error:
        raised = str(error)
    called: list[int] = []
    processes.on_main(lambda: called.append(processes.rank()))
    return {
        "rank": processes.rank(),
        "called": called,
        "on main": processes.on_main(lambda: os.environ["RANK"]),
        "raised": raised,
        "gathered": processes.gather({f"key {processes.rank()}": processes.rank()}),
        "accelerate agrees": (PartialState().process_index, PartialState().num_processes)
        == (processes.rank(), processes.count()),
        "sum": processes.add_up(torch.tensor([1.0, float(processes.rank())])).tolist(),
    }
