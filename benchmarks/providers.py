"""The ways to compute the losses that are measured against each other: the same inputs, the same reduction."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import ear_ops

Loss = Callable[[Tensor, Tensor], Tensor]  # query, key [2B, H, L, D] -> scalar


def eager(query: Tensor, key: Tensor) -> Tensor:
    """Plain PyTorch in the dtype of the inputs: two softmaxes and ``mse_loss``; query, key ``[2B, H, L, D]``."""
    attn = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, dim=-1)
    return F.mse_loss(*attn.chunk(2))


def fused(query: Tensor, key: Tensor) -> Tensor:
    """This package's kernel for the device of the inputs."""
    return ear_ops.qk_attention_mse(query, key, backend=query.device.type)


def qk_attention_mse_providers(compiled: bool) -> dict[str, Loss]:
    """By name; ``compiled`` adds ``torch.compile`` of the eager one, compiled anew for each case that asks."""
    providers: dict[str, Loss] = {"fused": fused, "eager": eager}
    if compiled:
        torch._dynamo.reset()  # else it gives up after a handful of shapes and quietly runs eagerly
        providers["compile"] = torch.compile(eager, dynamic=False)
    return providers
