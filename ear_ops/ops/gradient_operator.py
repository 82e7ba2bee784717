"""A fused operator whose forward also makes the gradients of its sums.

A sum of a pair takes one number as its upstream gradient. So the forward, which has all probabilities at hand, can make
the gradients for an upstream gradient of 1, and the backward multiplies by it. That saves the backward's exponentials
and products of queries and keys. The gradients stay in memory from the forward to the backward, as large as the inputs;
in float32 for those of float16, where some would overflow or vanish before the multiplication.

The operator is registered as ``torch.ops.ear_ops.NAME``. It takes a problem and ``needs``, one bool for each
differentiable input. It returns the sums ``[B]`` and the gradients that ``needs`` asks for, in the order of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ear_ops.ops.backend import kernels_of
from ear_ops.ops.operator import OPERATORS, ReferenceOperator, define, refuse_second_derivative, schema_inputs
from ear_ops.ops.probabilities import compute_dtype


class GradientOperator(ReferenceOperator):
    """A fused operator from a problem to sums ``[B]`` and their gradients.

    Args:
        name: of ``torch.ops.ear_ops.NAME``.
        problem: the ``NamedTuple`` of its inputs. The order of its fields is the schema: differentiable tensors, other
            tensors, then options. It has ``pairs``.
        reference: the definition, from a problem to the sums, in plain PyTorch.
        differentiable: how many of the first fields have a gradient. Their first dimension is B, or 2B with both views.
    """

    def __init__(
        self, name: str, problem: type[Any], *, reference: Callable[[Any], Tensor], differentiable: int
    ) -> None:
        super().__init__(name, reference)
        self.differentiable = differentiable
        inputs, _ = schema_inputs(problem)

        def fake(*inputs: Any) -> tuple[Tensor, list[Tensor]]:
            made, needs = problem(*inputs[:-1]), inputs[-1]
            named = zip(made[:differentiable], needs, strict=True)
            wanted = [tensor for tensor, needed in named if tensor is not None and needed]
            gradients = [
                torch.empty(tensor.shape, dtype=_kept(tensor.dtype), device=tensor.device) for tensor in wanted
            ]
            return made[0].new_empty((made.pairs,), dtype=compute_dtype(made[0].dtype)), gradients

        define(name, f"({inputs}, bool[] needs) -> (Tensor sums, Tensor[] gradients)", fake)
        self.forward_op = getattr(torch.ops.ear_ops, name).default
        self.kernels = kernels_of(name)
        OPERATORS[name] = self

    def fused_sums(self, problem: Any) -> Tensor:
        inputs = problem[: self.differentiable]
        recorded = torch.is_grad_enabled()
        needs = [recorded and tensor is not None and tensor.requires_grad for tensor in inputs]
        return _FusedGradients.apply(self.name, needs, *problem)


class _FusedGradients(Function):
    """Saves the gradients that the operator called ``name`` makes, and multiplies them in the backward."""

    @staticmethod
    def forward(ctx: Any, name: str, needs: list[bool], *problem: Any) -> Tensor:
        sums, gradients = OPERATORS[name].forward_op(*problem, needs)
        ctx.name, ctx.needs, ctx.inputs = name, needs, len(problem)
        ctx.dtype = problem[0].dtype
        ctx.save_for_backward(*gradients)
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(ctx.name)
        scaled = iter(_scale(ctx.saved_tensors, grad_sums, ctx.dtype))
        placed = [next(scaled) if needed else None for needed in ctx.needs]
        return (None, None, *placed, *[None] * (ctx.inputs - len(placed)))


def _kept(dtype: torch.dtype) -> torch.dtype:
    """What gradients of inputs in ``dtype`` are kept in."""
    return torch.float32 if dtype == torch.float16 else dtype


def _scale_plainly(gradients: Sequence[Tensor], upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The gradients ``[B, ...]`` or ``[2B, ...]`` times ``[B]`` numbers; 0 where they are, also if it is infinite."""
    scaled = []
    for gradient in gradients:
        both_views = len(gradient) != len(upstream)
        of_rows = torch.cat([upstream, upstream]) if both_views else upstream
        of_rows = of_rows.reshape(-1, *[1] * (gradient.dim() - 1))
        scaled.append((gradient * of_rows).masked_fill(of_rows == 0, 0.0).to(dtype))
    return scaled


define(
    "scale_gradients",
    "(Tensor[] gradients, Tensor upstream, ScalarType dtype) -> Tensor[]",
    lambda gradients, upstream, dtype: [gradient.new_empty(gradient.shape, dtype=dtype) for gradient in gradients],
    of_every_device=False,
)
_LIBRARY = torch.library.Library("ear_ops", "FRAGMENT")
# The CPU has a kernel. It has no batches of upstream gradients, which Jacobians are made of.
for _key in ("CompositeExplicitAutograd", "Batched", "FuncTorchBatched"):
    _LIBRARY.impl("scale_gradients", _scale_plainly, _key)


def _scale(gradients: Sequence[Tensor], upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    if torch.compiler.is_compiling():  # what is compiled in one piece needs no kernel
        return _scale_plainly(gradients, upstream, dtype)
    return torch.ops.ear_ops.scale_gradients(gradients, upstream, dtype)
