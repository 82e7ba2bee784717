"""Measure what attaching costs: the time of an unused recorder, and the memory of an attention pull.

    ear-ops bench capture time --out benchmarks/results/capture/NAME.json
    ear-ops bench capture memory --out benchmarks/results/capture/NAME.json    # and NAME.png

The model is BERT-base with random weights.

`time` compares training forwards in turns: of the model alone, and with an attention pull on 1 and on all 12 layers,
whose loss nobody asks for. The work of the recorder depends on the number of layers, not on the size of a tensor. It
is therefore also measured on a model with 12 tiny layers, where the noise of the matrix products does not hide it.

`memory` measures the peak of a training step (forward and backward) at L = 512. It compares the pull on 1 and on 12
layers with the same loss from `output_attentions` under eager attention.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measuring import facts, peak_memory
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import ear_ops
from ear_ops.memory import keep_freed_memory
from ear_ops.recipes.drawing import COLOURS, PAGE_WIDTH, figure

TINY_REPEATS = 60
TINY = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 12}


def bert(implementation: str, layers: int, **sizes: int) -> Any:
    torch.manual_seed(0)
    # With attention dropout, SDPA holds the whole map on a CPU and is no faster than eager. It does not on a GPU.
    config = BertConfig(num_hidden_layers=layers, num_labels=3, attention_probs_dropout_prob=0.0, **sizes)
    return BertForSequenceClassification._from_config(config, attn_implementation=implementation).train()


def batch_of(rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1000, 30000, (rows, length), generator=generator)
    real = torch.randint(length * 3 // 4, length + 1, (rows,), generator=generator)
    return {"input_ids": input_ids, "attention_mask": (torch.arange(length) < real[:, None]).long()}


def unused_recorder(model: Any, batch: dict[str, Tensor], repeats: int) -> list[dict[str, Any]]:
    """Return the median time of a forward without a recorder, and with one whose loss nobody asks for.

    The ways take turns. The time is processor time, because other work on the machine changes it less. A regulariser is
    attached for one forward only: while it is attached, every other model does one more lookup for each layer.
    """
    ways = {"model alone": None, "attached to 1 layer": "middle", "attached to all layers": "all"}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, chosen in ways.items():
            with ear_ops.attach(model, [ear_ops.AttentionPull(chosen)]) if chosen else contextlib.nullcontext():
                model(**batch)  # the first forward after attaching is slower
                start = time.process_time()
                model(**batch)
                times[way].append(1e3 * (time.process_time() - start))
    medians = {way: statistics.median(samples) for way, samples in times.items()}
    alone = medians["model alone"]
    return [{"way": way, "median_ms": median, "over_alone": median / alone - 1} for way, median in medians.items()]


def step_memory(layers: int, pairs: int, length: int) -> list[dict[str, Any]]:
    """Return the peak memory of forward and backward for each way. The loss is cross-entropy and attention pull."""
    batch = batch_of(2 * pairs, length)
    labels = torch.zeros(pairs, dtype=torch.long)
    mask = batch["attention_mask"]

    def step(model: Any, ear: ear_ops.attachment.Attachment | None, chosen: list[int]) -> None:
        if ear is not None:
            loss = ear_ops.robust_cross_entropy(model(**batch).logits, labels) + ear.loss()
        else:
            out = model(**batch, output_attentions=bool(chosen))
            loss = ear_ops.robust_cross_entropy(out.logits, labels)
            for layer in chosen:
                loss = loss + 0.1 * ear_ops.attention_mse(
                    out.attentions[layer - 1], attention_mask=mask, backend="reference"
                )
        loss.backward()

    every, middle = list(range(1, layers + 1)), [layers // 2]
    ways: tuple[tuple[str, str, list[int], bool], ...] = (
        ("no regulariser, sdpa", "sdpa", [], False),
        ("attention pull on 1 layer", "sdpa", middle, True),
        ("attention pull on all layers", "sdpa", every, True),
        ("output_attentions, 1 layer", "eager", middle, False),
        ("output_attentions, all layers", "eager", every, False),
    )
    rows = []
    for way, implementation, chosen, fused in ways:
        model = bert(implementation, layers)
        ear = ear_ops.attach(model, [ear_ops.AttentionPull(chosen)]) if fused else None
        step(model, ear, chosen)  # from now on the parameters have gradients
        rows.append({"way": way, "peak_bytes": peak_memory(lambda m=model, e=ear, c=chosen: step(m, e, c))})  # type: ignore[misc]
        print(f"{way:32} {rows[-1]['peak_bytes'] / 2**20:8.0f} MiB", flush=True)
    return rows


def plot(rows: list[dict[str, Any]], length: int, path: Path) -> None:
    with figure(path, PAGE_WIDTH, 2.2) as drawn:
        axes = drawn.subplots()
        bars = axes.barh([row["way"] for row in rows], [row["peak_bytes"] / 2**20 for row in rows])
        for bar, row in zip(bars, rows, strict=True):
            bar.set_color(COLOURS[1] if row["way"].startswith("output_attentions") else COLOURS[0])
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(f"peak MiB of a BERT-base training step above its state, L = {length}")


def time_report(arguments: argparse.Namespace) -> dict[str, Any]:
    tiny = unused_recorder(bert("sdpa", arguments.layers, **TINY), batch_of(2, 4), TINY_REPEATS * arguments.repeats)
    large = unused_recorder(bert("sdpa", arguments.layers), batch_of(8, 128), arguments.repeats)
    for row, tiny_row in zip(large, tiny, strict=True):
        added = tiny_row["median_ms"] - tiny[0]["median_ms"]
        row |= {"recorder_ms": added, "recorder_share": added / large[0]["median_ms"]}
        print(
            f"{row['way']:24} {row['median_ms']:8.2f} ms  {100 * row['over_alone']:+.2f}%  "
            f"recorder {1e3 * added:.0f} us, {100 * row['recorder_share']:.3f}% of the forward",
            flush=True,
        )
    return {"repeats": arguments.repeats, "unused_recorder": large, "unused_recorder_of_tiny_model": tiny}


def memory_report(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = step_memory(arguments.layers, arguments.pairs, arguments.length)
    if arguments.out:
        plot(rows, arguments.length, arguments.out.with_suffix(".png"))
    return {"pairs": arguments.pairs, "length": arguments.length, "step_memory": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=2, help="pairs of the step whose memory is measured")
    parser.add_argument("--length", type=int, default=512, help="length L of the step whose memory is measured")
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    keep_freed_memory()
    report = time_report(arguments) if arguments.what == "time" else memory_report(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps({"facts": facts(), "layers": arguments.layers, **report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
