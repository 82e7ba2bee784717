"""What the tests of `ear-ops train` in several processes run in each of them."""

from __future__ import annotations

from typing import Any


def train(settings: dict[str, Any], die_at: int | None = None) -> Any:
    """The results of a run, or the name and message of what a user can mend.

    Args:
        settings: of the configuration.
        die_at: every process stops before this step, as if it were killed.
    """
    from ear_ops.training import checkpoints, run
    from ear_ops.training.config import ConfigError, TrainConfig
    from ear_ops.training.folder import RunFolderError

    checkpoints._sync = lambda path: None  # waiting for the disk is most of a tiny run
    training_step = run.PairTrainer.training_step

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == die_at:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    run.PairTrainer.training_step = dying  # type: ignore[method-assign]
    try:
        return run.train(TrainConfig(**settings))
    except (ConfigError, RunFolderError) as error:
        return type(error).__name__, str(error)
    except KeyboardInterrupt:
        return "killed"
