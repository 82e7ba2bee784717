"""Whole runs of a tiny model: what is written, what is refused, what is said."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, MBartConfig, MBartModel, PreTrainedTokenizerFast

from ear_ops.data import DataError, PairExample
from ear_ops.models.classifier import load_classifier
from ear_ops.recipes.training import run, scoring, stages
from ear_ops.recipes.training.classifiers import check_tokenizer, initial_model, trained_model
from ear_ops.recipes.training.config import TrainConfig
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.folder import RunFolderError, claim, locked, versions
from ear_ops.recipes.training.methods import METHODS
from ear_ops.recipes.training.pair_trainer import PairTrainer


def metrics(results: dict[str, Any]) -> dict[str, Any]:
    """Everything that a repeated run must reproduce to the last digit."""
    return {name: value for name, value in results.items() if name not in ("date", "timing", "versions")}


def results_of(config: TrainConfig) -> dict[str, Any]:
    return json.loads((Path(config.output_dir) / "results.json").read_text())


def test_a_run_writes_its_tables_configuration_and_model(finished: TrainConfig) -> None:
    config, results = finished, results_of(finished)
    folder = Path(config.output_dir)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "config.json",
        "model",
        "predictions.json",
        "results.json",
        "results.md",
        "training.json",
    ]
    assert json.loads((folder / "config.json").read_text())["config"] == config.to_dict()
    assert {"python", "torch", "transformers", "accelerate"} <= set(results["versions"])

    assert list(results["languages"]) == ["en", "de", "sw"]
    predictions = json.loads((folder / "predictions.json").read_text())
    labels = [i % 3 for i in range(15)]
    for language, entry in results["languages"].items():
        hits = sum(p == label for p, label in zip(predictions[language], labels, strict=True))
        assert (entry["correct"], entry["total"], entry["accuracy"]) == (hits, 15, hits / 15)
        assert entry["low"] < entry["accuracy"] < entry["high"]
    accuracies = [entry["accuracy"] for entry in results["languages"].values()]
    assert results["average"] == pytest.approx(sum(accuracies) / 3)
    assert 0 < results["timing"]["evaluation_seconds"] < results["timing"]["seconds"]
    assert results["average_other"] == pytest.approx(sum(accuracies[1:]) / 2)

    # The checkpoint is the best of the four on English dev, and it is the one that was scored.
    training = json.loads((folder / "training.json").read_text())
    on_dev = {line["step"]: line["eval_accuracy"] for line in training["log"] if "eval_accuracy" in line}
    assert list(on_dev) == [4, 8, 12, 16]
    assert results["best"]["dev_accuracy"] == max(on_dev.values()) == results["languages"]["en"]["accuracy"]
    assert on_dev[results["best"]["step"]] == max(on_dev.values())
    assert {"cross_entropy", "cross_entropy_augmented", "embedding_push", "attention_pull.1"} <= set(results["terms"])
    assert "| en |" in (folder / "results.md").read_text()


def test_the_best_checkpoint_is_kept_when_later_ones_are_worse(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    on_dev = iter([0.2, 0.9, 0.4, 0.3])
    evaluate = PairTrainer.evaluate
    weights: list[float] = []

    def fake(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        weights.append(self.model.classifier.weight.sum().item())
        return {**evaluate(self, *args, **kwargs), "eval_accuracy": next(on_dev)}

    monkeypatch.setattr(PairTrainer, "evaluate", fake)
    config = make_config()
    results = run.train(config)
    assert results["best"] == {"step": 8, "dev_accuracy": 0.9}
    model, _ = load_classifier(str(Path(config.output_dir) / "model"), 3)
    assert model.classifier.weight.sum().item() == pytest.approx(weights[1], abs=1e-6)
    assert len({round(weight, 6) for weight in weights}) == 4


def test_the_same_run_twice_gives_the_same_metrics(make_config, finished: TrainConfig, tmp_path: Path) -> None:
    first = results_of(finished)
    assert metrics(run.train(make_config(output_dir=str(tmp_path / "second")))) == metrics(first)
    other = run.train(make_config(output_dir=str(tmp_path / "third"), seed=2))
    assert other["terms"] != first["terms"]


def test_a_tiny_model_learns_the_task(make_config) -> None:
    settings = {"epochs": 10, "batch_size": 4, "learning_rate": 3e-3, "evaluations_per_epoch": 1}
    results = run.train(make_config(method="finetune", **settings))
    assert results["average"] > 0.9 and results["average_other"] > 0.9
    assert not results["collapsed"] and results["notices"][0].startswith("no dev data for ar")


def test_a_finished_run_is_returned_and_not_trained_again(
    finished: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(run, "_fit", lambda *arguments: pytest.fail("trained again"))
    monkeypatch.setattr(run, "score_run", lambda *arguments: pytest.fail("scored again"))
    assert run.train(finished) == results_of(finished)
    assert "finished run of this configuration" in capsys.readouterr().out


def test_a_folder_of_another_configuration_is_refused_with_what_differs(make_config) -> None:
    config = make_config(seed=1)
    claim(Path(config.output_dir), config)
    (Path(config.output_dir) / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    before = (Path(config.output_dir) / "config.json").read_bytes()
    with pytest.raises(RunFolderError) as error:
        run.train(make_config(seed=2, beta=0.5))
    assert "beta: 0.1 there, 0.5 now" in str(error.value) and "seed: 1 there, 2 now" in str(error.value)
    assert "alpha" not in str(error.value) and "--output-dir" in str(error.value)
    assert (Path(config.output_dir) / "config.json").read_bytes() == before


def test_a_setting_that_is_newer_than_the_run_has_its_default(make_config) -> None:
    config = make_config()
    folder = Path(config.output_dir)
    claim(folder, config)
    saved = json.loads((folder / "config.json").read_text())
    del saved["config"]["warmup_ratio"]
    (folder / "config.json").write_text(json.dumps(saved))
    claim(folder, config)
    (folder / "training.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"warmup_ratio: 0\.0 there, 0\.5 now"):
        claim(folder, make_config(warmup_ratio=0.5))
    saved["config"]["learnign_rate"] = 1
    (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="unknown setting 'learnign_rate'"):
        claim(folder, config)


def test_a_first_attempt_that_computed_nothing_leaves_the_folder_free(make_config, tmp_path: Path) -> None:
    config = make_config(method="finetune", epochs=1)
    with pytest.raises(DataError, match="nope is not a folder"):
        run.train(make_config(data_dir=str(tmp_path / "nope")))
    (tmp_path / "run" / "checkpoints").mkdir()
    run.train(config)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"] == config.to_dict()
    with pytest.raises(RunFolderError, match="holds a run of another configuration"):
        run.train(make_config())


@pytest.mark.parametrize("name", ["checkpoints/checkpoint-4/complete.json", "weights.json", "results.json", "notes"])
def test_a_folder_with_anything_computed_is_not_taken_over(make_config, tmp_path: Path, name: str) -> None:
    claim(tmp_path / "run", make_config())
    before = (tmp_path / "run" / "config.json").read_bytes()
    (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(RunFolderError, match="seed: 1 there, 2 now"):
        claim(tmp_path / "run", make_config(seed=2))
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "reason"), [("not a run's", "damaged"), ('{"model_type": "bert"}', "written by something else")]
)
def test_a_config_of_something_else_is_not_overwritten(make_config, tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(RunFolderError, match=reason):
        claim(tmp_path / "run", make_config())
    assert (tmp_path / "run" / "config.json").read_text() == text


def test_a_folder_with_other_files_is_refused(make_config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"thesis\.tex"):
        run.train(make_config())
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_two_processes_do_not_share_a_folder(make_config, tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(RunFolderError, match="in use by another process"):
        run.train(make_config())


def test_evaluate_repeats_the_last_step(finished: TrainConfig, tmp_path: Path) -> None:
    config, trained = finished, results_of(finished)
    (tmp_path / "run" / "results.json").unlink()
    assert metrics(run.evaluate(config.output_dir)) == metrics(trained)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["average"] == trained["average"]
    on_test = run.evaluate(config.output_dir, split="test")
    assert on_test["split"] == "test" and (tmp_path / "run" / "results-test.md").exists()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["split"] == "dev"


def test_scores_are_not_overwritten_by_those_of_other_items(
    finished: TrainConfig, data_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(data_dir, tmp_path / "other")
    german = tmp_path / "other" / "xnli" / "dev-de.tsv"
    german.write_text("".join(german.read_text().splitlines(keepends=True)[:5]))
    before = (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(RunFolderError, match=r"results\.json counts other items .*\(de: 15 there, 5 in the data\)"):
        run.evaluate(finished.output_dir, data_dir=str(tmp_path / "other"))
    german.rename(german.with_name("dev-fr.tsv"))
    with pytest.raises(RunFolderError, match="de: 15 there, 0 in the data"):
        run.evaluate(finished.output_dir, data_dir=str(tmp_path / "other"))
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    shutil.copy(data_dir / "xnli" / "dev-de.tsv", german)  # a language more loses nothing
    results = run.evaluate(finished.output_dir, data_dir=str(tmp_path / "other"))
    assert list(results["languages"]) == ["en", "de", "fr", "sw"]


def test_evaluate_reads_new_texts_with_the_whole_vocabulary(
    make_config, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data_dir, tmp_path / "data")
    for path in (tmp_path / "data" / "xnli").glob("test-*.tsv"):
        path.unlink()
    config = make_config(data_dir=str(tmp_path / "data"), method="finetune", epochs=1, prune_vocabulary=True)
    trained = run.train(config)
    (tmp_path / "data" / "xnli" / "test-en.tsv").write_text("unused3 a1\tindeed\tentailment\n")
    pieces = []
    predict = scoring.predict

    def listening(model: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> list[int]:
        pieces.append(tokenizer.tokenize("unused3 a1"))
        return predict(model, tokenizer, *args, **kwargs)

    monkeypatch.setattr(scoring, "predict", listening)
    run.evaluate(config.output_dir, split="test")
    assert pieces == [["unused3", "a1"]]
    assert metrics(run.evaluate(config.output_dir)) == metrics(trained)


def test_files_that_changed_since_the_run_began_are_named(make_config, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir, tmp_path / "data")
    train, dev = (tmp_path / "data" / "xnli" / f"{split}-en.tsv" for split in ("train", "dev"))
    config, folder = make_config(data_dir=str(tmp_path / "data")), tmp_path / "run"
    claim(folder, config)
    dev.write_text(dev.read_text() + "a1\tindeed\tentailment\n")
    claim(folder, config)  # nothing has been computed from it
    (folder / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    claim(folder, config)
    train.write_text(train.read_text() + "a1\tindeed\tentailment\n")
    with pytest.raises(RunFolderError, match=r"other contents of \S*train-en\.tsv: bring"):
        claim(folder, config)
    shutil.copy(data_dir / "xnli" / "train-en.tsv", train)
    (tmp_path / "data" / "xnli" / "dev-de.tsv").write_text("")  # scored, and not learnt from
    claim(folder, config)


@pytest.mark.parametrize(
    ("name", "from_file"),
    [
        ("xnli/train-en.tsv", False),
        ("xnli/dev-en.tsv", False),
        ("xnli/dev-en.tsv", True),
        ("synonyms.json", False),
        ("variants.tsv", True),
        ("model/tokenizer.json", False),
        ("model/added_tokens.json", False),  # a file that was not there
    ],
)
def test_a_run_does_not_go_on_with_other_contents(
    make_config, data_dir: Path, tiny_model: Path, tmp_path: Path, name: str, from_file: bool
) -> None:
    """`from_file`: the augmented view comes from a variants file."""
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    shutil.copytree(tiny_model, data / "model")
    (data / "variants.tsv").touch()
    view = {"synonyms": str(data / "synonyms.json"), "variants_file": None}
    if from_file:
        view = {"synonyms": None, "variants_file": str(data / "variants.tsv")}
    config = make_config(data_dir=str(data), model=str(data / "model"), **view)
    claim(tmp_path / "run", config)
    (tmp_path / "run" / "training.json").write_text("{}")
    claim(tmp_path / "run", config)
    with open(data / name, "a") as file:
        file.write("\n")
    changed = data / name if not name.startswith("model/") else data / "model"
    with pytest.raises(RunFolderError, match=re.escape(f"other contents of {changed}: bring")):
        claim(tmp_path / "run", config)


def test_a_damaged_model_is_not_scored(finished: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    weights = bytearray((folder / "model" / "model.safetensors").read_bytes())
    weights[-8:] = bytes(8)
    (folder / "model" / "model.safetensors").write_bytes(weights)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match=r"\(model\.safetensors is not as it was written\).*train again"):
        run.evaluate(folder)
    (folder / "model" / "complete.json").write_text("[]")
    with pytest.raises(RunFolderError, match=r"\(complete\.json is not as it was written\).*train again"):
        run.evaluate(folder)
    before[folder / "model" / "complete.json"] = b"[]"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_vocabulary_is_not_restored_from_another_model(make_config, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "tiny")
    config = make_config(model=str(tmp_path / "tiny"), method="finetune", epochs=1, prune_vocabulary=True)
    results = run.train(config)
    assert metrics(run.evaluate(config.output_dir)) == metrics(results)
    weights = tmp_path / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(RunFolderError, match=r"began from other contents of .*tiny"):
        run.evaluate(config.output_dir)


def test_a_model_with_a_decoder_is_evaluated_while_it_trains(make_config, tiny_model: Path, tmp_path: Path) -> None:
    """Its output holds the encoder's states besides the logits."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, eos_token="[SEP]")
    config = MBartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.sep_token_id,
    )
    MBartModel(config).save_pretrained(tmp_path / "mbart")
    tokenizer.save_pretrained(tmp_path / "mbart")
    results = run.train(make_config(model=str(tmp_path / "mbart"), method="finetune", epochs=1, pooling="cls"))
    assert 0 <= results["best"]["dev_accuracy"] <= 1 and list(results["languages"]) == ["en", "de", "sw"]


def test_evaluate_needs_a_finished_run(make_config, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run"):
        run.evaluate(tmp_path)
    config = make_config()
    claim(Path(config.output_dir), config)
    with pytest.raises(RunFolderError, match="no complete model"):
        run.evaluate(config.output_dir)


def test_a_cross_entropy_stuck_at_chance_is_said_loudly(make_config, caplog, capsys) -> None:
    config = make_config(learning_rate=0.0, epochs=1)
    with caplog.at_level(logging.WARNING):
        results = run.train(config)
    assert results["collapsed"] is True
    assert "lower alpha/beta" in results["notices"][0]
    assert results["replaced"]["summary"] in capsys.readouterr().out
    assert "cross-entropy stayed at chance" in caplog.text
    folder = Path(config.output_dir)
    assert "stayed at chance" in (folder / "results.md").read_text().split("| language |")[0]
    assert json.loads((folder / "results.json").read_text())["collapsed"] is True


def test_pawsx_shows_the_accuracy_without_untranslated_rows(tiny_model, make_config, tmp_path: Path) -> None:
    folder = tmp_path / "pawsx"
    folder.mkdir()
    for name, rows in {"train-en": 16, "dev-en": 8, "dev-ko": 8}.items():
        lines = [f"a{i % 8} b1\tc2 {'indeed' if i % 2 else 'never'}\t{i % 2}\n" for i in range(rows)]
        (folder / f"{name}.tsv").write_text("".join(lines))
    with open(folder / "dev-ko.tsv", "a") as file:
        file.write("NS\ta1\t0\na1\tNS\t0\n")
    results = run.train(make_config(task="pawsx", method="finetune", data_dir=str(tmp_path), epochs=1))
    assert results["languages"]["ko"]["total"] == 10 and results["languages"]["ko"]["translated"]["total"] == 8
    assert results["languages"]["en"]["translated"]["total"] == 8
    assert "without NS" in (tmp_path / "run" / "results.md").read_text()


def test_pairs_without_text_are_not_trained_on_and_labels_that_say_nothing_are_named(
    make_config, data_dir: Path, tmp_path: Path, capsys, caplog
) -> None:
    shutil.copytree(data_dir / "xnli", tmp_path / "data")
    with open(tmp_path / "data" / "train-en.tsv", "a") as file:
        file.write("\t\tneutral\nNS\ta1\tneutral\n")
    swahili = tmp_path / "data" / "dev-sw.tsv"
    swahili.write_text("".join(line.rpartition("\t")[0] + "\tneutral\n" for line in swahili.read_text().splitlines()))
    with caplog.at_level(logging.WARNING):
        results = run.train(make_config(data_dir=str(tmp_path / "data"), method="finetune", epochs=1))
    assert (results["pairs"], results["untranslated"]) == (60, 2)
    output = capsys.readouterr().out
    assert "2 pairs are left out of training, because a text is empty or the marker NS" in output
    assert re.search(r"^step 3: loss \d\.\d+, grad_norm ", output, re.M) and "{'" not in output
    text = (tmp_path / "run" / "results.md").read_text()
    assert "Trained on 60 pairs; 2 more were left out, because a text is empty" in text
    notice = "all items of xnli dev have one label in sw ('neutral'): these are placeholders"
    assert caplog.text.count(notice) == 1 and notice in results["notices"][-1] and notice in text


def test_missing_data_are_noticed_before_training(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PairTrainer, "train", lambda *arguments, **options: pytest.fail("trained"))
    with pytest.raises(DataError, match=r"dev-fr\.tsv") as error:
        run.train(make_config(languages="en,fr"))
    assert "en, de, sw" in str(error.value)
    with pytest.raises(DataError, match=r"train-en\.tsv"):
        run.train(make_config(data_dir=str(tmp_path), output_dir=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="--synonyms"):
        run.train(make_config(synonyms=None, output_dir=str(tmp_path / "third")))


def test_another_source_language_is_trained_on_and_chooses_the_checkpoint(
    make_config, data_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data_dir / "xnli", folder)
    lines = (folder / "train-en.tsv").read_text().splitlines(keepends=True)
    (folder / "train-en.tsv").unlink()
    (folder / "train-de.tsv").write_text("".join(lines[:24]))
    results = run.train(make_config(method="finetune", source_language="de", data_dir=str(folder), epochs=1))
    languages = results["languages"]
    assert results["steps"] == 3 and results["best"]["dev_accuracy"] == languages["de"]["accuracy"]
    assert results["average_other"] == pytest.approx((languages["en"]["accuracy"] + languages["sw"]["accuracy"]) / 2)
    text = (tmp_path / "run" / "results.md").read_text()
    assert "from de, seed 1" in text and "average without de" in text and "best on de dev" in text


@pytest.mark.parametrize(("changes", "words"), [({"layer": 3}, "layer"), ({"max_length": 999}, "max_length")])
def test_a_setting_that_the_model_does_not_have_is_named(make_config, changes: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run.train(make_config(**changes))


@pytest.mark.parametrize("fault", [TypeError, ValueError])
def test_a_fault_of_our_own_does_not_look_like_a_mistake_of_the_user(
    make_config, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise fault("unexpected keyword argument")

    monkeypatch.setattr(stages, "TrainingArguments", broken)
    with pytest.raises(fault, match="unexpected keyword argument") as error:
        run.train(make_config())
    assert not isinstance(error.value, ConfigError)


def test_a_model_that_does_not_fit_is_named_with_its_cause(make_config, finished: TrainConfig, tmp_path: Path) -> None:
    """A run of three labels has left this model, and PAWS-X has two."""
    settings = {"task": "pawsx", "method": "finetune", "output_dir": str(tmp_path / "other")}
    for name in ("train-en", "dev-en"):
        (tmp_path / f"{name}.tsv").write_text("a1 b1\tc2\t1\n" * 8)
    with pytest.raises(ConfigError, match=r"num_labels: .* saved with 3 labels") as error:
        run.train(make_config(model=str(tmp_path / "run" / "model"), data_dir=str(tmp_path), **settings))
    assert type(error.value.__cause__) is ValueError


def test_a_model_folder_without_its_tokenizer_is_refused(make_config, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "tiny", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ConfigError, match=r"tiny: its tokenizer has special tokens alone.*vocab\.txt"):
        run.train(make_config(model=str(tmp_path / "tiny")))


def test_a_tokenizer_that_does_not_know_the_training_pairs_is_refused(
    make_config, data_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(data_dir, tmp_path / "data")
    train = tmp_path / "data" / "xnli" / "train-en.tsv"
    lines = [line.rsplit("\t", 2) for line in train.read_text().splitlines(keepends=True)]
    train.write_text("".join(f"{text1.upper()} a1\t{text2.upper()}\t{label}" for text1, text2, label in lines))
    with pytest.raises(ConfigError, match=r"knows 60 of the \d{3} pieces in 120 texts of the training pairs"):
        run.train(make_config(data_dir=str(tmp_path / "data")))


def test_a_tokenizer_that_leaves_out_what_it_does_not_know_is_refused() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    check_tokenizer(tokenizer, [PairExample("ab", "ba xyz", 0)] * 3, "tiny")
    with pytest.raises(ConfigError, match="the tokenizer of tiny knows 1 of the 1 pieces in 6 texts"):
        check_tokenizer(tokenizer, [PairExample("xyz", "uvw", 0)] * 2 + [PairExample("ab", "uvw", 0)], "tiny")


@pytest.mark.parametrize(
    ("ratio", "shares"),
    [(0.0, [8, 7, 6, 5, 4, 3, 2, 1]), (0.5, [0, 2, 4, 6, 8, 6, 4, 2])],
)
def test_the_learning_rate_warms_up_and_decays_linearly(make_config, ratio: float, shares: list[int]) -> None:
    """The shares are eighths of the largest rate, one for each step."""
    config = make_config(method="finetune", epochs=1, logging_steps=1, learning_rate=8e-3, warmup_ratio=ratio)
    run.train(config)
    log = json.loads((Path(config.output_dir) / "training.json").read_text())["log"]
    rates = [line["learning_rate"] for line in log if "learning_rate" in line]
    assert rates == pytest.approx([share * 1e-3 for share in shares])


def test_the_log_shows_a_loss_that_is_not_a_number(make_config, tmp_path: Path) -> None:
    config = make_config(method="finetune", epochs=1, learning_rate=1e30, logging_steps=1)
    data = stages.load_data(config.data, config.evaluation, two_views=False)
    classifier = stages.build_classifier(config.classifier, config.objective, data.training.views, None)
    method = METHODS["finetune"](config.objective)
    trainer = stages.make_trainer(config.optimisation, tmp_path, method, classifier, data)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert math.isfinite(losses[0]) and not math.isfinite(losses[-1])


def test_words_replaced_are_counted(finished: TrainConfig) -> None:
    replaced = results_of(finished)["replaced"]
    assert 0 < replaced["replaced"] < replaced["found"] < replaced["words"]
    # Two of three draws of a word with two synonyms replace it.
    assert replaced["replaced"] / replaced["found"] == pytest.approx(2 / 3, abs=0.15)


def test_pruning_the_vocabulary_does_not_change_the_run(make_config, tmp_path: Path, capsys) -> None:
    whole = run.train(make_config(output_dir=str(tmp_path / "whole"), max_train_examples=8))
    pruned = run.train(make_config(output_dir=str(tmp_path / "pruned"), max_train_examples=8, prune_vocabulary=True))
    assert "pieces kept" in capsys.readouterr().out
    for name in ("languages", "best", "terms"):
        assert pruned[name] == whole[name]
    size = lambda name: (tmp_path / name / "model" / "model.safetensors").stat().st_size  # noqa: E731
    assert size("pruned") < size("whole")


def test_weight_decay_of_a_pruned_vocabulary_is_refused(make_config) -> None:
    """It would change the embeddings of pieces that no text holds, which pruning drops and `evaluate` restores."""
    with pytest.raises(ConfigError, match=r"weight_decay: got 0\.01 with prune_vocabulary.*dropped pieces"):
        make_config(weight_decay=0.01, prune_vocabulary=True)
    assert make_config(weight_decay=0.01).weight_decay == 0.01
    make_config(weight_decay=0.01, prune_vocabulary=True, freeze_embeddings=True)


def test_a_restored_vocabulary_is_that_of_a_run_that_did_not_prune(make_config, tmp_path: Path) -> None:
    """With weight decay it is not, unless the word embeddings are frozen."""
    models = {}
    for name, changes in {
        "whole": {},
        "pruned": {"prune_vocabulary": True},
        "frozen": {"freeze_embeddings": True, "weight_decay": 0.5},
        "frozen and pruned": {"freeze_embeddings": True, "weight_decay": 0.5, "prune_vocabulary": True},
    }.items():
        config = make_config(output_dir=str(tmp_path / name), max_train_examples=8, epochs=1, **changes)
        run.train(config)
        models[name] = trained_model(config.classifier, tmp_path / name)[0].get_input_embeddings().weight
    assert torch.equal(models["whole"], models["pruned"])
    assert torch.equal(models["frozen"], models["frozen and pruned"])

    config = make_config(output_dir=str(tmp_path / "decayed"), max_train_examples=8, epochs=1, weight_decay=0.5)
    run.train(config)
    decayed = trained_model(config.classifier, tmp_path / "decayed")[0].get_input_embeddings().weight
    initial = initial_model(config.classifier)[0].get_input_embeddings().weight
    assert not torch.equal(decayed[-1], initial[-1]), "no text has this piece, and its embedding has changed"


def test_bf16_trains_and_scores_under_autocast(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict, scored = scoring.predict, []

    def spy(*args: Any, **kwargs: Any) -> list[int]:
        scored.append(kwargs["bf16"])
        return predict(*args, **kwargs)

    monkeypatch.setattr(scoring, "predict", spy)
    full = run.train(make_config(output_dir=str(tmp_path / "full"), epochs=1))
    half = run.train(make_config(output_dir=str(tmp_path / "half"), epochs=1, bf16=True))
    assert scored == [False] * 3 + [True] * 3
    assert half["terms"]["cross_entropy"] == pytest.approx(full["terms"]["cross_entropy"], rel=0.02)
    assert half["terms"] != full["terms"]


@pytest.mark.parametrize(("method", "collapsed"), [("adv", False), ("finetune", True)])
def test_a_model_that_beats_the_majority_may_fail_on_perturbed_embeddings(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, collapsed: bool
) -> None:
    monkeypatch.setattr(stages, "chance_level", lambda labels: 0.0)
    monkeypatch.setattr(stages, "beats_majority", lambda accuracy, labels: accuracy >= 0 and len(labels) == 15)
    results = run.train(make_config(output_dir=str(tmp_path / "run"), epochs=1, method=method))
    assert results["collapsed"] is collapsed and results["pairs"] == 60


def test_settings_that_the_method_takes_no_account_of_are_named_once(make_config, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        run.train(make_config(method="ear-no-both", epochs=1, push_ratio=1.0, layer=9))
    assert caplog.text.count("takes no account of") == 1
    assert "method 'ear-no-both' takes no account of layer, push_ratio" in caplog.text


def test_the_versions_name_the_commit_of_a_checkout() -> None:
    checkout = Path(__file__).parents[3]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        pytest.skip("there is no checkout, or no git")
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True)
    assert versions()["ear-ops"].removesuffix(")").removesuffix("-dirty").endswith(f" ({commit.stdout.strip()}")
