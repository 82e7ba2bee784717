"""When something is recorded, how long it lives, and what attaching leaves alone."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ear_ops import AttentionPull, EmbeddingPush, SentencePull, attach, pooled_distance
from ear_ops.capture.records import AttentionCall, Record

TERMS = (EmbeddingPush(0.5), AttentionPull(3, 3.0), SentencePull(2, 0.25))


def test_loss_without_a_forward_names_the_layer(tools):
    model = tools.build_model("bert")
    with attach(model, TERMS) as ear:
        with pytest.raises(RuntimeError, match=r"attention_pull\.3.*no forward was recorded"):
            ear.loss()
        model(**tools.build_batch())
        ear.loss()
        with pytest.raises(RuntimeError, match="no forward was recorded"):
            ear.loss()  # popped: once per forward


def test_odd_batch_raises_in_loss_not_in_forward(tools):
    model = tools.build_model("bert")
    with attach(model, TERMS) as ear:
        model(**tools.build_batch(rows=5))
        with pytest.raises(ValueError, match=r"embedding_push: expected an even batch.*got 5 rows"):
            ear.loss()


def test_evaluation_records_nothing_and_drops_what_was_left(tools):
    model = tools.build_model("bert")
    batch = tools.build_batch()
    with attach(model, TERMS) as ear:
        model(**batch)
        with torch.no_grad():
            model(**tools.build_batch(rows=5))
        with pytest.raises(RuntimeError, match="no forward was recorded"):
            ear.loss()
        model.eval()
        model(**batch)  # eval with grad is recorded
        assert ear.loss().requires_grad


def test_a_record_is_released_by_loss_and_by_the_next_forward(tools):
    model = tools.build_model("bert")
    seen = []

    def remember(module, args, output):
        seen.append(weakref.ref(output))

    model.bert.encoder.layer[1].register_forward_hook(remember)
    with attach(model, TERMS) as ear:
        model(**tools.build_batch())
        model(**tools.build_batch())
        gc.collect()
        assert seen[0]() is None and seen[1]() is not None
        ear.loss().detach()
        gc.collect()
        assert seen[1]() is None


def test_generate_is_untouched(tools):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, pad_token_id=0
    )
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(3, 60, (3, 5))
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False)
    with attach(model, TERMS) as ear:
        assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), expected)
        assert ear._recorder.record is None and ear._recorder.both is None


def test_the_terms_keep_their_graphs(tools):
    model = tools.build_model("bert")
    with attach(model, TERMS) as ear:
        model(**tools.build_batch())
        terms = ear.terms()
        assert {name: term.item() for name, term in terms.items()} == {
            name: term.item() for name, term in ear.components().items()
        }
        weighed = sum(term.weight * terms[term.name] for term in ear.regularizers)
        gradient = torch.autograd.grad(weighed, model.get_input_embeddings().weight)[0]
        model(**tools.build_batch())
        loss = ear.loss()
        torch.testing.assert_close(loss, weighed)
        torch.testing.assert_close(torch.autograd.grad(loss, model.get_input_embeddings().weight)[0], gradient)


@pytest.mark.parametrize("views", ["one forward", "two forwards"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_mask_in_place_of_the_models_has_a_row_for_each_row(tools, views, rows):
    model, batch = tools.build_model("bert"), tools.build_batch()
    count, length = batch["input_ids"].shape
    assert rows < count
    with attach(model, [EmbeddingPush()]) as ear:
        if views == "one forward":
            model(**batch)
        else:
            for name in ("original", "augmented"):
                with ear.view(name):
                    model(**batch)
        with pytest.raises(ValueError, match=rf"expected .*(got {rows}|received \[{rows}, {length}\])"):
            ear.loss(attention_mask=torch.ones(rows, length))
        model(**batch)
        with pytest.raises(ValueError, match=r"attention_mask: expected a tensor \[2B, L\].*; got \['int'\]"):
            ear.loss(attention_mask=3)


def test_kernel_registered_while_attached_is_recorded_and_kept(tools):
    sdpa = AttentionInterface()["sdpa"]
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        return sdpa(*args, **kwargs)

    model = tools.build_model("bert")
    batch = tools.build_batch()
    ear = attach(model, TERMS)
    model(**batch)
    expected = ear.loss()
    AttentionInterface.register("sdpa", counting)
    try:
        model(**batch)
        assert len(calls) == 4
        assert torch.equal(ear.loss(), expected)
        ear.detach()
        assert AttentionInterface()["sdpa"] is counting
    finally:
        AttentionInterface.register("sdpa", sdpa)


def test_kernel_that_calls_another_counts_once(tools):
    """A kernel that falls back to a registered one would report the same query twice."""

    def falling_back(*args, **kwargs):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    AttentionInterface.register("falling_back", falling_back)
    transformers.AttentionMaskInterface.register("falling_back", transformers.masking_utils.sdpa_mask)
    try:
        model = tools.build_model("bert", "falling_back")
        reference = tools.build_model("bert")
        losses = []
        for each in (model, reference):
            with attach(each, TERMS) as ear:
                each(**tools.build_batch())
                losses.append(ear.loss())
        assert torch.equal(*losses)
    finally:
        AttentionInterface._global_mapping.pop("falling_back")
        transformers.AttentionMaskInterface._global_mapping.pop("falling_back")


def test_exception_in_the_middle_of_a_forward(tools):
    model = tools.build_model("bert")
    batch = tools.build_batch()
    with attach(model, TERMS) as ear:
        model(**batch)
        expected = ear.loss()
        handle = model.classifier.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        handle.remove()
        model.bert(**batch)  # not a forward of the root; begins a record of its own, and ends it
        model(**batch)
        assert torch.equal(ear.loss(), expected)
        handle = model.classifier.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        handle.remove()
        with pytest.raises(RuntimeError, match="no forward was recorded"):
            ear.loss()


@pytest.mark.parametrize(
    ("interrupted_call", "next_call"), [("model", "model"), ("forward", "model"), ("forward", "forward")]
)
def test_interrupted_forward_does_not_block_the_next(tools, interrupted_call, next_call):
    """No hook runs on KeyboardInterrupt; "forward" passes by the hooks of the root, see the next test."""
    model = tools.build_model("bert")
    calls = {"model": model, "forward": model.forward}
    batch = tools.build_batch()

    def interrupt(module, args):
        raise KeyboardInterrupt

    with attach(model, TERMS) as ear:
        model(**batch)
        expected = ear.loss()
        handle = model.bert.encoder.layer[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            calls[interrupted_call](**batch)
        handle.remove()
        calls[next_call](**batch)
        assert torch.equal(ear.loss(), expected)


def test_forward_that_passes_by_the_hooks_of_the_root(tools):
    """peft calls ``model.forward``, not ``model(...)``, when it is applied after attach()."""
    model = tools.build_model("bert")
    batch = tools.build_batch()
    with attach(model, TERMS) as ear:
        model(**batch)
        expected = ear.loss()
        model.forward(**batch)
        assert torch.equal(ear.loss(), expected)


def test_views_need_each_other(tools):
    model = tools.build_model("bert")
    half = {name: tensor[:3] for name, tensor in tools.build_batch().items()}
    with attach(model, TERMS) as ear:
        with ear.view("original"):
            model(**half)
        with pytest.raises(RuntimeError, match=r"only the original view was recorded.*ear\.view\(\"augmented\"\)"):
            ear.loss()
        with pytest.raises(ValueError, match="expected one of 'original', 'augmented', got 'x'"), ear.view("x"):
            pass
        with pytest.raises(RuntimeError, match="'augmented' was opened inside 'original'"), ear.view("original"):  # noqa: SIM117
            with ear.view("augmented"):
                pass
        with ear.view("original"):
            model(**half)
        model(**tools.build_batch())  # outside of views: both views in one batch, the rest is dropped
        assert len(ear._recorder.take()) == 1


def test_views_of_different_length_name_both_shapes(tools):
    model = tools.build_model("bert")
    with attach(model, [AttentionPull(3)]) as ear:
        with ear.view("original"):
            model(**tools.build_batch(rows=2, length=6))
        with ear.view("augmented"):
            model(**tools.build_batch(rows=2, length=8))
        with pytest.raises(ValueError, match=r"\[2, 4, 6, 8\].*\[2, 4, 8, 8\]"):
            ear.loss()


def checkpointed_gradients(tools, use_reentrant, terms=TERMS):
    model = tools.build_model("bert")
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with attach(model, terms) as ear:
        out = model(**tools.build_batch())
        total = out.logits.square().sum() + ear.loss()
        gradients = tools.gradients(model, total)
        assert ear._recorder.both is None  # the recomputation is not taken for a forward
    return gradients


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_non_reentrant_checkpointing_is_exact(tools):
    plain, checkpointed = checkpointed_gradients(tools, None), checkpointed_gradients(tools, False)
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_reentrant_checkpointing_raises(tools):
    with pytest.raises(RuntimeError, match=r"attention_pull\.3: the layer ran without grad.*use_reentrant"):
        checkpointed_gradients(tools, True, [AttentionPull(3)])


def test_constant_term_warns_once(tools):
    model = tools.build_model("bert")
    model.bert.embeddings.requires_grad_(False)
    batch = tools.build_batch()
    with attach(model, [EmbeddingPush(1.0), AttentionPull(3)]) as ear:
        model(**batch)
        with pytest.warns(UserWarning, match="embedding_push has no gradient") as caught:
            loss = ear.loss()
        assert len(caught) == 1 and caught[0].filename == __file__
        assert loss.requires_grad  # the pull still trains
        model(**batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ear.loss()


@pytest.mark.parametrize("call", ["loss", "terms"])
def test_warnings_point_at_the_line_that_asked(tools, call):
    model = tools.build_model("bert").requires_grad_(False)
    with attach(model, [EmbeddingPush()]) as ear:
        model(**tools.build_batch())
        with pytest.warns(UserWarning, match="embedding_push has no gradient") as caught:
            getattr(ear, call)()
    assert [warning.filename for warning in caught] == [__file__]


def test_data_parallel_raises(tools):
    model = tools.build_model("bert")
    with pytest.raises(ValueError, match="DataParallel"):
        attach(nn.DataParallel(model), TERMS)
    with attach(model, TERMS):
        replica = model._replicate_for_data_parallel()
        with pytest.raises(RuntimeError, match="DataParallel"):
            replica(**tools.build_batch())


def test_a_layer_that_runs_twice_is_refused(tools):
    class Twice(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, **batch):
            return self.encoder(**batch).logits + self.encoder(**batch).logits

    model = Twice(tools.build_model("bert"))
    with attach(model, [AttentionPull(3)]) as ear:
        model(**tools.build_batch())
        with pytest.raises(RuntimeError, match=r"attention_pull\.3: expected one call in a forward, got 2"):
            ear.loss()


def test_a_layer_that_is_skipped_is_named(tools):
    model = tools.build_model("bert")
    with attach(model, [AttentionPull(3)]) as ear:
        layers = model.bert.encoder.layer
        model.bert.encoder.layer = layers[:2]
        model(**tools.build_batch())
        with pytest.raises(RuntimeError, match=r"attention_pull\.3: the last forward did not come through here"):
            ear.loss()


def test_a_part_that_is_called_by_itself_does_not_take_the_models_place(tools):
    model, pair, other = tools.build_model("bert"), tools.build_batch(), tools.build_batch(rows=6)
    with attach(model, TERMS) as ear:
        model(**pair)
        expected = ear.loss()
        model(**pair)
        with torch.no_grad():
            model.bert(**other)
        assert torch.equal(ear.loss(), expected)
        model(**pair)
        model.bert(**other)
        with pytest.raises(RuntimeError, match="its part 'bert' was called by itself with grad"):
            ear.loss()
        model.bert(**pair)  # alone it is a forward, as peft makes one
        assert torch.equal(ear.loss(), expected)
        model(**pair)
        assert torch.equal(ear.loss(), expected)


def test_what_is_changed_in_place_afterwards_is_refused():
    class Block(nn.Module):
        def forward(self, hidden):
            return 2 * hidden

    class Model(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.blocks, self.in_place = nn.ModuleList([Block()]), in_place

        def forward(self, hidden, attention_mask=None):
            hidden = self.blocks[0](hidden)
            return hidden.mul_(3) if self.in_place else hidden * 3

    hidden = torch.randn(4, 5, 8, requires_grad=True)
    for in_place in (False, True):
        model = Model(in_place)
        with attach(model, [SentencePull(1)]) as ear:
            model(hidden)
            if in_place:
                with pytest.raises(RuntimeError, match=r"sentence_pull\.1: .* changed in place afterwards"):
                    ear.loss()
            else:
                assert ear.loss() > 0


def llama():
    torch.manual_seed(0)
    shape = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**shape, intermediate_size=48, num_key_value_heads=2, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


def test_keys_that_the_second_view_overwrites_are_refused():
    """A static cache for both views: the keys of the first are gone."""
    model, ids = llama(), torch.randint(3, 60, (4, 6))
    cache = transformers.StaticCache(config=model.config, max_cache_len=6)
    with attach(model, [AttentionPull(2)]) as ear:
        with ear.view("original"), torch.no_grad():
            model(input_ids=ids[:2], past_key_values=cache, use_cache=True)
        cache.reset()
        with ear.view("augmented"):
            model(input_ids=ids[2:], past_key_values=cache, use_cache=True)
        with pytest.raises(RuntimeError, match=r"attention_pull\.2: the tensor of the keys .* changed in place"):
            ear.loss()


@pytest.mark.parametrize("term", [AttentionPull(2), EmbeddingPush(), SentencePull(1)])
@pytest.mark.parametrize("dimensions", [2, 4])
def test_a_mask_buffer_that_is_filled_again_before_the_loss_is_refused(tools, term, dimensions):
    model, batch = tools.build_model("bert"), tools.build_batch()
    mask = batch["attention_mask"].bool()
    mask = mask if dimensions == 2 else mask[:, None, None, :].expand(6, 1, 9, 9).contiguous()
    with attach(model, [term]) as ear:
        model(input_ids=batch["input_ids"], attention_mask=mask)
        ear.loss()
        model(input_ids=batch["input_ids"], attention_mask=mask)
        mask.fill_(True)
        with pytest.raises(RuntimeError, match=rf"{term.name}: the attention.mask .* changed in place"):
            ear.loss()


def test_a_mask_of_the_attention_function_that_is_filled_again_is_refused(tools):
    """The second view reuses the first one's mask; only the function of the layer was given it."""
    query = torch.randn(2, 4, 5, 8)
    for position, name in ((1, "tensor of the keys"), (3, "attention mask"), (4, "position bias")):
        given = [query.clone(), query.clone(), query.clone(), torch.ones(2, 1, 5, 5), torch.zeros(1, 4, 5, 5)]
        record = Record()
        record.add("layer", AttentionCall("sdpa", nn.Identity(), *given[:4], position_bias=given[4]))
        record.call("layer", "x")
        given[position].zero_()
        with pytest.raises(RuntimeError, match=f"x: the {name} that was taken here was changed in place"):
            record.call("layer", "x")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_export_records_no_forward(tools, strict):
    model, batch = tools.build_model("bert").eval(), tools.build_batch()
    with attach(model, TERMS) as ear:
        torch.export.export(model, (batch["input_ids"], batch["attention_mask"]), strict=strict)
        with pytest.raises(RuntimeError, match="no forward was recorded"):
            ear.loss()
        model(**batch)
        assert ear.loss().requires_grad


@pytest.mark.parametrize("views", [False, True])
def test_a_forward_that_is_interrupted_behind_the_tapped_layers_gives_no_loss(tools, views):
    model, batch = tools.build_model("bert"), tools.build_batch()

    def interrupt(module, args):
        raise KeyboardInterrupt

    def forward(ear, view):
        with ear.view(view) if views else contextlib.nullcontext():
            model(**batch)

    with attach(model, TERMS) as ear:
        handle = model.classifier.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            forward(ear, "original")
        handle.remove()
        if views:
            forward(ear, "augmented")
        with pytest.raises(RuntimeError, match="no complete forward was recorded"):
            ear.loss()
        for view in ("original", "augmented"):
            forward(ear, view)
        ear.loss()


def test_the_last_kind_of_record_counts(tools):
    """A forward of both views, or two named views: whichever began first and was not taken is gone."""
    model, batch = tools.build_model("bert"), tools.build_batch()
    other = {name: rows[:4] for name, rows in tools.build_batch(seed=2).items()}

    def named(ear, view, rows):
        with ear.view(view):
            model(**{name: tensor[rows] for name, tensor in batch.items()})

    with attach(model, TERMS) as ear:
        model(**batch)
        expected = ear.loss()
        model(**other)
        named(ear, "original", slice(3))
        named(ear, "augmented", slice(3, 6))
        torch.testing.assert_close(ear.loss(), expected)
        model(**other)
        named(ear, "augmented", slice(3, 6))
        with pytest.raises(RuntimeError, match="only the augmented view was recorded"):
            ear.loss()
        for first, second in (("original", "augmented"), ("augmented", "original")):
            named(ear, first, slice(3))
            model(**other)
            named(ear, second, slice(3, 6))
            with pytest.raises(RuntimeError, match=f"only the {second} view was recorded"):
                ear.loss()


@pytest.mark.parametrize("first", ["hooks", "attach"])
def test_hidden_states_are_those_that_hooks_put_in_place(tools, first):
    """Also those of hooks that are registered after attach, from the first forward on."""
    model = tools.build_model("bert").eval()
    layers = model.bert.encoder.layer

    def register():
        layers[0].register_forward_pre_hook(lambda module, args: (3 * args[0], *args[1:]))
        layers[1].register_forward_hook(lambda module, args, output: 0.5 * output)

    if first == "hooks":
        register()
    with attach(model, [EmbeddingPush(1.0), SentencePull(2)]) as ear:
        if first == "attach":
            register()
        for _ in range(2):
            states = model(**tools.build_batch(), output_hidden_states=True).hidden_states
            ear.loss()
            terms = ear.components()
            mask = tools.build_batch()["attention_mask"].bool()
            for name, hidden in (("embedding_push", states[0]), ("sentence_pull.2", states[2])):
                assert abs(terms[name]) == pytest.approx(pooled_distance(hidden, attention_mask=mask).item(), rel=1e-5)
