"""One fused operator: schemas, fake kernels, gradient and reference, all made from the type of its inputs.

An operator file defines a ``NamedTuple`` of inputs (its *problem*), a reference, the shapes of the outputs, and one
:class:`Operator`. That registers ``torch.ops.ear_ops.NAME`` and ``torch.ops.ear_ops.NAME_backward``; the compiled
binaries only register implementations for their device.

The forward operator returns the sums and the tensors that it saves for the backward. The backward operator takes the
gradient of the sums, the problem, the saved tensors and ``needs``: one bool for each differentiable input. It returns
the gradients that ``needs`` asks for, in the order of the inputs, and nothing else. Where the forward can make the
gradients at little more cost, :mod:`ear_ops.ops.gradient_operator` has another kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import Function

from ear_ops.installation import rebuild
from ear_ops.ops.backend import kernels_of, select_backend

OPERATORS: dict[str, Any] = {}
"""Every operator of the package by its name."""

SCHEMAS: dict[str, str] = {}
"""The schema of every forward and backward operator, as ``torch.library.define`` takes it."""

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    int: "int",
}


class ReferenceOperator:
    """An operator that no kernel computes yet; an :class:`Operator` of the same name takes its place when one does.

    Args:
        name: of the operator.
        reference: the definition, from a problem to the sums, in plain PyTorch.
    """

    kernels: frozenset[str] = frozenset()  # the devices that have one

    def __init__(self, name: str, reference: Callable[[Any], Tensor]) -> None:
        self.name = name
        self.reference = reference

    def sums(self, problem: Any, backend: str | None = None) -> Tensor:
        """The sums of ``problem`` by the chosen backend, differentiable.

        ``backend``: see :mod:`ear_ops.functional`. A problem's property ``unsupported`` says why no kernel can take it.
        """
        unsupported: str | None = getattr(problem, "unsupported", None)
        if select_backend(backend, problem[0], self.name, self.kernels, unsupported) == "reference":
            with _without_autocast(problem[0]):
                return self.reference(problem)
        return self.fused_sums(problem)

    def fused_sums(self, problem: Any) -> Tensor:
        """The sums by the kernels, differentiable."""
        raise NotImplementedError(f"{self.name} has no kernels")


class Operator(ReferenceOperator):
    """A fused operator from a problem to sums.

    Args:
        name: of ``torch.ops.ear_ops.NAME``.
        problem: the ``NamedTuple`` of its inputs. The order of its fields is the schema: differentiable tensors, other
            tensors, then options.
        reference: the definition, from a problem to the sums, in plain PyTorch.
        fake: from a problem to empty tensors of the outputs' shapes: the sums, then what is saved.
        saved: names of the tensors that the forward saves for the backward.
        differentiable: how many of the first fields have a gradient.
    """

    def __init__(
        self,
        name: str,
        problem: type[Any],
        *,
        reference: Callable[[Any], Tensor],
        fake: Callable[[Any], tuple[Tensor, ...]],
        saved: Sequence[str] = (),
        differentiable: int,
    ) -> None:
        super().__init__(name, reference)
        self.differentiable = differentiable
        inputs, self.tensors = schema_inputs(problem)
        saved_tensors = [f"Tensor {field}" for field in saved]
        outputs = f"(Tensor sums, {', '.join(saved_tensors)})" if saved else "Tensor"
        backward_inputs = ", ".join(["Tensor grad_sums", inputs, *saved_tensors, "bool[] needs"])
        define(name, f"({inputs}) -> {outputs}", lambda *fields: _one_or_several(fake(problem(*fields))))
        define(f"{name}_backward", f"({backward_inputs}) -> Tensor[]", self._fake_gradients)
        self.forward_op = getattr(torch.ops.ear_ops, name).default
        self.backward_op = getattr(torch.ops.ear_ops, f"{name}_backward").default
        self.kernels = kernels_of(name)
        OPERATORS[name] = self

    def fused_sums(self, problem: Any) -> Tensor:
        return FusedOperator.apply(self.name, *problem)[0]

    def _fake_gradients(self, grad_sums: Tensor, *inputs: Any) -> list[Tensor]:
        needs = inputs[-1]
        return [
            torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            for tensor, needed in zip(inputs[: self.differentiable], needs, strict=True)
            if tensor is not None and needed
        ]


class FusedOperator(Function):
    """Pairs the forward of the operator called ``name`` with its backward.

    ``forward`` saves for the backward itself. With a ``setup_context`` every call would bind its arguments by the
    signature, which takes longer than a small loss. The name comes first: ``torch.compile`` miscounts inputs where
    ``*inputs`` is the only parameter.
    """

    @staticmethod
    def forward(ctx: Any, name: str, *problem: Any) -> tuple[Tensor, ...]:
        operator = OPERATORS[name]
        sums, *saved = _several(operator.forward_op(*problem))
        ctx.name, ctx.options = name, problem[operator.tensors :]
        ctx.save_for_backward(*problem[: operator.tensors], *saved)
        ctx.mark_non_differentiable(*saved)
        return (sums, *saved)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        operator = OPERATORS[ctx.name]
        refuse_second_derivative(ctx.name)
        unpacked = ctx.saved_tensors  # once: checkpointing without reentry allows no second time
        tensors, saved = unpacked[: operator.tensors], unpacked[operator.tensors :]
        needs = list(ctx.needs_input_grad[1 : 1 + operator.differentiable])
        gradients = iter(operator.backward_op(grad_sums, *tensors, *ctx.options, *saved, needs))
        placed = [next(gradients) if needed else None for needed in needs]
        without_gradient = len(tensors) + len(ctx.options) - len(placed)
        return (None, *placed, *[None] * without_gradient)


def refuse_second_derivative(name: str) -> None:
    """Raises where a backward is itself recorded."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # grad mode is on in a backward only for this
        raise RuntimeError(
            f"{name}: its kernels have no second derivative (backward was called with create_graph=True); "
            f"use backend='reference', or EAR_OPS_BACKEND=reference for regularisers on a model"
        )


def schema_inputs(problem: type[Any]) -> tuple[str, int]:
    """The inputs of a schema, from the type of a problem, and how many of them are tensors, which come first."""
    types = [_SCHEMA_TYPES[hint] for hint in get_type_hints(problem).values()]
    inputs = ", ".join(f"{kind} {field}" for kind, field in zip(types, problem._fields, strict=True))
    return inputs, sum(kind.startswith("Tensor") for kind in types)


def define(name: str, schema: str, fake: Callable[..., Any], of_every_device: bool = True) -> None:
    """Registers ``torch.ops.ear_ops.NAME`` and what it gives for tensors without data.

    Args:
        of_every_device: it is listed in ``SCHEMAS``, and every device with kernels has one for it.

    Raises:
        RuntimeError: the compiled kernels were built for another schema.
    """
    try:
        torch.library.define(f"ear_ops::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    except RuntimeError as error:
        raise RuntimeError(
            f"the compiled kernels do not fit these Python files ({name} has other inputs), so they "
            f"have to be built again; {rebuild()}"
        ) from error
    torch.library.register_fake(f"ear_ops::{name}", fake)
    if of_every_device:
        SCHEMAS[name] = schema


def _one_or_several(outputs: tuple[Tensor, ...]) -> Any:
    return outputs if len(outputs) > 1 else outputs[0]


def _several(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The reference accumulates in float32; autocast would take its products to half precision."""
    device = tensor.device.type
    # A compiled graph of torch 2.11 cannot ask whether a device has autocast, so the usual ones are not asked about.
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
