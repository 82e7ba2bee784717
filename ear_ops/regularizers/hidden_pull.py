"""The regulariser on hidden states, token by token, with a projection between models of different sizes."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ear_ops.arguments import check_choice, check_one_layer
from ear_ops.capture.layout import Layout
from ear_ops.capture.readings import HiddenStates, align_hidden, split_reading
from ear_ops.capture.sites import Site
from ear_ops.ops.probabilities import compute_dtype
from ear_ops.regularizers.base import Regularizer, Weight


class HiddenPull(Regularizer):
    """Pull the hidden states of the two views together, token by token, after block ``layer``.

    With a teacher and ``projection="linear"``, this is the hidden loss of TinyBERT (Jiao et al. 2020). A token counts
    when it is real in both views.

    The projection is trained by your optimiser: give it the parameters of the model and ``ear.parameters()``. It is no
    part of the model. So the model's ``state_dict()`` does not have it, and DistributedDataParallel does not average
    its gradient. :class:`ear_ops.RegularizedTrainerMixin` trains and saves it like the parameters of the model.

    Args:
        layer: block of the model, counted from 1; its output is taken before any final norm of the model.
        weight: see :data:`Weight`.
        projection: None; or ``"linear"``, an ``nn.Linear`` from the hidden size of the model to that of the teacher,
            which :func:`ear_ops.attach` makes from both configurations; or a module of your own, from ``[B, L, C]`` to
            ``[B, L, C of the teacher]``. It is applied to the first view.
        distance: ``"mse"`` is the mean squared error, ``"cosine"`` is 1 minus the cosine, where a vector of
            zeros has the cosine 0 and no gradient.
        reduction: ``"mean"`` divides the sum by the number of counted tokens (for ``"mse"`` times C), ``"padded_mean"``
            counts padded tokens too, ``"equations"`` divides by B, and ``"sum"`` by nothing.
        name: key of the term in ``ear.components()``; ``"hidden_pull.LAYER"`` by default.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        layer: int,
        weight: Weight = 1.0,
        *,
        projection: nn.Module | str | None = None,
        distance: str = "mse",
        reduction: str = "mean",
        name: str | None = None,
    ) -> None:
        check_one_layer(layer, "HiddenPull")
        if not (projection is None or projection == "linear" or isinstance(projection, nn.Module)):
            raise ValueError(f"projection: expected None, 'linear' or a torch.nn.Module, got {projection!r}")
        check_choice("distance", distance, ("mse", "cosine"))
        super().__init__(f"hidden_pull.{layer}" if name is None else name, weight, reduction)
        self.layer = layer
        self.distance = distance
        self.projection = projection if isinstance(projection, nn.Module) else None
        self._makes_projection = projection == "linear"

    def site(self, layout: Layout) -> Site:
        return layout.hidden_states(self.layer)

    def prepare(self, model: nn.Module, teacher: nn.Module | None) -> None:
        if not self._makes_projection:
            return
        size, size_aug = _hidden_size(model), _hidden_size(model if teacher is None else teacher)
        if size is None or size_aug is None:
            raise ValueError(
                f"{self.name}: projection='linear' needs the hidden sizes of the configurations of both models, got "
                f"{size} and {size_aug}; pass projection=torch.nn.Linear(C, C_of_the_teacher)"
            )
        made = self.projection  # by an earlier attach()
        if not isinstance(made, nn.Linear) or (made.in_features, made.out_features) != (size, size_aug):
            like = next(model.parameters())
            self.projection = nn.Linear(size, size_aug, device=like.device, dtype=compute_dtype(like.dtype))

    def term(self, reading: HiddenStates, reading_aug: HiddenStates | None) -> Tensor:
        reading, reading_aug = split_reading(reading, reading_aug)
        if reading.states.shape[1] != reading_aug.states.shape[1]:
            raise ValueError(
                f"{self.name}: expected views of one length, since token is compared with token, got "
                f"{reading.states.shape[1]} and {reading_aug.states.shape[1]}; pad both to one length if "
                f"they have one tokenizer"
            )
        masks = [view.attention_mask for view in (reading, reading_aug) if view.attention_mask is not None]
        counted = functools.reduce(torch.logical_and, masks) if masks and self.reduction != "padded_mean" else None
        if counted is not None:  # before anything is computed, so that NaN in padding has no gradient
            reading, reading_aug = (
                view._replace(states=view.states.masked_fill(~counted[..., None], 0.0))
                for view in (reading, reading_aug)
            )
        if self.projection is not None:
            size = reading_aug.states.shape[2]
            reading = reading._replace(states=self._projected(self.projection, reading.states, size))
        aligned = align_hidden(reading, reading_aug, self.name)
        pair = [view.states.to(compute_dtype(view.states.dtype)) for view in aligned]
        batch, length, size = pair[0].shape
        if self.distance == "cosine":
            distances, size = _cosine_distances(*pair), 1
        else:
            distances = (pair[0] - pair[1]).square().sum(-1)
        total = (distances if counted is None else distances.masked_fill(~counted, 0.0)).sum()
        if self.reduction == "sum":
            return total
        if self.reduction == "equations":
            return total / max(batch, 1)
        return total / max(batch * length * size, 1) if counted is None else total / (counted.sum() * size).clamp(min=1)

    def _projected(self, projection: nn.Module, states: Tensor, size: int) -> Tensor:
        """``[B, L, size]`` of ``states`` ``[B, L, C]``."""
        like = next(projection.parameters(), states)
        if like.device != states.device:  # the model was moved after attach(); parameters stay the same objects
            projection.to(states.device)
        try:
            projected: Any = projection(states.to(like.dtype))
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # such as a device without memory
                raise
            raise RuntimeError(
                f"{self.name}: projection: expected a module that takes hidden states {list(states.shape)}, got an "
                f"error of {projection}: {error}"
            ) from error
        if not isinstance(projected, Tensor) or projected.dim() != 3 or projected.shape[:2] != states.shape[:2]:
            got = f"shape {list(projected.shape)}" if isinstance(projected, Tensor) else type(projected).__name__
            raise TypeError(
                f"{self.name}: projection: expected {type(projection).__name__} to return a tensor "
                f"[{states.shape[0]}, {states.shape[1]}, C of the teacher], got {got}"
            )
        if projected.shape[2] != size:
            raise ValueError(
                f"{self.name}: projection: expected {type(projection).__name__} to return {size} numbers for each "
                f"token, as many as the other view has, got {projected.shape[2]}"
            )
        return projected


def _cosine_distances(states: Tensor, states_aug: Tensor) -> Tensor:
    """1 minus the cosine of each token: half the squared distance of unit vectors, exactly 0 for equal ones.

    A vector of zeros gives 1, without a gradient.
    """
    unit, unit_aug = (F.normalize(view, dim=-1) for view in (states, states_aug))
    zero = (states == 0).all(-1) | (states_aug == 0).all(-1)
    return ((unit - unit_aug).square().sum(-1) / 2).masked_fill(zero, 1.0)


def _hidden_size(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else None
