"""Whether the result of a forward is still a part of a loss that waits for its backward.

A forward whose result was thrown away, or whose backward is over, was a try, an adversarial search or an earlier step.
One that still waits belongs to the same loss as the forward after it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


class PendingResult:
    """The result ``output`` of a forward: tensors, also in mappings, lists and tuples. It is not kept alive."""

    def __init__(self, output: Any) -> None:
        mark = _Mark()
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(mark)
        self._mark = weakref.ref(mark)

    def waits(self) -> bool:
        """Whether the graph exists and no backward has come through it."""
        mark = self._mark()
        return mark is not None and not mark.passed


class _Mark:
    """Hung on the graph, which alone keeps it alive."""

    passed = False

    def __call__(self, gradients: Any) -> None:
        self.passed = True


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)
