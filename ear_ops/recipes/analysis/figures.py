"""Pictures before and after training: vectors by t-SNE (figures 3 to 5 of Ding et al., 2022), measures by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ear_ops.recipes.drawing import COLOURS, MARKERS, PAGE_WIDTH, figure


def tsne(vectors: Tensor) -> NDArray[np.floating]:
    """The t-SNE (van der Maaten and Hinton, 2008) of at least 4 vectors in two dimensions, the same in every call.

    Args:
        vectors: [N, C].

    Returns:
        [N, 2].
    """
    from sklearn.manifold import TSNE

    if len(vectors) < 4:
        raise ValueError(f"vectors: expected at least 4, got {len(vectors)}")
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    embedded: NDArray[np.floating] = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(
        vectors.double().numpy()
    )
    return embedded


def scatter_panels(
    path: Path,
    panels: Mapping[str, Tensor],
    groups: Sequence[str],
    links: Iterable[tuple[int, int]] = (),
    named: Sequence[int] | None = None,
) -> None:
    """Write a picture of one t-SNE over the vectors of all panels. All panels show the same part of its space.

    Each group of points has a colour and a marker. Its name stands at one of its points, and in the legend.

    Args:
        path: of the PNG; an SVG is written beside it.
        panels: vectors [N, C] by the title of the panel, such as `before` and `after`.
        groups: of the points, the same in all panels, [N].
        links: pairs of points that a line joins in each panel.
        named: the points at which the names of their groups stand; None chooses points that lie apart.
    """
    from matplotlib.collections import LineCollection

    joined = np.array(list(links), dtype=int).reshape(-1, 2)
    members = {name: np.flatnonzero(np.array(groups) == name) for name in dict.fromkeys(groups)}
    embedded = np.split(tsne(torch.cat(list(panels.values()))), len(panels))  # each [N, 2]
    size = 14 if len(groups) <= 500 else 6
    with figure(path, PAGE_WIDTH, PAGE_WIDTH / len(panels) + 0.4) as drawn:
        all_axes = drawn.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
        for axes, title, points in zip(all_axes, panels, embedded, strict=True):
            axes.add_collection(LineCollection(points[joined], colors="0.75", linewidths=0.5, zorder=1))
            for number, (name, chosen) in enumerate(members.items()):
                colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
                axes.scatter(*points[chosen].T, s=size, color=colour, marker=marker, linewidths=0, label=name)
            for place in _points_apart(points, list(members.values())) if named is None else named:
                axes.annotate(
                    groups[place],
                    points[place],
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    parse_math=False,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
                )
            axes.set_title(title)
            axes.set_xlabel("t-SNE, first dimension")
            axes.set_xticks([])  # the axes of a t-SNE have no unit
            axes.set_yticks([])
        all_axes[0].set_ylabel("t-SNE, second dimension")
        legend = drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=7)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _points_apart(points: NDArray[np.floating], groups: Sequence[NDArray[np.integer]]) -> list[int]:
    """A point of each group for its name: in the middle of the group, and far from the names before.

    Args:
        points: [N, 2].
        groups: the numbers of the points of each group.
    """
    places: list[int] = []
    for members in groups:
        from_middle = np.linalg.norm(points[members] - np.median(points[members], axis=0), axis=1)
        inner = members[np.argsort(from_middle, kind="stable")[: (len(members) + 1) // 2]]
        if places:
            from_names = np.linalg.norm(points[inner][:, None] - points[places], axis=2).min(axis=1)
            places.append(int(inner[from_names.argmax()]))
        else:
            places.append(int(inner[0]))
    return places


def layer_panels(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Write a picture with a measure in each panel, over the layers.

    Args:
        path: of the PNG; an SVG is written beside it.
        panels: by the label of the measure with its unit, the values of each layer by the name of the line, such as
            `before` and `after`.
    """
    with figure(path, PAGE_WIDTH, 2.4) as drawn:
        for axes, (label, lines) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for name, values, colour, marker in zip(lines, lines.values(), COLOURS, MARKERS, strict=False):
                axes.plot(range(len(values)), values, color=colour, marker=marker, label=name)
            axes.set_xlabel("layer")
            axes.set_ylabel(label)
            axes.xaxis.get_major_locator().set_params(integer=True)
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(lines))
