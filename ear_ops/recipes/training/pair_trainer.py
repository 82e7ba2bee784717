"""The Hugging Face Trainer with the loss of a `Method`, an order that all methods share, and safe checkpoints."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ear_ops.installation import install

try:
    import accelerate  # noqa: F401  (the message of the Trainer would name another package)
except ModuleNotFoundError:
    raise ModuleNotFoundError(f"training needs accelerate: {install('train')}", name="accelerate") from None

import torch
import torch.nn.functional as F
from torch.utils.data import Sampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.trainer import TRAINER_STATE_NAME

from ear_ops.integrations.transformers import RegularizedTrainerMixin, StepLoss
from ear_ops.recipes.training import checkpoints, processes
from ear_ops.recipes.training.folder import RunFolderError
from ear_ops.recipes.training.methods import Method

STEPS_SORTED_TOGETHER = 50  # with fewer, the pairs of a step differ in length; with more, the order is less random


class EpochOrder(Sampler[int]):
    """A permutation of the training pairs that depends on the seed, the epoch and the originals alone.

    So every method takes the same originals in the same step. The dataset gets the epoch too, since the drawn
    variants depend on it.

    Args:
        dataset: has a `set_epoch` and, for grouping, `examples`.
        seed: of the permutation.
        group_size: pairs of a step. Steps then hold pairs of like length, which need less padding. With None, the order
            is random.
    """

    def __init__(self, dataset: Any, seed: int, group_size: int | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.group_size = group_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"order/{self.seed}/{self.epoch}")
        order = _shuffled(list(range(len(self))), rng)
        if self.group_size is None:
            return iter(order)
        examples, size, steps = self.dataset.examples, self.group_size, []
        for start in range(0, len(order), size * STEPS_SORTED_TOGETHER):
            window = order[start : start + size * STEPS_SORTED_TOGETHER]
            window.sort(key=lambda i: len(examples[i].text1) + len(examples[i].text2), reverse=True)
            steps += [window[i : i + size] for i in range(0, len(window), size)]
        tail = [steps.pop()] if len(order) % size else []  # a step that is not full stays the last one
        return iter([i for step in _shuffled(steps, rng) + tail for i in step])


def _shuffled(items: list[Any], rng: random.Random) -> list[Any]:
    """The items in random order, which unlike that of `random.shuffle` is the same in every version of Python."""
    keys = [rng.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


class SetEpoch(TrainerCallback):
    """Tells the order its epoch. Some wrappers of the data loader would not pass it on."""

    def __init__(self, order: EpochOrder, steps_per_epoch: int) -> None:
        self.order = order
        self.steps_per_epoch = steps_per_epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.order.set_epoch(state.global_step // self.steps_per_epoch)


class SeedOfProcess(TrainerCallback):
    """Lets every process draw other dropout. The Trainer gives all processes the same seed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.process_index:
            torch.manual_seed(args.seed + args.process_index)


class EvaluationSteps(TrainerCallback):
    """Evaluates and saves `evaluations_per_epoch` times in an epoch, at even distances, the last time at its end.

    The log is written before each evaluation. So a checkpoint holds the log up to its step, and a resumed run reports
    the same means as a run that was never interrupted.
    """

    def __init__(self, steps_per_epoch: int, evaluations_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        n = min(evaluations_per_epoch, steps_per_epoch)
        self.points = {-(-steps_per_epoch * k // n) for k in range(1, n + 1)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = (state.global_step - 1) % self.steps_per_epoch + 1 in self.points
        control.should_evaluate = control.should_save = due
        control.should_log = control.should_log or due


def log_line(step: int, logs: Mapping[str, Any]) -> str:
    """The entries of the log in one line, such as `step 50: loss 1.099, learning_rate 2e-05, epoch 0.25`."""
    texts = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in logs.items()}
    shown = [f"{name} {text}" for name, text in texts.items() if not name.endswith(("total_flos", "_per_second"))]
    return f"step {step}: {', '.join(shown)}"


class PlainLines(TrainerCallback):
    """The log as plain lines: the Trainer prints a dict of quoted numbers."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            print(log_line(state.global_step, logs or {}), flush=True)


class LinesAndBars(PlainLines):
    """On a terminal, also bars below the lines: one for the steps, and one for an evaluation while it runs."""

    def __init__(self) -> None:
        from rich.progress import MofNCompleteColumn, Progress

        self.bars = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), transient=True)
        self.training: Any = None
        self.evaluation: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.training = self.bars.add_task("training", total=state.max_steps, completed=state.global_step)
            self.bars.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training is not None:
            self.bars.update(self.training, completed=state.global_step)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.training is not None:
            if self.evaluation is None:
                self.evaluation = self.bars.add_task("evaluation", total=len(eval_dataloader))
            self.bars.advance(self.evaluation)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.evaluation is not None:
            self.bars.remove_task(self.evaluation)
            self.evaluation = None


@contextmanager
def _naming_damaged_files(checkpoint: str | Path | None) -> Iterator[None]:
    """Name the checkpoint where the Trainer cannot read a file of it, or torch refuses to.

    Raises:
        RunFolderError: in place of the errors of the libraries.
    """
    try:
        yield
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RunFolderError(
            f"{checkpoint}: a file of this checkpoint is damaged or refused ({type(error).__name__}: {reason}): delete "
            "the folder, and the run goes on from the checkpoint before, or from the start"
        ) from error


def best_checkpoint(checkpoint: Path) -> Path:
    """The checkpoint beside `checkpoint` that was the best when that one was written."""
    with _naming_damaged_files(checkpoint):
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return checkpoint.with_name(f"checkpoint-{state.best_global_step}")


class PairTrainer(RegularizedTrainerMixin, Trainer):
    """Trains with a `Method` on batches of pairs, as `PairCollator` makes them.

    Args:
        model: a classifier.
        args: of the Trainer.
        method: makes the loss. Its regularisers are attached to the model until `detach()`.
        train_dataset: originals with their augmented view, as `PairViews`, with a `set_epoch`.
        evaluations_per_epoch: evaluate `eval_dataset` and save this often, at even distances, and keep the newest and
            the best checkpoint. The steps in `args` are ignored then. With None, `args` decides all this.
        group_by_length: make steps of pairs of like length.
        compiled: take training steps with `torch.compile`. Every other forward runs without it.
        callbacks: of the Trainer, besides those of this class.
        kwargs: of the Trainer.

    Raises:
        ValueError: `args` has a `save_total_limit`, which would delete checkpoints before the next one is complete, or
            something that `RegularizedTrainerMixin` refuses.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        method: Method,
        *,
        train_dataset: Any,
        evaluations_per_epoch: int | None = None,
        group_by_length: bool = False,
        compiled: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        if args.save_total_limit is not None:
            raise ValueError("save_total_limit deletes a checkpoint before the next one is complete: pass None")
        per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        order = EpochOrder(train_dataset, args.seed, per_step if group_by_length else None)
        steps_per_epoch = -(-len(train_dataset) // per_step)
        run_callbacks: list[TrainerCallback] = [SetEpoch(order, steps_per_epoch), SeedOfProcess()]
        if evaluations_per_epoch is not None:
            run_callbacks.append(EvaluationSteps(steps_per_epoch, evaluations_per_epoch))
        super().__init__(
            model,
            args,
            regularizers=method.regularizers(),
            train_dataset=train_dataset,
            callbacks=[*run_callbacks, *callbacks],
            **kwargs,
        )
        self.progress: PlainLines | None = None
        bar = self.pop_callback(ProgressCallback)
        if bar or self.pop_callback(PrinterCallback):
            self.progress = LinesAndBars() if bar and sys.stdout.isatty() else PlainLines()
            self.add_callback(self.progress)
        self.method = method
        self.order = order
        self.prunes_checkpoints = evaluations_per_epoch is not None
        self.best_is_loaded = False  # whether the model is the best checkpoint, as after training
        self.compiled = compiled
        self._compiled_model: Any = None
        self._step, self._part = 0, -1  # of the last batch: the optimiser step, and the number of the batch in it

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does.

        Raises:
            RunFolderError: a file of the checkpoint to go on from cannot be read.
        """
        try:
            return super().train(*args, **kwargs)
        finally:
            if isinstance(self.progress, LinesAndBars):
                self.progress.bars.stop()  # else the cursor would stay hidden after an error

    def training_loss(self, model: Any, inputs: dict[str, Any]) -> StepLoss:
        """The loss of the method. The labels are [B], while the inputs may have 2B rows."""
        labels = inputs.pop("labels")
        if self.compiled:
            if self._compiled_model is None:  # only now is the model in its wrappers, if it gets any
                self._compiled_model = torch.compile(model, dynamic=True)  # steps differ in length
            model = self._compiled_model
        return self.method.step(model, inputs, labels, self.attached, self._next_batch())

    def _next_batch(self) -> int:
        """The number of the next batch since training began, also after a resume."""
        step = self.state.global_step
        self._step, self._part = step, self._part + 1 if step == self._step else 0
        return step * self.args.gradient_accumulation_steps + self._part

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The method's loss in training mode, the cross-entropy alone in evaluation mode."""
        if model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels)
        # The Trainer would gather every other output too, such as the hidden states of an encoder.
        return (loss, SequenceClassifierOutput(logits=outputs.logits)) if return_outputs else loss

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> EpochOrder:
        return self.order

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        progress = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:  # the folder of the run may have been moved since
            self.state.best_model_checkpoint = str(self._checkpoint(self.state.best_global_step))
        return progress

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _naming_damaged_files(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _naming_damaged_files(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _naming_damaged_files(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        checkpoints.mark_complete(self._checkpoint(self.state.global_step))
        if not self.prunes_checkpoints:
            return
        needed = {self._checkpoint(self.state.global_step), self._checkpoint(self.state.best_global_step)}
        for folder in checkpoints.all_checkpoints(self._checkpoint(0).parent):
            if folder not in needed:
                checkpoints.remove(folder)

    def _load_best_model(self) -> None:
        """Load the best checkpoint. Where it is lost, the Trainer would keep the last weights after a warning.

        Raises:
            DamagedCheckpointError: the best checkpoint is not as it was written.
        """
        best = self._checkpoint(self.state.best_global_step)
        if damage := processes.on_main(lambda: checkpoints.damage(best)):
            raise checkpoints.DamagedCheckpointError(
                f"{best}, the best checkpoint, was lost while the run trained ({damage}): start the run again, which "
                "trains from a state that has its best checkpoint"
            )
        self.state.best_model_checkpoint = str(best)
        super()._load_best_model()
        self.best_is_loaded = True

    def _checkpoint(self, step: int | None) -> Path:
        return Path(str(self.args.output_dir)) / f"checkpoint-{step}"
