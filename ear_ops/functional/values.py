"""Whether the numbers of a tensor can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def has_no_values(tensor: Tensor) -> bool:
    """Whether numbers cannot be read of ``tensor``: under a transform of torch.func, with fake tensors, in a trace."""
    return (
        torch._C._are_functorch_transforms_active()
        or detect_fake_mode((tensor,)) is not None
        or get_proxy_mode() is not None
    )


def can_be_read(tensor: Tensor | None) -> bool:
    """Whether the numbers of ``tensor`` can be looked at without waiting for a device, and not in a trace."""
    return tensor is not None and tensor.is_cpu and not torch.compiler.is_compiling() and not has_no_values(tensor)
