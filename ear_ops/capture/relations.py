"""The queries, keys or values of an attention, which are compared by how their tokens relate to each other."""

from __future__ import annotations

import functools

from ear_ops.capture.multihead import MultiheadSite
from ear_ops.capture.readings import AttentionInputs, AttentionMaps
from ear_ops.capture.records import Listener, Record
from ear_ops.capture.sites import AttentionSite, Undo
from ear_ops.capture.taps.hooks import add_tap, remove_tap
from ear_ops.capture.taps.interface import ValueTap


class RelationSite:
    """What an attention works on, as a reading with the same tensor as query and as key.

    Args:
        attention: the attention.
        of: ``"query"``, ``"key"`` or ``"value"``. Values are taken from the attention interface of transformers alone.
    """

    def __init__(self, attention: AttentionSite | MultiheadSite, of: str) -> None:
        if of == "value" and not attention.uses_interface:
            raise ValueError(
                f"of: expected 'query' or 'key' for {attention.place}, whose values cannot be taken, because it does "
                f"not call the attention interface of transformers; got 'value'"
            )
        self.attention, self.of = attention, of
        self.model, self.uses_interface = attention.model, attention.uses_interface

    def __str__(self) -> str:
        return f"{self.of} of the {self.attention}"

    @property
    def _value_key(self) -> str:
        return f"value:{self.attention.place.path}"

    def install(self, listener: Listener) -> list[Undo]:
        undo = self.attention.install(listener)
        if self.of == "value":
            tap = ValueTap(listener, self._value_key)
            for module in self.attention.place.modules:
                add_tap(module, tap)
                undo.append(functools.partial(remove_tap, module, tap))
        return undo

    def read(self, record: Record, what: str) -> AttentionInputs:
        reading = self.attention.read(record, what)
        if isinstance(reading, AttentionMaps):
            raise ValueError(f"{what}: this attention gives its probabilities alone, and no {self.of} to relate")
        if self.of == "query":
            states, mask = reading.query, reading.query_mask
        else:
            states, mask = reading.key, reading.attention_mask
        if self.of == "value":
            place = self.attention.place
            states = record.call(self._value_key, what, place.call, place.calls).tensor
        return AttentionInputs(states, states, mask, mask, attn_bias=None)
