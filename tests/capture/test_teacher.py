"""A second model as the other view: the losses and gradients of eager attention maps, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from ear_ops import AttentionPull, EmbeddingPush, HiddenPull, SentencePull, attach


def model(layers=2, hidden=32, heads=4, seed=0, kind="bert"):
    """A classifier in eval mode, its attention far from uniform."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 60, "hidden_size": hidden, "intermediate_size": 48, "num_labels": 3}
    shape |= {"num_hidden_layers": layers, "num_attention_heads": heads, "pad_token_id": 0}
    if kind == "llama":
        config = transformers.LlamaConfig(**shape, num_key_value_heads=2)
    elif kind == "mistral":
        config = transformers.MistralConfig(**shape, num_key_value_heads=1, sliding_window=None)
    else:
        config = transformers.BertConfig(**shape)
    built = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return built.eval()


@pytest.fixture
def batch(tools):
    return tools.build_batch(rows=5)


def eager_maps(of, batch, layer):
    """[B, H, L, L] of the layer, counted from 1."""
    of.set_attn_implementation("eager")
    maps = of(**batch, output_attentions=True).attentions[layer - 1]
    of.set_attn_implementation("sdpa")
    return maps


def eager_pull(student_maps, teacher_maps, mask):
    counted = (mask[:, None, :, None] & mask[:, None, None, :]).expand_as(student_maps)
    return (student_maps - teacher_maps)[counted].square().sum() / counted.sum()


@pytest.mark.parametrize(
    ("teacher", "layer_map", "layer", "teacher_layer"),
    [
        ({"layers": 2}, None, 1, 1),
        ({"layers": 4}, None, 1, 2),
        ({"layers": 4, "hidden": 48}, None, 2, 4),  # heads of 12 numbers and not of 8, another scale
        ({"layers": 3, "hidden": 16}, {2: 3}, 2, 3),
        ({"layers": 3, "seed": 7}, {1: 3}, 1, 3),
    ],
)
def test_attention_is_pulled_towards_the_teachers(tools, batch, teacher, layer_map, layer, teacher_layer):
    student, teacher = model().train(), model(**{"seed": 1, **teacher})
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        target = eager_maps(teacher, batch, teacher_layer)
    student.bert.encoder.layer[0].attention.self.dropout.p = student.bert.encoder.layer[1].attention.self.dropout.p = 0
    expected = eager_pull(eager_maps(student, batch, layer), target, mask)
    expected_gradients = tools.gradients(student, expected)

    with attach(student, [AttentionPull(layer, weight=1.0)], teacher=teacher, layer_map=layer_map) as ear:
        with torch.no_grad():
            teacher(**batch)
        student(**batch)
        loss = ear.loss()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    tools.assert_same_gradients(tools.gradients(student, loss), expected_gradients)


def test_teacher_with_other_numbers_of_key_heads(tools, batch):
    student, teacher = model(kind="llama"), model(kind="mistral", seed=1)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        target = eager_maps(teacher, batch, 2)
    maps = eager_maps(student, batch, 2)
    counted = (mask[:, None, :, None] & mask[:, None, None, :]).expand_as(maps)
    assert float(maps.detach()[..., ~causal].abs().max()) == 0.0
    expected = (maps - target)[counted].square().sum() / counted.sum()
    expected_gradients = tools.gradients(student, expected)
    with attach(student, [AttentionPull(2, weight=1.0)], teacher=teacher) as ear:
        with torch.no_grad():
            teacher(**batch)
        student(**batch)
        loss = ear.loss()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    tools.assert_same_gradients(tools.gradients(student, loss), expected_gradients)


def test_sentences_are_pulled_towards_the_teachers(tools, batch):
    student, teacher = model(), model(layers=4, seed=1)
    mask = batch["attention_mask"].to(torch.float32)

    def pooled(of, layer):
        hidden = of(**batch, output_hidden_states=True).hidden_states[layer]
        return torch.einsum("blc,bl->bc", hidden, mask) / mask.sum(1, keepdim=True)

    expected = (pooled(student, 1) - pooled(teacher, 3).detach()).square().mean()
    expected_gradients = tools.gradients(student, expected)
    with attach(student, [SentencePull(1)], teacher=teacher, layer_map={1: 3}) as ear:
        with torch.no_grad():
            teacher(**batch)
        student(**batch)
        loss = ear.loss()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    tools.assert_same_gradients(tools.gradients(student, loss), expected_gradients)


def test_the_teacher_is_a_constant_even_with_grad_and_keeps_its_results(batch):
    student, teacher = model(), model(seed=1)
    before = teacher(**batch).logits
    with attach(student, [AttentionPull(1), SentencePull(2), EmbeddingPush()], teacher=teacher) as ear:
        assert torch.equal(teacher(**batch).logits, before)
        student(**batch)
        ear.loss().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.bert.embeddings.word_embeddings.weight.grad is not None
    assert not teacher._forward_hooks and not teacher._forward_pre_hooks, "detached from both"


def test_every_step_needs_the_teacher_and_the_model(batch):
    student, teacher = model(), model(seed=1)
    with attach(student, [AttentionPull(1)], teacher=teacher) as ear:
        for _ in range(2):
            with torch.no_grad():
                teacher(**batch)
            student(**batch)
            ear.loss()
        student(**batch)
        with pytest.raises(RuntimeError, match=r"attention_pull\.1: the teacher has not seen this batch"):
            ear.loss()
        teacher(**batch)
        with pytest.raises(RuntimeError, match="no forward was recorded"):
            ear.loss()
        with pytest.raises(RuntimeError, match="the teacher's forward is the other view"):
            ear.view("original")


def test_a_teacher_in_training_mode_is_refused(batch):
    student, teacher = model(), model(seed=1).train()
    with attach(student, [AttentionPull(1)], teacher=teacher) as ear:
        teacher(**batch)
        student(**batch)
        with pytest.raises(RuntimeError, match=r"the teacher is in training mode.*teacher\.eval\(\)"):
            ear.loss()


def test_models_that_saw_other_batches(batch):
    student, teacher = model(), model(seed=1)
    with attach(student, [AttentionPull(1)], teacher=teacher) as ear:
        teacher(**{name: tensor[:4] for name, tensor in batch.items()})
        student(**batch)
        with pytest.raises(ValueError, match="equally many rows in the model and its teacher, got 5 and 4"):
            ear.loss()


def other_tokens(batch):
    """The batch with other tokens, and so another one for the same mask."""
    return {**batch, "input_ids": torch.where(batch["input_ids"] > 10, batch["input_ids"] - 1, batch["input_ids"])}


def test_the_teacher_of_an_earlier_batch_is_refused(batch):
    """A teacher that was called before and forgotten in this step gave a loss without a word."""
    student, teacher = model(), model(seed=1)
    stale = pytest.raises(RuntimeError, match=r"attention_pull\.1: the teacher's last forward was of another batch")
    with attach(student, [AttentionPull(1)], teacher=teacher) as ear:
        teacher(**other_tokens(batch))
        student(**batch)
        with stale:
            ear.loss()
        teacher(**batch)
        student(**batch)  # a step whose loss was not taken
        student(**other_tokens(batch))
        with stale:
            ear.loss()
        student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        teacher(batch["input_ids"].clone(), batch["attention_mask"])
        ear.loss()


def test_a_batch_that_is_filled_anew_after_the_teacher_is_another_batch(batch):
    student, teacher = model(), model(seed=1)
    with attach(student, [AttentionPull(1)], teacher=teacher) as ear:
        teacher(**batch)
        batch["input_ids"].copy_(other_tokens(batch)["input_ids"])
        student(**batch)
        with pytest.raises(RuntimeError, match="of another batch"):
            ear.loss()


def test_a_teacher_with_another_vocabulary_has_other_token_ids(batch):
    student, teacher = model(), model(seed=1)
    teacher.config.vocab_size += 1
    with attach(student, [AttentionPull(1)], teacher=teacher) as ear:
        teacher(**other_tokens(batch))
        student(**batch)
        assert ear.loss().item() > 0


def test_heads_and_hidden_sizes_that_do_not_compare(batch):
    for teacher, regularizer, message in (
        (model(heads=2, seed=1), AttentionPull(1), r"attention_pull\.1: expected equally many heads .* got 4 and 2"),
        (
            model(hidden=48, seed=1),
            SentencePull(1),
            r"sentence_pull\.1: expected hidden states of one size .* 32 and 48",
        ),
    ):
        student = model()
        with attach(student, [regularizer], teacher=teacher) as ear:
            teacher(**batch)
            student(**batch)
            with pytest.raises(ValueError, match=message):
                ear.loss()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layer_map": {1: 1}}, TypeError, "layer_map: expected None without a teacher"),
        ({"teacher": "bert"}, TypeError, "teacher: expected a torch.nn.Module, got str"),
        ({"teacher": {}, "layer_map": [1]}, TypeError, "layer_map: expected a mapping"),
        ({"teacher": {}, "layer_map": {1: 1}}, ValueError, "layer_map: expected an entry for layer 2 .*; it has 1"),
        ({"teacher": {}, "layer_map": {2: "2"}}, TypeError, "layer_map: expected layer 2 to map to a layer number"),
        ({"teacher": {}, "layer_map": {2: 9}}, ValueError, "teacher: layer: expected 1 to 2"),
        ({"teacher": {"layers": 3}}, ValueError, "the teacher has 3 layers and the student 2, which do not divide"),
    ],
)
def test_bad_arguments_change_nothing(options, error, match):
    student = model()
    if isinstance(options.get("teacher"), dict):
        options = {**options, "teacher": model(seed=1, **options["teacher"])}
    with pytest.raises(error, match=match):
        attach(student, [AttentionPull(2)], **options)
    hooked = [student, options.get("teacher")] if isinstance(options.get("teacher"), torch.nn.Module) else [student]
    assert not any(module._forward_hooks or module._forward_pre_hooks for of in hooked for module in of.modules())


def test_the_student_is_not_its_own_teacher():
    student = model()
    with pytest.raises(ValueError, match="got the student itself"):
        attach(student, [AttentionPull(1)], teacher=student)
    attach(student, [AttentionPull(1)], teacher=copy.deepcopy(student)).detach()


def test_projections_map_by_path():
    class Attention(torch.nn.Module):
        def __init__(self, query, key):
            super().__init__()
            self.add_module(query, torch.nn.Linear(8, 8))
            self.add_module(key, torch.nn.Linear(8, 8))
            self.names = query, key

        def forward(self, hidden):
            query, key = (self.get_submodule(name)(hidden) for name in self.names)
            return torch.softmax(query @ key.mT / 8**0.5, -1)

    student, teacher = Attention("q", "k"), Attention("query", "key").eval()
    hidden = torch.randn(3, 5, 8)
    pull = AttentionPull(query="q", key="k", num_heads=1, weight=1.0)
    with attach(student, [pull], teacher=teacher, layer_map={"q": "query", "k": "key"}) as ear:
        target, maps = teacher(hidden), student(hidden)
        torch.testing.assert_close(ear.loss(), (maps - target).square().mean())
    with pytest.raises(ValueError, match="teacher: query: Attention has no module 'q'"):
        attach(student, [pull], teacher=teacher)


def test_a_layer_by_its_path_follows_the_layer_map(batch):
    student, teacher = model(), model(layers=4, seed=1)
    losses = []
    for layer in ([1, 2], "bert.encoder.layer.*.attention.self"):
        for layer_map in (None, {1: 1, 2: 3}):
            with attach(student, [AttentionPull(layer)], teacher=teacher, layer_map=layer_map) as ear:
                with torch.no_grad():
                    teacher(**batch)
                student(**batch)
                losses.append(ear.loss().item())
    assert losses[:2] == losses[2:] and losses[0] != losses[1]
    with pytest.raises(ValueError, match="expected an entry for layer 2 of the student"):
        attach(student, [AttentionPull("bert.encoder.layer.1.attention.self")], teacher=teacher, layer_map={1: 1})
    path = {"bert.encoder.layer.1.attention.self": "bert.encoder.layer.0.attention.self"}
    attach(student, [AttentionPull(next(iter(path)))], teacher=teacher, layer_map=path).detach()


def test_a_teacher_in_inference_mode_and_one_row_of_word_ids_for_both(batch):
    student, teacher = model(), model(seed=1)
    rows, length = batch["input_ids"].shape
    word_ids = (torch.arange(length) // 2).expand(rows, length)
    losses = []
    with attach(student, [AttentionPull(1, alignment="word"), SentencePull(2)], teacher=teacher) as ear:
        for mode in (torch.no_grad, torch.inference_mode):
            for given in ((word_ids, word_ids), word_ids):
                with mode():
                    teacher(**batch)
                student(**batch)
                loss = ear.loss(word_ids=given)
                loss.backward()
                losses.append(loss.item())
    assert losses == losses[:1] * 4


def test_a_teacher_with_the_students_layers_is_called_after_the_student(tools):
    """Its adapters or its head may differ, as those of a model with LoRA and of the model below it do."""
    student, teacher, batch = tools.build_model("bert"), tools.build_model("bert").eval(), tools.build_batch()
    teacher.bert = student.bert
    with attach(student, [HiddenPull(1)], teacher=teacher, layer_map={1: 2}) as ear:
        with torch.no_grad():
            teacher(**batch)
        student.eval()(**batch)
        with pytest.raises(RuntimeError, match="where a teacher shares that part, call the teacher after the student"):
            ear.loss()
        hidden = student(**batch, output_hidden_states=True).hidden_states
        with torch.no_grad():
            teacher(**batch)
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(ear.loss(), (hidden[1] - hidden[2]).square()[real].mean())
