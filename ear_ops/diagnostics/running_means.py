"""Means of loss terms between two lines of a log, with one synchronisation a line and none a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class RunningMeans:
    """Means of scalars over the steps that have them, summed up on their device.

        means = ear_ops.RunningMeans()
        means.add(ear.components())              # in every step
        print(means.pop())                       # now and then

    A term whose mean is exactly 0 warns once by its name: a regulariser that does nothing is easily overlooked.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}  # in how many steps each term came
        self._warned: set[str] = set()

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add the scalars of one step, with or without a graph."""
        for name, value in terms.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._steps[name] = self._steps.get(name, 0) + 1

    def clear(self) -> None:
        """Forget the steps since the last :meth:`pop`."""
        self._sums.clear()
        self._steps.clear()

    def pop(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The means since the last call, each over the steps that had the term; the sums are then forgotten.

        Args:
            reduce: takes the means of this process to those over all processes, ``[number of terms]`` each; called in
                every process, with the same terms.
        """
        if not self._sums:
            return {}
        device = next(iter(self._sums.values())).device  # layers of one model may lie on several
        means = torch.stack([total.to(device) / self._steps[name] for name, total in self._sums.items()])
        if reduce is not None:
            means = reduce(means)
        named = dict(zip(self._sums, means.tolist(), strict=True))  # the only transfer from the device
        for name in named.keys() - self._warned:
            if named[name] == 0.0:
                self._warned.add(name)
                warnings.warn(
                    f"{name} was exactly 0 over the last {self._steps[name]} steps, so it does nothing: are the two "
                    f"views the same (an augmentation that changed nothing), or is everything masked?",
                    stacklevel=2,
                )
        self.clear()
        return named
