"""In each way people train, the gradients are those of the same losses written out from eager attention.

Compiled: test_compiled_models.py. LoRA: test_layers.py. DDP and FSDP2: tests/test_two_processes.py.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import pytest
import torch
import transformers
from transformers.modeling_utils import AttentionInterface

from ear_ops import AttentionPull, EmbeddingPush, SentencePull, attach

TERMS = (EmbeddingPush(5.0), AttentionPull(3, 30.0), SentencePull(2, 1.0))  # gradients about as large as the logits'


def own_loss(logits, mask):
    """Of a classifier's logits ``[2B, K]``, or a language model's ``[2B, L, V]`` at real tokens."""
    return logits[mask.bool()].square().mean() if logits.dim() == 3 else logits.float().square().mean()


def eager_gradients(tools, model, batch, autocast=False):
    """Of the logits and TERMS, ``model`` having eager attention, in plain torch."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**batch, output_attentions=True, output_hidden_states=True)
    mask = batch["attention_mask"]
    pull = tools.attention_pull(out.attentions[2].float(), mask)
    push = -tools.pooled_difference(out.hidden_states[0], mask)
    sentence = tools.pooled_difference(out.hidden_states[2], mask)
    assert float(pull.detach()) > 1e-4
    return tools.gradients(model, own_loss(out.logits, mask) + 5.0 * push + 30.0 * pull + sentence)


def attached_gradients(tools, model, batch, *ears):
    """Of the logits and what is attached."""
    total = own_loss(model(**batch).logits, batch["attention_mask"])
    return tools.gradients(model, sum((ear.loss() for ear in ears), total))


@pytest.fixture(scope="module")
def batch(tools):
    return tools.build_batch()


@pytest.fixture(scope="module")
def expected(tools, batch):
    """The gradients of eager attention, of the model of each seed."""
    return {seed: eager_gradients(tools, tools.build_model("bert", "eager", seed), batch) for seed in (0, 1)}


@pytest.fixture
def model(tools):
    return tools.build_model("bert")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_non_reentrant_checkpointing(tools, batch, expected, model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with attach(model, TERMS) as ear:
        for _ in range(2):
            tools.assert_same_gradients(attached_gradients(tools, model, batch, ear), expected[0])


def test_eval_mode_with_grad(tools, batch, expected, model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    with attach(model.eval(), TERMS) as ear:
        tools.assert_same_gradients(attached_gradients(tools, model, batch, ear), expected[0])


def test_evaluation_between_forward_and_forward(tools, batch, expected, model):
    with attach(model, TERMS) as ear:
        for _ in range(2):
            model.eval()
            with torch.no_grad():
                model(**tools.build_batch(rows=5, length=6))
            tools.assert_same_gradients(attached_gradients(tools, model.train(), batch, ear), expected[0])


def causal_model(implementation):
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=2, pad_token_id=0)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return model


def test_generation_between_steps(tools):
    """With its cache of keys, in rows of any number."""
    batch = tools.build_batch(side="left")
    expected = eager_gradients(tools, causal_model("eager"), batch)
    model, prompt = causal_model("sdpa"), batch["input_ids"][:1]
    plain = model.generate(prompt, max_new_tokens=3, do_sample=False)
    with attach(model, TERMS) as ear:
        for _ in range(2):
            tools.assert_same_gradients(attached_gradients(tools, model, batch, ear), expected)
            assert torch.equal(model.generate(prompt, max_new_tokens=3, do_sample=False), plain)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save_pretrained"])
def test_a_copy_and_its_original(tools, batch, expected, model, how, tmp_path):
    """Copied while a record is held; each gets its own gradients, whichever is attached."""
    with attach(model, TERMS) as ear:
        model(**batch)
        if how == "deepcopy":
            copied = copy.deepcopy(model)
        elif how == "pickle":
            copied = pickle.loads(pickle.dumps(model))
        else:
            model.save_pretrained(tmp_path)
            copied = type(model).from_pretrained(tmp_path).train()
        with attach(copied, TERMS) as own:
            tools.assert_same_gradients(attached_gradients(tools, copied, batch, own), expected[0])
            tools.assert_same_gradients(attached_gradients(tools, model, batch, ear), expected[0])


def test_after_an_exception_in_the_middle_of_a_forward(tools, batch, expected, model):
    with attach(model, TERMS) as ear:
        for layer in model.bert.encoder.layer[1], model.bert.encoder.layer[3]:
            handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**batch)
            handle.remove()
            tools.assert_same_gradients(attached_gradients(tools, model, batch, ear), expected[0])


def test_attached_twice(tools, batch, expected, model):
    """The push by one attachment, the rest by another, of one forward."""
    with attach(model, TERMS[:1]) as first, attach(model, TERMS[1:]) as second:
        tools.assert_same_gradients(attached_gradients(tools, model, batch, first, second), expected[0])


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)])
def test_detached_in_any_order(tools, batch, expected, model, order):
    """Whichever of three is left, in whatever order the others went, has its gradients."""
    ears = [attach(model, TERMS) for _ in range(3)]
    for index in order:
        model(**batch)
        ears[index].detach()
    (left,) = (ear for index, ear in enumerate(ears) if index not in order)
    tools.assert_same_gradients(attached_gradients(tools, model, batch, left), expected[0])
    left.detach()


def test_two_models_at_once(tools, batch, expected):
    """Both forwards before either loss, and one backward for both."""
    models = [tools.build_model("bert", seed=seed) for seed in (0, 1)]
    with attach(models[0], TERMS) as first, attach(models[1], TERMS) as second:
        totals = [own_loss(model(**batch).logits, batch["attention_mask"]) for model in models]
        (totals[0] + totals[1] + second.loss() + first.loss()).backward()
    for seed, model in enumerate(models):
        actual = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
        tools.assert_same_gradients(actual, expected[seed])


def test_a_model_in_each_thread(tools, batch, expected):
    """Attached, run and detached at the same time."""
    models = [tools.build_model("bert", seed=seed) for seed in (0, 1)]
    start, results = threading.Barrier(2, timeout=60), {0: [], 1: []}

    def work(index):
        for _ in range(3):
            start.wait()
            with attach(models[index], TERMS) as ear:
                results[index].append(attached_gradients(tools, models[index], batch, ear))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, found in results.items():
        assert len(found) == 3
        for gradients in found:
            tools.assert_same_gradients(gradients, expected[index])


@pytest.mark.parametrize("loss_inside", [True, False])
def test_autocast_loses_no_more_than_eager_attention_does(tools, batch, expected, model, loss_inside):
    """To bfloat16, measured against float32."""

    def error(gradients):
        return sum(float((gradients[name] - exact).square().sum()) for name, exact in expected[0].items()) ** 0.5

    inside, outside = torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext()
    with attach(model, TERMS) as ear:
        with inside:
            total = own_loss(model(**batch).logits, batch["attention_mask"])
            total = total + ear.loss() if loss_inside else total
        with outside:
            total = total if loss_inside else total + ear.loss()
        actual = tools.gradients(model, total)
    oracle = eager_gradients(tools, tools.build_model("bert", "eager"), batch, autocast=True)
    assert 0 < error(actual) < 1.5 * error(oracle)


@pytest.mark.parametrize("side", ["left", "right"])
def test_own_attention_function_that_gets_no_mask_is_refused_where_it_attends_to_padding(tools, monkeypatch, side):
    """Without a mask function under its name transformers builds no mask; a causal one needs none for right padding."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", dict(AttentionMaskInterface._global_mapping))
    AttentionInterface.register("mine", sdpa_attention_forward)
    batch = tools.build_batch(side=side)
    expected = {}
    for kind, refused in (("llama", side == "left"), ("bert", True)):
        model = tools.build_model(kind)
        with attach(model, [AttentionPull(2)]) as ear:
            model(**batch)
            expected[kind] = ear.loss()
            model.set_attn_implementation("mine")
            model(**batch)
            if refused:
                with pytest.raises(ValueError, match=r"attention_pull\.2: .* no mask reached .* 'mine'"):
                    ear.loss()
            else:
                torch.testing.assert_close(ear.loss(), expected[kind])
            model(input_ids=batch["input_ids"].clamp(min=3))  # without padding
            ear.loss()
    AttentionMaskInterface.register("mine", sdpa_mask)
    for kind, loss in expected.items():
        model = tools.build_model(kind, "mine")
        with attach(model, [AttentionPull(2)]) as ear:
            model(**batch)
            torch.testing.assert_close(ear.loss(), loss)
