"""When a result is right: the error rule of every kernel, and the measures that elementwise tolerances miss.

The oracle is the float64 reference on the same (already rounded) inputs, the yardstick what plain PyTorch loses in the
dtype under test. A result passes when its error is at most ``VALUE_FACTOR`` (gradients: ``GRADIENT_FACTOR``) times the
yardstick's plus 8 eps; float64 within 1e-12.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .cases import Case

VALUE_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def peak_error(actual: Tensor, oracle: Tensor) -> float:
    """max |error| / max |oracle|; where the oracle is nothing but zeros, 0 for zeros and infinity for anything else."""
    if oracle.numel() == 0:
        return 0.0
    error = float((actual.double() - oracle).abs().max())
    largest = float(oracle.abs().max())
    return error / largest if largest > 0 else (0.0 if error == 0 else math.inf)


def l2_error(actual: Tensor, oracle: Tensor) -> float:
    """|error| / |oracle| in the Euclidean norm."""
    return float((actual.double() - oracle).norm() / oracle.norm())


def cosine_gap(actual: Tensor, oracle: Tensor) -> float:
    """1 - cos of the angle between them, from normalised differences so that it resolves 1e-16; 1 for all zeros."""
    a, b = actual.double().flatten(), oracle.flatten()
    return float(0.5 * (a / a.norm() - b / b.norm()).square().sum()) if a.any() else 1.0


def signed_bias(actual: Tensor, oracle: Tensor) -> float:
    """By what fraction the whole is too long (or, negative, too short): what rounding downwards does."""
    error = actual.double() - oracle
    return float((error * oracle).sum() / oracle.square().sum())


def check_value(actual: Tensor, plain: Tensor, oracle: Tensor, *, slack: float = 1.0) -> None:
    """The error rule for a value in the dtype that ``plain`` was computed in."""
    assert actual.shape == oracle.shape
    _check_peak("value", actual, plain, oracle, VALUE_FACTOR, plain.dtype, slack)


def check_gradient(name: str, actual: Tensor, plain: Tensor, oracle: Tensor, *, slack: float = 1.0) -> None:
    """The error rule for a gradient, and relative L2, cosine and signed bias."""
    dtype = plain.dtype
    assert actual.shape == oracle.shape and actual.dtype == dtype, f"{name}: {actual.shape} {actual.dtype}"
    _check_peak(name, actual, plain, oracle, GRADIENT_FACTOR, dtype, slack)
    if dtype == torch.float64 or oracle.numel() == 0 or not oracle.any():
        return
    eps = torch.finfo(dtype).eps
    # How exactly plain PyTorch sums in float32 is a matter of the processor: eight eps, as for the peak.
    floor = max(2 * eps, 8 * torch.finfo(torch.float32).eps)
    loss, bound = l2_error(actual, oracle), GRADIENT_FACTOR * l2_error(plain, oracle) + floor
    assert loss <= slack * bound, f"{name}: relative L2 error {loss:.2e}, allowed {slack * bound:.2e}"
    gap, bound = (
        cosine_gap(actual, oracle),
        GRADIENT_FACTOR**2 * cosine_gap(plain, oracle) + max(8 * eps**2, floor**2 / 2),
    )
    assert gap <= slack**2 * bound, f"{name}: 1 - cosine {gap:.2e}, allowed {slack**2 * bound:.2e}"
    # Unbiased errors leave some bias by chance. It is judged by rows, since a wrong score is wrong for all features of
    # a row: where few rows hold most of the gradient, it is more than loss / sqrt(count). Float32 sums add a few eps.
    rows = ((actual.double() - oracle) * oracle).sum(dim=-1)
    chance = 4 * float(rows.norm() / oracle.square().sum()) + 0.1 * eps + 8 * torch.finfo(torch.float32).eps
    bias, bound = abs(signed_bias(actual, oracle)), GRADIENT_FACTOR * abs(signed_bias(plain, oracle)) + chance
    assert bias <= slack * bound, f"{name}: signed bias {bias:.2e}, allowed {slack * bound:.2e}"


def _check_peak(
    name: str, actual: Tensor, plain: Tensor, oracle: Tensor, factor: float, dtype: torch.dtype, slack: float
) -> None:
    error = peak_error(actual, oracle)
    if dtype == torch.float64:
        assert error <= 1e-12 * slack, f"{name}: error {error:.2e} in float64, allowed {1e-12 * slack:.0e}"
        return
    yardstick = peak_error(plain, oracle)
    assert math.isfinite(yardstick), f"{name}: plain PyTorch itself gives {plain}, so it measures nothing"
    bound = slack * (factor * yardstick + 8 * torch.finfo(dtype).eps)
    assert error <= bound, f"{name}: error {error:.2e} in {dtype}, plain {yardstick:.2e}, allowed {bound:.2e}"


def check_case(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    *,
    slack: float = 1.0,
    value_bound: float | None = None,
    negligible: float = 0.0,
) -> None:
    """Value and all gradients of a case under the error rule, upstream gradients random.

    ``slack`` multiplies every bound: for drawn cases, where the yardstick may be right by luck. ``value_bound`` is one
    more for the value, relative to the largest: for kernels that sum 16-bit inputs in float32. Exact results of no more
    than ``negligible`` may be nothing but rounding, which is held to ten times that.
    """
    case = case.to(dtype).to(device)
    upstream = case.upstream()
    value, gradients = case.run(backend, upstream=upstream)
    plain_value, plain_gradients = case.run_plain(upstream)
    exact = case.to(torch.float64)
    oracle, oracle_gradients = exact.run("reference", upstream=upstream.double())
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if not _is_negligible("value", value, oracle, negligible):
        check_value(value, plain_value, oracle, slack=slack)
        error = peak_error(value, oracle)
        assert value_bound is None or error <= value_bound, f"value: error {error:.2e}, allowed {value_bound:.2e}"
    names = [f"gradient of input {i}" for i in range(len(gradients))]
    for name, actual, plain, expected in zip(names, gradients, plain_gradients, oracle_gradients, strict=True):
        assert actual is not None and plain is not None and expected is not None
        if not _is_negligible(name, actual, expected, negligible):
            check_gradient(name, actual, plain, expected, slack=slack)


def _is_negligible(name: str, actual: Tensor, oracle: Tensor, negligible: float) -> bool:
    """Whether the exact result is negligible; ``actual`` then has to be, too."""
    if not negligible or oracle.numel() == 0 or float(oracle.abs().max()) > negligible:
        return False
    largest = float(actual.abs().max())
    assert largest <= 10 * negligible, f"{name}: {largest:.2e} where nothing but rounding is expected"
    return True


def check_pairs_without_upstream(case: Case, dtype: torch.dtype, device: str) -> None:
    """A pair whose loss nobody uses has gradients of zeros, and the others' do not change."""
    case = replace(case, reduction="none").to(dtype).to(device)
    upstream = case.upstream()
    _, expected = case.run(device, upstream=upstream)
    upstream[0] = 0
    _, gradients = case.run(device, upstream=upstream)
    for gradient, unchanged in zip(gradients, expected, strict=True):
        assert gradient is not None and unchanged is not None
        assert unchanged[0].any() and not gradient[0].any()
        assert torch.equal(gradient[1:], unchanged[1:])


def check_strides_and_forms(case: Case, layout: str, stacked: bool, dtype: torch.dtype, device: str) -> None:
    """Strides, and both views in one tensor, change where numbers lie, not one bit of the results."""
    if layout == "expanded":
        same = [tuple(t[:, :1].expand(t.shape).contiguous() for t in view) for view in (case.x, case.x_aug)]
        case = replace(case, x=same[0], x_aug=same[1])
    case = replace(case, layout=layout, stacked=stacked)
    check_case(case, dtype, device, device)
    value, gradients = case.to(dtype).to(device).run(device)
    expected, expected_gradients = replace(case, layout="contiguous", stacked=False).to(dtype).to(device).run(device)
    if stacked:
        inputs = len(case.x)
        expected_gradients = [torch.cat(expected_gradients[i::inputs]) for i in range(inputs)]
    assert torch.equal(value, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient, expected_gradient)
