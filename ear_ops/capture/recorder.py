"""When a recording begins and ends.

A record lives from the forward of the root module to :meth:`Recorder.take`. A forward without grad is recorded only as
a named view, so that generation and evaluation pass untouched. Recording ends with the forward, so that gradient
checkpointing, which recomputes it later, is not taken for a second forward.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ear_ops.capture.pending import PendingResult
from ear_ops.capture.records import Record, TensorCall, may_be_padding
from ear_ops.capture.sites import HiddenSite, Site
from ear_ops.capture.taps import interface
from ear_ops.capture.taps.hooks import ModelHook, run_last

VIEWS = ("original", "augmented")
INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")  # of a model's forward
MASKS = ("attention_mask", "encoder_attention_mask", "decoder_attention_mask")  # arguments of a model's forward


class Recorder:
    """Records what ``sites`` see in each forward of ``root``, from :meth:`install` to :meth:`remove`.

    Args:
        without_grad: record forwards without grad too: those of a teacher.

    Attributes:
        record: the record that is being written, None outside a recorded forward.
        open: path of the module whose forward is running, None outside (``""`` is root).
        begun: path of the module whose forward began the record that waits to be taken.
        interrupted: path of a module inside that was called by itself while a record of the root waited, or None.
        untaken: a training forward whose result waits for its backward was replaced by another one before it was taken.
    """

    def __init__(self, root: nn.Module, sites: Sequence[Site], *, without_grad: bool = False) -> None:
        self.root = root
        self.without_grad = without_grad
        self.sites = tuple(sites)
        self.attached = False
        self.view: str | None = None
        self.record: Record | None = None
        self.open: str | None = None
        self.begun: str | None = None
        self.interrupted: str | None = None
        self.untaken = False
        self.both: Record | None = None  # one forward that holds both views
        self.original: Record | None = None
        self.augmented: Record | None = None
        self._undo = contextlib.ExitStack()

    def install(self) -> None:
        """Hang the hooks on the model; where one fails, those before it are taken off again."""
        with contextlib.ExitStack() as undo:
            if any(getattr(site, "uses_interface", False) for site in self.sites):
                interface.acquire()
                release = weakref.finalize(self, interface.release)  # also where the model goes with this still on it
                release.atexit = False
                undo.callback(release)
            for path in dict.fromkeys(["", *(site.model for site in self.sites)]):
                module = self.root.get_submodule(path)
                enter, leave = _Enter(self, path, module), _Leave(self, path)
                undo.callback(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(leave, always_call=True).remove)
            for site in self.sites:
                for remove in site.install(self):
                    undo.callback(remove)
            self.attached = True
            self._undo = undo.pop_all()

    def run_last(self) -> None:
        """Let hooks that were registered after these replace hidden states before they are taken."""
        for site in self.sites:
            if isinstance(site, HiddenSite):
                for handle in site.handles:
                    run_last(handle)

    def remove(self) -> None:
        """Take everything off again, in any order with other recorders; a second call does nothing."""
        self.attached = False
        self.record = None
        self.forget()
        self._undo.close()

    def forget(self) -> None:
        """Drop what was recorded and not taken."""
        self.both = self.original = self.augmented = self.begun = self.interrupted = None
        self.untaken = False

    @contextlib.contextmanager
    def recording_view(self, view: str) -> Iterator[None]:
        """Forwards inside are recorded as one of :data:`VIEWS`, with or without grad."""
        if view not in VIEWS:
            raise ValueError(f"view: expected one of {', '.join(map(repr, VIEWS))}, got {view!r}")
        if self.view is not None:
            raise RuntimeError(f"view: {view!r} was opened inside {self.view!r}; leave the first before the second")
        self.view = view
        try:
            yield
        finally:
            self.view = None

    def take(self) -> tuple[Record, ...]:
        """The record of a forward with both views, or the records of the two views; they are dropped here.

        Raises:
            RuntimeError: nothing, or only one of two views, was recorded.
        """
        both, original, augmented, interrupted = self.both, self.original, self.augmented, self.interrupted
        self.forget()
        if not self.attached:
            raise RuntimeError("the regularisers were detached, so no forward was recorded")
        if interrupted is not None:
            raise RuntimeError(
                f"after the model's forward its part {interrupted!r} was called by itself with grad, so loss() cannot "
                f"tell which of the two forwards to use; call loss() before that, or the part under torch.no_grad(); "
                f"where a teacher shares that part, call the teacher after the student"
            )
        if any(record is not None and not record.complete for record in (both, original, augmented)):
            raise RuntimeError(
                "no complete forward was recorded: the last one was interrupted, or has not ended; call the model "
                "again before loss(), and loss() after the forward"
            )
        if both is not None:
            return (both,)
        if original is not None and augmented is not None:
            return original, augmented
        if original is not None or augmented is not None:
            seen, missing = VIEWS if augmented is None else reversed(VIEWS)
            raise RuntimeError(f'only the {seen} view was recorded; run the other one under ear.view("{missing}")')
        raise RuntimeError(
            "no forward was recorded. Call the model with grad enabled before each loss(), loss() once per forward "
            "(torch.export only traces one); a model that was compiled before attach() may have to be traced again: "
            "torch.compiler.reset()"
        )

    def begin(self, path: str) -> None:
        """A forward starts, and the record of an earlier one is dropped.

        A part of the model that is called by itself does not take the place of the whole model.
        """
        recorded = self.without_grad or self.view is not None or torch.is_grad_enabled()
        # The tensors of an export hold nothing. In torch 2.11, is_exporting() is true in every compiled graph.
        recorded = recorded and not torch.compiler._is_exporting_flag
        recorded = recorded and not _in_backward()  # checkpointing of the whole model runs it again
        if path and self.begun == "" and (self.both or self.original or self.augmented):
            if not recorded:
                return
            self.interrupted = path
        else:
            self.interrupted = None
        self.open = self.begun = path
        self.record = Record(self.root.training) if recorded else None
        if self.view is None:
            replaced = [self.both, self.original, self.augmented]
            self.original = self.augmented = None
            self.both = self.record
        else:
            # A forward outside of views may be another loss's: the views say which two forwards to compare.
            replaced = [self.original if self.view == "original" else self.augmented]
            self.both = None
            if self.view == "original":
                self.original = self.record
            else:
                self.augmented = self.record
        trained = [record for record in replaced if record is not None and record.complete and record.training]
        results = [record.result for record in trained if record.grad_enabled]
        del replaced, trained  # they may hold what they would be found to wait for
        if recorded and any(result is None or result.waits() for result in results):
            self.untaken = True

    def end(self, output: Any) -> None:
        """The forward has ended; one that failed, its output None, leaves no record."""
        if output is None:
            self.both = self.original = self.augmented = None
        elif self.record is not None:
            self.record.complete = True
            if not torch.compiler.is_compiling():
                self.record.result = PendingResult(output)
        self.open = None
        self.record = None


class _Enter(ModelHook):
    """Forward pre-hook of root and of the models that receive a mask.

    A model inside begins a record by itself only when the root's forward is not running: peft, applied after attach(),
    calls the ``forward`` of the root and so passes by its hooks.
    """

    def __init__(self, recorder: Recorder, path: str, module: nn.Module) -> None:
        self.recorder, self.path = recorder, path
        names = list(inspect.signature(module.forward).parameters)
        self.positions = {name: names.index(name) if name in names else None for name in MASKS}
        self.positions.update({name: names.index(name) for name in names if may_be_padding(name, module)})

    def __call__(self, module: nn.Module, args: tuple[Any, ...], received: Any) -> None:
        recorder = self.recorder
        if not recorder.attached:
            return  # a compiled graph from before detach()
        if "_is_replica" in module.__dict__:
            raise RuntimeError(
                "DataParallel runs replicas in threads that share one recorder; use DistributedDataParallel "
                "(torchrun, accelerate launch), a single device, or ear.detach()"
            )
        if recorder.open is None or recorder.open == self.path:  # the latter: an interrupted forward never ended
            recorder.begin(self.path)
            if not torch.compiler.is_compiling():  # a graph keeps the order of the hooks that it was traced with
                recorder.run_last()
        if recorder.record is not None:
            if recorder.record.batch is None:
                recorder.record.batch = TensorCall(_batch_tensor(args, received))
            arguments = {
                name: args[position] if position is not None and position < len(args) else received.get(name)
                for name, position in self.positions.items()
            }
            arguments.update({name: value for name, value in received.items() if may_be_padding(name, module)})
            recorder.record.masks[self.path] = {name: TensorCall(value) for name, value in arguments.items()}
            if self.positions["attention_mask"] is not None:
                recorder.record.masked_models.add(self.path)


class _Leave(ModelHook):
    """Forward hook of the same modules, called with None where the forward raised."""

    def __init__(self, recorder: Recorder, path: str) -> None:
        self.recorder, self.path = recorder, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.recorder.open == self.path:
            self.recorder.end(output)


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _batch_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor by which a batch is recognised: the input of the model, else the first tensor; None without any."""
    named = (kwargs.get(name) for name in INPUTS)
    return next((value for value in (*args, *named, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
