"""Sites: the places in a model where something is taken.

A site belongs to one attachment. ``install`` taps the place and returns how to undo that. ``read`` turns the record of
one forward into a reading, which a loss takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ear_ops.capture.masks import (
    attention_structure,
    check_mask_arrived,
    dense_bias,
    find_padding,
    padding_mask,
    tensor_mask,
)
from ear_ops.capture.nested import padded
from ear_ops.capture.readings import AttentionInputs, AttentionMaps, HiddenStates
from ear_ops.capture.records import AttentionCall, Listener, Record, SoftmaxCall
from ear_ops.capture.taps.hooks import add_tap, remove_tap
from ear_ops.capture.taps.inside import Watch, other_softmax
from ear_ops.capture.taps.interface import AttentionTap
from ear_ops.capture.taps.modules import InputTap, MaskTap, OutputTap

Undo = Callable[[], None]


class Site(Protocol):
    """A place in a model."""

    model: str  # path of the model whose attention_mask says which tokens are real
    uses_interface: bool  # it needs the attention interface of transformers to report

    def __str__(self) -> str:
        """Where it is, in words, such as ``attention at encoder.layer.5``."""

    def install(self, listener: Listener) -> list[Undo]:
        """Tap the place; returns what undoes it."""

    def read(self, record: Record, what: str) -> tuple[Any, ...]:
        """The reading of this place, its first field a tensor ``[B, ...]``; ``what`` names the place in errors."""


class Place(NamedTuple):
    """Where in a forward a layer runs.

    Attributes:
        path: of the module, or of the list of modules that a model runs again and again, each run being a layer.
        modules: the module, or the modules of that list.
        call: which of the calls of the modules it is, from 0.
        calls: how often the modules are called in a forward.
    """

    path: str
    modules: tuple[nn.Module, ...]
    call: int = 0
    calls: int = 1

    def __str__(self) -> str:
        repeated = f" (call {self.call + 1} of {self.calls})" if self.calls > 1 else ""
        return f"{self.path or 'the model itself'}{repeated}"


class Surroundings:
    """The ``nn.TransformerEncoder`` or ``nn.TransformerDecoderLayer`` around a place, whose masks say more of it.

    ``module``: None where there is neither.
    """

    def __init__(self, path: str, module: nn.Module | None) -> None:
        self.module = module
        self._key = f"masks around:{path}"

    def install(self, listener: Listener) -> list[Undo]:
        if self.module is None:
            return []
        tap = MaskTap(listener, self._key, self.module)
        return [self.module.register_forward_pre_hook(tap, with_kwargs=True).remove]

    def mask(self, record: Record, what: str, name: str) -> Tensor | None:
        """What the module received as ``name``, or None."""
        received: Tensor | None = record.mask(self._key, what, name)
        return received

    def nested_length(self, record: Record, what: str) -> int | None:
        """The length of the padded rows of which the encoder made nested ones; None: the caller made them."""
        padding = self.mask(record, what, "src_key_padding_mask")
        return None if padding is None else padding.shape[1]


class AttentionSite:
    """An attention module.

    Args:
        place: where it is.
        model: path of the model that receives the masks.
        key_mask, query_mask: under which names it receives them; two different names in cross-attention.
        inside: the module computes its attention itself, instead of calling through the attention interface of
            transformers.
    """

    def __init__(
        self,
        place: Place,
        model: str,
        key_mask: str = "attention_mask",
        query_mask: str = "attention_mask",
        *,
        inside: bool = False,
    ) -> None:
        self.place, self.model, self.inside = place, model, inside
        self.key_mask, self.query_mask = key_mask, query_mask
        self.uses_interface = not inside

    def __str__(self) -> str:
        return f"attention at {self.place}"

    def install(self, listener: Listener) -> list[Undo]:
        if self.inside:
            return [undo for module in self.place.modules for undo in Watch(listener, self.place.path).install(module)]
        tap = AttentionTap(listener, self.place.path)
        for module in self.place.modules:
            add_tap(module, tap)
        return [functools.partial(remove_tap, module, tap) for module in self.place.modules]

    def read(self, record: Record, what: str) -> AttentionInputs | AttentionMaps:
        path, _, index, expected = self.place
        other = record.calls.get(other_softmax(path))
        if other and path not in record.calls:
            raise ValueError(
                f"{what}: the attention at {path} took a softmax of shape {list(other[0].tensor.shape)} for inputs of "
                f"shape {list(other[0].input_shape or ())}, which is no attention matrix [B, H, L, S]; sparse and "
                f"local attention are not supported"
            )
        call: AttentionCall | SoftmaxCall = record.call(path, what, index, expected)
        if isinstance(call, SoftmaxCall):
            maps = call.maps()
            assert maps is not None
            return AttentionMaps(maps, *self._masks(record, None, maps.shape[0], maps.shape[2:], what))
        if call.unsupported is not None:
            raise ValueError(
                f"{what}: the attention was called with {call.unsupported}, which the attention losses do not support"
            )
        query, key = _one_dtype(call.query, call.key)
        lengths = query.shape[2], key.shape[2]
        # Layers share the mask of a forward, so its structure is worked out once: that waits for the device.
        stated = (call.implementation, call.is_causal, call.window, *lengths)
        known = (id(call.attention_mask), *stated, self.model, self.key_mask, self.query_mask)
        call.attention_mask = tensor_mask(call.attention_mask, query.shape[0], *lengths, query.device)
        key_mask, query_mask = self._masks(record, call.attention_mask, query.shape[0], lengths, what)
        if known not in record.structures:
            record.structures[known] = attention_structure(call, key_mask, query_mask, what)
            check_mask_arrived(call, key_mask, record.structures[known], what)
        structure = record.structures[known]
        bias = dense_bias(call, structure)
        scale, softcap = call.scaling, call.softcap
        return AttentionInputs(
            query, key, key_mask, query_mask, bias, scale, structure.is_causal, structure.window, softcap
        )

    def _masks(
        self, record: Record, attention_mask: Any, rows: int, lengths: Sequence[int], what: str
    ) -> tuple[Tensor | None, Tensor | None]:
        """Key mask ``[rows, S]`` and query mask ``[rows, L]``, or twice None; ``lengths``: L and S."""
        received = record.mask(self.model, what, self.key_mask)
        if received is None and attention_mask is None and self.key_mask == "attention_mask":
            key_mask = find_padding(record, self.model, None, rows, lengths[1], what)
        else:
            key_mask = padding_mask(received, attention_mask, rows, lengths[1], what)
        if self.query_mask == self.key_mask:
            return key_mask, _query_mask(key_mask, *lengths)
        query_mask = padding_mask(record.mask(self.model, what, self.query_mask), None, rows, lengths[0], what)
        if key_mask is None and query_mask is None:
            return None, None
        device = next(mask.device for mask in (key_mask, query_mask) if mask is not None)
        all_queries, all_keys = (torch.ones(rows, length, dtype=torch.bool, device=device) for length in lengths)
        return all_keys if key_mask is None else key_mask, all_queries if query_mask is None else query_mask


class ProjectionSite:
    """Two projection modules whose outputs, split into heads, are the queries and keys of a plain softmax attention."""

    uses_interface = False

    def __init__(
        self,
        root: nn.Module,
        query: str,
        key: str,
        num_heads: int,
        num_key_value_heads: int,
        model: str,
        cross_attention: bool | None = None,
    ) -> None:
        self.root, self.cross_attention = root, cross_attention
        self.query, self.key = query, key
        self.query_module, self.key_module = root.get_submodule(query), root.get_submodule(key)
        self.num_heads, self.num_key_value_heads = num_heads, num_key_value_heads
        self.model = model

    def __str__(self) -> str:
        return f"projections {self.query} and {self.key}"

    def install(self, listener: Listener) -> list[Undo]:
        return [
            module.register_forward_hook(OutputTap(listener, f"projection:{path}")).remove
            for path, module in ((self.query, self.query_module), (self.key, self.key_module))
        ]

    def read(self, record: Record, what: str) -> AttentionInputs:
        self._check_in_place(what)
        query = self._heads(record, self.query, self.num_heads, what)
        key = self._heads(record, self.key, self.num_key_value_heads, what)
        query, key = _one_dtype(query, key)
        rows, lengths = query.shape[0], (query.shape[2], key.shape[2])
        key_mask = find_padding(record, self.model, None, rows, lengths[1], what)
        query_mask = key_mask
        if key_mask is not None and self._is_cross_attention(record, lengths, what):
            query_mask = key_mask.new_ones(rows, lengths[0])  # queries of other tokens, such as learnt ones, are real
        return AttentionInputs(query, key, key_mask, query_mask, attn_bias=None)

    def _check_in_place(self, what: str) -> None:
        """Raises RuntimeError where another module, whose output the model uses, took the place of a projection."""
        for path, module in ((self.query, self.query_module), (self.key, self.key_module)):
            try:
                current = self.root.get_submodule(path)
            except AttributeError:  # inside a wrapper of its own
                continue
            if current is not module:
                raise RuntimeError(
                    f"{what}: {path} was replaced by {type(current).__name__} after attach(), so the loss would be of "
                    f"what lies inside; detach, and attach again after get_peft_model, merge_and_unload and the like"
                )

    def _is_cross_attention(self, record: Record, lengths: tuple[int, int], what: str) -> bool:
        """Whether queries and keys are of different tokens; equal lengths alone may be a coincidence."""
        if self.cross_attention is not None or lengths[0] != lengths[1]:
            return self.cross_attention is not False
        sources = [record.call(f"projection:{path}", what).source for path in (self.query, self.key)]
        if sources[0] is not sources[1]:
            raise ValueError(
                f"{what}: {self.query} and {self.key} project different tensors of one length, {lengths[0]}, so it is "
                f"not clear whether the queries are padded like the keys; pass cross_attention=True where they are "
                f"other tokens (all of them real), False where they are the same"
            )
        return False

    def _heads(self, record: Record, path: str, heads: int, what: str) -> Tensor:
        """The output ``[B, L, heads * D]`` of a projection as ``[B, heads, L, D]``, without a copy."""
        output = record.call(f"projection:{path}", what).tensor
        output = _expect_tensor(output, "[B, L, heads * D]", f"{what}: the output of {path}")
        if output.shape[2] % heads:
            raise ValueError(f"{what}: the {output.shape[2]} features of {path} do not divide into {heads} heads")
        return output.unflatten(2, (heads, -1)).transpose(1, 2)


class HiddenSite:
    """The hidden states that enter (``"input"``) or leave (``"output"``) the block at ``place``."""

    uses_interface = False

    def __init__(self, place: Place, side: str, model: str, around: Surroundings) -> None:
        self.place, self.side, self.model, self.around = place, side, model, around
        self.handles: tuple[RemovableHandle, ...] = ()

    def __str__(self) -> str:
        return f"{self.side} of {self.place}"

    @property
    def _tap_key(self) -> str:
        return f"{self.side}:{self.place.path}"

    @property
    def _mask_key(self) -> str:
        return f"masks:{self.place.path}"

    def install(self, listener: Listener) -> list[Undo]:
        undo, handles = self.around.install(listener), []
        for block in self.place.modules:
            masks = MaskTap(listener, self._mask_key, block)
            handles.append(block.register_forward_pre_hook(masks, with_kwargs=True))
            if self.side == "input":
                before = InputTap(listener, self._tap_key)
                handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            else:
                handles.append(block.register_forward_hook(OutputTap(listener, self._tap_key)))
        self.handles = tuple(handles)
        return [*undo, *(handle.remove for handle in handles)]

    def read(self, record: Record, what: str) -> HiddenStates:
        tensor = record.call(self._tap_key, what, self.place.call, self.place.calls).tensor
        if isinstance(tensor, Tensor) and tensor.is_nested:
            return HiddenStates(*padded(tensor, self.around.nested_length(record, what)))
        states = _expect_tensor(tensor, "[B, L, C]", f"{what}: the {self.side} of {self.place.path}")
        rows, length = states.shape[:2]
        return HiddenStates(states, find_padding(record, self.model, self._mask_key, rows, length, what))


def _query_mask(key_mask: Tensor | None, query_length: int, key_length: int) -> Tensor | None:
    """In self-attention the queries are the last of the keys (the others were cached); ``key_mask``: ``[B, S]``."""
    return None if key_mask is None else key_mask[:, key_length - query_length :]


def _one_dtype(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast queries and keys may differ in dtype (a norm on one of them): the wider of the two for both."""
    dtype = torch.promote_types(query.dtype, key.dtype)
    return query.to(dtype), key.to(dtype)


def _expect_tensor(value: Any, layout: str, what: str) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != layout.count(",") + 1:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what}: expected a tensor {layout}, got {got}")
    return value
