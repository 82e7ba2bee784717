"""Pictures of vectors before and after training, by t-SNE (figures 3 to 5 of Ding et al., COLING 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def tsne(vectors: Tensor, seed: int = 0) -> NDArray[np.floating]:
    """The t-SNE (van der Maaten and Hinton, 2008) of at least 4 vectors in two dimensions, the same for the same seed.

    Args:
        vectors: [N, C].
        seed: of the embedding.

    Returns:
        [N, 2].
    """
    from sklearn.manifold import TSNE

    if len(vectors) < 4:
        raise ValueError(f"vectors: expected at least 4, got {len(vectors)}")
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    embedded: NDArray[np.floating] = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(
        vectors.double().numpy()
    )
    return embedded


def scatter_panels(path: Path, title: str, panels: Mapping[str, Tensor], groups: Sequence[str]) -> None:
    """Write a picture with a t-SNE in each panel. Each group of points has its colour.

    Args:
        path: of the picture; its suffix decides the format.
        title: of the picture.
        panels: vectors [N, C] by the title of the panel, such as `before` and `after`.
        groups: of the points, the same in all panels, [N].
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    names = list(dict.fromkeys(groups))
    colours = colormaps["tab20"](np.linspace(0, 1, max(len(names), 2)))
    for axes, (name, vectors) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        points = tsne(vectors)
        for group, colour in zip(names, colours, strict=False):
            chosen = [i for i, point_group in enumerate(groups) if point_group == group]
            axes.scatter(points[chosen, 0], points[chosen, 1], s=12, color=colour, label=group)
        axes.set_title(name)
        axes.set_xticks([])  # the axes of a t-SNE have no unit
        axes.set_yticks([])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})
