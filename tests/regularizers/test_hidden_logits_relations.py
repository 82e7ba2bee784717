"""``HiddenPull``, ``LogitsPull`` and ``RelationPull``: the published formulas, written out on real models."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ear_ops import HiddenPull, LogitsPull, Regularizer, RelationPull, SentencePull, attach

SHAPE = {"vocab_size": 60, "intermediate_size": 48, "num_labels": 3, "pad_token_id": 0}


def bert(layers: int = 2, hidden: int = 32, heads: int = 4, seed: int = 0, tokens: bool = False) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        **SHAPE, num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, initializer_range=0.3
    )
    kind = transformers.BertForTokenClassification if tokens else transformers.BertForSequenceClassification
    return kind(config).eval()


MASK = torch.arange(7) < torch.tensor([7, 4, 6, 5])[:, None]
INPUT_IDS = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(0)).masked_fill(~MASK, 0)
BATCH = {"input_ids": INPUT_IDS, "attention_mask": MASK.long()}
BOTH = MASK[:2] & MASK[2:]


def of_teacher(student: nn.Module, teacher: nn.Module, regularizer: Regularizer, **options: Any) -> tuple[Tensor, Any]:
    """The loss of a batch, and the detached attachment."""
    with attach(student, [regularizer], teacher=teacher, **options) as ear:
        with torch.no_grad():
            teacher(**BATCH)
        student(**BATCH)
        return ear.loss(), ear


def of_views(model: nn.Module, regularizer: Regularizer, **more: Any) -> Tensor:
    with attach(model, [regularizer]) as ear:
        model(**BATCH, **more)
        return ear.loss()


def hidden_states(model: Any, layer: int) -> Tensor:
    states: Tensor = model(**BATCH, output_hidden_states=True).hidden_states[layer]
    return states


# --- hidden states --------------------------------------------------------------------------------------------------


def test_hidden_states_of_a_larger_teacher() -> None:
    """Jiao et al. 2020, eq. 8: the mean squared error of the projected student and the teacher, over real tokens."""
    student, teacher = bert(), bert(layers=4, hidden=48, seed=1)
    pull = HiddenPull(2, projection="linear")
    loss, ear = of_teacher(student, teacher, pull)
    (weight, bias) = ear.parameters()
    projected = F.linear(hidden_states(student, 2), weight, bias)
    expected = (projected - hidden_states(teacher, 4).detach())[MASK].square().mean()
    torch.testing.assert_close(loss, expected)
    inputs = [weight, bias, student.bert.embeddings.word_embeddings.weight]
    for gradient, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_the_optimiser_trains_the_projection() -> None:
    student, teacher = bert().requires_grad_(False), bert(hidden=48, seed=1)
    losses = []
    with attach(student, [HiddenPull(1, projection="linear")], teacher=teacher) as ear:
        optimizer = torch.optim.Adam([*student.parameters(), *ear.parameters()], lr=0.05)
        for _ in range(5):
            with torch.no_grad():
                teacher(**BATCH)
            student(**BATCH)
            losses.append(ear.loss())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_a_projection_is_kept_by_another_attach_and_made_anew_for_another_size() -> None:
    pull = HiddenPull(1, projection="linear")
    made = []
    for hidden in (48, 48, 16):
        attach(bert(), [pull], teacher=bert(hidden=hidden)).detach()
        made.append(pull.projection)
    assert made[0] is made[1] and made[2].out_features == 16


REDUCED = {"mean": 1 / int(BOTH.sum()), "equations": 1 / 2, "sum": 1.0}


@pytest.mark.parametrize("reduction", REDUCED)
@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_hidden_states_of_two_views(distance: str, reduction: str) -> None:
    model = bert()
    first, second = (view[BOTH] for view in hidden_states(model, 1).chunk(2))
    if distance == "mse":
        total = (first - second).square().sum() / (32 if reduction == "mean" else 1)
    else:
        total = (1 - F.cosine_similarity(first, second, dim=-1)).sum()
    loss = of_views(model, HiddenPull(1, distance=distance, reduction=reduction))
    torch.testing.assert_close(loss, total * REDUCED[reduction])
    everything = of_views(model, HiddenPull(1, distance="mse", reduction="padded_mean"))
    torch.testing.assert_close(everything, F.mse_loss(*hidden_states(model, 1).chunk(2)))


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_equal_hidden_states_and_padding(distance: str) -> None:
    """Exactly 0 with no gradient for equal views; what padding holds does not matter."""
    from ear_ops.capture import HiddenStates

    states = torch.randn(2, 3, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()
    with torch.no_grad():
        states[0, 2] = math.nan
    other = states.detach().clone()
    other[:, 2] = math.inf
    loss = HiddenPull(1, distance=distance).term(HiddenStates(states, mask), HiddenStates(other, mask))
    assert loss.item() == 0.0
    assert torch.equal(torch.autograd.grad(loss, states)[0], torch.zeros(2, 3, 4))


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_padding_gives_a_projection_no_gradient(distance: str) -> None:
    from ear_ops.capture import HiddenStates

    mask, projection, gradients = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), nn.Linear(4, 5), []
    states, other = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    for padding in (0.0, math.nan, math.inf):
        first = states.masked_fill(~mask[..., None], padding).requires_grad_()
        pull = HiddenPull(1, projection=projection, distance=distance)
        loss = pull.term(HiddenStates(first, mask), HiddenStates(other.masked_fill(~mask[..., None], padding), mask))
        gradients.append([loss, *torch.autograd.grad(loss, [first, *pull.parameters()])])
    assert all(torch.equal(a, b) for rest in gradients[1:] for a, b in zip(rest, gradients[0], strict=True))
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in gradients[0])


def test_the_cosine_of_a_vector_of_zeros_is_0() -> None:
    from ear_ops.capture import HiddenStates

    states, other = torch.randn(1, 3, 4), torch.randn(1, 3, 4).requires_grad_()
    states[0, 1] = 0.0
    states.requires_grad_()
    loss = HiddenPull(1, distance="cosine").term(HiddenStates(states, None), HiddenStates(other, None))
    torch.testing.assert_close(loss, (1 - F.cosine_similarity(states, other, dim=-1)).mean())
    for gradient in torch.autograd.grad(loss, [states, other]):
        assert not gradient[0, 1].any() and gradient[0, [0, 2]].all() and torch.isfinite(gradient).all()


class Pair(nn.Module):
    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return states, states


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (nn.Linear(6, 8), r"hidden_pull.1: projection: expected a module that takes hidden states \[2, 7, 32\]"),
        (nn.Linear(32, 8), "hidden_pull.1: projection: expected Linear to return 32 numbers for each token.* got 8"),
        (Pair(), r"hidden_pull.1: projection: expected Pair to return a tensor \[2, 7, C of the teacher\], got tuple"),
    ],
)
def test_a_projection_that_does_not_fit(projection: nn.Module, message: str) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        of_views(bert(), HiddenPull(1, projection=projection))


class Plain(nn.Module):
    """Blocks without a configuration; returns logits by themselves."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(size, size), nn.Linear(size, size)])

    def forward(self, vectors: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            vectors = block(vectors)
        return vectors


def test_a_projection_of_ones_own() -> None:
    student, teacher, vectors = Plain(), Plain(), torch.randn(3, 5, 8)
    with pytest.raises(ValueError, match=r"hidden_pull.1: projection='linear' needs the hidden sizes.*torch.nn.Linear"):
        attach(student, [HiddenPull(1, projection="linear")], teacher=teacher)
    assert not student.blocks[0]._forward_hooks
    projection = nn.Linear(8, 8)
    with attach(student, [HiddenPull(1, projection=projection)], teacher=teacher.eval()) as ear:
        teacher(vectors)
        student(vectors)
        loss = ear.loss()
        assert list(ear.parameters()) == list(projection.parameters())
    expected = F.mse_loss(projection(student.blocks[0](vectors)), teacher.blocks[0](vectors))
    torch.testing.assert_close(loss, expected)


def test_parameters_come_once_and_without_those_of_the_model() -> None:
    """So that an optimiser takes them beside those of the model."""
    student, teacher, shared = Plain(), Plain().eval(), nn.Linear(8, 8)
    student.head = nn.Linear(8, 8)
    pulls = [
        HiddenPull(1, projection=shared),
        HiddenPull(2, projection=shared),
        HiddenPull(2, projection=student.head, name="head"),
    ]
    with attach(student, pulls, teacher=teacher) as ear:
        assert list(ear.parameters()) == list(shared.parameters())
        optimizer = torch.optim.SGD([*student.parameters(), *ear.parameters()], lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 8


# --- logits ---------------------------------------------------------------------------------------------------------


def kl(target: Tensor, other: Tensor) -> Tensor:
    return F.kl_div(other.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")


def test_predictions_of_a_teacher() -> None:
    """Hinton et al. 2015, without the factor temperature^2."""
    student, teacher = bert(), bert(layers=4, hidden=48, seed=1)
    loss, _ = of_teacher(student, teacher, LogitsPull(temperature=2.0))
    expected = kl(teacher(**BATCH).logits.detach() / 2.0, student(**BATCH).logits / 2.0)
    torch.testing.assert_close(loss, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(loss, student.classifier.parameters()),
        torch.autograd.grad(expected, student.classifier.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 2, 1, 1])])
@pytest.mark.parametrize("return_dict", [True, False])
def test_predictions_of_two_views(labels: Tensor | None, return_dict: bool) -> None:
    """Liang et al. 2021: both directions of KL, each with half of the weight."""
    model = bert()
    first, second = model(**BATCH).logits.chunk(2)
    more = {"return_dict": return_dict} | ({} if labels is None else {"labels": labels})
    pulls = [LogitsPull(0.5, divergence=name, name=name) for name in ("kl", "reverse_kl")]
    with attach(model, pulls) as ear:
        model(**BATCH, **more)
        loss = ear.loss()
    torch.testing.assert_close(loss, (kl(first, second) + kl(second, first)) / 2)
    mean = ((first.softmax(-1) + second.softmax(-1)) / 2).log()
    torch.testing.assert_close(of_views(model, LogitsPull(divergence="js")), (kl(first, mean) + kl(second, mean)) / 2)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("kind", [transformers.BertModel, transformers.BertForQuestionAnswering])
def test_what_are_no_logits_is_refused(kind: type[nn.Module], return_dict: bool) -> None:
    config = bert().config
    config.num_labels = 2  # of a span: where it begins and where it ends
    model = kind(config).eval()
    with attach(model, [LogitsPull()]) as ear:
        model(**BATCH, return_dict=return_dict)
        with pytest.raises(ValueError, match=f"expected {kind.__name__} to return logits .* got no tensor of that"):
            ear.loss()


@pytest.mark.parametrize("annotation", ["logits of the model", "torch.no_such_type", 3])
def test_annotations_may_be_anything(annotation: Any) -> None:
    class Head(nn.Module):
        def forward(self, states):
            return (states,)

    Head.forward.__annotations__["return"] = annotation
    head, states = Head(), torch.randn(4, 3)
    with attach(head, [LogitsPull()]) as ear:
        head(states)
        torch.testing.assert_close(ear.loss(), kl(states[2:], states[:2]))


def test_predictions_of_tokens() -> None:
    model = bert(tokens=True)
    first, second = model(**BATCH).logits.chunk(2)
    expected = kl(second[BOTH], first[BOTH])
    torch.testing.assert_close(of_views(model, LogitsPull()), expected)
    torch.testing.assert_close(of_views(model, LogitsPull(reduction="equations")), expected * int(BOTH.sum()) / 2)
    every_token = kl(second.flatten(0, 1), first.flatten(0, 1))
    torch.testing.assert_close(of_views(model, LogitsPull(reduction="padded_mean")), every_token)


def test_predictions_of_a_decoder_are_masked_by_its_own_mask() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    decoder = {"decoder_input_ids": INPUT_IDS.flip(1), "decoder_attention_mask": MASK.flip(0).long()}
    counted = MASK.flip(0)[:2] & MASK.flip(0)[2:]
    first, second = (view[counted] for view in model(**BATCH, **decoder).logits.chunk(2))
    torch.testing.assert_close(of_views(model, LogitsPull(), **decoder), kl(second, first))


def test_predictions_by_themselves_and_two_forwards() -> None:
    model, vectors = Plain(), torch.randn(6, 8)
    first, second = model(vectors).chunk(2)
    with attach(model, [LogitsPull()]) as ear:
        model(vectors)
        torch.testing.assert_close(ear.loss(), kl(second, first))
        with ear.view("original"):
            model(vectors[:3])
        with ear.view("augmented"), torch.no_grad():
            model(vectors[3:])
        torch.testing.assert_close(ear.loss(), kl(second, first))
    assert not model._forward_hooks and not copy.deepcopy(model)._forward_hooks


def test_predictions_inside_a_compiled_model() -> None:
    torch.compiler.reset()
    model, vectors = Plain(), torch.randn(6, 8)
    first, second = model(vectors).chunk(2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with attach(compiled, [LogitsPull()]) as ear:
        compiled(vectors)
        torch.testing.assert_close(ear.loss(), kl(second, first))


def test_a_model_without_predictions() -> None:
    model = bert().bert
    with attach(model, [LogitsPull()]) as ear:
        model(**BATCH)
        with pytest.raises(ValueError, match=r"logits_pull: expected BertModel to return logits .*got no tensor"):
            ear.loss()


def test_one_class() -> None:
    from ear_ops.capture.logits import Logits

    with pytest.raises(ValueError, match=r"logits_pull: expected logits of at least 2 classes, got \[2, 1\]"):
        LogitsPull().term(Logits(torch.zeros(4, 1), None), None)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js"])
@pytest.mark.parametrize("masked", [False, True])
def test_classes_that_neither_view_has_add_nothing(divergence: str, masked: bool) -> None:
    from ear_ops.capture.logits import Logits

    pull, mask = LogitsPull(divergence=divergence), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool() if masked else None
    views = [torch.randn(2, 3, 5).requires_grad_() for _ in range(2)]
    expected = pull.term(*(Logits(view, mask) for view in views))
    longer = [torch.cat([torch.full((2, 3, 1), -math.inf), view], -1) for view in views]
    loss = pull.term(*(Logits(view, mask) for view in longer))
    torch.testing.assert_close(loss, expected)
    for gradient, wanted in zip(torch.autograd.grad(loss, views), torch.autograd.grad(expected, views), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_another_number_of_classes() -> None:
    student, teacher = Plain(8), nn.Sequential(Plain(8), nn.Linear(8, 5)).eval()
    with attach(student, [LogitsPull()], teacher=teacher) as ear:
        vectors = torch.randn(2, 8)
        teacher(vectors)
        student(vectors)
        with pytest.raises(ValueError, match=r"logits_pull: expected logits of one shape.*\[2, 8\] and \[2, 5\]"):
            ear.loss()


# --- relations ------------------------------------------------------------------------------------------------------


def relations(states: Tensor, heads: int, mask: Tensor) -> Tensor:
    """``[real queries of all heads, L]`` of ``states`` ``[B, L, C]``, written out."""
    split = states.unflatten(2, (heads, -1)).transpose(1, 2)
    scores = split @ split.mT / split.shape[3] ** 0.5
    return scores.masked_fill(~mask[:, None, None], -1e9).transpose(1, 2)[mask].flatten(0, 1)


@pytest.mark.parametrize("of", ["query", "key", "value"])
def test_relations_of_a_teacher_with_other_heads(of: str) -> None:
    """Wang et al. 2021: KL of the teacher's relations and the student's, over relation heads."""
    student, teacher = bert(), bert(layers=4, hidden=48, heads=6, seed=1)
    states = {}
    for name, model, layer in (("student", student, 2), ("teacher", teacher, 3)):
        projection = getattr(model.bert.encoder.layer[layer - 1].attention.self, of)
        states[name] = projection(hidden_states(model, layer - 1))
    loss, ear = of_teacher(student, teacher, RelationPull(2, of=of, relation_heads=8), layer_map={2: 3})
    expected = kl(relations(states["teacher"].detach(), 8, MASK), relations(states["student"], 8, MASK))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert list(ear.components()) == [f"relation_pull.{of}.2"]
    embeddings = student.bert.embeddings.word_embeddings.weight
    gradients = [torch.autograd.grad(value, embeddings)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_all_relations_of_two_views_beside_each_other() -> None:
    """Views of different lengths are related over the tokens that both have."""
    model = bert()
    pulls = [RelationPull(1, of=of) for of in ("query", "key", "value")]
    with attach(model, pulls) as ear:
        model(**BATCH)
        ear.loss().backward()
    assert all(math.isfinite(term) and term > 0 for term in ear.components().values())
    values = model.bert.encoder.layer[0].attention.self.value(hidden_states(model, 0))
    first, second = (relations(view, 4, BOTH) for view in values.chunk(2))
    torch.testing.assert_close(ear.components()["relation_pull.value.1"], kl(second, first).detach())


def test_relations_of_shared_values() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SHAPE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = transformers.LlamaForSequenceClassification(config).eval()
    layer = model.model.layers[1]
    values = layer.self_attn.v_proj(layer.input_layernorm(hidden_states(model, 1)))
    first, second = (relations(view, 4, BOTH) for view in values.chunk(2))
    loss = of_views(model, RelationPull(2, of="value", relation_heads=4))
    torch.testing.assert_close(loss, kl(second, first), rtol=1e-4, atol=1e-7)


def test_what_has_no_values() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    with pytest.raises(ValueError, match=r"of: expected 'query' or 'key' for .*self_attn.*got 'value'"):
        attach(encoder, [RelationPull(1, of="value")])
    with attach(encoder, [RelationPull(1, of="key", relation_heads=2)]) as ear:
        encoder(torch.randn(4, 5, 16))
        assert ear.loss() > 0


def test_relation_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"relation_heads: expected a divisor of the 32 numbers .*query, got 5"):
        of_views(bert(), RelationPull(1, of="query", relation_heads=5))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HiddenPull(0), ValueError, "layer: expected at least 1"),
        (
            lambda: HiddenPull("all"),
            TypeError,
            "layer: expected a number, got 'all'; write a HiddenPull for each layer",
        ),
        (lambda: SentencePull([1, 2]), TypeError, "layer: expected a number.*; write a SentencePull for each layer"),
        (lambda: HiddenPull(1, projection="mlp"), ValueError, "projection: expected None, 'linear' or"),
        (lambda: HiddenPull(1, distance="l1"), ValueError, "distance: expected 'mse' or 'cosine', got 'l1'"),
        (lambda: LogitsPull(temperature=-1), ValueError, "temperature: expected a positive, finite number"),
        (lambda: LogitsPull(temperature=None), ValueError, "temperature: expected a positive, finite number, got None"),
        (lambda: LogitsPull(divergence=["kl"]), ValueError, "divergence: expected one of 'kl', 'reverse_kl', 'js'"),
        (lambda: LogitsPull(divergence="mse"), ValueError, "divergence: expected one of 'kl', 'reverse_kl', 'js'"),
        (lambda: RelationPull(1, of="output"), ValueError, "of: expected one of 'query', 'key', 'value', got 'output'"),
        (lambda: RelationPull([1, 2]), TypeError, "layer: expected a number or a path"),
        (lambda: RelationPull("all"), ValueError, "got 'all'; write a RelationPull for each layer"),
        (lambda: RelationPull(1, relation_heads=0), ValueError, "relation_heads: expected at least 1"),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
