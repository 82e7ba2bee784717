"""A loss, a place in a model, a weight: the regularisers, and :func:`attach`, which hangs them on a model.

    ear = ear_ops.attach(model, [ear_ops.EmbeddingPush(1.0), ear_ops.AttentionPull(layer=6, weight=0.1)])
    logits = model(**pair_batch).logits          # rows 0..B-1 are x, rows B..2B-1 are its augmentation x^a
    loss = ear_ops.robust_cross_entropy(logits, labels) + ear.loss()

Layers are counted from 1, as in Ding et al., "A Simple and Effective Method to Improve Zero-Shot Cross-Lingual Transfer
Learning" (COLING 2022).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .attachment import Attachment
from .capture import (
    AttentionInputs,
    AttentionMaps,
    HiddenStates,
    Layout,
    Recorder,
    Site,
    align_attention,
    align_hidden,
    align_maps,
    unwrap,
)
from .layers import Layers, check_count, check_layers, is_finite_number, resolve_layers
from .reductions import REDUCTIONS
from .teacher import LayerMap, TeacherLayout, check_teacher
from .words import WordIds, word_attention_mse

Weight = float | Callable[[int], float]
"""A number, or a function of the optimiser step, which is then given by ``ear.loss(step=...)``."""


class Regularizer:
    """Base class: subclasses say where they look (:meth:`site`) and what they make of it (:meth:`term`).

    Args:
        name: key of the term in ``ear.components()``; unique within one :func:`attach`.
        weight: see :data:`Weight`.
        reduction: one of :data:`ear_ops.reductions.REDUCTIONS` except ``"none"``.
    """

    uses_word_ids = False  # whether term() takes word_ids

    def __init__(self, name: str, weight: Weight, reduction: str) -> None:
        if not callable(weight) and not is_finite_number(weight):
            raise TypeError(f"weight: expected a finite number or a function of the step, got {weight!r}")
        scalar = [known for known in REDUCTIONS if known != "none"]
        if reduction not in scalar:
            raise ValueError(
                f"reduction: expected one that gives a scalar, {', '.join(map(repr, scalar))}; got {reduction!r}"
            )
        self.name = name
        self.weight = weight
        self.reduction = reduction

    def expand(self, layout: Layout) -> list[Regularizer]:
        """The regularisers of one place each that this one stands for on a model: by default itself."""
        return [self]

    def site(self, layout: Layout) -> Site:
        """The place to look at; raises where the model does not have it, and changes nothing."""
        raise NotImplementedError

    def term(self, view: Any, view_aug: Any | None) -> Tensor:
        """The unweighted scalar of what the site read: both views in one ``[2B, ...]`` (``view_aug`` None), or two."""
        raise NotImplementedError

    def weight_at(self, step: int | None) -> float:
        if not callable(self.weight):
            return self.weight
        if step is None:
            raise TypeError(f"{self.name}: the weight is a function of the step; call ear.loss(step=...)")
        weight = self.weight(step)
        if not is_finite_number(weight):
            raise TypeError(f"{self.name}: expected the weight at step {step} to be a finite number, got {weight!r}")
        return weight

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, weight={self.weight!r}, reduction={self.reduction!r})"


class AttentionPull(Regularizer):
    """Pull the attention of the two views together: mean squared error of their attention matrices (eq. 2).

    The matrices are recomputed from Q and K inside a fused loss, so the model keeps its own attention kernel. They are
    compared before attention dropout.

    Args:
        layer: block of the model, counted from 1; on an encoder-decoder the encoder's self-attention. Or the path of an
            attention module (as in ``model.named_modules()``: decoder and cross-attention too), a pattern of such paths
            (``"decoder.layers.*.self_attn"``), ``"middle"`` (6 of 12) or ``"all"``. Or several of them in a list, or as
            a mapping to factors of the weight, ``{4: 0.5, 6: 1.0}``. Each is a term of its own.
        weight: see :data:`Weight`, of each layer; 0.1 in the paper.
        query, key: instead of ``layer``, for any ``nn.Module``: paths (as in ``model.named_modules()``) of the two
            projections, whose outputs are ``[B, L, num_heads * D]``. Exact only where nothing but
            ``softmax(Q K^T / sqrt(D))`` follows: no rotary embedding, causality or position bias.
        num_heads, num_key_value_heads: how many heads ``query`` and ``key`` split into; the second is the first by
            default.
        head_weights: a number for each head, which multiplies its part of the term, as in
            :func:`ear_ops.qk_attention_mse`; of every layer alike.
        alignment: ``"token"`` compares position with position; ``"word"`` word with word, for views whose words split
            into different numbers of pieces: ``ear.loss(word_ids=...)``, see :mod:`ear_ops.words`. That materialises
            the maps.
        reduction: see :mod:`ear_ops.reductions`, except ``"none"``.
    """

    def __init__(
        self,
        layer: Layers | None = None,
        weight: Weight = 0.1,
        *,
        query: str | None = None,
        key: str | None = None,
        num_heads: int | None = None,
        num_key_value_heads: int | None = None,
        head_weights: Sequence[float] | None = None,
        alignment: str = "token",
        reduction: str = "mean",
    ) -> None:
        if alignment not in ("token", "word"):
            raise ValueError(f"alignment: expected 'token' or 'word', got {alignment!r}")
        if alignment == "word" and reduction == "padded_mean":
            raise ValueError("reduction: 'padded_mean' counts padded tokens, which words do not have; use 'mean'")
        by_path = (query, key, num_heads)
        if layer is None:
            if any(given is None for given in by_path):
                raise TypeError(
                    "AttentionPull: expected layer=, or query=, key= and num_heads= together, got "
                    + (", ".join(f"{n}={g!r}" for n, g in zip(("query", "key", "num_heads"), by_path, strict=True)))
                )
        elif any(given is not None for given in (*by_path, num_key_value_heads)):
            raise TypeError("AttentionPull: expected either layer= or query=, key= and num_heads=, got both")
        else:
            check_layers(layer)
        for argument, heads in (("num_heads", num_heads), ("num_key_value_heads", num_key_value_heads)):
            if heads is not None:
                check_count(argument, heads)
        if num_heads is not None and num_key_value_heads is not None and num_heads % num_key_value_heads:
            raise ValueError(f"num_key_value_heads: expected a divisor of {num_heads} heads, got {num_key_value_heads}")
        if head_weights is not None and not (len(head_weights) and all(map(is_finite_number, head_weights))):
            raise ValueError(f"head_weights: expected a finite number for each head, got {head_weights!r}")
        super().__init__(f"attention_pull.{query if layer is None else layer}", weight, reduction)
        self.layer = layer
        self.query, self.key = query, key
        self.num_heads, self.num_key_value_heads = num_heads, num_key_value_heads
        self.uses_word_ids = alignment == "word"
        self._head_weights = None if head_weights is None else torch.tensor(head_weights)  # [H]

    def expand(self, layout: Layout) -> list[Regularizer]:
        if self.layer is None or isinstance(self.layer, int):
            return [self]
        pulls: list[Regularizer] = []
        for layer, factor in resolve_layers(self.layer, layout):
            pull = copy.copy(self)
            pull.layer, pull.name = layer, f"attention_pull.{layer}"
            pull.weight = _scaled(self.weight, factor)
            pulls.append(pull)
        return pulls

    def site(self, layout: Layout) -> Site:
        if self.layer is not None:
            assert isinstance(self.layer, (int, str)), "attach() expands several layers"
            return layout.attention(self.layer)
        assert self.query is not None and self.key is not None and self.num_heads is not None
        return layout.projections(self.query, self.key, self.num_heads, self.num_key_value_heads)

    def term(
        self,
        view: AttentionInputs | AttentionMaps,
        view_aug: AttentionInputs | AttentionMaps | None,
        word_ids: WordIds | None = None,
    ) -> Tensor:
        if self._head_weights is not None:  # kept there: a copy to the device in every step would wait for it
            self._head_weights = self._head_weights.to(view[0].device)
        if word_ids is not None:
            weights, reduction = self._head_weights, self.reduction
            return word_attention_mse(
                view, view_aug, word_ids, head_weights=weights, reduction=reduction, what=self.name
            )
        if isinstance(view, AttentionMaps) or isinstance(view_aug, AttentionMaps):
            return self._term_of_maps(view, view_aug)
        query_aug = key_aug = mask_aug = query_mask_aug = bias_aug = None
        if view_aug is not None:
            view, view_aug = align_attention(view, view_aug, self.name)
            query_aug, key_aug, mask_aug, query_mask_aug, bias_aug = view_aug[:5]
        return functional.qk_attention_mse(
            view.query,
            view.key,
            query_aug,
            key_aug,
            attention_mask=view.attention_mask,
            attention_mask_aug=mask_aug,
            query_mask=view.query_mask,
            query_mask_aug=query_mask_aug,
            attn_bias=view.attn_bias,
            attn_bias_aug=bias_aug,
            scale=view.scale,
            is_causal=view.is_causal,
            window=view.window,
            softcap=view.softcap,
            head_weights=self._head_weights,
            reduction=self.reduction,
        )

    def _term_of_maps(self, view: Any, view_aug: Any | None) -> Tensor:
        maps_aug = mask_aug = query_mask_aug = None
        if view_aug is not None:
            if type(view) is not type(view_aug):
                raise ValueError(f"{self.name}: the two views compute attention differently, so they do not compare")
            view, (maps_aug, mask_aug, query_mask_aug) = align_maps(view, view_aug)
        return functional.attention_mse(
            view.maps,
            maps_aug,
            attention_mask=view.attention_mask,
            attention_mask_aug=mask_aug,
            query_mask=view.query_mask,
            query_mask_aug=query_mask_aug,
            head_weights=self._head_weights,
            reduction=self.reduction,
        )


class EmbeddingPush(Regularizer):
    """Push the mean-pooled embeddings of the two views apart: minus their squared distance (eq. 1).

    It looks at what enters the first block: the embedding layer's output, LayerNorm and dropout included.

    Args:
        weight: see :data:`Weight`; 1.0 in the paper.
        reduction: see :mod:`ear_ops.reductions`, except ``"none"``.
        margin: the push has no lower bound; with a margin the term is minus the mean over pairs of ``min(d, margin)``,
            d a pair's squared distance as ``reduction`` scales it (``"mean"``: over C); for ``"sum"`` minus the sum.
    """

    def __init__(self, weight: Weight = 1.0, *, reduction: str = "mean", margin: float | None = None) -> None:
        super().__init__("embedding_push", weight, reduction)
        if margin is not None and not (is_finite_number(margin) and margin > 0):
            raise ValueError(f"margin: expected None or a positive number, got {margin!r}")
        self.margin = margin

    def site(self, layout: Layout) -> Site:
        return layout.embeddings()

    def term(self, view: HiddenStates, view_aug: HiddenStates | None) -> Tensor:
        if self.margin is None:
            return -_pooled_distance(view, view_aug, self.reduction, self.name)
        distances = _pooled_distance(view, view_aug, "none", self.name)  # [B]
        if self.reduction in ("mean", "padded_mean"):
            distances = distances / view.states.shape[2]
        pushed = distances.clamp(max=self.margin).sum()
        return -(pushed if self.reduction == "sum" else pushed / max(distances.numel(), 1))


class SentencePull(Regularizer):
    """Pull the mean-pooled hidden states of the two views together, after block ``layer`` (section 4.3).

    Args:
        layer: block of the model, counted from 1; its output is taken before any final norm of the model.
        weight: see :data:`Weight`.
        reduction: see :mod:`ear_ops.reductions`, except ``"none"``.
    """

    def __init__(self, layer: int, weight: Weight = 1.0, *, reduction: str = "mean") -> None:
        check_count("layer", layer)
        super().__init__(f"sentence_pull.{layer}", weight, reduction)
        self.layer = layer

    def site(self, layout: Layout) -> Site:
        return layout.hidden_states(self.layer)

    def term(self, view: HiddenStates, view_aug: HiddenStates | None) -> Tensor:
        return _pooled_distance(view, view_aug, self.reduction, self.name)


def attach(
    model: nn.Module,
    regularizers: Iterable[Regularizer],
    *,
    teacher: nn.Module | None = None,
    layer_map: LayerMap | None = None,
) -> Attachment:
    """Hang ``regularizers`` on ``model``; its own output stays bit for bit what it was.

    With a teacher the two views are the forwards of the two models on the same batch of B rows, the teacher's a
    constant: ``with torch.no_grad(): teacher(**batch)``, ``model(**batch)``, ``ear.loss()``.

    Args:
        model: any ``nn.Module``; ``torch.compile`` and ``DistributedDataParallel`` around it are looked through.
        regularizers: :class:`AttentionPull`, :class:`EmbeddingPush`, :class:`SentencePull` or subclasses of
            :class:`Regularizer`.
        teacher: another model, in eval mode when it is called; it may be deeper, and its heads larger.
        layer_map: from layers of ``model`` to layers of the teacher, counted from 1, such as ``{1: 2, 2: 4}``. None:
            the same layer where both are equally deep, else evenly spread, the last on the last. For regularisers on
            ``query=`` and ``key=`` from path to path; by default the same paths.

    Returns:
        An :class:`Attachment`; ``.loss()`` after each forward gives the regularisation loss.

    Raises:
        TypeError, ValueError: something does not fit the model; nothing has been changed then.
    """
    root = unwrap(model)
    if isinstance(regularizers, Regularizer) or not isinstance(regularizers, Iterable):
        raise TypeError(f"regularizers: expected a list of regularisers, got {regularizers!r}; put it in a list")
    chosen = tuple(regularizers)
    if not chosen:
        raise ValueError("regularizers: expected at least one regulariser, got an empty list")
    for regularizer in chosen:
        if not isinstance(regularizer, Regularizer):
            raise TypeError(f"regularizers: expected regularisers such as AttentionPull(layer=6), got {regularizer!r}")
    layout = Layout(root)
    chosen = tuple(one for regularizer in chosen for one in regularizer.expand(layout))
    names = [regularizer.name for regularizer in chosen]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"regularizers: expected each at most once, got {', '.join(repeated)} more than once")
    recorder = Recorder(root, [regularizer.site(layout) for regularizer in chosen])
    if teacher is None:
        if layer_map is not None:
            raise TypeError("layer_map: expected None without a teacher; it says which of the teacher's layers to take")
        recorder.install()
        return Attachment(recorder, chosen)
    teacher_root = check_teacher(teacher, root, layer_map)
    teacher_layout = TeacherLayout(teacher_root, layout, layer_map)
    teacher_sites = [regularizer.site(teacher_layout) for regularizer in chosen]
    teacher_recorder = Recorder(teacher_root, teacher_sites, without_grad=True)
    with contextlib.ExitStack() as undo:
        for each in (recorder, teacher_recorder):
            each.install()
            undo.callback(each.remove)
        undo.pop_all()
    return Attachment(recorder, chosen, teacher_recorder)


def _pooled_distance(view: HiddenStates, view_aug: HiddenStates | None, reduction: str, what: str) -> Tensor:
    states_aug = mask_aug = None
    if view_aug is not None:
        view, (states_aug, mask_aug) = align_hidden(view, view_aug, what)
    return functional.pooled_distance(
        view.states,
        states_aug,
        attention_mask=view.attention_mask,
        attention_mask_aug=mask_aug,
        reduction=reduction,
    )


def _scaled(weight: Weight, factor: float) -> Weight:
    if factor == 1.0:
        return weight
    return (lambda step: factor * weight(step)) if callable(weight) else factor * weight
