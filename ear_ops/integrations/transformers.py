"""Regularisers in the Trainer of transformers, by a mixin.

    class Trainer(ear_ops.RegularizedTrainerMixin, transformers.Trainer):
        pass

    trainer = Trainer(model, args, regularizers=[ear_ops.AttentionPull(layer=6)], train_dataset=..., data_collator=...)

Nothing of transformers is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ear_ops.attachment import Attachment, attach
from ear_ops.capture.layout import unwrap
from ear_ops.capture.teacher import LayerMap
from ear_ops.diagnostics.running_means import RunningMeans
from ear_ops.functional import check_labels_of_views, repeat_labels
from ear_ops.integrations.own_parameters import OwnParameters
from ear_ops.regularizers import Regularizer

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class StepLoss(NamedTuple):
    """The loss of one step, the model's output, and the terms to log (unweighted scalars)."""

    loss: Tensor  # []
    outputs: Any
    terms: dict[str, Tensor]


class RegularizedTrainerMixin(_Trainer):
    """Adds regularisers to the training loss of a ``transformers.Trainer``; evaluation and prediction do not change.

    A training batch holds both views: rows 0..B-1 of x, rows B..2B-1 of its augmentation. Its labels are those of the B
    pairs or of all 2B rows. The loss of both views, as the Trainer computes it, plus the regularisers is minimised. The
    model, label smoothing or ``compute_loss_func`` may compute that loss. With a teacher, a batch holds B rows and
    their labels, and the Trainer runs the teacher.

    Each line of the training log gets the mean of every regulariser's term since the line before, over all processes.
    It also gets ``task_loss``: the Trainer's own loss, a mean over the rows.

    Parameters of the regularisers themselves, such as a projection's, are treated as those of the model: weight decay,
    clipping (by their own norm), several processes, checkpoints and ``load_best_model_at_end``.

    Args:
        regularizers, teacher, layer_map: see :func:`ear_ops.attach`. The teacher is put into eval mode and on the
            device of the model. One that is quantised or was loaded with a ``device_map`` stays where it is.
        others: those of ``transformers.Trainer``.

    Raises:
        ValueError: ``args`` would drop the augmented view (``remove_unused_columns``), split pairs between processes
            (``dispatch_batches``) or use DataParallel. Or ``model_init`` is given in place of a model. Or
            :func:`ear_ops.attach` raises it. In training: labels fit neither pairs nor rows. Or they are classes of all
            rows, on the CPU, that differ between the views of a pair, as in a batch with one view. In evaluation: a
            batch holds both views. When a training is resumed: the checkpoint is of other regularisers. Or
            ``train_sampling_strategy`` needs lengths that the items do not have.
        RuntimeError: in training, the Trainer runs the model several times for one loss.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *others: Any,
        regularizers: Iterable[Regularizer] = (),
        teacher: nn.Module | None = None,
        layer_map: LayerMap | None = None,
        **more: Any,
    ) -> None:
        super().__init__(model, args, *others, **more)
        self._check_arguments(two_views=teacher is None)
        # Loss and terms are means over the batch, so the Trainer has to divide by the accumulation steps. It must not
        # read the **kwargs of a model as a sign that the model does so.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        self.teacher = None if teacher is None else teacher.eval()
        if teacher is not None and not _stays_where_it_is(teacher):
            teacher.to(self.args.device)
        regularizers = list(regularizers)
        self.attached: Attachment | None = None
        attachable: Any = self.model
        if regularizers:
            self.attached = attach(attachable, regularizers, teacher=teacher, layer_map=layer_map)
        self.own_parameters = OwnParameters(
            () if self.attached is None else self.attached.regularizers, unwrap(attachable)
        )
        if self.own_parameters.parameters:
            self.add_callback(self.own_parameters.callback())
        self.means = RunningMeans()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's optimiser, which also trains the parameters of the regularisers themselves."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.own_parameters.missing_in(optimizer) and self.lr_scheduler is not None:
            raise ValueError(
                "optimizers: expected an optimiser that has the parameters of the regularisers, too, because its "
                "schedule was made already; pass projection=torch.nn.Linear(...) and its parameters to the optimiser, "
                "or pass (optimizer, None)"
            )
        self.own_parameters.add_to(optimizer, self.args.weight_decay)
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the Trainer does; the log begins anew."""
        self.means.clear()
        return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and beside it the regularisers where they have parameters of their own."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.own_parameters.save(str(self.args.output_dir if output_dir is None else output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *others: Any, **more: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *others, **more)
        self.own_parameters.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.own_parameters.load(str(self.state.best_model_checkpoint))

    def detach(self) -> None:
        """Take the regularisers off the model."""
        if self.attached is not None:
            self.attached.detach()
            self.attached = None

    def training_loss(self, model: nn.Module, inputs: dict[str, Any]) -> StepLoss:
        """The loss of one batch in training mode; override it to train on another one.

        Args:
            inputs: the batch, a dictionary of its own; ``word_ids`` in it go to the regularisers and not to the model.
        """
        word_ids = inputs.pop("word_ids", None)
        if self.attached is not None:
            self.attached.forget()
        if self.teacher is not None:
            inputs = self._with_decoder_inputs(model, inputs)
            with torch.no_grad():
                self.teacher(**self._inputs_of_teacher(self.teacher, inputs))
        else:
            inputs = self._with_labels_of_both_views(inputs)
        task_loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if self.attached is not None and self.attached.untaken:
            raise RuntimeError(
                f"{type(self).__name__} ran the model several times for one loss, as Trainers do that have a forward "
                f"for each column of the data. The regularisers and the loss of both views need one forward, with x "
                f"in its first half of rows and its augmentation in the second. Override training_loss: run the two "
                f'views under self.attached.view("original") and self.attached.view("augmented"), and return a '
                f"StepLoss of the task loss plus self.attached.loss()"
            )
        terms = {"task_loss": task_loss}
        loss = task_loss if self.teacher is not None else 2 * task_loss  # the mean over 2B rows: CE(x) + CE(x^a)
        if self.attached is not None:
            loss = loss + self.attached.loss(step=self.state.global_step, word_ids=word_ids)
            terms.update(self.attached.components())
        return StepLoss(loss, outputs, terms)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The regularised loss in training mode, else that of the Trainer."""
        if not model.training:
            inputs = {name: value for name, value in inputs.items() if name != "word_ids"}
            self._check_one_view(inputs)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        step = self.training_loss(model, dict(inputs))
        self.means.add(step.terms)
        return (step.loss, step.outputs) if return_outputs else step.loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, without ``word_ids``, which belong to the regularisers."""
        inputs = {name: value for name, value in inputs.items() if name != "word_ids"}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the terms to the lines of the training log."""
        if "loss" in logs:
            logs.update(self.means.pop(lambda means: self.accelerator.reduce(means, reduction="mean")))
        super().log(logs, start_time)

    def _check_arguments(self, two_views: bool) -> None:
        args = self.args
        if self.model_init is not None:
            raise ValueError("model_init: every train() would build another model, without regularisers; pass model")
        if args.n_gpu > 1:
            raise ValueError("the regularisers do not run under DataParallel: show one GPU, or start with torchrun")
        own_loss = getattr(self, "compute_loss_func", None) is not None
        if own_loss and args.gradient_accumulation_steps > 1 and not hasattr(type(self), "loss_is_scaled_for_ga"):
            raise ValueError(
                "compute_loss_func: this version of transformers takes such a loss for one that is divided by the "
                "accumulation steps already, which the regularisers' is not: upgrade transformers, override "
                "training_loss, or leave out gradient_accumulation_steps"
            )
        self._check_lengths()
        if not two_views:
            return
        if args.remove_unused_columns:
            raise ValueError("remove_unused_columns=True drops the augmented view before the collator: pass False")
        dispatch = getattr(args.accelerator_config, "dispatch_batches", None)
        if dispatch is None:  # accelerate then dispatches the batches of iterable data sets
            dispatch = args.world_size > 1 and isinstance(self.train_dataset, IterableDataset)
        if dispatch:
            raise ValueError(
                "dispatch_batches splits the pairs of a batch between processes: pass "
                'accelerator_config={"dispatch_batches": False} (None dispatches iterable data sets)'
            )

    def _with_decoder_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """``inputs`` with those of the decoder of an encoder-decoder, which a teacher cannot make without labels."""
        root = unwrap(model)
        labels = inputs.get("labels")
        has_inputs = "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs
        if has_inputs or not getattr(getattr(root, "config", None), "is_encoder_decoder", False):
            return inputs
        if not isinstance(labels, Tensor) or labels.dim() < 2:  # of the sequence: both models shift their input_ids
            return inputs
        shift: Any = getattr(root, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise ValueError(
                f"decoder_input_ids: expected in the batch, because {type(root).__name__} makes them from labels by "
                f"itself, which its teacher does not get; let the collator add them"
            )
        return {**inputs, "decoder_input_ids": shift(labels=labels)}

    def _inputs_of_teacher(self, teacher: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """``inputs`` without labels, on the device of a teacher that was not moved to that of the model."""
        inputs = {name: value for name, value in inputs.items() if name not in self.label_names}
        device = next((parameter.device for parameter in teacher.parameters()), None)
        if device is None or device.type == "meta" or not _stays_where_it_is(teacher):  # meta: offloaded by accelerate
            return inputs
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}

    def _check_one_view(self, inputs: dict[str, Any]) -> None:
        """Evaluation and prediction take one view: raises ValueError for a batch of both with labels of the pairs."""
        rows = self._rows(inputs)
        for name in self.label_names:
            labels = inputs.get(name)
            if self.teacher is None and isinstance(labels, Tensor) and labels.dim() and 0 < 2 * len(labels) == rows:
                raise ValueError(
                    f"eval_dataset: expected batches of one view, which evaluation and prediction take, got {rows} "
                    f"rows to {len(labels)} {name}, as in batches of both views; pass pairs without an augmentation, "
                    f"such as PairViews(examples) without an augmenter"
                )

    def _rows(self, inputs: dict[str, Any]) -> int:
        """How many rows the batch has, by its first tensor that is no label."""
        values = (value for name, value in inputs.items() if name not in self.label_names)
        return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 0)

    def _check_lengths(self) -> None:
        """Raises ValueError where the Trainer would look for the lengths of items that do not have them."""
        data: Any = self.train_dataset
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        column = getattr(self.args, "length_column_name", "length")
        if strategy not in ("group_by_length", "batch_rebalance") or column in getattr(data, "column_names", ()):
            return
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or not len(data):
            return  # the Trainer ignores the strategy then
        names = getattr(getattr(self, "processing_class", None), "model_input_names", None) or ["input_ids"]
        item = data[0]
        if not isinstance(item, Mapping) or names[0] not in item:
            raise ValueError(
                f"train_sampling_strategy: {strategy!r} takes the length of {names[0]!r} in each item, which the items "
                f"of {type(data).__name__} do not have; pass train_sampling_strategy='random', or a datasets.Dataset "
                f"with a column {column!r}"
            )

    def _with_labels_of_both_views(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """``inputs`` with labels for all 2B rows."""
        rows = self._rows(inputs)
        for name in self.label_names:
            labels = inputs.get(name)
            if not isinstance(labels, Tensor):
                continue
            if len(labels) == rows:
                if name == "labels" and labels.dim() == 1 and not labels.is_floating_point():
                    check_labels_of_views(name, labels, -100)  # not of positions, which a synonym moves
                continue
            if 2 * len(labels) != rows:
                raise ValueError(
                    f"{name}: expected {rows // 2} (of the pairs) or {rows} (of all rows) to go with a batch of {rows} "
                    f"rows that holds both views, got {len(labels)}"
                )
            inputs[name] = repeat_labels(labels)
        return inputs


def _stays_where_it_is(teacher: nn.Module) -> bool:
    """Whether transformers and accelerate have placed the model, so that ``.to(device)`` is refused.

    That is a quantised model, or one that a ``device_map`` spreads over devices.
    """
    model: Any = unwrap(teacher)
    return any(
        getattr(model, name, None)
        for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_device_map")
    )
