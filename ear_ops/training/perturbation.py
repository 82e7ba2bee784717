"""Perturbing the word embeddings of one forward: random ones in a ball, Gaussian ones, and the worst in a ball.

Sizes are multiples of the mean Euclidean norm of the word embeddings of the batch's real tokens. It is taken anew in
every step, so that nothing has to be kept for a resumed run, and neither padding nor a pruned vocabulary changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ear_ops.capture import unwrap

STEP_SIZE = 2.5  # times radius over steps, after Madry et al. (ICLR 2018): the boundary is reached, and followed


def word_embeddings(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The word embeddings [R, L, C] of the batch, detached. inputs: `input_ids` [R, L]."""
    with torch.no_grad():
        return _embedding_layer(model)(inputs["input_ids"])


def _embedding_layer(model: Any) -> nn.Module:
    root: Any = unwrap(model)
    return root.get_input_embeddings()


def mean_norm(embeddings: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean norm [] of the vectors of real tokens. embeddings [R, L, C], attention_mask [R, L] (1 = real)."""
    return embeddings.float().norm(dim=-1)[attention_mask.bool()].mean()


@contextmanager
def shifted(model: Any, shift: Tensor) -> Iterator[None]:
    """Inside, `shift` [R, L, C] is added to what the word embedding layer of `model` gives."""

    def add(module: Any, arguments: Any, output: Tensor) -> Tensor:
        return output + shift.to(output.dtype)

    handle = _embedding_layer(model).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def uniform_in_ball(like: Tensor, radius: Tensor) -> Tensor:
    """For each token a vector drawn uniformly from the ball of `radius` [] around 0. like, result: [R, L, C]."""
    direction = torch.randn_like(like)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    share = torch.rand_like(like[..., :1]) ** (1 / like.shape[-1])  # volume grows with the C-th power of the radius
    return radius * share * direction


def worst_in_ball(loss: Callable[[Tensor], Tensor], like: Tensor, radius: Tensor, steps: int) -> Tensor:
    """The perturbation [R, L, C] that `steps` steps of projected gradient ascent from 0 find in the ball of each token.

    A step goes along each token's normalised gradient, for `STEP_SIZE * radius / steps`, and back into the ball. One
    step lands on its surface. Tokens without gradient (padding) stay where they are.

    Args:
        loss: of a perturbation [R, L, C], a scalar.
        like: the embeddings, for shape and device [R, L, C].
        radius: [].
        steps: of ascent, at least 1.
    """
    delta = torch.zeros_like(like)
    for _ in range(steps):
        delta.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(delta), delta)
        length = gradient.norm(dim=-1, keepdim=True)
        direction = gradient / length.masked_fill(length == 0, 1)
        delta = delta.detach() + STEP_SIZE * radius / steps * direction
        delta = delta * (radius / delta.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
    return delta
