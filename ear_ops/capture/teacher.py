"""A second model as the other view: which of its layers stands for which of the student's, and its constants."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ear_ops.capture.layout import Layout, unwrap
from ear_ops.capture.sites import AttentionSite, HiddenSite, ProjectionSite

View = TypeVar("View", bound=tuple[Any, ...])
LayerMap = Mapping[int | str, int | str]


class TeacherLayout(Layout):
    """The places of a teacher, asked for by the student's layers (and paths of projections).

    Args:
        teacher: the teacher's root module.
        student: the places of the student.
        layer_map: from a layer of the student to one of the teacher, both counted from 1, and from the path of an
            attention or a projection of the student to one of the teacher. None: the same layer where both models are
            equally deep, else evenly spread, the last layer on the last. A path that it does not name is taken to the
            same place of the block that stands for its block.
    """

    def __init__(self, teacher: nn.Module, student: Layout, layer_map: LayerMap | None) -> None:
        super().__init__(teacher)
        self.student = student
        self.layer_map = layer_map

    def attention(self, layer: int | str) -> AttentionSite:
        mapped = self._teacher_path(layer) if isinstance(layer, str) else self._teacher_layer(layer)
        return self._named(super().attention, mapped)

    def hidden_states(self, layer: int) -> HiddenSite:
        return self._named(super().hidden_states, self._teacher_layer(layer))

    def embeddings(self) -> HiddenSite:
        return self._named(super().embeddings)

    def projections(self, query: str, key: str, num_heads: int, num_key_value_heads: int | None) -> ProjectionSite:
        layer_map = self.layer_map or {}
        query, key = (str(layer_map.get(path, path)) for path in (query, key))
        return self._named(super().projections, query, key, num_heads, num_key_value_heads)

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
        inside = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)(\..+)?", path) if number == "0" else None
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


def as_constant(view: View, device: torch.device) -> View:
    """``view`` with its tensors detached and on ``device``."""
    values = (value.detach().to(device) if isinstance(value, Tensor) else value for value in view)
    return type(view)(*values)


def outside_inference_mode(view: View) -> View:
    """``view`` with copies of tensors from ``torch.inference_mode()``, which autograd cannot keep."""
    values = (value.clone() if isinstance(value, Tensor) and value.is_inference() else value for value in view)
    return type(view)(*values)
