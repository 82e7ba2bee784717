"""What one recorded forward gave: tensors still in the autograd graph, nothing copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class AttentionCall:
    """The arguments of one call of an attention function, as far as a loss needs them.

    Attributes:
        implementation: the name that the function is registered under, ``"eager"`` for a modeling file's own.
        query: ``[B, H, L, D]``, after rotary embedding and norms, a strided view.
        key: ``[B, H_kv, S, D]``.
        attention_mask: what the function was given: None, ``[B, S]``, ``[B, 1 or H, L, S]``, or a mask object.
        scaling: the factor of the scores, None for 1/sqrt(D).
        is_causal: what the call says, else what the module says.
        window: the keyword ``sliding_window``.
        softcap: the keyword ``softcap``.
        position_bias: ``[1 or B, H, L, S]`` added to the scores (T5), or None.
        unsupported: the name of an argument that changes the probabilities in a way the losses do not know, or None.
        grad_enabled: the grad mode of the call.
    """

    def __init__(
        self,
        implementation: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> None:
        is_causal = kwargs.get("is_causal")
        self.implementation = implementation
        self.query = query
        self.key = key
        self.attention_mask = attention_mask
        self.scaling: float | None = kwargs.get("scaling")
        self.is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        self.window: int | None = kwargs.get("sliding_window")
        self.softcap: float | None = kwargs.get("softcap")
        self.position_bias: Tensor | None = kwargs.get("position_bias")
        self.unsupported: str | None = None
        for name in ("s_aux", "cu_seq_lens_q", "cache"):
            if kwargs.get(name) is not None:
                self.unsupported = name
        self.grad_enabled = torch.is_grad_enabled()


class TensorCall:
    """One tensor that passed a hook, and the grad mode of that moment."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.grad_enabled = torch.is_grad_enabled()


class Record:
    """One forward of the root module.

    Attributes:
        grad_enabled: the grad mode in which the forward began.
        masks: the ``attention_mask`` that each model inside received, by the model's path.
        calls: what each tap saw, in order, by the tap's key.
    """

    def __init__(self) -> None:
        self.grad_enabled = torch.is_grad_enabled()
        self.masks: dict[str, Any] = {}
        self.calls: dict[str, list[Any]] = {}

    def add(self, key: str, call: Any) -> None:
        if key not in self.calls:
            self.calls[key] = []
        self.calls[key].append(call)

    def only_call(self, key: str, tensor: str, what: str) -> Any:
        """The one call that the tap ``key`` saw.

        Args:
            key: the tap's key.
            tensor: the attribute by which a repeated call with the very same tensor is recognised, and counted once.
            what: names the place in errors.

        Raises:
            RuntimeError: no call, several, or one without grad inside a forward with grad (reentrant checkpointing).
        """
        calls: list[Any] = []
        for call in self.calls.get(key, ()):
            if all(getattr(call, tensor) is not getattr(seen, tensor) for seen in calls):
                calls.append(call)
        if not calls:
            raise RuntimeError(
                f"{what}: the last forward did not come through here, so there is nothing to regularise. Was the layer "
                f"skipped (layer dropout), or the model compiled before attach()? Attach first, or call "
                f"torch.compiler.reset() once after attach()"
            )
        if len(calls) > 1:
            raise RuntimeError(
                f"{what}: expected one call in a forward, got {len(calls)}. A layer that is shared or run several "
                f"times is not supported; for two forwards of one model use "
                f'ear.view("original") and ear.view("augmented")'
            )
        if self.grad_enabled and not calls[0].grad_enabled:
            raise RuntimeError(
                f"{what}: the layer ran without grad inside a forward with grad, so the regulariser would have no "
                f"gradient. Gradient checkpointing has to be told use_reentrant=False "
                f'(gradient_checkpointing_kwargs={{"use_reentrant": False}})'
            )
        return calls[0]
