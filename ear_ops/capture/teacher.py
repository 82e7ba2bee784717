"""A second model as the other view: which of its layers stands for which of the student's, and its constants."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ear_ops.capture.layout import Layout, unwrap
from ear_ops.capture.multihead import MultiheadSite
from ear_ops.capture.records import Record
from ear_ops.capture.sites import AttentionSite, HiddenSite, ProjectionSite

Reading = TypeVar("Reading", bound=tuple[Any, ...])
LayerMap = Mapping[int | str, int | str]


class TeacherLayout(Layout):
    """The places of a teacher, asked for by the student's layers or paths of projections.

    Args:
        teacher: the teacher's root module.
        student: the places of the student.
        layer_map: from a layer of the student to a layer of the teacher, both counted from 1. It also maps paths of
            attentions and projections. None takes the same layer where both models are equally deep. Otherwise it
            spreads the layers evenly, the last on the last. A path without an entry leads to the same place inside the
            teacher's block for its block.
    """

    def __init__(self, teacher: nn.Module, student: Layout, layer_map: LayerMap | None) -> None:
        super().__init__(teacher)
        self.student = student
        self.layer_map = layer_map

    def attention(self, layer: int | str) -> AttentionSite | MultiheadSite:
        mapped = self._teacher_path(layer) if isinstance(layer, str) else self._teacher_layer(layer)
        return self._named(super().attention, mapped)

    def hidden_states(self, layer: int) -> HiddenSite:
        return self._named(super().hidden_states, self._teacher_layer(layer))

    def embeddings(self) -> HiddenSite:
        return self._named(super().embeddings)

    def projections(
        self,
        query: str,
        key: str,
        num_heads: int,
        num_key_value_heads: int | None,
        cross_attention: bool | None = None,
    ) -> ProjectionSite:
        layer_map = self.layer_map or {}
        query, key = (str(layer_map.get(path, path)) for path in (query, key))
        return self._named(super().projections, query, key, num_heads, num_key_value_heads, cross_attention)

    def _named(self, find: Any, *arguments: Any) -> Any:
        """What ``find`` finds, its errors naming the teacher."""
        try:
            return find(*arguments)
        except ValueError as error:
            raise ValueError(f"teacher: {error}") from None

    def _teacher_path(self, path: str) -> int | str:
        if self.layer_map is not None and path in self.layer_map:
            return self.layer_map[path]
        try:
            blocks, _, number = self.student.block(1).path.rpartition(".")
        except ValueError:  # a student without a list of blocks
            return path
        inside = (
            re.fullmatch(rf"{re.escape(blocks)}\.(\d+)(\..+)?", self.student.full_path(path)) if number == "0" else None
        )
        if inside is None:
            return path
        return self.block(self._teacher_layer(int(inside[1]) + 1)).path + (inside[2] or "")

    def _teacher_layer(self, layer: int) -> int:
        if self.layer_map is None:
            depth, teacher_depth = self.student.depth, self.depth
            if teacher_depth % depth:
                raise ValueError(
                    f"layer_map: the teacher has {teacher_depth} layers and the student {depth}, which do not divide; "
                    f"say which of the teacher's layers belongs to layer {layer}, as layer_map={{{layer}: ...}}"
                )
            return layer * (teacher_depth // depth)
        if layer not in self.layer_map:
            known = ", ".join(map(repr, self.layer_map)) or "none"
            raise ValueError(f"layer_map: expected an entry for layer {layer} of the student; it has {known}")
        mapped = self.layer_map[layer]
        if not isinstance(mapped, int) or isinstance(mapped, bool):
            raise TypeError(f"layer_map: expected layer {layer} to map to a layer number, got {mapped!r}")
        return mapped


def check_teacher(teacher: Any, student: nn.Module, layer_map: Any) -> nn.Module:
    """The teacher's root module. ``student``: the root module of the model that is trained.

    Raises:
        TypeError, ValueError: it is no module or the student itself, or ``layer_map`` is no mapping.
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher: expected a torch.nn.Module, got {type(teacher).__name__}")
    if layer_map is not None and not isinstance(layer_map, Mapping):
        raise TypeError(f"layer_map: expected a mapping from layers of the student to the teacher's, got {layer_map!r}")
    root = unwrap(teacher)
    if root is student:
        raise ValueError(
            "teacher: expected another model, got the student itself; for two forwards of one model use "
            'ear.view("original") and ear.view("augmented"), for a frozen copy copy.deepcopy(model)'
        )
    return root


def check_same_batch(record: Record, teacher_record: Record, student: nn.Module, teacher: nn.Module) -> None:
    """Raises RuntimeError where the teacher's record is of another batch than the student's.

    Usually both received the very same tensor, and nothing is compared. Other tensors of token ids are compared by
    value where both models have vocabularies of one size; that waits for the device.
    """
    batch, teacher_batch = record.batch, teacher_record.batch
    if batch is None or teacher_batch is None:
        return
    ids, teacher_ids = batch.tensor, teacher_batch.tensor
    if ids is teacher_ids:
        # Another version: the tensor was filled anew in between. A compiled model has no versions.
        same = None in (batch.version, teacher_batch.version) or batch.version == teacher_batch.version
    elif _are_token_ids(ids) and _are_token_ids(teacher_ids) and _share_vocabulary(student, teacher):
        if ids.shape != teacher_ids.shape:
            return  # the readings are compared later, with errors that name the shapes
        same = torch.equal(ids, teacher_ids.to(ids.device))
    else:
        return
    if not same:
        raise RuntimeError(
            "the teacher's last forward was of another batch than the model's; call it on the batch of each loss(), "
            "with torch.no_grad(): teacher(**batch)"
        )


def _are_token_ids(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and not tensor.is_floating_point() and not tensor.is_complex()


def _share_vocabulary(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether both configurations name vocabularies of one size."""
    size, teacher_size = (getattr(getattr(model, "config", None), "vocab_size", None) for model in (student, teacher))
    return size is not None and size == teacher_size


def as_constant(reading: Reading, device: torch.device) -> Reading:
    """``reading`` with its tensors detached and on ``device``."""
    values = (value.detach().to(device) if isinstance(value, Tensor) else value for value in reading)
    return type(reading)(*values)


def outside_inference_mode(reading: Reading) -> Reading:
    """``reading`` with copies of tensors from ``torch.inference_mode()``, which autograd cannot keep."""
    values = (value.clone() if isinstance(value, Tensor) and value.is_inference() else value for value in reading)
    return type(reading)(*values)
