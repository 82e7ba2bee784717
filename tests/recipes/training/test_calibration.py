"""Weights from ratios of gradient norms, against plain autograd; and word embeddings that are not trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

from ear_ops.data import PairCollator
from ear_ops.diagnostics import gradient_ratios as gradients
from ear_ops.functional import robust_cross_entropy
from ear_ops.models.classifier import load_classifier
from ear_ops.recipes.training import calibration, run
from ear_ops.recipes.training.classifiers import initial_model
from ear_ops.recipes.training.config import TrainConfig
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.freezing import freeze_word_embeddings
from ear_ops.recipes.training.methods import METHODS
from ear_ops.recipes.training.pair_trainer import PairTrainer
from ear_ops.recipes.training.sources import load_training_data
from ear_ops.recipes.training.stages import Classifier, RunData, make_trainer
from ear_ops.regularizers import AttentionPull, EmbeddingPush


@pytest.fixture
def weigh(make_config, tmp_path: Path):
    """The chosen weights of a configuration, measured anew, and what they were measured on."""

    def call(**settings: Any) -> tuple[dict[str, float], TrainConfig, Any, Any, Any]:
        config = make_config(**settings)
        data = load_training_data(config.data, two_views=True)
        model, tokenizer = initial_model(config.classifier)
        collate = PairCollator(tokenizer, max_length=config.max_length)
        (tmp_path / calibration.WEIGHTS_FILE).unlink(missing_ok=True)
        return (
            calibration.chosen_weights(config.objective, tmp_path, model, collate, data.views),
            config,
            model,
            collate,
            data,
        )

    return call


@pytest.mark.parametrize("method", ["ear", "ept+srpt"])
def test_the_weighted_terms_have_the_wanted_gradient_norms(weigh, method: str) -> None:
    weights, config, model, collate, data = weigh(method=method, push_ratio=0.3, pull_ratio=0.02, layer=2)
    places: dict[str, torch.Tensor] = {}
    attention = model.bert.encoder.layer[1].attention.self
    for name, module in (("E", model.bert.embeddings), ("Q", attention.query), ("K", attention.key)):
        module.register_forward_hook(lambda module, inputs, output, name=name: places.update({name: output}))
    model.set_attn_implementation("eager")
    squares = dict.fromkeys(("CE at E", "CE at QK", "push at E", "pull at QK"), 0.0)
    for start in range(0, 60, config.batch_size):  # all 60 pairs: fewer than the batches that are measured
        batch = collate([data.views[i] for i in range(start, min(start + config.batch_size, 60))])
        labels, mask = batch.pop("labels"), batch["attention_mask"]
        output = model(**batch, output_attentions=True, output_hidden_states=True)
        half = len(labels)
        real = mask[..., None].float()
        pooled, state = ((states * real).sum(1) / real.sum(1) for states in (places["E"], output.hidden_states[2]))
        maps, both, either = output.attentions[1], mask[:half] * mask[half:], (mask[:half] + mask[half:]) > 0
        counted = (both[:, None, :, None] * either[:, None, None, :]).expand(-1, 2, -1, -1).bool()
        pulls = {
            "ear": (maps[:half] - maps[half:]).square()[counted].mean(),
            "ept+srpt": (state[:half] - state[half:]).square().mean(),
        }
        for name, loss, at in (
            ("CE at E", robust_cross_entropy(output.logits, labels), "E"),
            ("CE at QK", robust_cross_entropy(output.logits, labels), "QK"),
            ("push at E", weights["alpha"] * -(pooled[:half] - pooled[half:]).square().mean(), "E"),
            ("pull at QK", weights["beta"] * pulls[method], "QK"),
        ):
            gradients = torch.autograd.grad(loss, [places[place] for place in at], retain_graph=True)
            squares[name] += sum(gradient.square().sum().item() for gradient in gradients)
    assert (squares["push at E"] / squares["CE at E"]) ** 0.5 == pytest.approx(0.3, rel=1e-4)
    assert (squares["pull at QK"] / squares["CE at QK"]) ** 0.5 == pytest.approx(0.02, rel=1e-4)


@pytest.mark.parametrize(("method", "pull"), [("ear", "attention_pull.2"), ("ept+srpt", "sentence_pull.2")])
def test_a_weight_is_the_ratio_over_the_measured_one(weigh, method: str, pull: str) -> None:
    """What `measure_gradients` gives and what the ratios ask for are the same numbers."""
    weights, config, model, collate, data = weigh(
        method=method, push_ratio=0.3, pull_ratio=0.02, layer=2, measure_gradients=calibration.WEIGHING_BATCHES
    )
    measured = calibration.measured_ratios(config.objective, model, collate, data.views)
    assert weights == pytest.approx(
        {
            "alpha": 0.3 / measured["embedding_push at embeddings"],
            "beta": 0.02 / measured[f"{pull} at query and key"],
        }
    )


def test_terms_that_a_method_lacks_are_measured_as_those_of_ear(weigh) -> None:
    for method in ("rs-da", "ear-no-both", "ear-no-ept", "ear-no-apt", "nt+apt"):
        _, config, model, collate, data = weigh(method=method, measure_gradients=1, layer=2)
        names = {
            name.partition(" at ")[0]
            for name in calibration.measured_ratios(config.objective, model, collate, data.views)
        }
        assert names == {"embedding_push", "attention_pull.2"}


def test_the_weight_of_the_push_alone_looks_at_no_attention(weigh) -> None:
    weights = [weigh(method="ear-no-apt", push_ratio=0.1, layer=layer)[0] for layer in (1, 99)]
    assert list(weights[0]) == ["alpha"] and weights[0] == weights[1]


def test_where_the_cross_entropy_has_no_gradient_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    squares = {"embeddings": {"cross_entropy": 4.0, "pull": 1.0}, "query": {"cross_entropy": 0.0, "pull": 1.0}}
    monkeypatch.setattr(gradients, "gradient_squares", lambda *arguments, **options: squares)
    assert gradients.gradient_ratios(None, [], 1, []) == {"pull at embeddings": 0.5}


def test_weights_follow_the_scale_of_the_cross_entropy_and_undo_that_of_the_term(weigh, monkeypatch) -> None:
    once = weigh(push_ratio=0.1, pull_ratio=0.1)[0]
    assert weigh(push_ratio=0.2, pull_ratio=0.3)[0] == pytest.approx(
        {"alpha": 2 * once["alpha"], "beta": 3 * once["beta"]}
    )
    whole = weigh(push_ratio=0.1, pull_ratio=0.1, reduction="equations")[0]
    assert 16 * whole["alpha"] == pytest.approx(once["alpha"]), "summed over 16 components, not averaged"
    monkeypatch.setattr(gradients, "robust_cross_entropy", lambda *tensors: 2 * robust_cross_entropy(*tensors))
    assert weigh(push_ratio=0.1, pull_ratio=0.1)[0] == pytest.approx(
        {"alpha": 2 * once["alpha"], "beta": 2 * once["beta"]}
    )


def test_only_the_weights_that_a_method_has_are_measured(weigh) -> None:
    assert list(weigh(method="ear", pull_ratio=0.1)[0]) == ["beta"]
    assert list(weigh(method="ear-no-apt", push_ratio=0.1, pull_ratio=0.1)[0]) == ["alpha"]
    assert list(weigh(method="nt+apt", push_ratio=0.1, pull_ratio=0.1)[0]) == ["beta"]
    for method in ("rs-da", "ear-no-both"):
        assert weigh(method=method, push_ratio=0.1, pull_ratio=0.1)[0] == {}
    assert weigh(method="ear")[0] == {}


def test_a_term_without_gradient_is_named(weigh, tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    path.write_text('{"elsewhere": ["nowhere"]}')
    with pytest.raises(ConfigError, match=r"push_ratio: embedding_push has no gradient.*pass alpha instead"):
        weigh(push_ratio=0.1, synonyms=str(path))
    with pytest.raises(ConfigError, match=r"pull_ratio: attention_pull\.1 has no gradient.*pass beta instead"):
        weigh(pull_ratio=0.1, synonyms=str(path))
    assert not (tmp_path / calibration.WEIGHTS_FILE).exists()


def test_a_run_with_ratios_is_the_run_with_the_weights_and_does_not_measure_again(
    make_config, tmp_path: Path, monkeypatch
) -> None:
    """Stopped in the middle, it goes on with the weights that it began with."""
    config = make_config(output_dir=str(tmp_path / "ratios"), epochs=1, push_ratio=0.3, pull_ratio=0.2)
    step = PairTrainer.training_step

    def stop(self: PairTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PairTrainer, "training_step", stop)
        run.train(config)
    monkeypatch.setattr(calibration, "gradient_squares", lambda *arguments: pytest.fail("measured again"))
    ratios = run.train(config)
    assert ratios["timing"]["resumed"]
    assert ratios["config"]["push_ratio"] == 0.3 and ratios["config"]["alpha"] is None and ratios["regularised"]
    assert ratios["weights"] == json.loads((tmp_path / "ratios" / calibration.WEIGHTS_FILE).read_text())

    weights = run.train(make_config(output_dir=str(tmp_path / "weights"), epochs=1, **ratios["weights"]))
    assert weights["weights"] == {} and set(ratios["weights"]) == {"alpha", "beta"}
    for name in ("languages", "terms", "best"):
        assert ratios[name] == weights[name]
    assert "Weights of the terms: alpha " in (tmp_path / "ratios" / "results.md").read_text()


def test_frozen_word_embeddings_stay_and_the_rest_of_the_embedding_layer_is_trained(make_config, tmp_path) -> None:
    config = make_config(freeze_embeddings=True, epochs=1)
    start, _ = initial_model(config.classifier)
    results = run.train(config)
    trained = load_classifier(str(Path(config.output_dir) / "model"), 3)[0]
    before, after = (dict(model.named_parameters()) for model in (start, trained))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert "bert.embeddings.word_embeddings.weight" in same
    assert not {name for name in same if "LayerNorm" in name or "position" in name}
    assert results["terms"]["embedding_push"] < 0


def test_freezing_refuses_a_term_that_nothing_trained_reaches() -> None:
    """Where nothing but words is embedded, the push would be a constant."""
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            num_labels=3,
        )
    )
    inputs = {"input_ids": torch.arange(1, 13).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    with pytest.raises(ConfigError, match="freeze_embeddings: embedding_push has no gradient"):
        freeze_word_embeddings(model, [EmbeddingPush(1.0), AttentionPull(2, 0.1)], inputs)
    freeze_word_embeddings(model, [AttentionPull(2, 0.1)], inputs)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "model.embed_tokens.weight"
    ]


def test_a_compiled_run_is_the_same_run(make_config, tmp_path: Path, monkeypatch) -> None:
    """With a compiler that changes nothing, so that a step that is traced wrongly shows."""
    compiled, compile = [], torch.compile

    def eager(model: Any, *, dynamic: bool) -> Any:
        compiled.append(compile(model, dynamic=dynamic, backend="eager"))
        return compiled[-1]

    monkeypatch.setattr(torch, "compile", eager)
    torch.compiler.reset()
    settings = {"epochs": 1, "max_train_examples": 24, "measure_gradients": 1}
    plain = run.train(make_config(**settings, output_dir=str(tmp_path / "plain")))
    other = run.train(make_config(**settings, output_dir=str(tmp_path / "compiled"), compile=True))
    assert plain["languages"] == other["languages"] and plain["best"] == other["best"]
    assert other["terms"] == pytest.approx(plain["terms"], rel=1e-5)
    assert len(compiled) == 1
    torch.compiler.reset()


def test_adamw_is_fused_and_gradients_are_clipped_together(make_config, tmp_path: Path) -> None:
    config = make_config(max_grad_norm=0.01, epochs=1)
    data = load_training_data(config.data, two_views=True)
    model, tokenizer = initial_model(config.classifier)
    collate = PairCollator(tokenizer, max_length=config.max_length)
    trainer = make_trainer(
        config.optimisation,
        tmp_path,
        METHODS["ear"](config.objective),
        Classifier(model, tokenizer, collate),
        RunData(data, data.views.examples),
    )
    norms = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item())

    trainer.add_callback(Watch())
    trainer.train()
    trainer.detach()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in optimizer.param_groups)
    assert norms == pytest.approx([0.01] * 8, rel=1e-3), "of all parameters together"


def test_a_run_measures_before_and_after_and_is_not_changed_by_it(make_config, tmp_path) -> None:
    plain = run.train(make_config(output_dir=str(tmp_path / "plain"), epochs=1))
    measured = run.train(make_config(output_dir=str(tmp_path / "measured"), epochs=1, measure_gradients=3))
    assert plain["gradient_ratios"] is None
    ratios = measured["gradient_ratios"]
    assert ratios["before"].keys() == ratios["after"].keys() and ratios["before"] != ratios["after"]
    for name in ("languages", "terms", "best"):
        assert measured[name] == plain[name]
    one_view = make_config(output_dir=str(tmp_path / "one"), epochs=1, measure_gradients=3, method="finetune")
    assert run.train(one_view)["gradient_ratios"] is None


def test_before_and_after_are_measured_in_one_precision(make_config, tmp_path) -> None:
    """Training under autocast leaves its mark on the model's forward; a rate of 0 leaves none on the weights."""
    settings = {"epochs": 1, "measure_gradients": 2, "bf16": True, "learning_rate": 0.0}
    ratios = run.train(make_config(output_dir=str(tmp_path / "run"), **settings))["gradient_ratios"]
    assert ratios["after"] == ratios["before"]
