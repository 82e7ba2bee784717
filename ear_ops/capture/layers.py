"""The layers that a regulariser asks for: how they may be written, and which layers of a model they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ear_ops.arguments import check_layer, is_finite_number
from ear_ops.capture.layout import Layout

Layers = int | str | Sequence[int | str] | Mapping[int | str, float]
"""A number from 1, a path or pattern, ``"middle"``, ``"all"``; several of them; or with factors of the weight."""


def resolve_layers(layers: Layers, layout: Layout) -> list[tuple[int | str, float]]:
    """Each layer, a number or a path, with the factor of its weight."""
    requested = [layers] if isinstance(layers, (int, str)) else list(layers)
    factors = layers if isinstance(layers, Mapping) else {}
    return [
        (layer, factors.get(request, 1.0))
        for request in requested
        for layer in (layout.layers(request) if isinstance(request, str) else [request])
    ]


def check_layers(layers: Any) -> None:
    """Raises TypeError or ValueError unless ``layers`` is :data:`Layers`."""
    if isinstance(layers, str):
        if not layers or layers.isdigit():
            raise TypeError(f"layer: expected an integer, a module path or a pattern of paths, got {layers!r}")
        return
    if not isinstance(layers, (Mapping, Sequence)):
        check_layer(layers)
        return
    if not layers:
        raise ValueError(f"layer: expected at least one layer, got {layers!r}")
    for layer in layers:
        if not isinstance(layer, str):
            check_layer(layer)
    if isinstance(layers, Mapping):
        for layer, factor in layers.items():
            if not is_finite_number(factor):
                raise TypeError(f"layer: expected the factor of layer {layer!r} to be a finite number, got {factor!r}")
