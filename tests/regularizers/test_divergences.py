"""``AttentionPull`` with every divergence: the numbers of eager attention maps, and what does not go together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import ear_ops
from ear_ops import AttentionPull, attach
from ear_ops.capture import AttentionInputs, AttentionMaps

SHAPE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def model(kind: str, seed: int) -> Any:
    """A classifier in eval mode, its attention far from uniform."""
    torch.manual_seed(seed)
    if kind == "bert":
        config = transformers.BertConfig(**SHAPE)
    else:
        config = transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, pad_token_id=0)
    built = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return built.eval()


def batch_of(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    input_ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length) < torch.tensor([length, length - 3, length - 1])[:, None]
    return {"input_ids": input_ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def eager_rows(of: Any, batch: dict[str, Tensor], layer: int) -> Tensor:
    """``[rows, L]`` attention probabilities of the real queries of all heads."""
    of.set_attn_implementation("eager")
    maps = of(**batch, output_attentions=True).attentions[layer - 1]
    of.set_attn_implementation("sdpa")
    return maps[batch["attention_mask"].bool()[:, None].expand(maps.shape[:3])]


def kl(target: Tensor, other: Tensor) -> Tensor:
    """Mean over rows, written out; masked keys have probability 0 in both."""
    logs = [torch.where(rows > 0, rows, 1.0).log() for rows in (target, other)]
    return (target * (logs[0] - logs[1])).sum(-1).mean()


WRITTEN_OUT = {
    "kl": lambda p, t: kl(t, p),
    "reverse_kl": kl,
    "js": lambda p, t: (kl(p, (p + t) / 2) + kl(t, (p + t) / 2)) / 2,
}


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("divergence", WRITTEN_OUT)
def test_the_numbers_of_eager_attention(kind: str, divergence: str) -> None:
    student, teacher, batch = model(kind, 0), model(kind, 1), batch_of()
    with torch.no_grad():
        target = eager_rows(teacher, batch, 2)
    expected = WRITTEN_OUT[divergence](eager_rows(student, batch, 2), target)
    parameters = [p for p in student.parameters() if p.requires_grad]
    expected_gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    with attach(student, [AttentionPull(2, 1.0, divergence=divergence)], teacher=teacher) as ear:
        with torch.no_grad():
            teacher(**batch)
        student(**batch)
        loss = ear.loss()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    for gradient, wanted in zip(
        torch.autograd.grad(loss, parameters, allow_unused=True), expected_gradients, strict=True
    ):
        wanted = None if wanted is None or not wanted.any() else wanted
        assert (gradient is None or not gradient.any()) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return self.query(hidden) + self.key(hidden)


HIDDEN = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.arange(6) < torch.tensor([6, 4, 6, 4])[:, None]
SHORTER = torch.arange(6) < torch.tensor([6, 4, 5, 4])[:, None]


def pull(**options: Any) -> AttentionPull:
    return AttentionPull(query="query", key="key", num_heads=2, name="pull", **options)


def term(mask: Tensor = MASK, word_ids: Tensor | None = None, **options: Any) -> Tensor:
    hidden, module = HIDDEN, Projections()
    with attach(module, [pull(**options)]) as ear:
        module(hidden, mask)
        ear.loss(word_ids=word_ids)
    return ear.components()["pull"]


def heads(side: str) -> Tensor:
    """``[2B, H, L, D]`` queries or keys of both views."""
    return getattr(Projections(), side)(HIDDEN).unflatten(2, (2, 4)).transpose(1, 2)


def test_scores_of_two_views() -> None:
    scores = heads("query") @ heads("key").mT / 2.0
    squares = (scores[:2] - scores[2:]).square()
    real = (MASK[:2, None, :, None] & MASK[:2, None, None]).expand_as(squares)
    torch.testing.assert_close(term(divergence="scores_mse"), squares[real].mean())


@pytest.mark.parametrize("divergence", WRITTEN_OUT)
def test_temperature(divergence: str) -> None:
    scores = (heads("query") @ heads("key").mT / 2.0 / 3.0).masked_fill(~MASK[:, None, None], -math.inf)
    p, t = (scores.softmax(-1)[v].permute(0, 2, 1, 3)[MASK[:2]].flatten(0, 1) for v in (slice(0, 2), slice(2, 4)))
    torch.testing.assert_close(term(divergence=divergence, temperature=3.0), WRITTEN_OUT[divergence](p, t))


def test_views_of_different_lengths() -> None:
    """KL of them is infinite in one direction, and its error says what to do."""
    with pytest.raises(ValueError, match=r"^pull: .*KL is infinite; use divergence='js' or support='shared'$"):
        term(SHORTER, divergence="reverse_kl")
    shared = [term(SHORTER, divergence=name, support="shared") for name in WRITTEN_OUT]
    assert all(torch.isfinite(value) and value > 0 for value in (*shared, term(SHORTER, divergence="js")))


@pytest.mark.parametrize("divergence", WRITTEN_OUT)
def test_words(divergence: str) -> None:
    """Words of one piece each are tokens."""
    ids = torch.arange(6).expand(4, 6)
    options = {"divergence": divergence, "alignment": "word"}
    torch.testing.assert_close(term(word_ids=ids, **options), term(divergence=divergence))


@pytest.mark.parametrize("divergence", ["mse", *WRITTEN_OUT])
def test_of_maps_as_of_queries_and_keys(divergence: str) -> None:
    inputs = AttentionInputs(heads("query"), heads("key"), MASK, MASK, None)
    maps = AttentionMaps(inputs.probabilities(), MASK, MASK)
    torch.testing.assert_close(
        *(AttentionPull(1, divergence=divergence).term(reading, None) for reading in (inputs, maps))
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divergence": "scores_mse"}, "divergence='scores_mse' needs scores"),
        ({"divergence": "kl", "temperature": 2.0}, "temperature=2.0 needs scores"),
    ],
)
def test_maps_have_no_scores(options: dict[str, Any], words: str) -> None:
    maps = AttentionMaps(F.softmax(torch.randn(2, 2, 3, 3), -1), None, None)
    with pytest.raises(ValueError, match=rf"attention_pull\.1: {words}.*probabilities alone"):
        AttentionPull(1, **options).term(maps, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "l1"}, "divergence: expected one of 'mse', 'kl', 'reverse_kl', 'js', 'scores_mse', got 'l1'"),
        ({"divergence": "kl", "support": "union"}, "support: expected 'all' or 'shared', got 'union'"),
        ({"divergence": "kl", "temperature": 0}, "temperature: expected a positive, finite number, got 0"),
        ({"divergence": ["kl"]}, r"divergence: expected one of 'mse', .*, got \['kl'\]"),
        ({"temperature": 2.0}, "temperature: divergence='mse' has none; use 'kl', 'reverse_kl' or 'js'"),
        ({"divergence": "scores_mse", "support": "shared"}, "support: divergence='scores_mse' has none"),
        ({"divergence": "scores_mse", "alignment": "word"}, "alignment: 'word' compares probabilities"),
        ({"divergence": "kl", "temperature": 2.0, "alignment": "word"}, "alignment: 'word' compares probabilities"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionPull(1, **options)


@pytest.mark.parametrize(
    ("module", "function", "options"),
    [
        (ear_ops.QKAttentionKLLoss, ear_ops.qk_attention_kl, {"direction": "reverse", "temperature": 2.0}),
        (ear_ops.QKAttentionJSLoss, ear_ops.qk_attention_js, {"temperature": 2.0, "support": "shared"}),
        (ear_ops.QKScoresMSELoss, ear_ops.qk_scores_mse, {"is_causal": True}),
        (ear_ops.AttentionKLLoss, ear_ops.attention_kl, {"direction": "reverse"}),
        (ear_ops.AttentionJSLoss, ear_ops.attention_js, {"support": "shared"}),
    ],
)
def test_modules_are_the_functions(module: Any, function: Any, options: dict[str, Any]) -> None:
    views = (heads("query"), heads("key")) if "QK" in module.__name__ else (heads("query").softmax(-1),)
    loss = module(**options, reduction="sum")
    assert torch.equal(loss(*views), function(*views, **options, reduction="sum"))
    assert all(f"{name}={value!r}" in repr(loss) for name, value in options.items())
