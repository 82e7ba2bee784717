"""Perturbations of the word embeddings of one forward: random in a ball, Gaussian, and the worst in a ball.

Sizes are multiples of the mean Euclidean norm of the word embeddings of the batch's real tokens. Each step computes the
norm. So a resumed run needs no saved state, and neither padding nor a pruned vocabulary changes the norm.

Several processes that share a step perturb its rows as one process would. The norm is the mean over the rows of all
processes, and the draws of a row depend on its place among them.
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

# Times radius / steps, as in Madry et al. (ICLR 2018): the search can reach the boundary and move along it.
STEP_SIZE = 2.5


def word_embeddings(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The word embeddings [R, L, C] of the batch, detached. inputs: `input_ids` [R, L]."""
    with torch.no_grad():
        return _embedding_layer(model)(inputs["input_ids"])


def _embedding_layer(model: Any) -> nn.Module:
    root: Any = unwrap(model)
    return root.get_input_embeddings()


def mean_norm(embeddings: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean norm [] of the vectors of real tokens, over all processes.

    Args:
        embeddings: [R, L, C].
        attention_mask: 1 for real tokens, [R, L].
    """
    norms = embeddings.float().norm(dim=-1)  # [R, L]
    total, count = processes.add_up(torch.stack([(norms * attention_mask).sum(), attention_mask.sum()]))
    return total / count


class Draws:
    """The random numbers for the rows of one batch, which depend on the seed and the number of the batch.

    Each process draws for the rows of all processes, always `length` tokens for a row, and takes the numbers of its
    rows. So a row gets the same numbers with one process and with several, and with any padding.

    Args:
        seed: of the run.
        batch: the number of the batch since training began, the same in all processes.
        length: the largest number of tokens that a row may have.
    """

    def __init__(self, seed: int, batch: int, length: int) -> None:
        self._seed = int(random.Random(f"draws/{seed}/{batch}").random() * 2**53)
        self._length = length
        self._generator: torch.Generator | None = None  # made with the first draw, on its device

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape of `like` [R, L, C]."""
        return self._draw(torch.randn, like, like.shape[2])

    def uniform(self, like: Tensor) -> Tensor:
        """A uniform number in [0, 1) for each token, [R, L, 1]. `like` is [R, L, C]."""
        return self._draw(torch.rand, like, 1)

    def _draw(self, draw: Callable[..., Tensor], like: Tensor, size: int) -> Tensor:
        if self._generator is None:
            self._generator = torch.Generator(like.device).manual_seed(self._seed)
        rows, length = like.shape[:2]
        shape = (processes.count() * rows, self._length, size)
        drawn = draw(shape, generator=self._generator, dtype=like.dtype, device=like.device)
        return drawn[processes.rank() * rows :][:rows, :length]


@contextmanager
def shifted(model: Any, shift: Tensor) -> Iterator[None]:
    """Inside, `shift` [R, L, C] is added to the output of the model's word embedding layer."""

    def add(module: Any, arguments: Any, output: Tensor) -> Tensor:
        return output + shift.to(output.dtype)

    handle = _embedding_layer(model).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def uniform_in_ball(like: Tensor, radius: Tensor, draws: Draws) -> Tensor:
    """A vector for each token, drawn uniformly from the ball of this radius [] around 0, in the shape of `like`."""
    direction = draws.normal(like)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    share = draws.uniform(like) ** (1 / like.shape[-1])  # volume grows with the C-th power of the radius
    return radius * share * direction


def worst_in_ball(loss: Callable[[Tensor], Tensor], like: Tensor, radius: Tensor, steps: int) -> Tensor:
    """The perturbation [R, L, C] that projected gradient ascent from 0 finds in the ball of each token.

    A step moves each token by `STEP_SIZE * radius / steps` along its normalised gradient, and then back into the ball.
    A single step ends on the surface. Tokens without gradient, such as padding, do not move.

    Args:
        loss: computes a scalar from a perturbation [R, L, C].
        like: the embeddings, for shape and device, [R, L, C].
        radius: of the balls, [].
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
