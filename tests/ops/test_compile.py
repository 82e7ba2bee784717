"""``opcheck`` on every operator; ``torch.compile(fullgraph=True)`` of every loss, forward and backward.

Compiled with AOT autograd and inductor's partitioner but without code generation: what can go wrong here is a graph
break, a wrong fake kernel or a wrong saved tensor, not the compiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import LOSSES, Case, attention_case, in_comparison, pooled_case, qk_case
from torch import Tensor

import ear_ops

COMPILER = "aot_eager_decomp_partition"
RAGGED = ([7, 3], [5, 7])
CASES: dict[str, Case] = {
    "qk_attention_mse": qk_case(7, None, 4, lengths=RAGGED, options={"is_causal": True, "window": 4}),
    "attention_mse": attention_case(7, lengths=RAGGED),
    "pooled_distance": pooled_case(7, pairs=2, lengths=RAGGED),
}
CASES |= {
    op: in_comparison(CASES["qk_attention_mse"], op) for op in ("qk_attention_kl", "qk_attention_js", "qk_scores_mse")
}
OPERATORS = [*CASES, "qk_attention_reverse_kl"]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("EAR_OPS_BACKEND", raising=False)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# --- opcheck ------------------------------------------------------------------------------------------------------


def arguments(op: str, stacked: bool, optional: bool, device: str) -> tuple[list[Any], list[Any]]:
    """Forward and backward arguments of an operator, with and without everything that is optional."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)

    def mask(*shape: int) -> Tensor | None:
        return random(*shape) > -0.7 if optional else None

    rows = 4 if stacked else 2
    needs = [True, False]
    if op.startswith("qk"):
        views = [random(rows, 4, 5, 3), random(rows, 2, 6, 3)]
        views += [None, None] if stacked else [random(2, 4, 5, 3) + 1, random(2, 2, 6, 3) + 1]
        biases = [random(1, 1, 5, 6).expand(2, 4, 5, 6), random(6).expand(2, 4, 5, 6)] if optional else [None, None]
        real = mask(4, 6)
        if real is not None and op.endswith("_kl"):  # which is infinite where the target alone has a key
            real = real[:2].repeat(2, 1)
        forward = [*views, real, mask(2, 5), *biases, 0.5, optional, 4 if optional else 0, None]
        needs, upstream = [True, True, False, not stacked], random(2, 4)
    elif op == "attention_mse":
        forward = [random(rows, 3, 5, 6), None if stacked else random(2, 3, 5, 6) + 1, mask(4, 6), mask(2, 5)]
        upstream = random(2, 3)
    else:
        forward = [random(rows, 5, 6), None if stacked else random(2, 5, 6) + 1, mask(4, 5)]
        upstream = random(2)
    results = getattr(torch.ops.ear_ops, op)(*forward)
    saved = [] if op == "attention_mse" else [results[1]]
    return forward, [upstream, *forward, *saved, needs]


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
@pytest.mark.parametrize("optional", [False, True], ids=["plain", "all options"])
def test_opcheck(op: str, stacked: bool, optional: bool, device: str) -> None:
    forward, backward = arguments(op, stacked, optional, device)
    torch.library.opcheck(getattr(torch.ops.ear_ops, op).default, tuple(forward))
    torch.library.opcheck(getattr(torch.ops.ear_ops, f"{op}_backward").default, tuple(backward))


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
def test_backward_operators_return_what_is_needed_and_nothing_else(op: str, stacked: bool, device: str) -> None:
    _, backward = arguments(op, stacked, True, device)
    count = len(backward[-1])
    for number in range(2**count):
        needs = [bool(number >> i & 1) for i in range(count)]
        expected = [n for n in range(count) if needs[n] and not (stacked and n >= count // 2)]
        gradients = getattr(torch.ops.ear_ops, f"{op}_backward")(*backward[:-1], needs)
        assert len(gradients) == len(expected)
        assert all(gradient.is_contiguous() for gradient in gradients)


def test_half_precision_fakes(device: str) -> None:
    """Sums and saved statistics are float32, gradients in the dtype of the inputs, in the fakes too."""
    forward, backward = arguments("qk_attention_mse", True, False, device)
    halves = [t.bfloat16() if isinstance(t, Tensor) else t for t in forward]
    torch.library.opcheck(torch.ops.ear_ops.qk_attention_mse.default, tuple(halves), test_utils="test_faketensor")
    saved = torch.ops.ear_ops.qk_attention_mse(*halves)[1]
    arguments_ = (backward[0], *halves, saved, backward[-1])
    torch.library.opcheck(torch.ops.ear_ops.qk_attention_mse_backward.default, arguments_, test_utils="test_faketensor")


# --- torch.compile ------------------------------------------------------------------------------------------------


def results(case: Case, function: Any, backend: str | None = None) -> list[Tensor]:
    inputs = [t.requires_grad_() for t in case.inputs()]
    value = function(*inputs, **case.arguments(), backend=backend)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def check(case: Case, compiled: Any) -> None:
    for found, expected in zip(results(case, compiled), results(case, LOSSES[case.op]), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
def test_full_graph(op: str, stacked: bool, device: str) -> None:
    compiled = torch.compile(LOSSES[op], fullgraph=True, backend=COMPILER)
    case = replace(CASES[op], stacked=stacked).to(torch.float32).to(device)
    check(case, compiled)
    check(replace(case, masks={}, options={}), compiled)


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("why", ["no_grad", "constants"])
def test_full_graph_without_gradients(op: str, why: str, device: str) -> None:
    case = CASES[op].to(torch.float32).to(device)
    inputs = [t.requires_grad_(why == "no_grad") for t in case.inputs()]
    with torch.set_grad_enabled(why != "no_grad"):
        found = torch.compile(LOSSES[op], fullgraph=True, backend=COMPILER)(*inputs, **case.arguments())
    torch.testing.assert_close(found, case.call(case.inputs(), device))


@pytest.mark.parametrize("op", CASES)
def test_dynamic_shapes_compile_once(op: str, device: str) -> None:
    graphs = of_first = 0

    def counting(graph: Any, example_inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(COMPILER)(graph, example_inputs)

    compiled = torch.compile(LOSSES[op], fullgraph=True, dynamic=True, backend=counting)
    make = {"attention_mse": attention_case, "pooled_distance": pooled_case}.get(op, qk_case)
    for length, pairs in ((7, 2), (12, 3), (33, 5)):
        first = [length, *[3] * (pairs - 1)]
        lengths = (first, first if op == "qk_attention_kl" else [4] * pairs)
        case = replace(make(length, pairs=pairs, lengths=lengths, stacked=True), op=op)
        check(case.to(torch.float32).to(device), compiled)
        of_first = of_first or graphs  # a trace that starts anew for a float makes two
    assert graphs == of_first


@pytest.mark.parametrize("backend", ["reference", "kernels"])
def test_the_environment_does_not_break_the_graph(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAR_OPS_BACKEND", device if backend == "kernels" else backend)
    calls = []

    def recording(graph: Any, example_inputs: Any) -> Any:
        calls.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(ear_ops.pooled_distance, fullgraph=True, backend=recording)
    case = CASES["pooled_distance"].to(torch.float32).to(device)
    compiled(*[t.requires_grad_() for t in case.inputs()], **case.arguments())
    assert len(calls) == 1
    assert ("ear_ops.pooled_distance" in calls[0]) == (backend == "kernels")


def test_inside_a_compiled_step(device: str) -> None:
    """Between other operations, as a module, not the last node, with the module's parameters in front."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8).to(device)
    loss = ear_ops.QKAttentionMSELoss(backend=device)

    def step(hidden: Tensor) -> Tensor:
        heads = layer(hidden).unflatten(-1, (2, 4)).transpose(1, 2)
        return torch.tanh(30 * loss(heads, 2 * heads)) + 1e-3 * heads.square().mean()

    hidden = torch.randn(4, 5, 8, device=device)
    gradients = []
    for run in (step, torch.compile(step, fullgraph=True, backend=COMPILER)):
        layer.zero_grad()
        run(hidden).backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
