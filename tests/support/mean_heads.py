"""Cases of averages over heads, and how they are run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from support.cases import LOSSES, Case, in_form, other_heads
from support.strategies import cases
from torch import Tensor

FORM_NAMES = {"mse": "mse", "forward": "kl", "reverse": "reverse_kl", "js": "js"}  # of operators
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ragged": {"lengths": ([33, 20], [33, 20])},
    "peaked": {"gain": 6.0},
    "nearly equal": {"closeness": 1e-4, "heads_aug": None},
}

Result = tuple[Tensor, list[Tensor]]


def run(case: Case, backend: str | None = "reference", upstream: Tensor | None = None, **arguments: Any) -> Result:
    inputs = [tensor.requires_grad_() for tensor in case.inputs()]
    value = LOSSES[case.op](*inputs, **case.arguments(), **arguments, backend=backend)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return value.detach(), list(torch.autograd.grad(value, inputs, upstream))


def written_out(case: Case, upstream: Tensor | None = None, weights: Tensor | None = None) -> Result:
    """Value and gradients by plain PyTorch, in the dtype of the case."""
    return replace(case, options={**case.options, "head_weights": weights}).run_plain(upstream)


def check_close(found: Result, expected: Result, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=atol)
    for gradient, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, other, rtol=rtol, atol=atol)


def drawn(data: st.DataObject, form: str, same_keys: bool | None = None, **limits: Any) -> Case:
    """A case in which heads and head dimensions differ, or do not; KL is finite where both have the same keys."""
    case = in_form(data.draw(cases("qk_attention_mse", **limits)), form)
    if data.draw(st.booleans()):
        key_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
        case = other_heads(case, key_heads * group, key_heads, data.draw(st.sampled_from([1, 5, 16, 40])))
        case = replace(case, biases={n: b[..., :1, :, :] if b.dim() > 2 else b for n, b in case.biases.items()})
        if case.layout == "expanded":
            case = replace(case, layout="contiguous")
    if form in ("forward", "reverse") if same_keys is None else same_keys:
        masks = {n: case.masks[n.removesuffix("_aug")] if n.startswith("att") else m for n, m in case.masks.items()}
        case = replace(case, masks=masks, biases={n: b for n, b in case.biases.items() if n == "attn_bias"})
    return case
