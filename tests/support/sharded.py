"""One training step of a tiny BERT: what the tests of several processes run, and what they expect."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

import ear_ops

PAIRS = 4


def build_model(implementation: str = "sdpa") -> Any:
    """Without dropout, its attention far from uniform."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification._from_config(config, attn_implementation=implementation).train()


def build_batch(padded: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Two views of PAIRS pairs, and labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (2 * PAIRS, 7), generator=generator)
    lengths = torch.randint(3, 8, (2 * PAIRS, 1), generator=generator) if padded else torch.full((2 * PAIRS, 1), 7)
    mask = (torch.arange(7) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, torch.tensor([0, 2, 1, 1])


def share(batch: dict[str, Tensor], labels: Tensor, rank: int, count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Every count-th pair, both views of it."""
    return (
        {name: torch.cat([view[rank::count] for view in tensor.chunk(2)]) for name, tensor in batch.items()},
        labels[rank::count],
    )


def step_of_eager_attention(reduction: str, padded: bool) -> dict[str, Tensor]:
    """Gradients of one step of all pairs in this process and its loss, from what eager attention returns."""
    model = build_model("eager")
    batch, labels = build_batch(padded)
    out = model(**batch, output_attentions=True, output_hidden_states=True)
    how: dict[str, Any] = {"attention_mask": batch["attention_mask"], "reduction": reduction, "backend": "reference"}
    pull = ear_ops.attention_mse(out.attentions[1], **how)
    push = -ear_ops.pooled_distance(out.hidden_states[0], **how)
    sentence = ear_ops.pooled_distance(out.hidden_states[1], **how)
    loss = ear_ops.robust_cross_entropy(out.logits, labels) + 5.0 * pull + 0.5 * push + 0.7 * sentence
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {**gradients, "loss": loss.detach()}


def step(wrapping: str, views: str, reduction: str, padded: bool) -> dict[str, Tensor]:
    """Gradients of one step of this process's pairs, and its loss under the name ``loss``.

    Args:
        wrapping: ``"ddp"`` or ``"fsdp2"``.
        views: ``"one forward"`` or ``"two forwards"``.
    """
    model = build_model()
    parameters = dict(model.named_parameters())
    batch, labels = build_batch(padded)
    torch.distributed.init_process_group("gloo")
    batch, labels = share(batch, labels, torch.distributed.get_rank(), torch.distributed.get_world_size())
    if wrapping == "ddp":
        # DDP of torch 2.11 overwrites the position ids before a second forward; the backward of the first needs them.
        wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=views == "one forward")
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
        parameters = dict(model.named_parameters())
    regularizers = [
        ear_ops.AttentionPull(2, 5.0, reduction=reduction),
        ear_ops.EmbeddingPush(0.5, reduction=reduction),
        ear_ops.SentencePull(1, 0.7, reduction=reduction),
    ]
    with ear_ops.attach(wrapped, regularizers) as ear:
        if views == "one forward":
            logits = wrapped(**batch).logits
        else:
            parts = []
            for name, half in (("original", 0), ("augmented", 1)):
                with ear.view(name):
                    parts.append(wrapped(**{key: tensor.chunk(2)[half] for key, tensor in batch.items()}).logits)
            logits = torch.cat(parts)
        loss = ear_ops.robust_cross_entropy(logits, labels) + ear.loss()
        loss.backward()
    gradients = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            gradient = parameter.grad
            gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return {**gradients, "loss": loss.detach()}
