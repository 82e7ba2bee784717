"""The place of an ``nn.MultiheadAttention``, also inside ``nn.TransformerEncoder`` and ``nn.TransformerDecoder``.

Unlike models of transformers, it gets its masks itself, so they say what is padding: ``key_padding_mask`` and
``attn_mask``. Only where it got none are the masks of the model around it asked.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ear_ops.capture.masks import (
    allowed_entries,
    attention_structure,
    dense_bias,
    find_padding,
    padding_mask,
    real_tokens,
)
from ear_ops.capture.nested import padded
from ear_ops.capture.readings import AttentionInputs
from ear_ops.capture.records import AttentionCall, Listener, Record
from ear_ops.capture.sites import Place, Surroundings, Undo
from ear_ops.capture.taps.multihead import MultiheadCall, MultiheadTap


class _Masks(NamedTuple):
    """What the masks of a call say, as the fields of :class:`AttentionInputs`."""

    key_mask: Tensor | None  # [B, S] bool
    query_mask: Tensor | None  # [B, L] bool
    attn_bias: Tensor | None
    is_causal: bool


class MultiheadSite:
    """An ``nn.MultiheadAttention``.

    Args:
        place: where it is.
        model: path of the model that receives the masks.
        around: what it is a part of.
        cross_attention: its queries are other tokens than its keys, which its name says.
    """

    uses_interface = False

    def __init__(self, place: Place, model: str, around: Surroundings, cross_attention: bool) -> None:
        self.place, self.model, self.around, self.cross_attention = place, model, around, cross_attention

    @property
    def _tap_key(self) -> str:
        """Of this site alone: nothing tells a call that two taps saw from two calls with the very same queries."""
        return f"multihead:{self.place.path}:{id(self)}"

    def install(self, listener: Listener) -> list[Undo]:
        tap = MultiheadTap(listener, self._tap_key)
        undo = [module.register_forward_pre_hook(tap, with_kwargs=True).remove for module in self.place.modules]
        return [*undo, *self.around.install(listener)]

    def read(self, record: Record, what: str) -> AttentionInputs:
        call: MultiheadCall = record.call(self._tap_key, what, self.place.call, self.place.calls)
        if call.query.dim() != 3:
            raise ValueError(
                f"{what}: expected an nn.MultiheadAttention to get batches, [B, L, E] or [L, B, E], got the shape "
                f"{list(call.query.shape)}; add the dimension of the batch with unsqueeze"
            )
        if call.query.is_nested:
            inputs, mask = padded(call.query, self.around.nested_length(record, what))
            query, key = call.heads(inputs, inputs, what)
            return AttentionInputs(query, key, mask, mask, attn_bias=None)
        inputs, inputs_key = (
            states if call.batch_first else states.transpose(0, 1) for states in (call.query, call.key)
        )
        query, key = call.heads(inputs, inputs_key, what)
        # Layers share the masks of a forward, so what they say is worked out once: that waits for the device.
        stated = call.is_causal, call.takes_hint, call.of_same_tokens, query.shape[:3], key.shape[2]
        known = (id(call.key_padding_mask), id(call.attn_mask), *stated, self.model, self.cross_attention)
        if known not in record.structures:
            record.structures[known] = self._masks(record, call, query, key, what)
        masks: _Masks = record.structures[known]
        return AttentionInputs(query, key, masks.key_mask, masks.query_mask, masks.attn_bias, is_causal=masks.is_causal)

    def _masks(self, record: Record, call: MultiheadCall, query: Tensor, key: Tensor, what: str) -> _Masks:
        rows, lengths = query.shape[0], (query.shape[2], key.shape[2])
        mask = call.mask(rows)
        key_mask = self._key_mask(record, call, mask, rows, lengths, what)
        query_mask = self._query_mask(record, call, key_mask, rows, lengths, what)
        if key_mask is None and query_mask is not None:
            key_mask = query_mask.new_ones(rows, lengths[1])
        if key_mask is not None and query_mask is None:
            query_mask = key_mask.new_ones(rows, lengths[0])
        if key_mask is not None and query_mask is not None and call.key_padding_mask is None:
            reached = ~key_mask[:, None, None, :] & query_mask[:, None, :, None]
            if bool((reached if mask is None else reached & allowed_entries(mask)).any()):
                raise ValueError(
                    f"{what}: the batch has padding that the nn.MultiheadAttention attends to, so the loss would be "
                    f"of other maps than the model's; pass the module key_padding_mask, True for padding"
                )
        if mask is None:
            return _Masks(key_mask, query_mask, None, False)
        described = AttentionCall("sdpa", nn.Identity(), query, key, key, mask, is_causal=call.is_causal)
        structure = attention_structure(described, key_mask, query_mask, what)
        if call.takes_hint and not (structure.is_causal and lengths[0] == lengths[1]):
            raise ValueError(
                f"{what}: the nn.MultiheadAttention was told is_causal=True with an attn_mask that is not causal, and "
                f"attends causally or by the mask, depending on need_weights; pass is_causal=False"
            )
        return _Masks(key_mask, query_mask, dense_bias(described, structure), structure.is_causal)

    def _key_mask(
        self,
        record: Record,
        call: MultiheadCall,
        mask: Tensor | None,
        rows: int,
        lengths: tuple[int, int],
        what: str,
    ) -> Tensor | None:
        """``[rows, S]`` bool mask of the real keys, or None where all are."""
        is_self = call.of_same_tokens and not self.cross_attention
        if is_self and record.mask_override is not None:
            return padding_mask(record.mask_override, None, rows, lengths[1], what)
        if call.key_padding_mask is not None:
            return real_tokens(call.key_padding_mask)
        if not is_self:
            return None
        key_mask = find_padding(record, self.model, None, rows, lengths[1], what)
        if key_mask is None and call.attn_mask is not None and call.attn_mask.dim() == 3:
            return padding_mask(None, mask, rows, lengths[1], what)
        return key_mask

    def _query_mask(
        self,
        record: Record,
        call: MultiheadCall,
        key_mask: Tensor | None,
        rows: int,
        lengths: tuple[int, int],
        what: str,
    ) -> Tensor | None:
        """``[rows, L]`` bool mask of the real queries, or None where all are."""
        if call.of_same_tokens:
            return key_mask
        if self.cross_attention or lengths[0] != lengths[1]:
            received = self.around.mask(record, what, "tgt_key_padding_mask")
            return None if received is None else real_tokens(received)
        if key_mask is not None and not bool(key_mask.all()):
            raise ValueError(
                f"{what}: the nn.MultiheadAttention got different tensors of one length, {lengths[0]}, as query and "
                f"key, so it is not clear whether the queries are padded like the keys. Where they are the same "
                f"tokens, pass one tensor as both; where they are others, give the module a name with 'cross' in it"
            )
        return None
