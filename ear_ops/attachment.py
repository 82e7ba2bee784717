"""Regularisers on a running model: attach them, and take the loss of each forward.

    ear = ear_ops.attach(model, [ear_ops.EmbeddingPush(1.0), ear_ops.AttentionPull(layer=6, weight=0.1)])
    logits = model(**pair_batch).logits          # rows 0..B-1 are x, rows B..2B-1 are its augmentation x^a
    loss = ear_ops.robust_cross_entropy(logits, labels) + ear.loss()

Layers are counted from 1, as in Ding et al., "A Simple and Effective Method to Improve Zero-Shot Cross-Lingual Transfer
Learning" (COLING 2022).
"""

from __future__ import annotations

import contextlib
import html
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ear_ops.arguments import check_tensor
from ear_ops.capture.layout import Layout, unwrap
from ear_ops.capture.recorder import Recorder
from ear_ops.capture.records import Record
from ear_ops.capture.sites import Site
from ear_ops.capture.teacher import (
    LayerMap,
    TeacherLayout,
    as_constant,
    check_same_batch,
    check_teacher,
    outside_inference_mode,
)
from ear_ops.regularizers.base import Regularizer, check_constructed, check_term, site_of, weight_text
from ear_ops.regularizers.word_alignment import WordIds


class Attachment:
    """Regularisers on a model, until it is detached or deleted; made by :func:`attach`.

    It is a context manager that detaches. A copy of it, or what a pickle of it gives, is detached: it has the
    regularisers alone.

    Args:
        recorder: installed on the model.
        regularizers: one for each of the recorder's sites.
        teacher: installed on the teacher, whose forward is then the other view.
    """

    def __init__(
        self, recorder: Recorder, regularizers: tuple[Regularizer, ...], teacher: Recorder | None = None
    ) -> None:
        self.regularizers = regularizers
        self._recorder = recorder
        self._teacher = teacher
        self._components: dict[str, Tensor] = {}
        self._warned: set[str] = set()
        self._warned_of_untaken = False
        self._model_name = type(recorder.root).__name__
        self._copied = False
        for installed in (recorder, teacher):
            if installed is not None:  # no loss can be asked for once nobody holds the attachment
                weakref.finalize(self, _remove, weakref.ref(installed)).atexit = False

    def loss(
        self,
        step: int | None = None,
        *,
        word_ids: WordIds | None = None,
        attention_mask: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The sum of weight times term over the regularisers.

        The terms are of the last forward, of the last forwards of both views, or of the last forwards of model and
        teacher. Call this once per forward and before ``backward``: it drops the recorded tensors.

        Args:
            step: optimiser step, for weights that are functions of it.
            word_ids: the word of each token, for ``alignment="word"``; see :data:`ear_ops.regularizers.WordIds`.
            attention_mask: in place of the ``attention_mask`` that the model received, 1 for real tokens: ``[2B, L]``
                of both views, x first; a pair of ``[B, L]`` and ``[B, L']``; or, with a teacher, the ``[B, L]`` of its
                batch.

        Returns:
            A scalar, float32 (float64 for a float64 model).

        Raises:
            RuntimeError: no forward was recorded, or it did not come through a layer; the teacher is in training mode
                or has seen another batch.
            TypeError: a weight needs ``step``, a regulariser needs ``word_ids``, or a term is no tensor.
            ValueError: the batch is odd, or masks, ``word_ids`` or shapes do not fit.
        """
        weights = [regularizer.weight_at(step) for regularizer in self.regularizers]
        terms = self._terms(word_ids, attention_mask)
        total: Tensor | None = None
        for weight, term in zip(weights, terms.values(), strict=True):
            total = weight * term if total is None else total + (weight * term).to(total.device)
        assert total is not None
        return total

    def terms(
        self,
        *,
        word_ids: WordIds | None = None,
        attention_mask: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The terms that :meth:`loss` adds up, by name: unweighted scalars with their graphs.

        In place of :meth:`loss`, for losses that weigh terms in another way, such as by their gradients.

        Args:
            word_ids, attention_mask: as for :meth:`loss`.

        Raises:
            RuntimeError, TypeError, ValueError: as :meth:`loss` does.
        """
        return self._terms(word_ids, attention_mask)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the regularisers themselves, such as a projection's, for your optimiser.

        Each comes once, and none that the model has too: those are among ``model.parameters()``.
        """
        seen = set(self._recorder.root.parameters())
        for regularizer in self.regularizers:
            for parameter in regularizer.parameters():
                if parameter not in seen:
                    seen.add(parameter)
                    yield parameter

    def components(self) -> dict[str, Tensor]:
        """The terms of the last :meth:`loss` by name: unweighted, signed, detached scalars; empty before the first."""
        return dict(self._components)

    def view(self, name: str) -> contextlib.AbstractContextManager[None]:
        """For two forwards in place of one: ``with ear.view("original"): ...``, ``with ear.view("augmented"): ...``.

        A view is recorded without grad too; it is a constant target then.

        Raises:
            RuntimeError: the other view is a teacher's forward, or a view is open already.
            ValueError: ``name`` is no view.
        """
        self._check_not_copied()
        if self._teacher is not None:
            raise RuntimeError(f"view: {name!r} was asked for, but the teacher's forward is the other view")
        return self._recorder.recording_view(name)

    @property
    def untaken(self) -> bool:
        """Whether a training forward was replaced by a later one, with no :meth:`loss` between and no backward yet."""
        return self._recorder.untaken

    def forget(self) -> None:
        """Drop what was recorded: for a forward that belongs to no :meth:`loss`, such as one of another task."""
        self._recorder.forget()
        if self._teacher is not None:
            self._teacher.forget()

    def detach(self) -> None:
        """Take everything off the model again; a second call does nothing."""
        self._recorder.remove()
        if self._teacher is not None:
            self._teacher.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has the regularisers and neither model nor tensors."""
        return {"regularizers": self.regularizers, "model": self._model_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(Recorder(nn.Module(), ()), state["regularizers"])  # type: ignore[misc]
        self._model_name = state["model"]
        self._copied = True

    def __repr__(self) -> str:
        """A heading, and a line for each regulariser: what hangs where, and its last term."""
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n  ".join([self._heading(), *map(str.rstrip, lines)])

    def _repr_html_(self) -> str:
        """What ``repr`` says as a table; notebooks show it."""
        header, *rows = [[html.escape(cell) for cell in row] for row in self._rows()]
        lines = [f"<tr><th>{'</th><th>'.join(header)}</th></tr>"]
        lines += [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows]
        return f"<table><caption>{html.escape(self._heading())}</caption>{''.join(lines)}</table>"

    def _heading(self) -> str:
        on_teacher = "" if self._teacher is None else f" with the teacher {type(self._teacher.root).__name__}"
        detached = "" if self._recorder.attached else ", detached"
        return f"Attachment on {self._model_name}{on_teacher}{detached}"

    def _rows(self) -> list[list[str]]:
        """The table that people see, with its header first. A copy has no places."""
        rows = [["regulariser", "kind", "place", "weight", "last term"]]
        places = list(map(str, self._recorder.sites)) or ["-"] * len(self.regularizers)
        for regularizer, place in zip(self.regularizers, places, strict=True):
            term = self._components.get(regularizer.name)
            rows.append(
                [
                    regularizer.name,
                    type(regularizer).__name__,
                    place,
                    weight_text(regularizer.weight),
                    "-" if term is None else f"{term.item():.4g}",
                ]
            )
        if self._teacher is not None:
            for row, place in zip(rows, ["place in the teacher", *map(str, self._teacher.sites)], strict=True):
                row.insert(3, place)
        return rows

    def _terms(
        self, word_ids: WordIds | None, attention_mask: Tensor | tuple[Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        """What :meth:`loss` and :meth:`terms` share; from both, warnings point at the line that called them."""
        self._check_not_copied()
        for regularizer in self.regularizers:
            if regularizer.uses_word_ids and word_ids is None:
                raise TypeError(
                    f"{regularizer.name}: it compares words, so it needs word_ids, as in ear.loss(word_ids=...)"
                )
        if word_ids is not None:
            for ids in word_ids if isinstance(word_ids, tuple) else (word_ids,):
                check_tensor("word_ids", ids, "pass torch.tensor(word_ids), with -1 where a token has no word")
        untaken = self._recorder.untaken
        try:
            records = self._take()
        except RuntimeError as error:
            raise RuntimeError(f"{', '.join(r.name for r in self.regularizers)}: {error}") from None
        if untaken:
            self._warn_of_untaken()
        if attention_mask is not None:
            self._replace_masks([record for record, _ in records], attention_mask)
        terms: dict[str, Tensor] = {}
        for index, regularizer in enumerate(self.regularizers):
            readings = [
                outside_inference_mode(sites[index].read(record, regularizer.name)) for record, sites in records
            ]
            rows = [reading[0].shape[0] for reading in readings]
            self._check_rows(regularizer.name, rows)
            if attention_mask is not None:
                _check_rows_of_masks([record for record, _ in records], rows)
            if self._teacher is not None:
                readings[1] = as_constant(readings[1], readings[0][0].device)
                if isinstance(word_ids, Tensor) and len(word_ids) == len(readings[0][0]):
                    word_ids = (word_ids, word_ids)  # the teacher sees the very same rows
            words = {"word_ids": word_ids} if regularizer.uses_word_ids else {}
            with torch.autocast(readings[0][0].device.type, enabled=False):
                term = regularizer.term(readings[0], readings[1] if len(readings) == 2 else None, **words)
            check_term(regularizer, term)
            self._warn_if_constant(regularizer.name, term)
            terms[regularizer.name] = term
        self._components = {name: term.detach() for name, term in terms.items()}
        return terms

    def _check_not_copied(self) -> None:
        if self._copied:
            raise RuntimeError(
                "this attachment was copied or unpickled, so it is detached: it belongs to no model and records "
                "nothing; attach again, ear = ear_ops.attach(model, ear.regularizers)"
            )

    def _take(self) -> list[tuple[Record, tuple[Site, ...]]]:
        """The recorded forwards, one with both views or one for each view, and the sites of each."""
        records = [(record, self._recorder.sites) for record in self._recorder.take()]
        if self._teacher is None:
            return records
        if self._teacher.both is None:
            raise RuntimeError(
                "the teacher has not seen this batch; call it before each loss(), "
                "with torch.no_grad(): teacher(**batch)"
            )
        if self._teacher.root.training:
            raise RuntimeError(
                "the teacher is in training mode, so its dropout would be noise in the target; call teacher.eval()"
            )
        (teacher_record,) = self._teacher.take()
        check_same_batch(records[0][0], teacher_record, self._recorder.root, self._teacher.root)
        return [*records, (teacher_record, self._teacher.sites)]

    def _replace_masks(self, records: list[Record], attention_mask: Tensor | tuple[Tensor, Tensor]) -> None:
        """Put ``attention_mask`` in place of what the models of ``records`` received."""
        views = list(attention_mask) if isinstance(attention_mask, (tuple, list)) else [attention_mask]
        if not 1 <= len(views) <= 2 or not all(isinstance(view, Tensor) and view.dim() == 2 for view in views):
            got = [list(view.shape) if isinstance(view, Tensor) else type(view).__name__ for view in views]
            raise ValueError(
                f"attention_mask: expected a tensor [2B, L] of both views, or a pair of [B, L], 1 for real tokens and "
                f"0 for padding; got {got}"
            )
        if len(views) == 2 and len(records) == 1:
            if views[0].shape[1] != views[1].shape[1]:
                raise ValueError(
                    f"attention_mask: expected one length for both views of one forward, got {views[0].shape[1]} and "
                    f"{views[1].shape[1]}"
                )
            views = [torch.cat(views)]
        elif len(views) == 1 and len(records) == 2:
            if self._teacher is None and len(views[0]) % 2:
                raise ValueError(f"attention_mask: expected the rows of two views, got {len(views[0])} rows")
            views = [views[0], views[0]] if self._teacher is not None else list(views[0].chunk(2))
        for record, view in zip(records, views, strict=True):
            batch = None if record.batch is None else record.batch.tensor
            record.mask_override = view.to(batch.device) if isinstance(batch, Tensor) else view

    def _check_rows(self, name: str, rows: list[int]) -> None:
        if len(rows) == 1 and rows[0] % 2:
            raise ValueError(
                f"{name}: expected an even batch, rows 0..B-1 of x and B..2B-1 of its augmentation, got {rows[0]} rows"
            )
        if len(set(rows)) > 1:
            both = "the views" if self._teacher is None else "the model and its teacher"
            raise ValueError(f"{name}: expected equally many rows in {both}, got {rows[0]} and {rows[1]}")

    def _warn_of_untaken(self) -> None:
        if self._warned_of_untaken:
            return
        self._warned_of_untaken = True
        views = "" if self._teacher is not None else 'name two forwards with ear.view("original") and "augmented", '
        warnings.warn(
            f"{self._model_name} ran several times before one loss(), which takes the last forward alone: put all rows "
            f"into one batch, {views}or call ear.forget() after each forward that loss() should leave out",
            stacklevel=4,
        )

    def _warn_if_constant(self, name: str, term: Tensor) -> None:
        if term.requires_grad or name in self._warned or not torch.is_grad_enabled():
            return
        self._warned.add(name)
        warnings.warn(
            f"{name} has no gradient, so it is a constant in the loss: nothing that it depends on is trained (frozen "
            f"embeddings or layers, or views without grad)",
            stacklevel=4,
        )


def _remove(reference: weakref.ref[Recorder]) -> None:
    """Take a recorder off its model; a weak reference, because a model that holds its attachment has to be freed."""
    recorder = reference()
    if recorder is not None:
        recorder.remove()


def _check_rows_of_masks(records: list[Record], rows: list[int]) -> None:
    """Raises ValueError where a mask that replaces the model's has other rows: one would stand for all of them."""
    for record, count in zip(records, rows, strict=True):
        if record.mask_override is not None and len(record.mask_override) != count:
            raise ValueError(
                f"attention_mask: expected {count} rows, one for each of the forward, got {len(record.mask_override)}"
            )


def attach(
    model: nn.Module,
    regularizers: Iterable[Regularizer],
    *,
    teacher: nn.Module | None = None,
    layer_map: LayerMap | None = None,
) -> Attachment:
    """Hang ``regularizers`` on ``model``; the model's own output keeps every bit.

    With a teacher, the two views are the forwards of the two models on the same batch of B rows. The teacher's forward
    is a constant: ``with torch.no_grad(): teacher(**batch)``, ``model(**batch)``, ``ear.loss()``.

    Args:
        model: any ``nn.Module``; ``torch.compile`` and ``DistributedDataParallel`` around it are looked through.
        regularizers: those of :mod:`ear_ops.regularizers`, such as :class:`AttentionPull`, or your own subclasses of
            :class:`Regularizer`.
        teacher: another model, in eval mode when it is called; it may be deeper, and its heads larger.
        layer_map: from layers of ``model`` to layers of the teacher, counted from 1, such as ``{1: 2, 2: 4}``. None
            takes the same layer where both models are equally deep. Otherwise it spreads the layers evenly, the last on
            the last. For regularisers on ``query=`` and ``key=`` it maps path to path; by default the paths are equal.

    Returns:
        An :class:`Attachment`; its ``loss()`` after each forward gives the regularisation loss.

    Raises:
        TypeError, ValueError: something does not fit the model; nothing has been changed then.
    """
    root = unwrap(model)
    if isinstance(regularizers, Regularizer) or not isinstance(regularizers, Iterable):
        raise TypeError(f"regularizers: expected a list of regularisers, got {regularizers!r}; put it in a list")
    requested = tuple(regularizers)
    if not requested:
        raise ValueError("regularizers: expected at least one regulariser, got an empty list")
    for regularizer in requested:
        if not isinstance(regularizer, Regularizer):
            raise TypeError(f"regularizers: expected regularisers such as AttentionPull(layer=6), got {regularizer!r}")
        check_constructed(regularizer)
    layout = Layout(root)
    expanded = tuple(single for regularizer in requested for single in regularizer.expand(layout))
    names = [regularizer.name for regularizer in expanded]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"regularizers: expected another name for each, got {', '.join(repeated)} more than once; pass name= where "
            f"two of one kind look at one place"
        )
    recorder = Recorder(root, [site_of(regularizer, layout) for regularizer in expanded])
    if teacher is None:
        if layer_map is not None:
            raise TypeError("layer_map: expected None without a teacher; it says which of the teacher's layers to take")
        for regularizer in expanded:
            regularizer.prepare(root, None)
        recorder.install()
        return Attachment(recorder, expanded)
    teacher_root = check_teacher(teacher, root, layer_map)
    teacher_layout = TeacherLayout(teacher_root, layout, layer_map)
    teacher_sites = [site_of(regularizer, teacher_layout) for regularizer in expanded]
    for regularizer in expanded:
        regularizer.prepare(root, teacher_root)
    teacher_recorder = Recorder(teacher_root, teacher_sites, without_grad=True)
    with contextlib.ExitStack() as undo:
        for installed in (recorder, teacher_recorder):
            installed.install()
            undo.callback(installed.remove)
        undo.pop_all()
    return Attachment(recorder, expanded, teacher_recorder)
