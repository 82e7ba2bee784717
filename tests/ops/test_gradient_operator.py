"""What holds where a forward makes the gradients, and the backward multiplies them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ear_ops
from ear_ops.ops import extension, gradient_operator

needs_kernels = pytest.mark.skipif(not extension.CPU.loaded, reason=f"no CPU kernels: {extension.CPU.reason}")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_multiplied_by_the_number_of_their_pair(dtype: torch.dtype) -> None:
    """In one pass as in PyTorch: rounded once, from float32, for both views in one tensor or in two."""
    kept = gradient_operator._kept(dtype)
    shapes = [(3, 2, 5, 7), (6, 2, 5, 7), (3, 1, 300, 131), (3, 2, 0, 7)]  # more than one part; nothing
    gradients = [torch.randn(shape).to(kept) for shape in shapes]
    upstream = torch.tensor([0.3, -2.7, 1.9], dtype=kept if kept == torch.float64 else torch.float32)
    found = torch.ops.ear_ops.scale_gradients(gradients, upstream, dtype)
    expected = gradient_operator._scale_plainly(gradients, upstream, dtype)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)


@needs_kernels
@pytest.mark.parametrize("scale", [torch.ops.ear_ops.scale_gradients, gradient_operator._scale_plainly])
def test_a_pair_without_upstream_gradient_gets_zeros(scale: Callable[..., list[Tensor]]) -> None:
    gradient = torch.tensor([[math.inf, 1.0], [math.nan, 2.0], [3.0, math.inf]])
    (found,) = scale([gradient], torch.tensor([0.0, 0.0, 2.0]), torch.float32)
    assert torch.equal(found, torch.tensor([[0.0, 0.0], [0.0, 0.0], [6.0, math.inf]]))


@needs_kernels
def test_shapes_without_data() -> None:
    gradient, upstream = torch.empty(4, 2, 3, device="meta"), torch.empty(2, device="meta")
    (scaled,) = torch.ops.ear_ops.scale_gradients([gradient], upstream, torch.float16)
    assert (scaled.shape, scaled.dtype) == ((4, 2, 3), torch.float16)


@needs_kernels
@pytest.mark.parametrize("to", [torch.float64, torch.float16])
def test_what_hooks_of_autograd_change_is_taken(to: torch.dtype) -> None:
    """Saved gradients may come back in another dtype, and with other strides."""
    inputs = [torch.randn(3, 2, 20, 8, requires_grad=True) for _ in range(4)]
    plain = torch.autograd.grad(ear_ops.qk_attention_mse(*inputs, heads="mean"), inputs)
    pack, unpack = lambda t: t.to(to).transpose(1, 2).contiguous(), lambda t: t.transpose(1, 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = ear_ops.qk_attention_mse(*inputs, heads="mean")
    for gradient, expected in zip(torch.autograd.grad(loss, inputs), plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=1e-6)


@needs_kernels
def test_many_upstream_gradients_at_once() -> None:
    """As Jacobians are made."""
    inputs = [torch.randn(3, 2, 20, 8, requires_grad=True) for _ in range(4)]
    losses = ear_ops.qk_attention_mse(*inputs, heads="mean", reduction="none")
    batched = torch.autograd.grad(losses, inputs, torch.eye(3), is_grads_batched=True, retain_graph=True)
    for i in range(3):
        one = torch.autograd.grad(losses[i], inputs, retain_graph=True)
        assert all(torch.equal(batch[i], gradient) for batch, gradient in zip(batched, one, strict=True))


@needs_kernels
def test_numbers_that_do_not_fit_the_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gradients: expected 2 or 4 rows.*got 3"):
        torch.ops.ear_ops.scale_gradients([torch.ones(3, 5)], torch.ones(2), torch.float32)
