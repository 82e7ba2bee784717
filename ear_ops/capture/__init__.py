"""Taking queries, keys, masks, embeddings and hidden states out of a running model.

One idea a file: :mod:`.layout` finds the places in a model, :mod:`.sites` taps one place, :mod:`.interface` lets the
attention functions of transformers report to the taps, :mod:`.inside` watches modules that call none of them,
:mod:`.records` holds what one forward gave, :mod:`.masks` turns the model's masks into the losses', :mod:`.views` is
what a loss gets, :mod:`.recorder` says when a recording begins and ends. Nothing here knows of a loss.
"""

from __future__ import annotations

from ear_ops.capture.layout import Layout, find_attention, unwrap
from ear_ops.capture.readings import (
    AttentionInputs,
    AttentionMaps,
    HiddenStates,
    align_attention,
    align_hidden,
    align_maps,
)
from ear_ops.capture.recorder import Recorder
from ear_ops.capture.records import Record
from ear_ops.capture.sites import AttentionSite, HiddenSite, Place, ProjectionSite, Site

__all__ = [
    "AttentionInputs",
    "AttentionMaps",
    "AttentionSite",
    "HiddenSite",
    "HiddenStates",
    "Layout",
    "Place",
    "ProjectionSite",
    "Record",
    "Recorder",
    "Site",
    "align_attention",
    "align_hidden",
    "align_maps",
    "find_attention",
    "unwrap",
]
