"""Tiny random models and batches, and the losses written out in plain torch from eager ``output_attentions``."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

SHAPE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PADDED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SHAPE, **NO_DROPOUT),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SHAPE, **NO_DROPOUT, **PADDED),
    "roberta": lambda: transformers.RobertaConfig(**SHAPE, **NO_DROPOUT, **PADDED),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=60,
        dim=32,
        n_layers=4,
        n_heads=4,
        hidden_dim=48,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
    "llama": lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, **PADDED),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4, **PADDED),
    "modernbert": lambda: transformers.ModernBertConfig(
        **SHAPE, **PADDED, cls_token_id=1, sep_token_id=2, local_attention=6, global_attn_every_n_layers=3
    ),
}


@pytest.fixture(params=["cpu", "cuda"])
def model_device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is false")
    return request.param


def build_model(kind: str, implementation: str = "sdpa", seed: int = 0, layers: int = 4) -> Any:
    """A classifier with random weights, large enough that attention is far from uniform; dropout 0."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    config.num_hidden_layers = layers
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return model.train()


def build_batch(rows: int = 6, length: int = 9, side: str = "right", seed: int = 1) -> dict[str, torch.Tensor]:
    """``rows`` sequences of different lengths, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 60, (rows, length), generator=generator)
    real = torch.randint(length // 2, length + 1, (rows,), generator=generator)
    real[0] = length
    position = torch.arange(length)
    mask = position < real[:, None] if side == "right" else position >= length - real[:, None]
    return {"input_ids": input_ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def attention_pull(attn: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of (P - T)^2, queries real in both views, keys real in one; ``attn`` [2B, H, L, L], ``mask`` [2B, L]."""
    rows, heads, length, _ = attn.shape
    mask = torch.ones(rows, length) if mask is None else mask.to(attn.dtype)
    first, second = mask[: rows // 2], mask[rows // 2 :]
    query, key = first * second, ((first + second) > 0).to(attn.dtype)
    squared = (attn[: rows // 2] - attn[rows // 2 :]) ** 2
    weight = query[:, None, :, None] * key[:, None, None, :]
    return (squared * weight).sum() / (heads * weight.sum())


def pooled_difference(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over pairs and features of (M(h) - M(h^a))^2; ``hidden`` [2B, L, C], ``mask`` [2B, L]."""
    mask = torch.ones(hidden.shape[:2]) if mask is None else mask.to(hidden.dtype)
    pooled = torch.einsum("blc,bl->bc", hidden, mask) / mask.sum(1, keepdim=True)
    return ((pooled[: len(pooled) // 2] - pooled[len(pooled) // 2 :]) ** 2).mean()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every parameter's gradient of ``loss``; zeros where none flows."""
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same_gradients(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-5
) -> None:
    """Relative to each gradient's norm; one that is zero in exact arithmetic (the key bias) relative to the largest."""
    largest = max(float(g.norm()) for g in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        error = float((actual[name] - gradient).norm())
        assert error <= rtol * max(float(gradient.norm()), 1e-2 * largest), (
            f"{name}: {error} of {float(gradient.norm())}"
        )


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The helpers of this file for the tests beside it."""
    helpers: list[Callable[..., Any]] = [
        build_model,
        build_batch,
        attention_pull,
        pooled_difference,
        gradients,
        assert_same_gradients,
    ]
    return SimpleNamespace(**{helper.__name__: helper for helper in helpers})
