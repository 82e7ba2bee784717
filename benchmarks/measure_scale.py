"""Measure the gradients of push and pull in each preset against the cross-entropy, before and after a training.

    python benchmarks/measure_scale.py RUN --out benchmarks/results/scale/NAME.json

A ratio divides the norm of a term's gradient by the norm of the gradient of CE(x) + CE(x^a). Both are taken over the
first training pairs, without dropout: those of the push at the output of the embedding layer, those of the pull at the
queries and keys of its layer.

Ratios `of the preset` include the weight in the preset. The reciprocal of the other ratio is the weight with which a
term is as strong as the cross-entropy.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from measuring import facts
from transformers.utils import logging

from ear_ops.data import PairCollator, PairViews, get_task
from ear_ops.diagnostics.gradient_ratios import gradient_squares
from ear_ops.models.classifier import load_classifier
from ear_ops.recipes.training.calibration import first_batches, squares_where_it_acts
from ear_ops.recipes.training.classifiers import initial_model
from ear_ops.recipes.training.config import PRESETS
from ear_ops.recipes.training.folder import load_config
from ear_ops.recipes.training.sources import load_training_data
from ear_ops.regularizers import AttentionPull, EmbeddingPush


def ratios(model: Any, collate: PairCollator, views: PairViews, preset: dict[str, Any], count: int, size: int) -> dict:
    """Return the ratios without and with the weights, over `count` batches of `size` pairs."""
    terms = {
        "push": EmbeddingPush(preset["alpha"], reduction=preset["reduction"]),
        "pull": AttentionPull(preset["layer"], preset["beta"], reduction=preset["reduction"]),
    }
    batches = first_batches(count, size, model, collate, views)
    squares = gradient_squares(model, list(terms.values()), preset["layer"], batches)
    row = {}
    for (name, term), weight in zip(terms.items(), ("alpha", "beta"), strict=True):
        of_term, of_cross_entropy = squares_where_it_acts(squares, term)
        row[name] = math.sqrt(of_term / of_cross_entropy)
        row[f"{name} of the preset"] = preset[weight] * row[name]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run with two views that kept its model")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    logging.disable_progress_bar()
    config = load_config(options.run)
    views = load_training_data(config.data, two_views=True).views
    models = {
        "before": initial_model(config.classifier),
        "after": load_classifier(str(options.run / "model"), len(get_task(config.task).labels)),
    }
    rows = []
    for when, (model, tokenizer) in models.items():
        for name, preset in PRESETS.items():
            collate = PairCollator(tokenizer, max_length=config.max_length, padding=preset["padding"])
            measured = ratios(model, collate, views, preset, options.batches, config.batch_size)
            rows.append(
                {
                    "when": when,
                    "preset": name,
                    "pairs": min(options.batches * config.batch_size, len(views)),
                    **measured,
                }
            )
            print(
                f"{when:<7}{name:<10} "
                f"push {measured['push']:9.3g}, of the preset {measured['push of the preset']:9.3g}   "
                f"pull {measured['pull']:9.3g}, of the preset {measured['pull of the preset']:9.3g}",
                flush=True,
            )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"facts": facts(), "config": config.to_dict(), "rows": rows}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
