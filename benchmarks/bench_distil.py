"""Measure what attention distillation of all layers adds to a training step of a student.

    ear-ops bench distil --out FILE.json

Student and teacher are BERTs of the shape preset `distil`: 12 layers with 12 heads of 32 dimensions, on 8 rows of 128
tokens without padding. A step is forward, backward, clipping and fused AdamW. The ways to make it are:

- `student alone`: the cross-entropy of the student.
- `with teacher`: the same, and a forward of the teacher. Every kind of distillation needs it.
- `fused`: the mean squared error of the attention of all layers besides, with this package.
- `output_attentions`: the same loss from the attention matrices of both models, under eager attention.

All ways train a copy of the same student on the same batch. They are warm before they are timed, and take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import chosen, measurer
from presets import PRESETS, Preset

import ear_ops
from ear_ops.memory import keep_freed_memory

DTYPES = ("float32", "bfloat16")
BASE = "student alone"


def bert(preset: Preset, seed: int, **sizes: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    width = preset.heads * preset.dim
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": preset.heads}
    # Dropout of the attention would be added to the maps of `output_attentions`, so that the losses would differ.
    config = BertConfig(num_hidden_layers=preset.layers, attention_probs_dropout_prob=0.0, **shape, **sizes)
    return BertForSequenceClassification(config)


def steps(preset: Preset, dtype: str, device: str = "cpu", **sizes: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Return a training step for each way. A step returns its loss.

    Args:
        preset: batch, length, layers and heads of both models.
        dtype: of the forward, which runs under autocast where it is not float32.
        sizes: other sizes of the models, as in `transformers.BertConfig`.
    """
    student, teacher = bert(preset, 0, **sizes).to(device), bert(preset, 1, **sizes).to(device).eval()
    ids = torch.randint(
        student.config.vocab_size, (preset.pairs, preset.length), generator=torch.Generator().manual_seed(0)
    )
    batch = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    batch["labels"] = torch.zeros(preset.pairs, dtype=torch.long, device=device)
    made = {}

    def make(name: str, attn: str, loss_of: Callable[[Any, Any], Any], distils: bool) -> None:
        trained, taught = copy.deepcopy(student).train(), copy.deepcopy(teacher)
        for model in (trained, taught):
            model.set_attn_implementation(attn)
        attached = None
        if distils:
            attached = ear_ops.attach(trained, [ear_ops.AttentionPull("all", 1.0)], teacher=taught)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-5, fused=True)

        def step() -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = loss_of(trained, taught)
                if attached is not None:
                    loss = loss + attached.loss()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            return loss.detach()

        made[name] = step

    def with_teacher(trained: Any, taught: Any) -> torch.Tensor:
        with torch.no_grad():
            taught(**batch)
        return trained(**batch).loss

    def from_maps(trained: Any, taught: Any) -> torch.Tensor:
        with torch.no_grad():
            target = taught(**batch, output_attentions=True).attentions
        out = trained(**batch, output_attentions=True)
        return out.loss + sum(F.mse_loss(*maps) for maps in zip(out.attentions, target, strict=True))

    make(BASE, "sdpa", lambda trained, taught: trained(**batch).loss, False)
    make("with teacher", "sdpa", with_teacher, False)
    make("fused", "sdpa", with_teacher, True)
    make("output_attentions", "eager", from_maps, False)
    return made


def rows_of(times: Mapping[str, dict], memory: Mapping[str, int], **shared: str) -> list[dict]:
    """Return a row for each way, with its time over that of the student alone."""
    return [
        {"op": "distillation step", **shared, "provider": name, **measured, "extra_bytes": memory[name]}
        | {"this_over_alone": measured["median_ms"] / times[BASE]["median_ms"]}
        for name, measured in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    dtypes = chosen(options.dtypes, DTYPES, "dtypes")
    using = measurer(options.device)
    if options.device == "cpu":
        keep_freed_memory()
    how = {} if options.device == "cpu" else {"capture": False}  # a step cannot be captured as a CUDA graph
    rows = []
    for dtype in dtypes:
        calls = steps(PRESETS["distil"], dtype, options.device)
        times = using.interleaved(calls, options.repeats, **how)
        memory = {name: using.peak_memory(call) for name, call in calls.items()}
        new = rows_of(times, memory, preset="distil", dtype=dtype)
        rows += new
        for row in new:
            print(
                f"{dtype:<9} {row['provider']:<18} {row['median_ms']:9.1f} ms "
                f"[{row['p20_ms']:.1f}, {row['p80_ms']:.1f}]  {row['this_over_alone']:5.2f} of the {BASE}  "
                f"{row['extra_bytes'] / 2**20:8.0f} MiB",
                flush=True,
            )
        if options.out:
            options.out.write_text(json.dumps({"facts": using.facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
