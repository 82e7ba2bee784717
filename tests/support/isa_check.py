"""Run by test_backend.py in a process of its own, because the instruction set is chosen once, at the first call.

Prints the instruction set that runs; fails where a handful of odd shapes breaks the error rule in any dtype.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import torch
from support.cases import attention_case, in_comparison, pooled_case, qk_case
from support.rules import check_case, peak_error
from support.strategies import DTYPES

from ear_ops.functional import qk_word_attention

CASES = [
    qk_case(1, 1, 1),
    qk_case(2, 17, 3, heads=4, key_heads=2),
    qk_case(65, 33, 65, lengths=([33, 9], [20, 31])),
    qk_case(17, 300, 31, options={"is_causal": True, "window": 270}, lengths=([300, 20], [280, 290])),
    qk_case(20, 4300, 16, pairs=1, lengths=([4300], [4200])),
    qk_case(70, None, 16, biases={"attn_bias": torch.arange(70.0) / 35 - 1}, lengths=([70, 9], [60, 64]), side="left"),
    attention_case(5, 33, lengths=([33, 9], [20, 31])),
    attention_case(3, 47),
    qk_case(70, 33, 9, heads=4, key_heads=2, lengths=([33, 9], [20, 31]), options={"heads": "mean"}),
    qk_case(64, 96, 64),  # rows that are operands where they lie
    qk_case(64, 96, 64, layout="slices"),  # and rows that begin at any element
    pooled_case(9, 37, lengths=([9, 4, 0], [7, 9, 2])),
    pooled_case(33, 16),
]


# Not the long rows: a plain loop sums products of so many equal sizes less exactly than the rule allows.
COMPARISONS = [
    in_comparison(case, op)
    for case in (*CASES[1:4], CASES[5])
    for op in ("qk_attention_kl", "qk_attention_js", "qk_scores_mse")
]


def bits_of_every_half() -> None:
    """Every bfloat16 and float16 number through a kernel that loads and stores it: the gradient of (a - 0)^2 / 2."""
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
        attn = values.reshape(1, 1, 256, 256)  # rows of whole vectors
        (found,) = torch.ops.ear_ops.attention_mse_backward(
            torch.full((1, 1), 0.5), attn, torch.zeros_like(attn), None, None, [True, False]
        )
        number = ~attn.isnan()
        assert torch.equal(~found.isnan(), number)
        assert torch.equal(found[number], attn[number]), dtype
        single = attn.reshape(1, 1, -1, 1)  # rows that are less than a vector
        (alone,) = torch.ops.ear_ops.attention_mse_backward(
            torch.full((1, 1), 0.5), single, torch.zeros_like(single), None, None, [True, False]
        )
        assert torch.equal(alone.flatten()[number.flatten()], found[number])
        # storing: numbers halfway between two halves, just above and just below, into the range of denormals and over
        wide = attn[number].float()
        step = torch.cat([wide * (1 + f) for f in (2**-9, 2**-12, 0.75 * 2**-8, -(2**-10))])
        step = torch.cat([step, wide * 2**-3, wide * 2.0])
        step = step[torch.isfinite(step) & (step / 2 * 2 == step)]
        ones = torch.ones(step.numel(), 1, 1, 17, dtype=dtype)  # a whole vector and one more
        upstream = (step / 2).reshape(-1, 1)  # of one pair each: its gradient is 2 * upstream * (1 - 0)
        (stored,) = torch.ops.ear_ops.attention_mse_backward(
            upstream, ones, torch.zeros_like(ones), None, None, [True, False]
        )
        assert torch.equal(stored[:, 0, 0], step.to(dtype)[:, None].expand(-1, 17)), dtype


def attention_between_words() -> None:
    """Each comparison against the reference in float64, in more than one block of queries and tile of keys."""
    pieces = torch.tensor([[1, 3, 2, 1, 70], [2, 1, 69, 4, 1]]).repeat(1, 4)
    ids = torch.stack([torch.arange(20).repeat_interleave(row) for row in pieces])
    inputs = [torch.randn(2, 2, ids.shape[1], 33, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    options = {"word_ids": ids, "words": 20, "is_causal": True, "window": 280}
    for divergence in ("mse", "js"):
        for dtype, most in zip(DTYPES, (1e-5, 2e-2, 5e-3, 1e-12), strict=True):
            rounded, results = [tensor.to(dtype) for tensor in inputs], []
            for backend, wanted in (("cpu", dtype), ("reference", torch.float64)):
                tensors = [tensor.to(wanted).requires_grad_() for tensor in rounded]
                value = qk_word_attention(*tensors, **options, divergence=divergence, backend=backend)
                results.append([value.detach(), *torch.autograd.grad(value, tensors)])
            for actual, expected in zip(*results, strict=True):
                assert peak_error(actual, expected) <= most, (divergence, dtype, peak_error(actual, expected))


def main() -> None:
    name = torch.ops.ear_ops.cpu_isa()
    for case in CASES + COMPARISONS:
        for dtype in DTYPES:
            for stacked in (False, True):
                check_case(replace(case, reduction="sum", stacked=stacked), dtype, "cpu")
    bits_of_every_half()
    attention_between_words()
    print(name)


if __name__ == "__main__":
    main()
