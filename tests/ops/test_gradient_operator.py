"""What holds where a forward makes the gradients, and the backward multiplies them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ear_ops.ops import extension, gradient_operator

needs_kernels = pytest.mark.skipif(not extension.CPU.loaded, reason=f"no CPU kernels: {extension.CPU.reason}")


def by_kernel_and_plainly(
    gradients: list[Tensor], upstream: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor]]:
    by_kernel = gradient_operator._scale(gradients, upstream, dtype)
    monkeypatch.setattr(gradient_operator, "_SCALE_KERNELS", frozenset())
    return by_kernel, gradient_operator._scale(gradients, upstream, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_multiplied_by_the_number_of_their_pair(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass as in PyTorch: rounded once, from float32, for both views in one tensor or in two."""
    kept = gradient_operator._kept(dtype)
    shapes = [(3, 2, 5, 7), (6, 2, 5, 7), (3, 1, 300, 131), (3, 2, 0, 7)]  # more than one part; nothing
    gradients = [torch.randn(shape).to(kept) for shape in shapes]
    upstream = torch.tensor([0.3, -2.7, 1.9], dtype=kept if kept == torch.float64 else torch.float32)
    found, expected = by_kernel_and_plainly(gradients, upstream, dtype, monkeypatch)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)


@needs_kernels
def test_a_pair_without_upstream_gradient_gets_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = torch.tensor([[math.inf, 1.0], [math.nan, 2.0], [3.0, math.inf]])
    found, expected = by_kernel_and_plainly([gradient], torch.tensor([0.0, 0.0, 2.0]), torch.float32, monkeypatch)
    assert torch.equal(found[0], torch.tensor([[0.0, 0.0], [0.0, 0.0], [6.0, math.inf]]))
    assert torch.equal(found[0], expected[0])


@needs_kernels
def test_shapes_without_data() -> None:
    gradients = [torch.empty(4, 2, 3, device="meta")]
    assert torch.ops.ear_ops.scale_gradients(gradients, torch.empty(2, device="meta"), torch.float16)[0].shape == (
        4,
        2,
        3,
    )
