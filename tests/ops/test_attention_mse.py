"""The kernels of ``attention_mse`` against the float64 reference, under the error rule of ``support.rules``."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.cases import LAYOUTS, Case, attention_case
from support.rules import check_case, check_pairs_without_upstream, check_strides_and_forms
from support.strategies import DTYPES, REDUCTIONS

import ear_ops


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if device == "cuda" and request.param == torch.float64:
        pytest.skip("the CUDA kernels take no float64")
    return request.param


SHAPES = [(1, 1), (1, 513), (2, 2), (2, 15), (17, 16), (64, 17), (65, 129), (129, 64), (300, 2), (300, 300), (513, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check_case(attention_case(*shape, reduction="none"), dtype, device, device)


FEATURES: dict[str, Case] = {
    "ragged": attention_case(65, lengths=([65, 30], [40, 50]), reduction="sum"),
    "left padding": attention_case(65, lengths=([65, 30], [40, 50]), side="left", reduction="sum"),
    "one view empty": attention_case(20, 40, lengths=([40, 0], [0, 40]), reduction="sum"),
    "all masked pair": attention_case(33, lengths=([20, 0], [33, 0]), reduction="sum"),
    "query mask": attention_case(
        40,
        33,
        masks={
            "query_mask": torch.arange(40)[None, :] % torch.tensor([[3], [5]]),
            "query_mask_aug": torch.arange(40)[None, :] % torch.tensor([[2], [7]]),
        },
        reduction="sum",
    ),
    "nearly equal views": attention_case(65, closeness=1e-3, reduction="sum"),
    "many heads": attention_case(5, 7, pairs=3, heads=13, reduction="sum"),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, dtype: torch.dtype, device: str) -> None:
    check_case(FEATURES[name], dtype, device, device)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(reduction: str, dtype: torch.dtype, device: str) -> None:
    check_case(attention_case(17, 20, lengths=([20, 3], [11, 20]), reduction=reduction), dtype, device, device)


def test_a_pair_without_upstream_gradient(dtype: torch.dtype, device: str) -> None:
    check_pairs_without_upstream(attention_case(5, 7), dtype, device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
def test_strides_and_forms(layout: str, stacked: bool, dtype: torch.dtype, device: str) -> None:
    case = attention_case(20, 33, heads=4, lengths=([33, 9], [20, 31]), reduction="sum")
    check_strides_and_forms(case, layout, stacked, dtype, device)


@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
def test_gradcheck(stacked: bool, device: str) -> None:
    if device != "cpu":
        pytest.skip("gradcheck needs float64, which only the CPU kernels take")
    case = attention_case(4, 5, lengths=([5, 2], [3, 4]), reduction="none", stacked=stacked)
    inputs = [t.requires_grad_() for t in case.inputs()]
    assert torch.autograd.gradcheck(lambda *tensors: case.call(tensors, device), inputs)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2))[:-1], ids=str)
def test_every_subset_of_gradients(needs: tuple[bool, ...], device: str) -> None:
    case = attention_case(20, 33, lengths=([33, 9], [20, 31])).to(torch.float32).to(device)
    _, every = case.run(device)
    _, some = case.run(device, needs)
    for gradient, expected, needed in zip(some, every, needs, strict=True):
        assert gradient is None if not needed else torch.equal(gradient, expected)


def test_probabilities_at_padded_keys_count_as_zero(device: str) -> None:
    attn, attn_aug = torch.ones(1, 1, 1, 3, device=device), torch.zeros(1, 1, 1, 3, device=device)
    mask, mask_aug = torch.tensor([[1, 0, 0]], device=device), torch.tensor([[1, 1, 0]], device=device)
    masks = {"attention_mask": mask, "attention_mask_aug": mask_aug}
    assert ear_ops.attention_mse(attn, attn_aug, **masks, reduction="sum", backend=device).item() == 1.0
    # two keys are counted: real in at least one view
    assert ear_ops.attention_mse(attn, attn_aug, **masks, backend=device).item() == 0.5


def test_functional_and_module_agree(device: str) -> None:
    case = attention_case(9, lengths=([9, 5], [7, 9])).to(torch.float32).to(device)
    module = ear_ops.AttentionMSELoss(reduction="equations", backend=device)
    given = {**case.masks, "head_weights": torch.linspace(0, 1, case.inputs()[0].shape[1], device=device)}
    expected = ear_ops.attention_mse(*case.inputs(), **given, reduction="equations", backend=device)
    assert torch.equal(module(*case.inputs(), **given), expected)
    assert repr(module) == "AttentionMSELoss(heads='each', reduction='equations')"
