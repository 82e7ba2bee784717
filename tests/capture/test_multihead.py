"""The attention of ``nn.MultiheadAttention``: loss and gradients are those of the maps that the module itself gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ear_ops import AttentionPull, EmbeddingPush, SentencePull, attach, gradient_ratios

ROWS, LENGTH, SIZE, HEADS = 6, 7, 16, 4
REAL = torch.arange(LENGTH) < torch.tensor([7, 5, 4, 6, 7, 3])[:, None]  # [6, 7], three pairs


class Attention(nn.Module):
    """A self-attention, or attention to ``memory``, and the maps that the module gives of it."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(SIZE, HEADS, **options)
        with torch.no_grad():
            for parameter in self.attn.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.6)

    def forward(self, states, memory=None, **given):
        memory = states if memory is None else memory
        return self.attn(states, memory, memory, need_weights=False, **given)[0]

    def maps(self, states, memory=None, **given):
        memory = states if memory is None else memory
        return self.attn(states, memory, memory, need_weights=True, average_attn_weights=False, **given)[1]


def states(rows=ROWS, length=LENGTH, size=SIZE, batch_first=True, seed=1):
    drawn = torch.randn(rows, length, size, generator=torch.Generator().manual_seed(seed))
    return drawn if batch_first else drawn.transpose(0, 1).contiguous()


def pull(maps, real_queries=None, real_keys=None):
    """Mean of the squares over queries that are real in both views and keys that are real in one of them."""
    rows, _, queries, keys = maps.shape
    query = torch.ones(rows, queries, dtype=torch.bool) if real_queries is None else real_queries
    key = torch.ones(rows, keys, dtype=torch.bool) if real_keys is None else real_keys
    (first, second), (query, query_aug), (key, key_aug) = (x.chunk(2) for x in (maps, query, key))
    counted = ((query & query_aug)[:, None, :, None] & (key | key_aug)[:, None, None, :]).expand_as(first)
    return (first - second)[counted].square().mean()


def check(tools, model, given, maps, real_queries=None, real_keys=None, layer="attn", rtol=1e-5):
    """``given``: arguments of the model; ``maps``: a function that computes the maps of it."""
    with attach(model, [AttentionPull(layer, 1.0)]) as ear:
        model(*given[0], **given[1])
        loss = ear.loss()
    expected = pull(maps(), real_queries, real_keys)
    assert float(expected.detach()) > 1e-4
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=rtol, atol=0.0)
    tools.assert_same_gradients(tools.gradients(model, loss), tools.gradients(model, expected), rtol)


def additive(forbidden, lowest=float("-inf")):
    return torch.zeros(forbidden.shape).masked_fill(forbidden, lowest)


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
SPARSE = torch.rand(ROWS * HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.7
SPARSE[:, :, 0] = False  # no row is empty
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": ~REAL},
    "added padding": {"key_padding_mask": additive(~REAL)},
    "lowest padding": {"key_padding_mask": additive(~REAL, torch.finfo(torch.float32).min)},
    "weak padding": {"key_padding_mask": additive(~REAL) - torch.linspace(0, 2, LENGTH)},
    "causal": {"attn_mask": CAUSAL},
    "added causal": {"attn_mask": additive(CAUSAL)},
    "causal by hint": {"attn_mask": CAUSAL, "is_causal": True},
    "causal by hint, padding": {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": ~REAL},
    "causal and padding": {"attn_mask": additive(CAUSAL), "key_padding_mask": additive(~REAL)},
    "two kinds": {"attn_mask": additive(CAUSAL), "key_padding_mask": ~REAL},
    "of every head": {"attn_mask": SPARSE},
    "of every head and padding": {"attn_mask": SPARSE, "key_padding_mask": ~REAL},
    "bias": {"attn_mask": torch.randn(ROWS * HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3))},
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", MASKS)
def test_loss_and_gradients_are_those_of_the_modules_maps(tools, masks, batch_first):
    model, given = Attention(batch_first=batch_first), MASKS[masks]
    inputs = states(batch_first=batch_first)
    real = REAL if "key_padding_mask" in given else None
    check(tools, model, ((inputs,), given), lambda: model.maps(inputs, **given), real, real)


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"kdim": 10, "vdim": 12}, {"kdim": 10, "vdim": 10, "bias": False}]
)
@pytest.mark.parametrize("length", [5, LENGTH])
@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention(tools, options, length, padded):
    class Crossing(Attention):
        def __init__(self):
            super().__init__(batch_first=True, **options)
            self.cross_attn = self.attn
            del self.attn

        def forward(self, queries, memory, values, **given):
            return self.cross_attn(queries, memory, values, **given)[0]

        def maps(self, queries, memory, values, **given):
            return self.cross_attn(queries, memory, values, average_attn_weights=False, **given)[1]

    model = Crossing()
    memory = states(length=length, size=options.get("kdim", SIZE), seed=2)
    inputs = states(), memory, memory[..., :1].expand(-1, -1, options.get("vdim", SIZE))
    given = {"key_padding_mask": ~REAL[:, :length]} if padded else {}
    real = REAL[:, :length] if padded else None
    check(tools, model, (inputs, given), lambda: model.maps(*inputs, **given), None, real, "cross_attn")


def encoder(layers=2, dropout=0.0, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        SIZE, HEADS, 24, dropout, batch_first=options.pop("batch_first", True), **options
    )
    stack = nn.TransformerEncoder(
        layer, layers, enable_nested_tensor=layer.self_attn.batch_first and not layer.norm_first
    )
    with torch.no_grad():
        for parameter in stack.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return stack


def encoder_maps(stack, layer, inputs, **given):
    """The maps of ``layer``, counted from 1, as its self-attention gives them."""
    names = {"src_key_padding_mask": "key_padding_mask", "mask": "attn_mask"}
    seen = {}
    module = stack.layers[layer - 1].self_attn
    handle = module.register_forward_pre_hook(lambda module, args: seen.setdefault("args", args))
    stack(inputs, **given)
    handle.remove()
    masks = {names[name]: value for name, value in given.items()}
    return module(*seen["args"], need_weights=True, average_attn_weights=False, **masks)[1]


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"norm_first": True}])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_layer_of_an_encoder(tools, options, layer):
    model = encoder(**options)
    inputs = states(batch_first=options.get("batch_first", True))
    given = {"src_key_padding_mask": ~REAL}
    check(tools, model, ((inputs,), given), lambda: encoder_maps(model, layer, inputs, **given), REAL, REAL, layer)


def test_a_causal_encoder(tools):
    model, inputs = encoder(), states()
    given = {"mask": CAUSAL, "src_key_padding_mask": ~REAL}
    check(tools, model, ((inputs,), given), lambda: encoder_maps(model, 2, inputs, **given), REAL, REAL, 2)
    given = {"mask": nn.Transformer.generate_square_subsequent_mask(LENGTH)}
    check(tools, model, ((inputs,), given), lambda: encoder_maps(model, 2, inputs, **given), layer="layers.1")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [LENGTH, LENGTH + 3])  # longer than the longest row, as with padding="max_length"
def test_a_view_on_the_fast_path(tools, padded, length):
    """In evaluation without grad, torch.nn makes nested tensors of padded ones."""
    model, inputs, real = encoder().eval(), states(length=length), torch.arange(length) < REAL.sum(1, keepdim=True)
    real[0] = torch.arange(length) < LENGTH
    given = {"src_key_padding_mask": ~real} if padded else {}
    halves = [{name: value[rows] for name, value in given.items()} for rows in (slice(3), slice(3, 6))]
    seen = []
    inputs.requires_grad_()  # what stands for embeddings
    with attach(model, [AttentionPull(2, 1.0), SentencePull(1, 1.0), EmbeddingPush(1.0)]) as ear:
        handle = model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].is_nested))
        with ear.view("original"), torch.no_grad():
            model(inputs[:3], **halves[0])
        with ear.view("augmented"):
            model(inputs[3:], **halves[1])
        handle.remove()
        loss = ear.loss()
        terms = ear.components()
        gradients = tools.gradients(model, loss)
        for view, rows in (("original", slice(3)), ("augmented", slice(3, 6))):
            with ear.view(view):
                model(inputs[rows], **{name: value[rows] for name, value in given.items()})
        torch.testing.assert_close(ear.loss(), loss)
        for name, term in ear.components().items():
            torch.testing.assert_close(terms[name], term, rtol=1e-5, atol=1e-7)
    assert seen == [padded, False]
    maps = encoder_maps(model, 2, inputs, **given)
    expected = pull(maps, real if padded else None, real if padded else None)
    torch.testing.assert_close(terms["attention_pull.2"], expected.detach(), rtol=1e-5, atol=0.0)
    maps = torch.cat([maps[:3].detach(), maps[3:]])
    output = model.layers[0](inputs, src_key_padding_mask=given.get("src_key_padding_mask"))
    mask = (real if padded else torch.ones_like(real))[:, :, None]
    mean = (output * mask).sum(1) / mask.sum(1)
    expected = pull(maps, real if padded else None, real if padded else None)
    expected = expected + (mean[:3].detach() - mean[3:]).square().mean()
    tools.assert_same_gradients(gradients, tools.gradients(model, expected))


def test_a_teacher_on_the_fast_path(tools):
    student, teacher, inputs = encoder(), encoder(layers=4).eval(), states()
    given = {"src_key_padding_mask": ~REAL}
    with attach(student, [AttentionPull(2, 1.0)], teacher=teacher) as ear:
        with torch.no_grad():
            teacher(inputs, **given)
        student(inputs, **given)
        loss = ear.loss()
    maps = [encoder_maps(model, layer, inputs, **given) for model, layer in ((student, 2), (teacher, 4))]
    expected = pull(torch.cat([maps[0], maps[1].detach()]), REAL.repeat(2, 1), REAL.repeat(2, 1))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    tools.assert_same_gradients(tools.gradients(student, loss), tools.gradients(student, expected))


def test_nested_tensors_of_the_caller(tools):
    model, inputs = Attention(batch_first=True).eval(), states()
    nested = torch.nested.nested_tensor([row[real] for row, real in zip(inputs, REAL, strict=True)])
    with attach(model, [AttentionPull("attn", 1.0)]) as ear:
        for view, rows in (("original", range(3)), ("augmented", range(3, 6))):
            with ear.view(view), torch.no_grad():
                # both views as long as their longest row, 7
                model(torch.nested.nested_tensor([nested[row] for row in rows]))
        with pytest.warns(UserWarning, match="has no gradient"):
            loss = ear.loss()
    expected = pull(model.maps(inputs, key_padding_mask=~REAL), REAL, REAL)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0.0)


def decoder():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(SIZE, HEADS, 24, dropout=0.0, batch_first=True)
    stack = nn.TransformerDecoder(layer, 2)
    with torch.no_grad():
        for parameter in stack.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return stack


@pytest.mark.parametrize("name", ["self_attn", "multihead_attn"])
@pytest.mark.parametrize("memory_length", [LENGTH, 5])
def test_a_decoder(tools, name, memory_length):
    """The queries of its second attention are padded like the targets, whose mask that attention does not get."""
    model, targets, memory = decoder(), states(), states(length=memory_length, seed=4)
    padded = torch.arange(memory_length) >= torch.tensor([3, 5, 4, 5, 2, 4])[:, None]
    given = {
        "tgt_mask": CAUSAL,
        "tgt_is_causal": True,
        "tgt_key_padding_mask": ~REAL,
        "memory_key_padding_mask": padded,
    }
    calls = {}
    module = model.layers[1].get_submodule(name)

    def note(module, args, kwargs):
        calls.setdefault("call", (args, kwargs))

    def maps():
        handle = module.register_forward_pre_hook(note, with_kwargs=True)
        model(targets, memory, **given)
        handle.remove()
        args, kwargs = calls["call"]
        return module(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})[1]

    keys = REAL if name == "self_attn" else ~padded
    check(tools, model, ((targets, memory), given), maps, REAL, keys, f"layers.1.{name}")


def test_masks_of_a_decoder_are_not_those_of_its_memory(tools):
    model, targets, memory = decoder(), states(), states(seed=4)
    with attach(model, [SentencePull(1, 1.0)]) as ear:
        model(targets, memory, memory_key_padding_mask=~REAL)
        loss = ear.loss()
    output = model.layers[0](targets, memory, memory_key_padding_mask=~REAL).mean(1)
    torch.testing.assert_close(loss, (output[:3] - output[3:]).square().mean())


def test_pooled_terms_of_a_causal_encoder_take_its_mask_for_no_padding():
    model, inputs = encoder(), states()
    with attach(model, [SentencePull(1, 1.0)]) as ear:
        model(inputs, mask=CAUSAL)
        loss = ear.loss()
    output = model.layers[0](inputs, src_mask=CAUSAL).mean(1)
    torch.testing.assert_close(loss, (output[:3] - output[3:]).square().mean())


def test_numbers_that_weaken_keys_are_no_padding_of_pooled_terms():
    model, inputs = encoder(), states()
    weak = -torch.linspace(0, 2, LENGTH).expand(ROWS, LENGTH)
    with attach(model, [EmbeddingPush(1.0)]) as ear:
        model(inputs.requires_grad_(), src_key_padding_mask=weak)
        loss = ear.loss()
    mean = inputs.mean(1)
    torch.testing.assert_close(loss, -(mean[:3] - mean[3:]).square().mean())


def test_checkpointing_is_exact(tools):
    def gradients(checkpointed):
        model, inputs = encoder(), states()
        layer = model.layers[1]
        if checkpointed:
            forward = layer.forward
            layer.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
                forward, *args, use_reentrant=False, **kwargs
            )
        with attach(model, [AttentionPull(2, 1.0)]) as ear:
            output = model(inputs, src_key_padding_mask=~REAL)
            return tools.gradients(model, output.square().sum() + ear.loss())

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


def test_compiled_in_one_graph(tools):
    model, inputs = encoder(), states()
    expected = pull(encoder_maps(model, 2, inputs, src_key_padding_mask=~REAL), REAL, REAL)
    gradients = tools.gradients(model, expected)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with attach(compiled, [AttentionPull(2, 1.0)]) as ear:
        for _ in range(2):
            compiled(inputs, src_key_padding_mask=~REAL)
            loss = ear.loss()
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
            tools.assert_same_gradients(tools.gradients(model, loss), gradients)
    torch.compiler.reset()


def test_bfloat16_autocast(tools):
    """A layer before the module gives it bfloat16, while its weights are float32."""

    class Behind(Attention):
        def __init__(self):
            super().__init__(batch_first=True)
            self.first = nn.Linear(SIZE, SIZE)

        def forward(self, states, **given):
            return super().forward(self.first(states), **given)

    model, inputs = Behind(), states()
    with attach(model, [AttentionPull("attn", 1.0)]) as ear:
        with torch.autocast("cpu", torch.bfloat16):
            model(inputs, key_padding_mask=~REAL)
            maps = model.maps(model.first(inputs), key_padding_mask=~REAL)
        loss = ear.loss()
    assert all(torch.isfinite(gradient).all() for gradient in tools.gradients(model, loss).values())
    torch.testing.assert_close(loss, pull(maps.float(), REAL, REAL), rtol=0.05, atol=0.0)


def test_the_output_keeps_every_bit_and_copies_are_plain_modules():
    model, inputs = encoder(), states()
    expected = model(inputs, src_key_padding_mask=~REAL)
    with attach(model, [AttentionPull("all", 1.0)]) as ear:
        assert torch.equal(model(inputs, src_key_padding_mask=~REAL), expected)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(inputs, src_key_padding_mask=~REAL), expected)
        ear.loss()
        assert list(ear.components()) == ["attention_pull.1", "attention_pull.2"]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_mask_given_to_the_loss(tools):
    model, inputs = Attention(batch_first=True), states()
    fewer = REAL & (torch.arange(LENGTH) > 0)
    with attach(model, [AttentionPull("attn", 1.0)]) as ear:
        model(inputs, key_padding_mask=~fewer)
        expected = ear.loss()
        model(inputs, key_padding_mask=~fewer)
        assert torch.equal(ear.loss(attention_mask=fewer.long()), expected)
        model(inputs)
        with pytest.raises(ValueError, match=r"padding that the nn\.MultiheadAttention attends to"):
            ear.loss(attention_mask=fewer)


class Around(Attention):
    """Takes an attention_mask, and makes of it what ``convert`` says."""

    def __init__(self, convert):
        super().__init__(batch_first=True)
        self.convert = convert

    def forward(self, states, attention_mask):
        return super().forward(states, **self.convert(attention_mask))


@pytest.mark.parametrize(
    "convert",
    [
        lambda mask: {"attn_mask": (mask == 0)[:, None, None, :].expand(ROWS, HEADS, LENGTH, LENGTH).flatten(0, 1)},
        lambda mask: {"attn_mask": CAUSAL},  # real tokens see no padding behind them
    ],
)
def test_padding_that_the_model_around_was_told(tools, convert):
    model, inputs = Around(convert), states()
    maps = model.maps(inputs, **convert(REAL))
    with attach(model, [AttentionPull("attn", 1.0)]) as ear:
        model(inputs, REAL.long())
        torch.testing.assert_close(ear.loss(), pull(maps, REAL, REAL), rtol=1e-5, atol=0.0)


def test_a_mask_of_every_row_tells_padding_by_itself(tools):
    model, inputs = Attention(batch_first=True), states()
    mask = (~REAL)[:, None, None, :].expand(ROWS, HEADS, LENGTH, LENGTH).flatten(0, 1)
    check(tools, model, ((inputs,), {"attn_mask": mask}), lambda: model.maps(inputs, attn_mask=mask), REAL, REAL)


@pytest.mark.parametrize("argument", ["add_bias_kv", "add_zero_attn"])
def test_keys_that_are_no_tokens_are_refused_by_attach(argument):
    model = Attention(**{argument: True})
    with pytest.raises(ValueError, match=rf"layer: attn \(nn.MultiheadAttention\) has {argument}=True"):
        attach(model, [AttentionPull("attn")])
    assert not model._forward_hooks and not model.attn._forward_pre_hooks


def test_what_cannot_be_told_is_refused_by_the_loss():
    model, inputs = Attention(batch_first=True), states()

    def refused(call, error, message):
        with attach(model, [AttentionPull("attn")]) as ear:
            call()
            with pytest.raises(error, match=rf"attention_pull\.attn: .*{message}"):
                ear.loss()

    refused(lambda: model(inputs[0]), ValueError, r"to get batches.* got the shape \[7, 16\]")
    refused(lambda: model(inputs, inputs.clone(), key_padding_mask=~REAL), ValueError, "padded like the keys")
    refused(
        lambda: model(inputs, attn_mask=CAUSAL.T, is_causal=True), ValueError, "is_causal=True with an attn_mask that"
    )
    refused(lambda: (model(inputs), inputs.add_(1.0)), RuntimeError, "input of the queries .* changed in place")
    padded = ~REAL
    refused(
        lambda: (model(inputs, key_padding_mask=padded), padded.fill_(False)), RuntimeError, "key_padding_mask .* place"
    )

    def step():
        model(inputs)
        with torch.no_grad():
            model.attn.in_proj_weight.mul_(2.0)

    refused(step, RuntimeError, "weight of the projections .* changed in place")

    def free():
        freed = model.attn.in_proj_weight.clone()
        del model.attn.in_proj_weight
        model.attn.in_proj_weight = freed
        model(inputs)
        freed.untyped_storage().resize_(0)

    refused(free, RuntimeError, "freed after the forward.*reshard_after_forward=False")


def test_two_calls_with_the_same_queries_are_two():
    class Twice(Attention):
        def forward(self, states):
            return super().forward(states) + super().forward(states, states.flip(1))

    model = Twice(batch_first=True)
    with attach(model, [AttentionPull("attn")]) as ear:
        model(states())
        with pytest.raises(RuntimeError, match="expected one call in a forward, got 2"):
            ear.loss()


def test_gradient_ratios_at_queries_that_the_cross_entropy_passes_by_are_refused():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder()

        def forward(self, states):
            self.logits = self.encoder(states).mean(1)
            return self

    batch = {"states": states(), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match="layer 2 computes its attention itself and gives no queries and keys"):
        gradient_ratios(Classifier(), [AttentionPull(2)], 2, [batch])
