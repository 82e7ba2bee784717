"""The mixin for transformers.Trainer: the loss it trains on, in parts and with smoothing, what it logs and refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
import transformers
from support import two_processes
from support.trainer_task import (
    PAIRS,
    Pairs,
    RegularizedTrainer,
    Stream,
    both_views,
    descend,
    expected_loss,
    mean_over_parts,
    model,
    one_view,
    train_in_parts,
    trainer,
    weights,
)
from torch.utils._python_dispatch import TorchDispatchMode

import ear_ops
import ear_ops.data


@pytest.mark.parametrize(
    ("arguments", "smoothing"),
    [
        ({}, 0.0),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 0.0),
        ({"label_smoothing_factor": 0.2}, 0.2),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "label_smoothing_factor": 0.2}, 0.2),
    ],
    ids=["plain", "in parts", "smoothed", "smoothed in parts"],
)
def test_a_step_goes_down_the_gradient_of_both_views_and_the_regularisers(
    tmp_path: Path, arguments: dict[str, Any], smoothing: float
) -> None:
    batch = both_views([Pairs()[i] for i in range(PAIRS)])
    expected = descend(model(), lambda of: expected_loss(of, batch, smoothing))
    own = trainer(tmp_path, **arguments)
    own.train()
    own.detach()
    torch.testing.assert_close(weights(own.model), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights(model()), expected)
    logged = own.state.log_history[0]["loss"]
    assert logged == pytest.approx(expected_loss(model(), batch, smoothing).item(), rel=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_the_parts_of_a_step_weigh_the_same(tmp_path: Path, count: int) -> None:
    """In one process or several, also where the last step has fewer parts, or its last part fewer pairs."""
    pairs = Pairs(10 if count == 2 else 11)
    if count == 1:
        steps = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10]]]
        found, log = train_in_parts(tmp_path, pairs)
    else:  # the last step has one part in each process, the second one wrapped around
        if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
            pytest.skip("torch without gloo")
        steps = [[[0, 1], [4, 5], [2, 3], [6, 7]], [[8, 9], [0, 1]]]
        (found, log), (other, other_log) = two_processes.run(train_in_parts, tmp_path, tmp_path, pairs)
        assert torch.equal(found, other) and log[0]["task_loss"] == other_log[0]["task_loss"]
    losses = [mean_over_parts(pairs, *parts) for parts in steps]
    torch.testing.assert_close(found, descend(model(), *losses), rtol=1e-5, atol=1e-6)
    assert len(log) == len(steps)
    of = model()
    for line, loss in zip(log, losses, strict=True):
        value = loss(of).item()
        assert line["loss"] == pytest.approx(value, rel=1e-5)
        terms = 2 * line["task_loss"] + 5.0 * line["attention_pull.1"] + 0.5 * line["embedding_push"]
        assert terms == pytest.approx(value, rel=1e-5)
        descend(of, loss)


WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device: numbers read from it, and shapes that depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split(".")[0]
        by_mask = name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_reads_one_number_more_from_the_device_than_the_model_does(tmp_path: Path) -> None:
    """Whether the mask is what the layers say, all of them together; a line of the log then reads all terms at once."""

    def padded(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = both_views(items)
        batch["attention_mask"][0, 4:] = 0
        return batch

    def reads_of_each_step(regularizers: list[Any]) -> list[list[str]]:
        options = {"data_collator": padded}
        own = trainer(
            tmp_path, regularizers, options=options, per_device_train_batch_size=2, max_steps=4, logging_steps=4
        )
        found: list[list[str]] = []
        compute_loss = own.compute_loss

        def watched(*args: Any, **kwargs: Any) -> Any:
            with Reads() as reads:
                loss = compute_loss(*args, **kwargs)
            found.append(reads.found)
            return loss

        own.compute_loss = watched
        own.train()
        own.detach()
        assert len(found) == 4
        return found

    terms = [ear_ops.AttentionPull([1, 2]), ear_ops.EmbeddingPush(1.0), ear_ops.SentencePull(2)]
    one = "aten::_local_scalar_dense"
    assert reads_of_each_step(terms) == [[*reads, one] for reads in reads_of_each_step([])]
    with Reads() as reads:
        torch.ones(2)[torch.ones(2) > 0].sum().item()
    assert reads.found == ["aten::index", "aten::_local_scalar_dense"], "the counter counts"


def test_a_loss_function_that_an_older_trainer_would_not_divide_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(transformers.Trainer, "loss_is_scaled_for_ga", raising=False)
    options = {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()}
    with pytest.raises(ValueError, match=r"compute_loss_func: .*upgrade transformers"):
        trainer(tmp_path, options=options, gradient_accumulation_steps=2)
    trainer(tmp_path, options=options, gradient_accumulation_steps=1).detach()


@pytest.mark.skipif(not hasattr(transformers.Trainer, "loss_is_scaled_for_ga"), reason="refused by this transformers")
def test_a_loss_function_of_ones_own_and_labels_of_all_rows(tmp_path: Path) -> None:
    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = both_views(items)
        return {**batch, "labels": ear_ops.repeat_labels(batch["labels"])}

    def loss_function(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        total = F.cross_entropy(outputs.logits, labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    batch = both_views([Pairs()[i] for i in range(PAIRS)])
    expected = descend(model(), lambda of: expected_loss(of, batch))
    own = trainer(
        tmp_path,
        options={"data_collator": collate, "compute_loss_func": loss_function},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    own.train()
    torch.testing.assert_close(weights(own.model), expected, rtol=1e-5, atol=1e-6)


def test_word_ids_go_to_the_regularisers_and_not_to_the_model(tmp_path: Path) -> None:
    """With a word for each token the loss is that of tokens."""

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = both_views(items)
        return {**batch, "word_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}

    batch = both_views([Pairs()[i] for i in range(PAIRS)])
    expected = descend(model(), lambda of: expected_loss(of, batch))
    terms = [ear_ops.AttentionPull(1, 5.0, alignment="word"), ear_ops.EmbeddingPush(0.5)]
    own = trainer(tmp_path, terms, options={"data_collator": collate})
    given: list[set[str]] = []
    own.model.register_forward_pre_hook(lambda *call: given.append(set(call[2])), with_kwargs=True)
    own.train()
    one_view = {name: rows[:PAIRS] for name, rows in collate([Pairs()[i] for i in range(PAIRS)]).items()}
    own.compute_loss(own.model.eval(), one_view)
    assert given and all("word_ids" not in names and "input_ids" in names for names in given)
    given_batch = collate([Pairs()[i] for i in range(PAIRS)])
    own.compute_loss(own.model.train(), given_batch)
    assert "word_ids" in given_batch and len(given_batch["labels"]) == PAIRS, "the caller's batch stays as it is"
    torch.testing.assert_close(weights(own.model), expected, rtol=1e-5, atol=1e-6)


def test_word_ids_do_not_reach_the_model_in_prediction(tmp_path: Path) -> None:
    own = trainer(tmp_path)
    batch = {name: value for name, value in one_view([Pairs()[0]]).items() if name != "labels"}
    loss, logits, labels = own.prediction_step(own.model, {**batch, "word_ids": torch.zeros(1, 4)}, False)
    assert loss is labels is None and logits.shape == (1, 3)


SEQ2SEQ = {
    "Bart": {"encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0, "max_position_embeddings": 9},
    "T5": {"num_layers": 1, "d_kv": 8, "num_heads": 2, "d_ff": 16, "dropout_rate": 0.0},
}
TOKENS = {"vocab_size": 20, "pad_token_id": 0, "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_the_decoder_of_a_teacher_reads_what_that_of_the_student_reads(tmp_path: Path, kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(d_model=16, **SEQ2SEQ[kind], **TOKENS)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    items = [{name: torch.randint(3, 20, (5,)) for name in ("input_ids", "labels")} for _ in range(PAIRS)]
    options = {"train_dataset": items, "teacher": models[1], "regularizers": [ear_ops.LogitsPull()]}
    own = trainer(tmp_path, of=models[0], options={**options, "data_collator": None}, learning_rate=0.0)
    own.train()
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    logs = [of.eval()(**batch).logits.detach().log_softmax(-1).flatten(0, 1) for of in models]
    expected = F.kl_div(*logs, log_target=True, reduction="batchmean")
    assert own.state.log_history[0]["logits_pull"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_trainer_runs_the_teacher(tmp_path: Path) -> None:
    teacher = model(seed=1, layers=4)
    before = weights(teacher)
    batch = one_view([Pairs()[i] for i in range(PAIRS)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def loss_of(student: Any) -> torch.Tensor:
        for each in (student, teacher):
            each.set_attn_implementation("eager")
        target = teacher(**inputs, output_attentions=True).attentions[3].detach()
        output = student(**inputs, output_attentions=True)
        for each in (student, teacher):
            each.set_attn_implementation("sdpa")
        pull = (output.attentions[1] - target).square().mean()
        return F.cross_entropy(output.logits, batch["labels"]) + 3.0 * pull

    expected = descend(model(), loss_of)
    own = trainer(
        tmp_path,
        [ear_ops.AttentionPull(2, 3.0)],
        options={"teacher": teacher.train(), "layer_map": {2: 4}, "data_collator": one_view},
    )
    with_grad: list[bool] = []
    teacher.register_forward_hook(lambda *call: with_grad.append(torch.is_grad_enabled()))
    own.train()
    assert not teacher.training and torch.equal(weights(teacher), before) and with_grad == [False]
    torch.testing.assert_close(weights(own.model), expected, rtol=1e-5, atol=1e-6)
    trainer(tmp_path, options={"teacher": model(seed=1), "data_collator": one_view}, remove_unused_columns=True)


@pytest.mark.parametrize(
    "placed",
    [
        {"is_loaded_in_8bit": True},
        {"is_loaded_in_4bit": True},
        {"hf_device_map": {"": "cpu"}},
        {"quantization_method": "gptq"},
    ],
    ids=lambda placed: next(iter(placed)),
)
def test_a_teacher_that_was_placed_when_it_was_loaded_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placed: dict[str, Any]
) -> None:
    """A quantised model, or one with a device_map, refuses ``.to``."""
    teacher = model(seed=1)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("`.to` is not supported for such a model")

    for name, value in {**placed, "to": refuse}.items():
        monkeypatch.setattr(teacher, name, value, raising=False)
    own = trainer(tmp_path, options={"teacher": teacher, "data_collator": one_view})
    own.train()
    assert not teacher.training and own.state.global_step == 1
    own.detach()


def test_a_teacher_that_stays_gets_the_batch_on_its_own_device(tmp_path: Path) -> None:
    own = trainer(tmp_path, options={"teacher": model(seed=1), "data_collator": one_view})
    batch = one_view([Pairs()[i] for i in range(4)])
    elsewhere = model(seed=1).to("meta")
    assert own._inputs_of_teacher(elsewhere, batch)["input_ids"] is batch["input_ids"], "it is moved, not the batch"
    elsewhere.hf_device_map = {"": "disk"}
    assert own._inputs_of_teacher(elsewhere, batch)["input_ids"] is batch["input_ids"], (
        "the hooks of accelerate move it"
    )
    elsewhere = torch.nn.Linear(1, 1)
    elsewhere.hf_device_map = {"": "cpu"}
    on_meta = {name: value.to("meta") for name, value in batch.items()}

    def moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device=device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", moved)  # numbers on the meta device have no copy
        found = own._inputs_of_teacher(elsewhere, on_meta)
    assert found.keys() == {"input_ids", "attention_mask"}
    assert all(value.device.type == "cpu" for value in found.values())


def test_the_log_has_the_mean_of_every_term_since_its_last_line(tmp_path: Path) -> None:
    steps: list[dict[str, float]] = []
    own = trainer(tmp_path, per_device_train_batch_size=2, max_steps=4, logging_steps=2)
    add = own.means.add

    def spy(terms: dict[str, torch.Tensor]) -> None:
        steps.append({name: value.item() for name, value in terms.items()})
        add(terms)

    own.means.add = spy
    own.train()
    lines = [line for line in own.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4] and len(steps) == 4
    for line, part in zip(lines, (steps[:2], steps[2:]), strict=True):
        for name in ("task_loss", "attention_pull.1", "embedding_push"):
            assert line[name] == pytest.approx((part[0][name] + part[1][name]) / 2, rel=1e-6)
        mean = 2 * line["task_loss"] + 5.0 * line["attention_pull.1"] + 0.5 * line["embedding_push"]
        assert line["loss"] == pytest.approx(mean, rel=1e-5)


def test_another_training_begins_the_log_anew(tmp_path: Path) -> None:
    own = trainer(tmp_path, max_steps=3, logging_steps=2)
    own.train()  # the last step is in no line
    own.train()
    (line,) = [line for line in own.state.log_history if "loss" in line]
    mean = 2 * line["task_loss"] + 5.0 * line["attention_pull.1"] + 0.5 * line["embedding_push"]
    assert line["loss"] == pytest.approx(mean, rel=1e-5)


def test_a_weight_gets_the_optimiser_step(tmp_path: Path) -> None:
    asked: list[int] = []

    def weight(step: int) -> float:
        asked.append(step)
        return 1.0

    pull = [ear_ops.AttentionPull(1, weight)]
    trainer(tmp_path, pull, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2).train()
    assert asked == [0, 0, 1, 1]


def test_evaluation_is_the_trainers(tmp_path: Path) -> None:
    own = trainer(tmp_path, options={"eval_dataset": Pairs()})
    own.data_collator = one_view
    batch = one_view([Pairs()[i] for i in range(PAIRS)])
    expected = F.cross_entropy(own.model.eval()(**{**batch, "labels": None}).logits, batch["labels"])
    assert own.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert own.means.pop() == {}


@pytest.mark.parametrize("use", ["evaluate", "predict"])
def test_evaluation_on_both_views_is_refused(tmp_path: Path, use: str) -> None:
    own = trainer(tmp_path, options={"eval_dataset": Pairs()}, per_device_eval_batch_size=4)
    with pytest.raises(ValueError, match=r"eval_dataset: expected batches of one view.* got 8 rows to 4 labels.*Pair"):
        own.evaluate() if use == "evaluate" else own.predict(Pairs())
    own.detach()


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_sampling_by_lengths_that_the_items_lack_is_refused(tmp_path: Path, strategy: str) -> None:
    if not hasattr(transformers.TrainingArguments, "train_sampling_strategy"):
        pytest.skip("this transformers has no sampling strategies")
    example = ear_ops.data.PairExample("a text", "another", 0)
    views = ear_ops.data.PairViews([example] * 8)
    words = rf"train_sampling_strategy: '{strategy}' takes the length of 'input_ids'.*PairViews.*='random'"
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, options={"train_dataset": views}, train_sampling_strategy=strategy)
    trainer(tmp_path, options={"train_dataset": views}).detach()
    with_lengths = [{"input_ids": [1, 2]}] * 8
    trainer(tmp_path, options={"train_dataset": with_lengths}, train_sampling_strategy=strategy).detach()


def test_no_items_are_counted(tmp_path: Path) -> None:
    """The loss is a mean over pairs; a count of labels would be gathered from all processes in every step."""
    own = trainer(tmp_path)
    batch = both_views([Pairs()[i] for i in range(4)])
    assert own._get_num_items_in_batch([batch, batch], torch.device("cpu")) is None


def test_a_term_that_stays_zero_warns_once(tmp_path: Path) -> None:
    own = trainer(tmp_path, options={"train_dataset": Pairs(same=True)}, max_steps=3, logging_steps=1)
    with pytest.warns(UserWarning, match=r"attention_pull\.1 was exactly 0 over the last 1 steps") as caught:
        own.train()
    messages = [str(warning.message) for warning in caught]
    assert sum("was exactly 0" in message for message in messages) == 2, "the push and the pull, once each"


def test_a_term_that_some_steps_lack_is_a_mean_over_the_others() -> None:
    means = ear_ops.RunningMeans()
    means.add({"always": torch.tensor(1.0), "sometimes": torch.tensor(4.0)})
    means.add({"always": torch.tensor(3.0)})
    means.add({"always": torch.tensor(5.0), "sometimes": torch.tensor(8.0)})
    assert means.pop() == {"always": 3.0, "sometimes": 6.0}


def test_running_means_are_read_once_and_need_no_graph() -> None:
    means = ear_ops.RunningMeans()
    assert means.pop() == {}
    for value in (1.0, 2.0, 6.0):
        means.add({"a": torch.tensor(value, requires_grad=True), "b": torch.tensor(-value, dtype=torch.float64)})
    assert means.pop(lambda own: 2 * own) == {"a": 6.0, "b": -6.0}
    assert means.pop() == {}
    means.add({"a": torch.tensor(0.0)})
    with pytest.warns(UserWarning, match="a was exactly 0"):
        means.pop()
    means.add({"a": torch.tensor(0.0)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert means.pop() == {"a": 0.0}


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ({"remove_unused_columns": True}, {}, "remove_unused_columns=True drops the augmented view"),
        ({"accelerator_config": {"dispatch_batches": True}}, {}, "dispatch_batches splits the pairs"),
        ({}, {"regularizers": [ear_ops.AttentionPull(3)]}, "layer: expected 1 to 2"),
    ],
)
def test_what_would_break_the_pairs_is_refused(
    tmp_path: Path, arguments: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, options=options, **arguments)


def test_a_model_that_every_training_builds_anew_is_refused(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="model_init: every train"):
        RegularizedTrainer(args=arguments, model_init=lambda: model(), regularizers=[ear_ops.AttentionPull(1)])


def test_streams_are_dispatched_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="None dispatches iterable data sets"):
        trainer(tmp_path, options={"train_dataset": Stream()})
    trainer(tmp_path, options={"train_dataset": Stream()}, accelerator_config={"dispatch_batches": False})


def test_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="do not run under DataParallel: show one GPU"):
        trainer(tmp_path)


def test_labels_that_fit_neither_pairs_nor_rows(tmp_path: Path) -> None:
    own = trainer(tmp_path)
    batch = both_views([Pairs()[i] for i in range(4)])
    own.model.train()
    with pytest.raises(ValueError, match=r"labels: expected 4 \(of the pairs\) or 8 \(of all rows\).* got 3"):
        own.compute_loss(own.model, {**batch, "labels": batch["labels"][:3]})


def test_a_batch_of_one_view_with_labels_of_its_rows(tmp_path: Path) -> None:
    """What the usual collator makes; positions of tokens may differ between the views."""
    own = trainer(tmp_path)
    batch = both_views([Pairs()[i] for i in range(4)])
    own.model.train()
    labels = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match=r"labels: .*got 0 in row 3 and 1 in row 7 of 8: does the batch hold both"):
        own.compute_loss(own.model, {**batch, "labels": labels})
    own.label_names = ["start_positions"]
    assert own._with_labels_of_both_views({**batch, "start_positions": labels})["start_positions"] is labels


def test_means_of_terms_on_several_devices_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one device here: the means must be brought to that of the first before they are stacked."""
    means, moved = ear_ops.RunningMeans(), []
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append(device) or self)
    assert means.pop() == {"a": 1.0, "b": 2.0} and moved == [torch.device("cpu")] * 2


class ColumnTrainer(transformers.Trainer):
    """Runs the model once a column, as Trainers of sentence encoders do."""

    runs = 2

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = [model(**inputs) for _ in range(self.runs)]
        loss = sum(output.loss for output in outputs) / self.runs
        return (loss, outputs[-1]) if return_outputs else loss


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_trainer_with_a_forward_for_each_column_is_refused(tmp_path: Path, with_teacher: bool) -> None:
    class Trainer(ear_ops.RegularizedTrainerMixin, ColumnTrainer):
        pass

    teacher = {"teacher": model(seed=1), "data_collator": one_view} if with_teacher else {"data_collator": both_views}
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False, max_steps=2, save_strategy="no"
    )
    own = Trainer(
        model(),
        arguments,
        train_dataset=Pairs(),
        eval_dataset=Pairs(),
        regularizers=[ear_ops.AttentionPull(1)],
        **teacher,
    )
    with pytest.raises(RuntimeError, match=r"Trainer ran the model several times for one loss.*Override training_loss"):
        own.train()
    own.runs = 1
    kept = own.model.train()(**{name: value for name, value in both_views([Pairs()[0]]).items() if name != "labels"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.train()  # what waited before a step is no part of it
    del kept
    own.runs, own.data_collator = 2, one_view
    own.evaluate()
