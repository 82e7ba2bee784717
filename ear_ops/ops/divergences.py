"""What two rows of attention are compared by: Kullback-Leibler and Jensen-Shannon divergences, entry by entry.

P and T are the probabilities of the first view and of the second, which is the target, and ``x = log T - log P``. A
divergence is the sum over keys of entries v(P, T). Each entry is at least 0, and exactly 0 where P = T, so that the
divergence of nearly equal views keeps its digits. Sums of ``T x`` and differences of log-sum-exps would lose them.

With ``f = P dv/dP`` the gradient of the scores is ``dS = f - P sum f``, likewise of the second view:

=============  ===========================================  ===========  =============
divergence     v                                            f            f of T
=============  ===========================================  ===========  =============
KL(T || P)     T (exp(-x) - 1 + x) = P - T + T x            P - T        T x
KL(P || T)     the same with the views exchanged
JS             (KL(T || M) + KL(P || M)) / 2, M the mean    P u / 2      T u_aug / 2
=============  ===========================================  ===========  =============

with ``u = log P - log M`` and ``u_aug = log T - log M``. P - T sums to 0 over a row, so it changes no divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ear_ops.errors import EarOpsError
from ear_ops.ops.probabilities import fill_masked


class InfiniteDivergenceError(EarOpsError, ValueError):
    """KL is infinite; ``reason`` says where, and the message also says what to do about it in a function."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"attention_mask: {reason}; use the Jensen-Shannon divergence (qk_attention_js, attention_js) or "
            f"support='shared'"
        )
        self.reason = reason


class Divergence(NamedTuple):
    """A divergence of two rows, by functions of P, T and x, all ``[..., L, S]``.

    ``x`` is +inf at a key that only the second view has, -inf at a key that only the first has, and 0 at a key that
    neither has.
    """

    entries: Callable[[Tensor, Tensor, Tensor], Tensor]  # v
    slopes: Callable[[Tensor, Tensor, Tensor], Tensor]  # P dv/dP
    slopes_aug: Callable[[Tensor, Tensor, Tensor], Tensor]  # T dv/dT

    def exchanged(self) -> Divergence:
        """The divergence with the views exchanged."""
        return Divergence(
            lambda p, t, x: self.entries(t, p, -x),
            lambda p, t, x: self.slopes_aug(t, p, -x),
            lambda p, t, x: self.slopes(t, p, -x),
        )


_FAR = 1e4  # exp(-1e4) is 0 in every dtype, so a finite x beyond this changes nothing
_NEAR = 2.0**-5  # below, exp(-x) - 1 + x is a series: the sum of its terms cancels


def _relative_entropy(p: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """``T (exp(-x) - 1 + x)``; +inf at a key that only T has, P at a key that only P has."""
    finite = x.clamp(min=-_FAR)
    highest = 8 if x.dtype == torch.float64 else 4  # the power at which the series ends
    coefficients = [(-1.0) ** power / math.factorial(power) for power in range(highest, 1, -1)]
    series = (finite * coefficients[0]).add_(coefficients[1])
    for coefficient in coefficients[2:]:
        series.mul_(finite).add_(coefficient)
    series.mul_(finite).mul_(finite)
    factors = torch.where(finite.abs() < _NEAR, series, finite.neg().expm1_().add_(finite))
    far = torch.addcmul(p - t, t, finite)  # where T underflows, exp(-x) overflows
    entries = torch.where(finite < -1.0, far, factors.mul_(t))
    return entries.clamp_(min=0.0).masked_fill_(x == math.inf, math.inf)


def _with_target(p: Tensor, t: Tensor) -> Tensor:
    """P without the rows in which T has no key: KL(T || P) is 0 there."""
    return p.masked_fill((t == 0).all(-1, keepdim=True), 0.0)


def _log_to_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """``log P - log M`` and ``log T - log M``, M = (P + T) / 2."""
    x = x.clamp(-_FAR, _FAR)
    distance = torch.where(x < 0, -x, x)  # whose derivative at 0 is not 0, as that of abs: second derivatives need it
    larger = -torch.log1p(torch.expm1(-distance) / 2.0)  # of the view with the larger probability: in [0, log 2]
    smaller = larger - distance
    return torch.where(x < 0, larger, smaller), torch.where(x < 0, smaller, larger)


def _js_entries(p: Tensor, t: Tensor, x: Tensor) -> Tensor:
    mean = (p + t) / 2.0
    u, u_aug = _log_to_mean(x)
    return (_relative_entropy(mean, p, u) + _relative_entropy(mean, t, u_aug)) / 2.0


_KL = Divergence(
    entries=lambda p, t, x: _relative_entropy(_with_target(p, t), t, x),
    slopes=lambda p, t, x: _with_target(p, t) - t,
    slopes_aug=lambda p, t, x: t * x.clamp(min=-_FAR),
)
DIVERGENCES = {
    "kl": _KL,
    "reverse_kl": _KL.exchanged(),
    "js": Divergence(
        entries=_js_entries,
        slopes=lambda p, t, x: p * _log_to_mean(x)[0] / 2.0,
        slopes_aug=lambda p, t, x: t * _log_to_mean(x)[1] / 2.0,
    ),
}


def divergence_of_scores(
    name: str, scores: Tensor, scores_aug: Tensor, allowed: Tensor | None, allowed_aug: Tensor | None
) -> Tensor:
    """``[B, H]`` sums of the divergence called ``name`` between the softmaxes of two sets of scores ``[B, H, L, S]``.

    The masks are those of :func:`ear_ops.ops.probabilities.attention_scores`.
    """
    return apply_function(_DivergenceOfScores, name, scores, scores_aug, allowed, allowed_aug)


def divergence_of_maps(name: str, attn: Tensor, attn_aug: Tensor) -> Tensor:
    """``[B, H]`` sums of the divergence called ``name`` between two sets of probabilities ``[B, H, L, S]``.

    A probability of exactly 0 gets the gradient 0.
    """
    return apply_function(_DivergenceOfMaps, name, attn, attn_aug)


def apply_function(function: type[Function], name: str, *views: Tensor | None) -> Tensor:
    needs_gradient = torch.is_grad_enabled() and any(view is not None and view.requires_grad for view in views)
    if torch.compiler.is_compiling() and not needs_gradient:  # torch 2.13 cannot trace apply() then
        sums: Tensor = function.forward(name, *views)
    else:
        sums = function.apply(name, *views)
    return sums


class _DivergenceOfScores(Function):
    """Its gradients are those of the table: autograd through the entries would subtract numbers that nearly cancel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *views: Any) -> Tensor:
        return DIVERGENCES[name].entries(*_rows_of_scores(*views)).sum((-2, -1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        scores, scores_aug, allowed, allowed_aug = ctx.saved_tensors
        p, t, x = _rows_of_scores(scores, scores_aug, allowed, allowed_aug)
        divergence, upstream = DIVERGENCES[ctx.name], grad_sums[..., None, None]
        x = finite_where_left_out(x, upstream)
        views = (p, allowed, divergence.slopes), (t, allowed_aug, divergence.slopes_aug)
        gradients: list[Tensor | None] = [None, None]
        for view, (attn, mask, slopes) in enumerate(views):
            if ctx.needs_input_grad[1 + view]:
                slope = slopes(p, t, x)
                gradient = upstream * torch.addcmul(slope, attn, slope.sum(-1, keepdim=True), value=-1.0)
                gradients[view] = gradient if mask is None else gradient.masked_fill(~mask, 0.0)
        return None, *gradients, None, None


class _DivergenceOfMaps(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, attn: Tensor, attn_aug: Tensor) -> Tensor:
        return DIVERGENCES[name].entries(attn, attn_aug, _log_ratio(attn, attn_aug)).sum((-2, -1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        p, t = ctx.saved_tensors
        divergence, upstream = DIVERGENCES[ctx.name], grad_sums[..., None, None]
        x = finite_where_left_out(_log_ratio(p, t), upstream)
        gradients: list[Tensor | None] = [None, None]
        for view, (attn, slopes) in enumerate(((p, divergence.slopes), (t, divergence.slopes_aug))):
            if ctx.needs_input_grad[1 + view]:
                empty = attn == 0
                gradients[view] = upstream * slopes(p, t, x).masked_fill(empty, 0.0) / attn.masked_fill(empty, 1.0)
        return None, *gradients


def finite_where_left_out(x: Tensor, upstream: Tensor) -> Tensor:
    """``x`` without infinities in heads whose sum does not enter the loss: 0 times infinity would be NaN."""
    return x.masked_fill(torch.isinf(x) & (upstream == 0), 0.0)


def _rows_of_scores(
    scores: Tensor, scores_aug: Tensor, allowed: Tensor | None, allowed_aug: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """P, T and x of two sets of scores: x comes from them, so it is finite where P or T underflows."""
    p, shifted, log_sum = softmax_of(scores, allowed)
    t, shifted_aug, log_sum_aug = softmax_of(scores_aug, allowed_aug)
    x = (shifted_aug - shifted).sub_(log_sum_aug - log_sum)
    if allowed is not None and allowed_aug is not None:
        x = x.masked_fill(~allowed, math.inf).masked_fill(~allowed_aug, -math.inf)
        x = x.masked_fill(~(allowed | allowed_aug), 0.0)
    return p, t, x


def softmax_of(scores: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax of the allowed scores, all scores minus the largest allowed one of their row, and log sums.

    The logarithm of the softmax is the second minus the third, which is that of the sum of the exponentials of the
    second. A row of very large scores would lose it in a sum with the largest one.
    """
    filled = scores if allowed is None else fill_masked(scores, allowed)
    attn = torch.softmax(filled, -1)
    if not attn.shape[-1]:
        return attn, scores, attn.sum(-1, keepdim=True)
    shifted, log_sum = scores - filled.amax(-1, keepdim=True), -torch.log(attn.amax(-1, keepdim=True))
    return attn if allowed is None else attn.masked_fill(~allowed, 0.0), shifted, log_sum


def _log_ratio(p: Tensor, t: Tensor) -> Tensor:
    """``log T - log P``, from T - P where they are nearly equal; ±inf where one of them is 0, 0 where both are."""
    p_filled, t_filled = p.masked_fill(p == 0, 1.0), t.masked_fill(t == 0, 1.0)
    near = (t - p).abs() < p / 2.0
    change = (t - p).masked_fill(~near, 0.0) / p_filled
    x = torch.where(near, torch.log1p(change), torch.log(t_filled) - torch.log(p_filled))
    return x.masked_fill(p == 0, math.inf).masked_fill(t == 0, -math.inf).masked_fill((p == 0) & (t == 0), 0.0)
