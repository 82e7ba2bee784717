"""The loss of each method against a computation by hand, from hidden states that the model itself returns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification

from ear_ops import attach
from ear_ops.recipes.training.config import RATIOS
from ear_ops.recipes.training.methods import AUGMENTATION, METHODS, Method
from ear_ops.recipes.training.perturbation import Draws, mean_norm, uniform_in_ball, word_embeddings

B, L = 3, 6


@pytest.fixture
def model(tiny_model):
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(tiny_model, num_labels=3, dtype=torch.float64)
    for module in model.modules():  # training mode without its noise
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    return model.train()


@pytest.fixture
def make_method(make_config):
    """A method by its name, with these settings."""

    def make(name: str, **settings: object) -> Method:
        return METHODS[name](make_config(method=name, **settings).objective)

    return make


@pytest.fixture
def batch() -> tuple[dict[str, Tensor], Tensor]:
    """Two views of B pairs [2B, L] with padding that differs between the views, and labels [B]."""
    torch.manual_seed(1)
    ids = torch.randint(5, 30, (2 * B, L))
    lengths = torch.tensor([6, 3, 5, 4, 6, 5])
    mask = (torch.arange(L) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, torch.tensor([0, 2, 1])


def cross_entropies(logits: Tensor, labels: Tensor) -> list[float]:
    return [-math.log(row.exp()[label] / row.exp().sum()) for row, label in zip(logits, labels, strict=True)]


def eager_maps(model, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """Attention maps [2B, H, L, L] of block `layer`, from its input and its weights."""
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[layer - 1]
    attention = model.bert.encoder.layer[layer - 1].attention.self
    query, key = (
        projection(hidden).detach().view(2 * B, L, 2, 8).transpose(1, 2)
        for projection in (attention.query, attention.key)
    )
    scores = query @ key.mT / math.sqrt(8)
    return scores.masked_fill(inputs["attention_mask"][:, None, None, :] == 0, -math.inf).softmax(-1)


def test_finetune_is_the_mean_cross_entropy_of_the_originals(make_method, model, batch) -> None:
    inputs, labels = {name: tensor[:B] for name, tensor in batch[0].items()}, batch[1]
    method = make_method("finetune")
    step = method.step(model, inputs, labels, None, 0)
    logits = model(**inputs).logits.detach()
    expected = sum(cross_entropies(logits, labels)) / B
    assert step.loss.item() == pytest.approx(expected)
    assert {name: term.item() for name, term in step.terms.items()} == pytest.approx({"cross_entropy": expected})
    assert not method.two_views and method.regularizers() == []


def test_rs_da_is_the_mean_over_both_views_as_separate_examples(make_method, model, batch) -> None:
    inputs, labels = batch
    method = make_method("rs-da")
    step = method.step(model, inputs, labels, None, 0)
    losses = cross_entropies(model(**inputs).logits.detach(), torch.cat([labels, labels]))
    assert step.loss.item() == pytest.approx(sum(losses) / (2 * B))
    assert {name: term.item() for name, term in step.terms.items()} == pytest.approx(
        {"cross_entropy": sum(losses[:B]) / B, "cross_entropy_augmented": sum(losses[B:]) / B}
    )
    assert method.two_views and method.regularizers() == []


@pytest.mark.parametrize("reduction", ["mean", "equations", "padded_mean"])
@pytest.mark.parametrize("layer", [1, 2])
def test_ear_is_both_cross_entropies_plus_push_plus_pull(make_method, model, batch, reduction: str, layer: int) -> None:
    inputs, labels = batch
    method = make_method("ear", alpha=0.7, beta=0.3, layer=layer, reduction=reduction)
    with attach(model, method.regularizers()) as attached:
        step = method.step(model, inputs, labels, attached, 0)
    step.loss.backward()

    losses = cross_entropies(model(**inputs).logits.detach(), torch.cat([labels, labels]))
    with torch.no_grad():
        embeddings = model(**inputs, output_hidden_states=True).hidden_states[0]  # [2B, L, C]
    mask = inputs["attention_mask"]
    pooled = torch.stack([rows[real.bool()].mean(0) for rows, real in zip(embeddings, mask, strict=True)])
    push = -((pooled[:B] - pooled[B:]) ** 2).sum()
    push = push / B if reduction == "equations" else push / (B * 16)

    maps = eager_maps(model, inputs, layer)
    squares = (maps[:B] - maps[B:]) ** 2  # [B, H, L, L]
    both, either = (mask[:B] * mask[B:]).bool(), (mask[:B] + mask[B:]).bool()
    counted = both[:, None, :, None] & either[:, None, None, :] & torch.ones(1, 2, 1, 1, dtype=torch.bool)
    pull = {
        "mean": squares[counted].sum() / counted.sum(),
        "equations": squares[counted].sum() / (B * 2),
        "padded_mean": squares.sum() / squares.numel(),
    }[reduction]

    expected = sum(losses[:B]) / B + sum(losses[B:]) / B + 0.7 * push + 0.3 * pull
    assert push.item() < 0 < pull.item()
    assert step.loss.item() == pytest.approx(expected.item())
    assert {name: term.item() for name, term in step.terms.items()} == pytest.approx(
        {
            "cross_entropy": sum(losses[:B]) / B,
            "cross_entropy_augmented": sum(losses[B:]) / B,
            "embedding_push": push.item(),
            f"attention_pull.{layer}": pull.item(),
        }
    )
    assert all(not term.requires_grad for term in step.terms.values())
    assert model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_without_its_regularisers_ear_is_twice_rs_da(make_method, model, batch) -> None:
    inputs, labels = batch
    ear = make_method("ear", alpha=0.0, beta=0.0)
    with attach(model, ear.regularizers()) as attached:
        twice = ear.step(model, inputs, labels, attached, 0).loss
    once = make_method("rs-da").step(model, inputs, labels, None, 0).loss
    assert twice.item() == pytest.approx(2 * once.item())


def test_every_method_says_where_it_comes_from() -> None:
    for name, method in METHODS.items():
        assert "20" in (method.__doc__ or ""), name


@pytest.mark.parametrize(
    ("name", "weights"),
    [("ear-no-ept", (0.0, 0.3)), ("ear-no-apt", (0.7, 0.0)), ("ear-no-both", (0.0, 0.0))],
)
def test_an_ablation_is_ear_without_the_term(
    make_method, model, batch, name: str, weights: tuple[float, float]
) -> None:
    inputs, labels = batch
    steps = {}
    for method in (
        make_method("ear", alpha=0.7, beta=0.3),
        make_method(name, alpha=0.7, beta=0.3),
    ):
        regularizers = method.regularizers()
        attached = attach(model, regularizers) if regularizers else None
        steps[type(method)] = method.step(model, inputs, labels, attached, 0)
        if attached is not None:
            attached.detach()
    ear, ablation = steps.values()
    kept = {"embedding_push": weights[0], "attention_pull.1": weights[1]}
    cross_entropy = ear.terms["cross_entropy"] + ear.terms["cross_entropy_augmented"]
    expected = cross_entropy + sum(weight * ear.terms[term] for term, weight in kept.items())
    assert ablation.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    absent = {term for term, weight in kept.items() if not weight}
    assert ablation.terms.keys() == ear.terms.keys() - absent


def test_ear_without_both_is_twice_rs_da(make_method, model, batch) -> None:
    inputs, labels = batch
    twice = make_method("ear-no-both").step(model, inputs, labels, None, 0).loss
    once = make_method("rs-da").step(model, inputs, labels, None, 0).loss
    assert twice.item() == pytest.approx(2 * once.item())


def test_ept_srpt_pulls_the_pooled_output_of_its_layer(make_method, model, batch) -> None:
    inputs, labels = batch
    method = make_method("ept+srpt", alpha=0.7, beta=0.3, layer=2)
    with attach(model, method.regularizers()) as attached:
        step = method.step(model, inputs, labels, attached, 0)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    pooled = [
        torch.stack([rows[real.bool()].mean(0) for rows, real in zip(layer, inputs["attention_mask"], strict=True)])
        for layer in states
    ]
    push, pull = -((pooled[0][:B] - pooled[0][B:]) ** 2).mean(), ((pooled[2][:B] - pooled[2][B:]) ** 2).mean()
    cross_entropy = step.terms["cross_entropy"] + step.terms["cross_entropy_augmented"]
    assert step.terms["sentence_pull.2"].item() == pytest.approx(pull.item())
    assert step.loss.item() == pytest.approx((cross_entropy + 0.7 * push + 0.3 * pull).item(), rel=1e-6)


class Shift:
    """What a method adds to the word embeddings, seen from where they are used next."""

    def __init__(self, model, inputs: dict[str, Tensor]) -> None:
        self.words = model.bert.embeddings.word_embeddings.weight.detach()[inputs["input_ids"]]  # [R, L, C]
        self.real = inputs["attention_mask"].bool()
        self.seen: list[Tensor] = []
        model.bert.embeddings.LayerNorm.register_forward_pre_hook(self._keep)
        types = model.bert.embeddings.token_type_embeddings.weight[0]
        positions = model.bert.embeddings.position_embeddings.weight[:L]
        self.others = (types + positions).detach()  # [L, C]

    def _keep(self, module, arguments) -> None:
        self.seen.append(arguments[0].detach() - self.words - self.others)

    @property
    def norm(self) -> float:
        return self.words[self.real].norm(dim=-1).mean().item()


def originals(batch) -> tuple[dict[str, Tensor], Tensor]:
    return {name: tensor[:B] for name, tensor in batch[0].items()}, batch[1]


def test_rs_rp_moves_each_word_within_its_ball(make_method, model, batch) -> None:
    inputs, labels = originals(batch)
    shift = Shift(model, inputs)
    step = make_method("rs-rp", perturbation=0.3).step(model, inputs, labels, None, 0)
    (moved,) = shift.seen
    lengths = moved[shift.real].norm(dim=-1) / (0.3 * shift.norm)
    assert lengths.max() <= 1 + 1e-6 and lengths.min() > 0.5, (
        "in 16 dimensions nearly all of a ball is near its surface"
    )
    logits = model(inputs_embeds=shift.words + moved, attention_mask=inputs["attention_mask"]).logits.detach()
    assert step.loss.item() == pytest.approx(sum(cross_entropies(logits, labels)) / B)
    make_method("rs-rp", perturbation=0.3).step(model, inputs, labels, None, 0)
    assert torch.equal(shift.seen[-1], moved), "the number of the batch decides, and not what was drawn before"
    again = make_method("rs-rp", perturbation=0.3).step(model, inputs, labels, None, 1)
    assert not torch.equal(shift.seen[-1], moved) and again.loss != step.loss
    make_method("rs-rp", perturbation=0.3, seed=2).step(model, inputs, labels, None, 0)
    assert not torch.equal(shift.seen[-1], moved)


def test_draws_are_uniform_in_the_ball() -> None:
    drawn = uniform_in_ball(torch.zeros(200, 100, 3), torch.tensor(2.0), Draws(0, 0, 100)).flatten(0, 1)
    volumes = (drawn.norm(dim=-1) / 2) ** 3  # uniform in [0, 1]
    assert volumes.max() <= 1
    assert [(volumes < share).float().mean().item() for share in (0.1, 0.5, 0.9)] == pytest.approx(
        [0.1, 0.5, 0.9], abs=0.02
    )
    assert drawn.mean(0).abs().max() < 0.03


@pytest.mark.parametrize("steps", [1, 3])
def test_adv_climbs_the_loss_inside_the_ball(make_config, make_method, model, batch, steps: int) -> None:
    inputs, labels = originals(batch)
    shift = Shift(model, inputs)
    config = make_config(method="adv", perturbation=0.1, adversarial_steps=steps)
    step = METHODS["adv"](config.objective).step(model, inputs, labels, None, 0)
    assert len(shift.seen) == steps + 1
    assert all(parameter.grad is None for parameter in model.parameters()), "the search leaves no gradients behind"
    step.loss.backward()
    head_gradient = model.classifier.weight.grad.clone()

    radius, mask = 0.1 * shift.norm, inputs["attention_mask"]
    delta = torch.zeros_like(shift.words)
    for _ in range(steps):
        delta.requires_grad_()
        loss = torch.nn.functional.cross_entropy(
            model(inputs_embeds=shift.words + delta, attention_mask=mask).logits, labels
        )
        gradient = torch.autograd.grad(loss, delta)[0]
        ascent = delta.detach() + 2.5 * radius / steps * torch.nn.functional.normalize(gradient, dim=-1)
        delta = torch.where(
            ascent.norm(dim=-1, keepdim=True) > radius, radius * torch.nn.functional.normalize(ascent, dim=-1), ascent
        )
    moved = shift.seen[steps]
    assert torch.allclose(moved, delta, atol=1e-7) and not moved[~shift.real].any()
    assert moved.norm(dim=-1).max().item() == pytest.approx(radius)
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(
        model(inputs_embeds=shift.words + delta, attention_mask=mask).logits, labels
    )
    loss.backward()
    assert step.loss.item() == pytest.approx(loss.item())
    assert torch.allclose(head_gradient, model.classifier.weight.grad, atol=1e-7)
    clean = make_method("finetune").step(model, inputs, labels, None, 0)
    assert step.loss.item() > clean.loss.item() + 0.01


def test_nt_apt_adds_noise_to_the_augmented_view_alone(make_method, model, batch) -> None:
    inputs, labels = batch
    shift = Shift(model, inputs)
    method = make_method("nt+apt", beta=0.3, perturbation=0.2)
    assert [type(regularizer).__name__ for regularizer in method.regularizers()] == ["AttentionPull"]
    with attach(model, method.regularizers()) as attached:
        step = method.step(model, inputs, labels, attached, 0)
    (noise,) = shift.seen
    assert noise[:B].abs().max() < 1e-12
    assert noise[B:].std().item() == pytest.approx(0.2 * shift.norm, rel=0.1)

    moved = {"inputs_embeds": shift.words + noise, "attention_mask": inputs["attention_mask"]}
    losses = cross_entropies(model(**moved).logits.detach(), torch.cat([labels, labels]))
    maps, mask = eager_maps(model, moved, 1), inputs["attention_mask"]
    both, either = (mask[:B] * mask[B:]).bool(), (mask[:B] + mask[B:]).bool()
    counted = (both[:, None, :, None] & either[:, None, None, :]).expand(-1, 2, -1, -1)
    pull = ((maps[:B] - maps[B:]) ** 2)[counted].mean()
    assert step.terms["attention_pull.1"].item() == pytest.approx(pull.item())
    assert step.loss.item() == pytest.approx(sum(losses) / B + 0.3 * pull.item())


def test_padding_does_not_change_the_size_of_a_perturbation(model, batch) -> None:
    inputs, _ = batch
    wider = {name: torch.nn.functional.pad(tensor, (0, 4)) for name, tensor in inputs.items()}
    norms = [mean_norm(word_embeddings(model, rows), rows["attention_mask"]).item() for rows in (inputs, wider)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 0


def test_what_a_row_gets_depends_on_its_place_among_the_rows_of_all_processes(monkeypatch) -> None:
    """Not on the process that has it, nor on the length to which it is padded there."""
    like = torch.zeros(6, 5, 4)
    alone = [draw(like) for draws in [Draws(1, 7, 9)] for draw in (draws.normal, draws.uniform)]
    assert [list(drawn.shape) for drawn in alone] == [[6, 5, 4], [6, 5, 1]]
    assert len(set(alone[0].flatten().tolist())) == 6 * 5 * 4, "every number once"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        draws = Draws(1, 7, 9)
        for drawn, expected in zip((draws.normal(like[:2, :3]), draws.uniform(like[:2, :3])), alone, strict=True):
            assert torch.equal(drawn, expected[2 * rank : 2 * rank + 2, :3])


def test_a_method_uses_the_settings_that_it_says(make_config) -> None:
    """`uses` decides which runs of a study are the same; what a method reads and does not name would be lost there."""

    class Watched:
        def __init__(self, config: object) -> None:
            self.config, self.read = config, set()

        def __getattr__(self, name: str) -> object:
            self.read.add(name)
            return getattr(self.config, name)

    for name, method in METHODS.items():
        config = Watched(make_config(method=name).objective)
        method(config).regularizers()
        elsewhere = {
            "perturbation",
            "adversarial_steps",
            *RATIOS.values(),
        }  # read in a step, or before there is a method
        assert config.read == method.uses - elsewhere - AUGMENTATION, name
        assert {RATIOS[weight] for weight in method.uses & RATIOS.keys()} == method.uses & set(RATIOS.values()), name
        assert (method.uses >= AUGMENTATION) == method.two_views, name
