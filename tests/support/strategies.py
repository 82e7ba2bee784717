"""hypothesis strategies for whole cases: shapes (0 and 1 included), masks, biases, structure, strides, dtypes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .cases import LAYOUTS, Case, attention_case, in_comparison, lengths_mask, pooled_case, qk_case

OPS = ("qk_attention_mse", "attention_mse", "pooled_distance", "qk_attention_kl", "qk_attention_js", "qk_scores_mse")
REDUCTIONS = ("mean", "padded_mean", "equations", "sum", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LENGTHS = st.one_of(st.integers(1, 20), st.sampled_from([0, 1, 2, 33, 65]))
_COUNTS = st.one_of(st.integers(1, 3), st.sampled_from([0, 1]))


@st.composite
def masks_of(draw: st.DrawFn, pairs: int, width: int, kind: str) -> tuple[Tensor, Tensor]:
    """The masks ``[B, width]`` of both views: full, ragged (right), left, scattered, one view empty, all empty."""
    if kind in ("ragged", "left"):
        lengths = st.lists(st.integers(0, width), min_size=pairs, max_size=pairs)
        masks = [lengths_mask(draw(lengths), width, "right" if kind == "ragged" else "left") for _ in range(2)]
    elif kind == "scattered":
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        masks = [torch.randint(0, 2, (pairs, width), generator=generator) for _ in range(2)]
    else:
        masks = [torch.ones(pairs, width, dtype=torch.int64) for _ in range(2)]
        for view in {"full": (), "one_view_empty": (1,), "empty": (0, 1)}[kind]:
            masks[view].zero_()
    if draw(st.booleans()):
        masks = [mask.bool() for mask in masks]
    return masks[0], masks[1]


MASK_KINDS = ("full", "ragged", "left", "scattered", "one_view_empty", "empty")


@st.composite
def cases(
    draw: st.DrawFn,
    op: str,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    reductions: tuple[str, ...] = REDUCTIONS,
    mask_kinds: tuple[str | None, ...] = (None, *MASK_KINDS),
    layouts: tuple[str, ...] = LAYOUTS,
    structured: bool = True,
    biased: bool = True,
    empty: bool = True,
    same_length: bool = False,
) -> Case:
    """A case of ``op``; ``structured``: causal and windows, too, ``biased``: biases, ``empty``: sizes of 0."""
    least = 0 if empty else 1
    lengths = _LENGTHS.filter(lambda n: n >= least)
    pairs = draw(_COUNTS.filter(lambda n: n >= least))
    queries = draw(lengths)
    keys = queries if same_length or draw(st.booleans()) else draw(lengths)
    common: dict[str, Any] = {
        "pairs": pairs,
        "seed": draw(st.integers(0, 10_000)),
        "reduction": draw(st.sampled_from(reductions)),
        "stacked": draw(st.booleans()),
        "layout": draw(st.sampled_from(layouts)),
    }
    kind = draw(st.sampled_from(mask_kinds))
    masks: dict[str, Tensor] = {}
    if kind is not None:
        width = queries if op == "pooled_distance" else keys
        masks["attention_mask"], masks["attention_mask_aug"] = draw(masks_of(pairs, width, kind))
    if op == "pooled_distance":
        features = draw(st.sampled_from([1, 3, 16, 40] + ([0] if empty else [])))
        return _finished(pooled_case(queries, features, masks=masks, **common), draw(st.sampled_from(dtypes)))

    if draw(st.booleans()):  # queries masked on their own, also where no key is
        own = draw(st.sampled_from([kind for kind in mask_kinds if kind is not None] or ["full"]))
        masks["query_mask"], masks["query_mask_aug"] = draw(masks_of(pairs, queries, own))
    key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = key_heads * group
    if op == "attention_mse":
        case = attention_case(queries, keys, heads=heads, masks=masks, **common)
        return _finished(case, draw(st.sampled_from(dtypes)))

    options: dict[str, Any] = {"scale": draw(st.sampled_from([None, 1.0, 0.3, 0.0, -0.5]))}
    if structured:
        options["is_causal"] = draw(st.booleans())
        options["window"] = draw(st.sampled_from([None, None, 1, 2, 7, 100]))
    biases = draw(_biases((pairs, heads, queries, keys))) if biased else {}
    dim = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 100])))
    case = qk_case(
        queries,
        keys,
        dim,
        heads=heads,
        key_heads=key_heads,
        masks=masks,
        options=options,
        biases=biases,
        **common,
    )
    directions = {"direction": draw(st.sampled_from(["forward", "reverse"]))} if op == "qk_attention_kl" else {}
    return _finished(in_comparison(case, op, **directions), draw(st.sampled_from(dtypes)))


@st.composite
def _biases(draw: st.DrawFn, shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """No bias, one for both views or one each; float (with and without -inf) or bool; any dimension broadcast."""
    names = draw(st.sampled_from([(), (), ("attn_bias",), ("attn_bias", "attn_bias_aug")]))
    biases = {}
    for name in names:
        kept = [draw(st.booleans()) for _ in shape]
        own = [n if keep else 1 for n, keep in zip(shape, kept, strict=True)]
        own = own[draw(st.sampled_from([0, 0, 1, 2])) :]
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        forbidden = torch.rand(own, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.9]))
        if draw(st.booleans()):
            biases[name] = ~forbidden
        else:
            values = torch.randn(own, generator=generator, dtype=torch.float64)
            biases[name] = values.masked_fill(forbidden, -torch.inf)
    return biases


def _finished(case: Case, dtype: torch.dtype) -> Case:
    """In its dtype; the values of an expanded case made equal along what is expanded, so that both agree."""
    if case.layout == "expanded":
        x, x_aug = (
            tuple(t[:, :1].expand(t.shape).contiguous() for t in view) if case.x[0].shape[1] else view
            for view in (case.x, case.x_aug)
        )
        case = Case(case.op, x, x_aug, case.masks, case.biases, case.options, case.reduction, case.stacked, case.layout)
    return case.to(dtype)
