"""The kernels of ``qk_attention_mse`` against the float64 reference, under the error rule of ``support.rules``."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from support.cases import LAYOUTS, Case, qk_case
from support.memory import peak_memory
from support.rules import check_case, check_gradient, check_pairs_without_upstream, check_strides_and_forms
from support.strategies import DTYPES, REDUCTIONS

import ear_ops


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if device == "cuda" and request.param == torch.float64:
        pytest.skip("the CUDA kernels take no float64")
    return request.param


def slack(dtype: torch.dtype, device: str) -> float:
    """The CUDA kernels round the gradient of the scores to half precision, for the matrix unit; one such error spreads
    over a whole row of gradients, and those of so few rows do not average out."""
    return 2.0 if device == "cuda" and dtype in (torch.bfloat16, torch.float16) else 1.0


# Every length and head dimension, not every pair of them: below, at and above the kernels' blocks.
SHAPES = [
    (1, 1, 64),
    (1, 513, 8),
    (2, 2, 1),
    (2, 65, 160),
    (17, 17, 3),
    (17, 300, 255),
    (64, 64, 64),
    (64, 129, 127),
    (65, 65, 33),
    (129, 64, 80),
    (129, 129, 128),
    (300, 2, 256),
    (300, 300, 17),
    (513, 1, 16),
    (513, 513, 20),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    queries, keys, dim = shape
    check_case(qk_case(queries, keys, dim, reduction="none"), dtype, device, device, slack=slack(dtype, device))


def bias(*shape: int, seed: int = 7, forbid: float = 0.0) -> torch.Tensor:
    """Random normal bias in float64, a part of it -inf."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.masked_fill(torch.rand(shape, generator=generator) < forbid, -math.inf)


FEATURES: dict[str, Case] = {
    "ragged": qk_case(65, None, 32, lengths=([65, 30], [40, 50])),
    "ragged beyond one key tile": qk_case(40, 300, 16, lengths=([300, 17], [260, 290])),
    "left padding": qk_case(65, None, 32, lengths=([65, 30], [40, 50]), side="left"),
    "left padding, causal": qk_case(
        65, None, 32, lengths=([65, 30], [40, 50]), side="left", options={"is_causal": True}
    ),
    "one view empty": qk_case(33, 40, 16, lengths=([40, 0], [0, 40])),
    "all masked pair": qk_case(33, None, 16, lengths=([20, 0], [33, 0])),
    "query mask": qk_case(
        40,
        33,
        16,
        masks={
            "query_mask": torch.arange(40)[None, :] % torch.tensor([[3], [5]]),
            "query_mask_aug": torch.arange(40)[None, :] % torch.tensor([[2], [7]]),
        },
    ),
    "padded queries counted": qk_case(33, None, 16, lengths=([20, 11], [33, 7]), reduction="padded_mean"),
    "grouped": qk_case(65, None, 32, heads=6, key_heads=2),
    "one key head": qk_case(33, 65, 32, heads=5, key_heads=1, lengths=([65, 40], [50, 60])),
    "causal": qk_case(65, None, 32, options={"is_causal": True}),
    "causal, more keys": qk_case(17, 300, 32, options={"is_causal": True}),
    "causal, rows without keys": qk_case(130, 17, 32, options={"is_causal": True}),
    "window": qk_case(65, None, 32, options={"window": 7}),
    "window of one": qk_case(33, None, 32, options={"window": 1}),
    "window skips key tiles": qk_case(300, 600, 8, options={"window": 20}),
    # Of 64 queries from 320 on, the first begins at key 255; of those before 192, the last ends with key 256.
    "window reaches one key into a tile": qk_case(512, None, 8, pairs=1, heads=1, options={"window": 66}),
    "causal window, ragged": qk_case(
        300, None, 8, options={"window": 20, "is_causal": True}, lengths=([300, 100], [280, 70])
    ),
    "bias": qk_case(33, 65, 16, biases={"attn_bias": bias(2, 2, 33, 65)}),
    "bias per head": qk_case(33, 65, 16, biases={"attn_bias": bias(2, 1, 1)}),
    "bias per query and key": qk_case(33, 65, 16, biases={"attn_bias": bias(33, 65)}),
    "bias per view": qk_case(
        33, 65, 16, biases={"attn_bias": bias(1, 2, 33, 65), "attn_bias_aug": bias(2, 1, 1, 65, seed=8)}
    ),
    "bias with -inf": qk_case(33, 65, 16, biases={"attn_bias": bias(2, 2, 33, 65, forbid=0.7)}),
    "bias with rows of -inf": qk_case(
        33,
        65,
        16,
        biases={
            "attn_bias": bias(2, 2, 33, 65).masked_fill(torch.arange(33)[:, None] % 3 == 0, -math.inf),
            "attn_bias_aug": bias(2, 2, 33, 65).masked_fill(torch.arange(33)[:, None] % 2 == 0, -math.inf),
        },
    ),
    "bool bias": qk_case(33, 65, 16, biases={"attn_bias": bias(2, 2, 33, 65) > 0}),
    "bool bias per view": qk_case(
        33, 65, 16, biases={"attn_bias": bias(33, 65) > 0, "attn_bias_aug": bias(2, 1, 1, 65, seed=8) > 0}
    ),
    "bias and ragged": qk_case(65, None, 16, biases={"attn_bias": bias(2, 65, 65)}, lengths=([65, 30], [40, 50])),
    "negative scale": qk_case(33, None, 16, options={"scale": -0.4}),
    "scale of zero": qk_case(33, None, 16, options={"scale": 0.0}, lengths=([33, 12], [20, 30])),
    "nearly equal views": qk_case(65, None, 32, closeness=1e-2),
    "large logits": qk_case(65, None, 32, gain=10.0),
    "large bias": qk_case(33, None, 16, biases={"attn_bias": 30.0 * bias(2, 33, 33)}),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, dtype: torch.dtype, device: str) -> None:
    case = FEATURES[name]
    if case.reduction == "mean":  # sums: means of many elements underflow in float16
        case = Case(**{**vars(case), "reduction": "sum"})
    check_case(case, dtype, device, device, slack=slack(dtype, device))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(reduction: str, dtype: torch.dtype, device: str) -> None:
    case = qk_case(17, 20, 8, lengths=([20, 3], [11, 20]), reduction=reduction)
    check_case(case, dtype, device, device, slack=slack(dtype, device))


def test_a_pair_without_upstream_gradient(dtype: torch.dtype, device: str) -> None:
    check_pairs_without_upstream(qk_case(7, 9, 8, heads=4, key_heads=2), dtype, device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
def test_strides_and_forms(layout: str, stacked: bool, dtype: torch.dtype, device: str) -> None:
    # a bias for each view and its stacked form, too: [2B, ...] in one tensor
    biases = {name: bias(2, 4, 20, 33, seed=seed) for seed, name in enumerate(("attn_bias", "attn_bias_aug"), start=1)}
    case = qk_case(20, 33, 24, heads=4, key_heads=2, lengths=([33, 9], [20, 31]), biases=biases, reduction="sum")
    check_strides_and_forms(case, layout, stacked, dtype, device)


def test_inputs_are_not_copied_for_their_strides(device: str) -> None:
    """The transposed view [B, H, L, D] of what a projection leaves costs no more memory than a contiguous one."""
    peaks = {}
    for layout in ("contiguous", "length_first", "slices"):
        case = Case(**{**vars(qk_case(64, None, 64, pairs=4, heads=8)), "layout": layout}).to(torch.float32).to(device)
        inputs = case.inputs()
        peaks[layout] = peak_memory(lambda inputs=inputs, case=case: case.call(inputs, device), device)
    assert peaks["length_first"] == peaks["contiguous"] == peaks["slices"]


@pytest.mark.parametrize("lowest", [-1e6, torch.finfo(torch.float32).min])
def test_rows_masked_by_large_finite_numbers(lowest: float, device: str) -> None:
    # an additive mask of finfo.min, as models make them: a row of nothing else is uniform, forward and backward
    masked = torch.zeros(2, 1, 9, 9)
    masked[:, :, ::3] = lowest
    case = qk_case(9, None, 8, biases={"attn_bias": torch.zeros(2, 1, 9, 9), "attn_bias_aug": masked}, reduction="sum")
    case = case.to(torch.float32).to(device)
    _, gradients = case.run(device)
    _, expected = case.run("reference")
    _, exact = case.to(torch.float64).run("reference")
    for i, (gradient, reference, oracle) in enumerate(zip(gradients, expected, exact, strict=True)):
        check_gradient(f"gradient of input {i}", gradient, reference, oracle)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bias_of_padded_keys_is_not_read(value: float, device: str) -> None:
    case = qk_case(9, None, 8, lengths=([9, 9], [7, 4]), biases={"attn_bias_aug": bias(2, 1, 9, 9)})
    case.biases["attn_bias"] = bias(2, 1, 9, 9, seed=8)
    padded = case.masks["attention_mask_aug"][:, None, None, :] == 0
    spoilt = Case(**{**vars(case), "biases": dict(case.biases)})
    spoilt.biases["attn_bias_aug"] = case.biases["attn_bias_aug"].masked_fill(padded, value)
    clean, dirty = (c.to(torch.float32).to(device).run(device) for c in (case, spoilt))
    assert torch.equal(clean[0], dirty[0])
    assert all(torch.equal(a, b) for a, b in zip(clean[1], dirty[1], strict=True))


@pytest.mark.parametrize("magnitude", [1e2, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_of_any_finite_size(magnitude: float, masked: bool, device: str) -> None:
    """At 5e9 and more the rounding error of a score alone overflows exp, unless every pass rounds it alike."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 2, 20, 32, generator=generator) * magnitude for _ in range(4)]
    inputs = [tensor.to(device).requires_grad_() for tensor in inputs]
    options = {"is_causal": True} if masked else {}
    loss = ear_ops.qk_attention_mse(*inputs, **options, backend=device)
    torch.testing.assert_close(loss, ear_ops.qk_attention_mse(*inputs, **options, backend="reference"))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, inputs))


def test_one_key_has_probability_one_at_any_scale(device: str) -> None:
    query = torch.full((1, 1, 1, 1), 4e4, dtype=torch.bfloat16, device=device)
    key = torch.full((1, 1, 1, 1), 1.1e6, dtype=torch.bfloat16, device=device)
    assert ear_ops.qk_attention_mse(query, key, query * 2, key, backend=device).item() == 0.0


def test_nan_stays_where_structure_lets_it(device: str) -> None:
    """A NaN key spoils the queries that may attend to it, and through them only the keys they may attend to."""
    case = qk_case(20, None, 8, pairs=1, heads=1, options={"window": 3}, reduction="sum").to(torch.float32)
    case.x[1][0, 0, 5] = math.nan
    value, gradients = case.to(device).run(device)
    _, expected = case.run("reference")
    assert value.isnan()
    for gradient, reference in zip(gradients, expected, strict=True):
        assert torch.equal(gradient.isnan().cpu(), reference.isnan())
    assert expected[1].isnan().any() and not expected[1].isnan().all()


@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
def test_gradcheck(stacked: bool, device: str) -> None:
    if device != "cpu":
        pytest.skip("gradcheck needs float64, which only the CPU kernels take")
    case = qk_case(4, None, 3, heads=4, key_heads=2, lengths=([4, 2], [3, 4]), reduction="none", stacked=stacked)
    options = {"is_causal": True, "window": 3, "scale": 0.8}
    case = Case(**{**vars(case), "options": options, "biases": {"attn_bias": bias(4, 4, 4)}})
    inputs = [t.requires_grad_() for t in case.inputs()]
    assert torch.autograd.gradcheck(lambda *tensors: case.call(tensors, device), inputs, fast_mode=False)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4))[:-1], ids=str)
def test_every_subset_of_gradients(needs: tuple[bool, ...], device: str) -> None:
    case = qk_case(20, 33, 8, lengths=([33, 9], [20, 31])).to(torch.float32).to(device)
    _, every = case.run(device)
    _, some = case.run(device, needs)
    for gradient, expected, needed in zip(some, every, needs, strict=True):
        assert gradient is None if not needed else torch.equal(gradient, expected)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=str)
def test_every_subset_of_gradients_of_one_tensor(needs: tuple[bool, bool], device: str) -> None:
    case = qk_case(20, 33, 8, lengths=([33, 9], [20, 31]), stacked=True).to(torch.float32).to(device)
    _, every = case.run(device)
    _, some = case.run(device, needs)
    for gradient, expected, needed in zip(some, every, needs, strict=True):
        assert gradient is None if not needed else torch.equal(gradient, expected)


def test_no_gradient_asked_for(device: str) -> None:
    case = qk_case(9).to(torch.float32).to(device)
    value, gradients = case.run(device, [False] * 4)
    assert gradients == [None] * 4
    assert torch.equal(value, case.run(device)[0])


MASKS = ("attention_mask", "attention_mask_aug")
LONG = {  # many tiles of keys
    "plain": qk_case(70, 4500, 16, pairs=1),
    "ragged": qk_case(70, 4500, 16, pairs=1, lengths=([4500], [4200])),
    "gaps": qk_case(
        33, 5000, 8, pairs=1, masks={name: torch.arange(5000)[None] % 3 != i for i, name in enumerate(MASKS)}
    ),
    "causal": qk_case(70, 4500, 16, pairs=1, options={"is_causal": True}),
    "window": qk_case(300, 4500, 16, pairs=1, options={"window": 4300}),
    "bias": qk_case(40, 4500, 8, pairs=1, biases={"attn_bias": bias(40, 4500, forbid=0.3)}),
    "large scores": qk_case(40, 4500, 64, pairs=1, gain=30.0, closeness=0.01),
}


@pytest.mark.parametrize("name", LONG)
def test_long_rows(name: str, dtype: torch.dtype, device: str) -> None:
    check_case(replace(LONG[name], reduction="sum"), dtype, device, device)


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (6, 3)], ids=str)
@pytest.mark.parametrize("name", ["plain", "ragged", "causal"])
def test_large_inputs_give_the_same_bits_on_any_number_of_threads(name: str, heads: tuple[int, int]) -> None:
    """From one key head for all threads, where blocks and keys are shared out, to more key heads than threads."""
    rest = {"ragged": {"lengths": ([600], [411])}, "causal": {"options": {"is_causal": True}}}.get(name, {})
    case = qk_case(300, 600, 16, pairs=1, heads=heads[0], key_heads=heads[1], **rest).to(torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(case.run("cpu"))
    finally:
        torch.set_num_threads(before)
    for value, gradients in results[1:]:
        assert torch.equal(value, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True))


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["plain", "masks and bias"])
def test_memory_grows_linearly(features: str, device: str) -> None:
    lengths = (512, 1024, 2048, 4096)

    def peak(length: int) -> int:
        rest = {}
        if features != "plain":
            rest = {"lengths": ([length], [length // 2]), "biases": {"attn_bias": torch.zeros(length)}}
        case = qk_case(length, None, 8, pairs=1, heads=2, **rest).to(torch.float32).to(device)
        return peak_memory(lambda: case.run(device), device)

    peaks = [peak(length) for length in lengths]
    steps = [b - a for a, b in itertools.pairwise(peaks)]
    assert all(1.7 < b / a < 2.3 for a, b in itertools.pairwise(steps)), f"not a line: {peaks} bytes at {lengths}"
    assert peaks[-1] < 2 * lengths[-1] ** 2, f"{peaks[-1]} bytes is in the order of one attention matrix"


def test_the_reference_would_fail_the_memory_test() -> None:
    peaks = []
    for length in (128, 256, 512):
        case = qk_case(length, None, 8, pairs=1, heads=2).to(torch.float32)
        peaks.append(peak_memory(lambda case=case: case.run("reference"), "cpu"))
    assert (peaks[2] - peaks[1]) / (peaks[1] - peaks[0]) > 3


def test_functional_and_module_agree(device: str) -> None:
    case = qk_case(9, None, 8, lengths=([9, 5], [7, 9]), options={"is_causal": True, "window": 4, "scale": 0.3})
    case = case.to(torch.float32).to(device)
    module = ear_ops.QKAttentionMSELoss(reduction="none", backend=device, **case.options)
    given = {**case.masks, "head_weights": torch.linspace(0, 1, case.inputs()[0].shape[1], device=device)}
    expected = ear_ops.qk_attention_mse(*case.inputs(), **given, **case.options, reduction="none", backend=device)
    assert torch.equal(module(*case.inputs(), **given), expected)
    assert "is_causal=True, window=4" in repr(module)
