"""The place where a model returns its logits."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import NamedTuple, get_args, get_type_hints

from torch import Tensor, nn

from ear_ops.capture.masks import find_padding, padding_mask
from ear_ops.capture.records import Listener, Record
from ear_ops.capture.sites import Undo
from ear_ops.capture.taps.modules import LogitsTap

_KEY = "logits"


class Logits(NamedTuple):
    """What a model predicts, and, for a prediction of each token, which of them are real."""

    logits: Tensor  # [B, K] or [B, L, K]
    attention_mask: Tensor | None  # [B, L] bool


class LogitsSite:
    """The logits in the output of ``root``: its attribute or entry of that name, or the output itself.

    ``mask``: the name of the argument that says which of the predicted tokens are real.
    """

    model = ""
    uses_interface = False

    def __init__(self, root: nn.Module, mask: str) -> None:
        self.root, self.mask = root, mask

    def __str__(self) -> str:
        return "logits of the model"

    def install(self, listener: Listener) -> list[Undo]:
        # Before the other hooks of root, of which one ends the record.
        tap = LogitsTap(listener, _KEY, _may_return_logits(self.root))
        return [self.root.register_forward_hook(tap, prepend=True).remove]

    def read(self, record: Record, what: str) -> Logits:
        logits = record.call(_KEY, what).tensor
        if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
            got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else "no tensor of that name"
            raise ValueError(
                f"{what}: expected {type(self.root).__name__} to return logits [B, K] or [B, L, K], by itself or as "
                f"output.logits, got {got}; use a model with a head that returns logits, or write a Regularizer"
            )
        if logits.dim() == 2:
            return Logits(logits, None)
        rows, length = logits.shape[:2]
        if self.mask == "attention_mask":
            return Logits(logits, find_padding(record, self.model, None, rows, length, what))
        received = record.mask(self.model, what, self.mask)
        return Logits(logits, padding_mask(received, None, rows, length, what))


def _may_return_logits(root: nn.Module) -> bool:
    """False for a model of transformers whose output, by the annotation of its forward, has no field ``logits``."""
    try:
        returned = get_type_hints(root.forward).get("return")
    except Exception:  # of annotations that are no types, which any code may have
        return True
    outputs = [kind for kind in (get_args(returned) or (returned,)) if is_dataclass(kind)]
    return not outputs or any(field.name == "logits" for kind in outputs for field in fields(kind))
