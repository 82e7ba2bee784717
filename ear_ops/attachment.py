"""Regularisers on a running model: the loss of the last forward, its components, views, and how to let go.

Made by :func:`ear_ops.regularizers.attach`.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .capture import Recorder

if TYPE_CHECKING:
    from .regularizers import Regularizer


class Attachment:
    """Regularisers on a model; made by :func:`attach`. A context manager that detaches."""

    def __init__(self, recorder: Recorder, regularizers: tuple[Regularizer, ...]) -> None:
        self.regularizers = regularizers
        self._recorder = recorder
        self._components: dict[str, Tensor] = {}
        self._warned: set[str] = set()

    def loss(self, step: int | None = None) -> Tensor:
        """Sum of weight times term over the regularisers, of the last forward (or of the last two views).

        Call it once per forward, before ``backward``; the recorded tensors are dropped here.

        Args:
            step: optimiser step, for weights that are functions of it.

        Returns:
            A scalar, float32 (float64 for a float64 model).

        Raises:
            RuntimeError: no forward was recorded, or it did not come through a layer.
            ValueError: an odd batch, or masks or shapes that do not fit.
        """
        weights = [regularizer.weight_at(step) for regularizer in self.regularizers]
        try:
            records = self._recorder.take()
        except RuntimeError as error:
            raise RuntimeError(f"{', '.join(r.name for r in self.regularizers)}: {error}") from None
        total: Tensor | None = None
        components: dict[str, Tensor] = {}
        for regularizer, site, weight in zip(self.regularizers, self._recorder.sites, weights, strict=True):
            views = [site.read(record, regularizer.name) for record in records]
            rows = views[0][0].shape[0]
            if len(views) == 1 and rows % 2:
                raise ValueError(
                    f"{regularizer.name}: expected an even batch, rows 0..B-1 of x and B..2B-1 of its augmentation, "
                    f"got {rows} rows"
                )
            with torch.autocast(views[0][0].device.type, enabled=False):
                term = regularizer.term(views[0], views[1] if len(views) == 2 else None)
            self._warn_if_constant(regularizer.name, term)
            components[regularizer.name] = term.detach()
            total = weight * term if total is None else total + (weight * term).to(total.device)
        self._components = components
        assert total is not None
        return total

    def components(self) -> dict[str, Tensor]:
        """The terms of the last :meth:`loss` by name: unweighted, signed, detached scalars; empty before the first."""
        return dict(self._components)

    def view(self, name: str) -> contextlib.AbstractContextManager[None]:
        """For two forwards in place of one: ``with ear.view("original"): ...``, ``with ear.view("augmented"): ...``.

        A view is recorded without grad too, as a constant target.
        """
        return self._recorder.recording_view(name)

    def detach(self) -> None:
        """Take everything off the model again; a second call does nothing."""
        self._recorder.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "" if self._recorder.attached else ", detached"
        return f"Attachment({type(self._recorder.root).__name__}, {list(self.regularizers)}{state})"

    def _warn_if_constant(self, name: str, term: Tensor) -> None:
        if term.requires_grad or name in self._warned or not torch.is_grad_enabled():
            return
        self._warned.add(name)
        warnings.warn(
            f"{name} has no gradient: nothing that it depends on is trained (frozen embeddings or layers, or views "
            f"without grad), so it is a constant in the loss",
            stacklevel=3,
        )
