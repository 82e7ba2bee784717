"""What one recorded forward gave: tensors still in the autograd graph, nothing copied."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ear_ops.capture.pending import PendingResult

_HINT = (
    ", so the loss would use what was written there. In a model write x = x + y in place of x += y; between two "
    "forwards, or a forward and its loss(), overwrite no buffer that the first one used: give each view a cache "
    "of its own (or use_cache=False) and a mask of its own"
)


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
        position_ids: the keyword ``position_ids``.
        versions: how often each of ``taken`` had been changed in place by then.
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
        for name, value in kwargs.items():
            # Sinks and whatever else a model adds to the scores; integers are positions and lengths.
            if name != "position_bias" and isinstance(value, Tensor) and value.is_floating_point():
                self.unsupported = name
            if name in ("cu_seq_lens_q", "cache") and value is not None:
                self.unsupported = name
        self.position_ids: Any = kwargs.get("position_ids")
        self._received_mask = attention_mask  # a site may put a tensor in place of a mask object
        self.versions = tuple(tensor_version(tensor) for _, tensor in self.taken)
        self.grad_enabled = torch.is_grad_enabled()

    @property
    def tensor(self) -> Tensor:
        """By which a call that is reported twice is recognised."""
        return self.query

    @property
    def taken(self) -> tuple[tuple[str, Any], ...]:
        """What the loss is computed of, by the names for errors."""
        return (
            ("tensor of the queries", self.query),
            ("tensor of the keys", self.key),
            ("attention mask", self._received_mask),
            ("position bias", self.position_bias),
        )


class SoftmaxCall:
    """The attention matrix that a module made with softmax, before dropout.

    Attributes:
        tensor: ``[B, H, L, S]`` or ``[B * H, L, S]``.
        input_shape: of the first tensor given to the module, None where it was given none.
        grad_enabled: the grad mode of the call.
    """

    taken: tuple[tuple[str, Any], ...] = ()  # some modules empty rows of the matrix in place
    versions: tuple[int | None, ...] = ()

    def __init__(self, tensor: Tensor, input_shape: tuple[int, ...] | None) -> None:
        self.tensor = tensor
        self.input_shape = input_shape
        self.grad_enabled = torch.is_grad_enabled()

    def maps(self) -> Tensor | None:
        """``[B, H, L, S]``, or None where it is no attention of all positions of the input (``[B, L, C]``)."""
        maps = self.tensor
        if self.input_shape is None or len(self.input_shape) < 2:
            return None
        positions = math.prod(self.input_shape[:-1])
        if maps.dim() == 3 and maps.shape[1] and positions % maps.shape[1] == 0:
            rows = positions // maps.shape[1]
            maps = maps.unflatten(0, (rows, -1)) if rows and maps.shape[0] % rows == 0 else maps
        if maps.dim() != 4 or maps.shape[0] * maps.shape[2] != positions:
            return None
        # Over a single key a softmax is always 1: of one weight a token (SwiftFormer), not of an attention.
        return None if maps.shape[3] == 1 < maps.shape[2] else maps


class TensorCall:
    """One tensor that passed a hook, its version and the grad mode of that moment.

    ``source``: the tensor that a module made it of, where it is a module's output.
    """

    def __init__(self, tensor: Any, source: Any = None) -> None:
        self.tensor = tensor
        self.source = source
        self.version = tensor_version(tensor)
        self.grad_enabled = torch.is_grad_enabled()

    @property
    def taken(self) -> tuple[tuple[str, Any], ...]:
        """What the loss is computed of, by the names for errors."""
        return (("tensor", self.tensor),)

    @property
    def versions(self) -> tuple[int | None, ...]:
        return (self.version,)


class Record:
    """One forward of the root module.

    Attributes:
        training: the root module was in training mode.
        grad_enabled: the grad mode in which the forward began.
        complete: the forward has ended; KeyboardInterrupt ends it without a hook.
        result: what the forward returned; None where it was compiled.
        masks: the masks that each model inside received by name, by the model's path.
        masked_models: paths of the models that take an ``attention_mask`` by name and were called.
        mask_override: takes the place of the ``attention_mask`` that models received, where it is not None.
        batch: the first tensor that the root module received, by which the batch is recognised, and its version.
        calls: what each tap saw, in order, by the tap's key.
        structures: what the attention masks of this forward say, kept for the next layer by :mod:`.sites`.
    """

    def __init__(self, training: bool = True) -> None:
        self.training = training
        self.grad_enabled = torch.is_grad_enabled()
        self.complete = False
        self.result: PendingResult | None = None
        self.masks: dict[str, dict[str, TensorCall]] = {}
        self.masked_models: set[str] = set()
        self.mask_override: Tensor | None = None
        self.batch: TensorCall | None = None
        self.calls: dict[str, list[Any]] = {}
        self.structures: dict[Any, Any] = {}

    def add(self, key: str, call: Any) -> None:
        if key not in self.calls:
            self.calls[key] = []
        self.calls[key].append(call)

    def mask(self, model: str, what: str, name: str = "attention_mask") -> Any:
        """What the model at the path ``model`` received as ``name``, or None; ``what`` names the place in errors.

        Raises:
            RuntimeError: the mask was changed in place since.
        """
        if name == "attention_mask" and self.mask_override is not None:
            return self.mask_override
        received = self.masks.get(model, {}).get(name)
        if received is None:
            return None
        if received.version is not None and tensor_version(received.tensor) != received.version:
            raise RuntimeError(
                f"{what}: the {name} that the model received was changed in place afterwards, so the loss would use "
                f"the mask of another batch; call loss() before the buffer is filled again, or give each forward a "
                f"mask of its own ({name}.clone())"
            )
        return received.tensor

    def call(self, key: str, what: str, index: int = 0, expected: int = 1) -> Any:
        """Call ``index`` of the ``expected`` calls that the tap ``key`` saw; one with the very same tensor counts once.

        Args:
            key: the tap's key.
            what: names the place in errors.
            index: from 0, the layer of a stack that runs one module again and again.
            expected: how many calls a forward makes.

        Raises:
            RuntimeError: no call, too many or too few, one without grad inside a forward with grad (reentrant
                checkpointing), or one of tensors that were changed in place since.
        """
        calls: list[Any] = []
        for call in self.calls.get(key, ()):
            if all(call.tensor is not seen.tensor for seen in calls):
                calls.append(call)
        if not calls:
            raise RuntimeError(
                f"{what}: the last forward did not come through here, so there is nothing to regularise. Was the layer "
                f"skipped (layer dropout), or the model compiled before attach()? Attach first, or call "
                f"torch.compiler.reset() once after attach()"
            )
        if len(calls) != expected:
            wanted = "one call" if expected == 1 else f"{expected} calls"
            raise RuntimeError(
                f"{what}: expected {wanted} in a forward, got {len(calls)}. A layer that runs several times is "
                f"supported only where a model shares one layer as all of its layers; for two forwards of one model "
                f'use ear.view("original") and ear.view("augmented")'
            )
        if self.grad_enabled and not calls[index].grad_enabled:
            raise RuntimeError(
                f"{what}: the layer ran without grad inside a forward with grad, so the regulariser would have no "
                f"gradient. Gradient checkpointing has to be told use_reentrant=False "
                f'(gradient_checkpointing_kwargs={{"use_reentrant": False}})'
            )
        for (name, tensor), version in zip(calls[index].taken, calls[index].versions, strict=True):
            if version is not None and tensor_version(tensor) != version:
                raise RuntimeError(f"{what}: the {name} that was taken here was changed in place afterwards{_HINT}")
        return calls[index]


def may_be_padding(name: str, module: nn.Module | None = None) -> bool:
    """Whether an argument called ``name``, of ``module``, may say which tokens are padding, or which are not."""
    if name.startswith("memory_") or (name == "mask" and isinstance(module, nn.TransformerEncoder)):
        return False  # of what a decoder attends to; of positions, the same for all rows
    return name in ("mask", "masks", "input_mask", "token_mask", "pad_mask") or name.endswith("padding_mask")


def tensor_version(tensor: Any) -> int | None:
    """The count of in-place changes, None where there is none."""
    if not isinstance(tensor, Tensor) or torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version


class Listener(Protocol):
    """What a tap reports to: the recorder, whose ``record`` is None while nothing is recorded."""

    record: Record | None
