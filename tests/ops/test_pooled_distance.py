"""The kernels of ``pooled_distance`` against the float64 reference, under the error rule of ``support.rules``."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.cases import Case, pooled_case
from support.rules import check_case, check_pairs_without_upstream, check_strides_and_forms
from support.strategies import DTYPES, REDUCTIONS

import ear_ops


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if device == "cuda" and request.param == torch.float64:
        pytest.skip("the CUDA kernels take no float64")
    return request.param


SHAPES = [(1, 1), (1, 513), (2, 15), (17, 16), (64, 17), (65, 129), (129, 64), (300, 2), (300, 300), (513, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check_case(pooled_case(*shape, reduction="none"), dtype, device, device)


FEATURES: dict[str, Case] = {
    "ragged": pooled_case(65, lengths=([65, 30, 1], [40, 50, 65]), reduction="sum"),
    "left padding": pooled_case(65, lengths=([65, 30, 1], [40, 50, 65]), side="left", reduction="sum"),
    "one view empty": pooled_case(20, lengths=([20, 0, 4], [0, 20, 5]), reduction="sum"),
    "all masked pair": pooled_case(33, lengths=([20, 0, 3], [33, 0, 4]), reduction="sum"),
    "nearly equal views": pooled_case(17, closeness=1e-2, reduction="sum"),
    "not centred": pooled_case(64, offset=3.0, reduction="sum"),
    "long, not centred": pooled_case(2048, offset=3.0, reduction="sum"),
    "long, nearly equal views": pooled_case(1024, offset=1.0, closeness=0.1, reduction="sum"),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, dtype: torch.dtype, device: str) -> None:
    check_case(FEATURES[name], dtype, device, device)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(reduction: str, dtype: torch.dtype, device: str) -> None:
    check_case(pooled_case(17, lengths=([17, 3, 0], [11, 17, 5]), reduction=reduction), dtype, device, device)


def test_a_pair_without_upstream_gradient(dtype: torch.dtype, device: str) -> None:
    check_pairs_without_upstream(pooled_case(5, 7), dtype, device)


@pytest.mark.parametrize("layout", ["contiguous", "length_first", "slices", "every_second", "expanded"])
@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
def test_strides_and_forms(layout: str, stacked: bool, dtype: torch.dtype, device: str) -> None:
    case = pooled_case(20, lengths=([20, 9, 0], [15, 20, 4]), reduction="sum")
    check_strides_and_forms(case, layout, stacked, dtype, device)


@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
def test_gradcheck(stacked: bool, device: str) -> None:
    if device != "cpu":
        pytest.skip("gradcheck needs float64, which only the CPU kernels take")
    case = pooled_case(5, 4, lengths=([5, 2, 0], [3, 5, 2]), reduction="none", stacked=stacked)
    inputs = [t.requires_grad_() for t in case.inputs()]
    assert torch.autograd.gradcheck(lambda *tensors: case.call(tensors, device), inputs)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2))[:-1], ids=str)
def test_every_subset_of_gradients(needs: tuple[bool, ...], device: str) -> None:
    case = pooled_case(20, lengths=([20, 9, 0], [15, 20, 4])).to(torch.float32).to(device)
    _, every = case.run(device)
    _, some = case.run(device, needs)
    for gradient, expected, needed in zip(some, every, needs, strict=True):
        assert gradient is None if not needed else torch.equal(gradient, expected)


def test_worked_by_hand(device: str) -> None:
    # means (2, 3) and (0, 1): distance 8, gradient 2 (2, 2) / 2 at both real tokens, -4 at the one of x^a
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]], device=device, requires_grad=True)
    hidden_aug = torch.tensor([[[0.0, 1.0], [7.0, 7.0], [7.0, 7.0]]], device=device, requires_grad=True)
    value = ear_ops.pooled_distance(
        hidden,
        hidden_aug,
        attention_mask=torch.tensor([[1, 1, 0]], device=device),
        attention_mask_aug=torch.tensor([[1, 0, 0]], device=device),
        reduction="sum",
        backend=device,
    )
    value.backward()
    assert value.item() == 8.0
    assert hidden.grad.tolist() == [[[2.0, 2.0], [2.0, 2.0], [0.0, 0.0]]]
    assert hidden_aug.grad.tolist() == [[[-4.0, -4.0], [0.0, 0.0], [0.0, 0.0]]]


def test_functional_and_module_agree(device: str) -> None:
    case = pooled_case(9, lengths=([9, 5, 0], [7, 9, 1])).to(torch.float32).to(device)
    module = ear_ops.PooledDistanceLoss(reduction="none", backend=device)
    expected = ear_ops.pooled_distance(*case.inputs(), **case.masks, reduction="none", backend=device)
    assert torch.equal(module(*case.inputs(), **case.masks), expected)
    assert repr(module) == "PooledDistanceLoss(reduction='none')"
