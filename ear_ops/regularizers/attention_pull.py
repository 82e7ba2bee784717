"""The regulariser on attention: pull the attention matrices of two views together."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ear_ops import functional
from ear_ops.arguments import check_choice, check_count, is_finite_number
from ear_ops.capture.layers import Layers, check_layers, resolve_layers
from ear_ops.capture.layout import Layout
from ear_ops.capture.readings import AttentionInputs, AttentionMaps, align_attention, align_maps
from ear_ops.capture.sites import Site
from ear_ops.ops.divergences import InfiniteDivergenceError
from ear_ops.regularizers.base import Regularizer, Weight, scaled
from ear_ops.regularizers.word_alignment import WordIds, compare_words

# The name of a comparison, and the functions that compute it from queries and keys, and from given maps.
_COMPARISONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor] | None]] = {
    "mse": (functional.qk_attention_mse, functional.attention_mse),
    "kl": (functional.qk_attention_kl, functional.attention_kl),
    "reverse_kl": (
        functools.partial(functional.qk_attention_kl, direction="reverse"),
        functools.partial(functional.attention_kl, direction="reverse"),
    ),
    "js": (functional.qk_attention_js, functional.attention_js),
    "scores_mse": (functional.qk_scores_mse, None),
}


class AttentionPull(Regularizer):
    """Pull the attention of the two views together: by default the mean squared error of their matrices (eq. 2).

    The loss computes the matrices from Q and K, so the model keeps its own attention kernel. The matrices are
    compared as they are before attention dropout.

    Args:
        layer: one of these, each layer being a term of its own:

            * the number of a block, counted from 1; on an encoder-decoder the encoder's self-attention;
            * the path of an attention module as in ``model.named_modules()``, also of a decoder or a cross-attention,
              of ``nn.MultiheadAttention``, and of modules that call softmax themselves;
            * a pattern of such paths (``"decoder.layers.*.self_attn"``), ``"middle"`` (6 of 12) or ``"all"``;
            * several of them, in a list, or as a mapping to factors of the weight, ``{4: 0.5, 6: 1.0}``.
        weight: see :data:`Weight`, of each layer. 0.1 is the paper's for the squared error; those of
            MiniLM and TinyBERT have the weight 1.
        query, key: instead of ``layer``, for any ``nn.Module``: paths, as in ``model.named_modules()``, of the two
            projections, whose outputs are ``[B, L, num_heads * D]``. Exact only where the model computes
            ``softmax(Q K^T / sqrt(D))`` of them: without rotary embedding, causality or position bias.
        num_heads, num_key_value_heads: how many heads ``query`` and ``key`` split into; the second is the first by
            default.
        cross_attention: with ``query`` and ``key``: True where the queries are other tokens than the keys, so that the
            mask of the keys says nothing of them. None finds out, and asks where it cannot.
        divergence: ``"mse"``; ``"kl"`` is KL(T || P), where the target T is the teacher, or the second view x^a;
            ``"reverse_kl"`` is KL(P || T); ``"js"`` is the Jensen-Shannon divergence; ``"scores_mse"`` compares the
            scores before the softmax. See :func:`ear_ops.qk_attention_kl`,
            :func:`ear_ops.qk_attention_js`, :func:`ear_ops.qk_scores_mse`.
        temperature: divides the scores of both views, for divergences ``"kl"``, ``"reverse_kl"`` and ``"js"``.
        support: for the same divergences, ``"all"``; or ``"shared"``, which renormalises over the keys that both views
            have. Views of different lengths need it for KL, which is infinite otherwise.
        heads: ``"each"`` compares head with head. ``"mean"`` compares the averages over the heads, so that a teacher
            may have another number of heads; divergence ``"scores_mse"`` has none.
        head_weights: a number for each head, which multiplies its part of the term, or weights the averages, as in
            :func:`ear_ops.qk_attention_mse`; the same for every layer.
        alignment: ``"token"`` compares position with position. ``"word"`` compares word with word, for views whose
            words split into different numbers of pieces; it needs ``ear.loss(word_ids=...)``, see
            :mod:`ear_ops.regularizers.word_alignment`.
        reduction: see :mod:`ear_ops.ops.reductions`, except ``"none"``.
        name: key of the term in ``ear.components()``, ``"attention_pull.LAYER"`` by default. With several layers, each
            term is called ``"NAME.LAYER"``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
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
        cross_attention: bool | None = None,
        divergence: str = "mse",
        temperature: float = 1.0,
        support: str = "all",
        heads: str = "each",
        head_weights: Sequence[float] | None = None,
        alignment: str = "token",
        reduction: str = "mean",
        name: str | None = None,
    ) -> None:
        check_choice("alignment", alignment, ("token", "word"))
        if alignment == "word" and reduction == "padded_mean":
            raise ValueError("reduction: 'padded_mean' counts padded tokens, which words do not have; use 'mean'")
        self.divergence = divergence
        self._options = _options_of(divergence, temperature, support, heads, alignment)
        if layer is None:
            _check_projections(query, key, num_heads)
        elif any(argument is not None for argument in (query, key, num_heads, num_key_value_heads, cross_attention)):
            raise TypeError("AttentionPull: expected either layer= or query=, key= and num_heads=, got both")
        else:
            check_layers(layer)
        for argument, count in (("num_heads", num_heads), ("num_key_value_heads", num_key_value_heads)):
            if count is not None:
                check_count(argument, count)
        if num_heads is not None and num_key_value_heads is not None and num_heads % num_key_value_heads:
            raise ValueError(f"num_key_value_heads: expected a divisor of {num_heads} heads, got {num_key_value_heads}")
        if head_weights is not None and not (len(head_weights) and all(map(is_finite_number, head_weights))):
            raise ValueError(f"head_weights: expected a finite number for each head, got {head_weights!r}")
        if heads == "mean" and head_weights is not None and (min(head_weights) < 0 or max(head_weights) <= 0):
            raise ValueError(f"head_weights: expected numbers of at least 0, not all of them 0, got {head_weights!r}")
        default_name = f"attention_pull.{query if layer is None else layer}"
        super().__init__(default_name if name is None else name, weight, reduction)
        self.layer = layer
        self.query, self.key = query, key
        self.num_heads, self.num_key_value_heads = num_heads, num_key_value_heads
        self.cross_attention = cross_attention
        self.uses_word_ids = alignment == "word"
        self._user_name = name
        self._head_weights = None if head_weights is None else torch.tensor(head_weights)  # [H]

    def expand(self, layout: Layout) -> list[Regularizer]:
        if self.layer is None or isinstance(self.layer, int):
            return [self]
        layers = resolve_layers(self.layer, layout)
        pulls: list[Regularizer] = []
        for layer, factor in layers:
            pull = copy.copy(self)
            pull.layer, pull.weight = layer, scaled(self.weight, factor)
            if self._user_name is None or len(layers) > 1:
                pull.name = f"{self._user_name or 'attention_pull'}.{layer}"
            pulls.append(pull)
        return pulls

    def site(self, layout: Layout) -> Site:
        if self.layer is not None:
            assert isinstance(self.layer, (int, str)), "attach() expands several layers"
            return layout.attention(self.layer)
        assert self.query is not None and self.key is not None and self.num_heads is not None
        return layout.projections(self.query, self.key, self.num_heads, self.num_key_value_heads, self.cross_attention)

    def term(
        self,
        reading: AttentionInputs | AttentionMaps,
        reading_aug: AttentionInputs | AttentionMaps | None,
        word_ids: WordIds | None = None,
    ) -> Tensor:
        try:
            return self._compared(reading, reading_aug, word_ids)
        except InfiniteDivergenceError as error:
            raise ValueError(f"{self.name}: {error.reason}; use divergence='js' or support='shared'") from None

    def _compared(
        self,
        reading: AttentionInputs | AttentionMaps,
        reading_aug: AttentionInputs | AttentionMaps | None,
        word_ids: WordIds | None,
    ) -> Tensor:
        if self._head_weights is not None:  # kept there: a copy to the device in every step would wait for it
            self._head_weights = self._head_weights.to(reading[0].device)
        of_inputs, of_maps = _COMPARISONS[self.divergence]
        common = {**self._options, "head_weights": self._head_weights, "reduction": self.reduction}
        if word_ids is not None:
            assert of_maps is not None, "the constructor refuses scores of words"
            return compare_words(reading, reading_aug, word_ids, self.divergence, of_maps, what=self.name, **common)
        if reading_aug is not None and type(reading) is not type(reading_aug):
            kinds = [
                "queries and keys" if isinstance(view, AttentionInputs) else "probabilities alone"
                for view in (reading, reading_aug)
            ]
            raise ValueError(
                f"{self.name}: expected both views to give queries and keys, or both probabilities, got "
                f"{' and '.join(kinds)}; compare words (alignment='word'), or use HiddenPull or LogitsPull"
            )
        first: Any = reading
        second: Any = reading_aug
        if isinstance(reading, AttentionInputs):
            if second is not None:
                first, second = align_attention(first, second, self.name, self._options.get("heads", "each"))
            return of_inputs(**_arguments(first, second), **common)
        if of_maps is None or "temperature" in common:
            asked = "divergence='scores_mse'" if of_maps is None else f"temperature={common['temperature']}"
            raise ValueError(
                f"{self.name}: {asked} needs scores of queries and keys, but this attention gives its probabilities "
                f"alone; use divergence='mse', 'kl', 'reverse_kl' or 'js' with temperature=1.0"
            )
        if second is not None:
            first, second = align_maps(first, second)
        return of_maps(**_arguments(first, second), **common)


# The arguments of the functions that take a value of each view; the others are the same for both.
_OF_A_VIEW = ("query", "key", "attn", "attention_mask", "query_mask", "attn_bias")


def _arguments(reading: Any, reading_aug: Any | None) -> dict[str, Any]:
    """Two aligned readings as the arguments of the function that compares them; ``reading`` alone holds both views."""
    arguments = reading._asdict()
    for name in _OF_A_VIEW:
        if name in arguments and reading_aug is not None:
            arguments[f"{name}_aug"] = getattr(reading_aug, name)
    return arguments


def _options_of(divergence: str, temperature: float, support: str, heads: str, alignment: str) -> dict[str, Any]:
    """What the function of a divergence takes beyond its views; raises where the arguments do not go together."""
    check_choice("divergence", divergence, _COMPARISONS)
    functional.check_divergence_options(temperature=temperature, support=support, heads=heads)
    options: dict[str, Any] = {"temperature": temperature} if temperature != 1.0 else {}
    if support != "all":
        options["support"] = support
    if options and divergence in ("mse", "scores_mse"):
        raise ValueError(f"{next(iter(options))}: divergence={divergence!r} has none; use 'kl', 'reverse_kl' or 'js'")
    if alignment == "word" and (divergence == "scores_mse" or "temperature" in options):
        raise ValueError("alignment: 'word' compares probabilities of words, which have no scores and no temperature")
    if heads == "mean":
        if divergence == "scores_mse":
            raise ValueError("heads: divergence='scores_mse' has no 'mean'; use 'mse', 'kl', 'reverse_kl' or 'js'")
        options["heads"] = heads
    return options


def _check_projections(query: str | None, key: str | None, num_heads: int | None) -> None:
    arguments = {"query": query, "key": key, "num_heads": num_heads}
    if None in arguments.values():
        described = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise TypeError(f"AttentionPull: expected layer=, or query=, key= and num_heads= together, got {described}")
