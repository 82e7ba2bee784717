"""What attaching costs: the time of an unused recorder; the memory of an attention pull and of `output_attentions`.

    python benchmarks/bench_capture.py --out benchmarks/results/NAME.json    # and NAME.png

BERT-base with random weights. Time: a training forward with an attention pull on 1 and on all 12 layers attached,
whose loss is never asked for, against the model alone, interleaved. What the recorder does depends on the number of
layers and on no size of a tensor, so its cost is also measured on a model of as many layers with tiny ones, where
it is not lost in the noise of the products, and compared with the forward of BERT-base. Memory: the peak of a training
step (forward, backward) at L = 512, with the pull on 1 and on 12 layers, against the same made of `output_attentions`
under eager attention.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import facts, interleaved, keep_freed_memory, peak_memory
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import ear_ops

TINY = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 12}


def bert(implementation: str, layers: int, **sizes: int) -> Any:
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=layers, num_labels=3, **sizes)
    return BertForSequenceClassification._from_config(config, attn_implementation=implementation).train()


def batch_of(rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1000, 30000, (rows, length), generator=generator)
    real = torch.randint(length * 3 // 4, length + 1, (rows,), generator=generator)
    return {"input_ids": input_ids, "attention_mask": (torch.arange(length) < real[:, None]).long()}


def unused_recorder(model: Any, batch: dict[str, Tensor], repeats: int) -> list[dict[str, Any]]:
    """The forward of one model alone and of copies with a recorder that nobody asks for a loss."""
    calls: dict[str, Callable[[], object]] = {"model alone": lambda: model(**batch)}
    for name, chosen in (("1 layer", "middle"), ("all layers", "all")):
        attached = copy.deepcopy(model)
        ear_ops.attach(attached, [ear_ops.AttentionPull(chosen)])
        calls[f"attached to {name}"] = lambda attached=attached: attached(**batch)  # type: ignore[misc]
    times = interleaved(calls, repeats)
    alone = times["model alone"]["median_ms"]
    return [{"way": way, **row, "over_alone": row["median_ms"] / alone - 1} for way, row in times.items()]


def step_memory(layers: int, pairs: int, length: int) -> list[dict[str, Any]]:
    """Peak memory of forward and backward by way; the loss is cross-entropy and attention pull."""
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
        step(model, ear, chosen)  # gradients of the parameters exist afterwards
        rows.append({"way": way, "peak_bytes": peak_memory(lambda m=model, e=ear, c=chosen: step(m, e, c))})  # type: ignore[misc]
        print(f"{way:32} {rows[-1]['peak_bytes'] / 2**20:8.0f} MiB", flush=True)
    return rows


def plot(rows: list[dict[str, Any]], length: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    bars = axes.barh([row["way"] for row in rows], [row["peak_bytes"] / 2**20 for row in rows])
    for bar, row in zip(bars, rows, strict=True):
        bar.set_color("tab:orange" if row["way"].startswith("output_attentions") else "tab:blue")
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"peak MiB of a BERT-base training step above its state, L = {length}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    keep_freed_memory()
    report: dict[str, Any] = {"facts": facts(), "layers": arguments.layers}
    report["step"] = {"pairs": arguments.pairs, "length": arguments.length}
    tiny = unused_recorder(bert("sdpa", arguments.layers, **TINY), batch_of(2, 4), 10 * arguments.repeats)
    large = unused_recorder(bert("sdpa", arguments.layers), batch_of(8, 128), arguments.repeats)
    report |= {"unused_recorder": large, "unused_recorder_of_tiny_model": tiny}
    for row, tiny_row in zip(large, tiny, strict=True):
        added = tiny_row["median_ms"] - tiny[0]["median_ms"]
        row |= {"recorder_ms": added, "recorder_share": added / large[0]["p20_ms"]}
        print(
            f"{row['way']:32} {row['median_ms']:8.2f} ms  {100 * row['over_alone']:+.2f}%  "
            f"recorder {1e3 * added:.0f} us, {100 * row['recorder_share']:.3f}% of the forward",
            flush=True,
        )
    report["step_memory"] = step_memory(arguments.layers, arguments.pairs, arguments.length)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        plot(report["step_memory"], arguments.length, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
