"""Perturbing the word embeddings of one forward: random ones in a ball, Gaussian ones, and the worst in a ball.

Sizes are multiples of the mean Euclidean norm of the word embeddings of the batch's real tokens. It is taken anew in
every step, so that nothing has to be kept for a resumed run, and neither padding nor a pruned vocabulary changes it.
Several processes that share a step perturb its rows as one process would: the norm is the mean over the rows of all,
and a row's draws depend on its place among them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ear_ops.capture import unwrap
from ear_ops.recipes.training import processes

STEP_SIZE = 2.5  # times radius over steps, after Madry et al. (ICLR 2018): the boundary is reached, and followed


def word_embeddings(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The word embeddings [R, L, C] of the batch, detached. inputs: `input_ids` [R, L]."""
    with torch.no_grad():
        return _embedding_layer(model)(inputs["input_ids"])


def _embedding_layer(model: Any) -> nn.Module:
    root: Any = unwrap(model)
    return root.get_input_embeddings()


def mean_norm(embeddings: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean norm [] of the vectors of real tokens, over all processes. embeddings [R, L, C], attention_mask [R, L]
    (1 = real)."""
    norms = embeddings.float().norm(dim=-1)  # [R, L]
    total, count = processes.add_up(torch.stack([(norms * attention_mask).sum(), attention_mask.sum()]))
    return total / count


class Draws:
    """Random numbers for the rows of one batch, decided by seed and batch.

    Each process draws for the rows of all processes, `length` tokens a row whatever it is padded to, and keeps its own:
    so a row gets what it would get in one process.

    Args:
        seed: of the run.
        batch: number of the batch since training began, the same in all processes.
        length: most tokens that a row may have.
    """

    def __init__(self, seed: int, batch: int, length: int) -> None:
        self._seed = int(random.Random(f"draws/{seed}/{batch}").random() * 2**53)
        self._length = length
        self._generator: torch.Generator | None = None  # on the device of what is drawn first

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal [R, L, C]. like: [R, L, C]."""
        return self._own(torch.randn, like, like.shape[2])

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in [0, 1), one for each token: [R, L, 1]. like: [R, L, C]."""
        return self._own(torch.rand, like, 1)

    def _own(self, draw: Callable[..., Tensor], like: Tensor, size: int) -> Tensor:
        if self._generator is None:
            self._generator = torch.Generator(like.device).manual_seed(self._seed)
        rows, length = like.shape[:2]
        shape = (processes.count() * rows, self._length, size)
        drawn = draw(shape, generator=self._generator, dtype=like.dtype, device=like.device)
        return drawn[processes.rank() * rows :][:rows, :length]


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


def uniform_in_ball(like: Tensor, radius: Tensor, draws: Draws) -> Tensor:
    """For each token a vector drawn uniformly from the ball of `radius` [] around 0. like, result: [R, L, C]."""
    direction = draws.normal(like)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    share = draws.uniform(like) ** (1 / like.shape[-1])  # volume grows with the C-th power of the radius
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
