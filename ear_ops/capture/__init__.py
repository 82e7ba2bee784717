"""Taking queries, keys, masks, embeddings and hidden states out of a running model; nothing here knows of a loss.

One idea a file:

* :mod:`.layout` finds the places in a model, :mod:`.layers` reads how a user asks for layers.
* :mod:`.sites` are places; they tap a module and read the record of a forward. :mod:`.multihead`, :mod:`.logits` and
  :mod:`.relations` are some of them.
* :mod:`.taps` hang on modules and take tensors.
* :mod:`.records` hold what the taps took in one forward; :mod:`.recorder` begins and ends them.
* :mod:`.masks` turns the model's masks into those of the losses.
* :mod:`.readings` are what a loss gets.
* :mod:`.nested` writes nested tensors as padded ones.
* :mod:`.teacher` finds the places of a second model and ties its forward to the same batch.
"""

from __future__ import annotations

from ear_ops.capture.layout import Layout, find_attention, unwrap
from ear_ops.capture.logits import Logits, LogitsSite
from ear_ops.capture.multihead import MultiheadSite
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
from ear_ops.capture.relations import RelationSite
from ear_ops.capture.sites import AttentionSite, HiddenSite, Place, ProjectionSite, Site

__all__ = [
    "AttentionInputs",
    "AttentionMaps",
    "AttentionSite",
    "HiddenSite",
    "HiddenStates",
    "Layout",
    "Logits",
    "LogitsSite",
    "MultiheadSite",
    "Place",
    "ProjectionSite",
    "Record",
    "Recorder",
    "RelationSite",
    "Site",
    "align_attention",
    "align_hidden",
    "align_maps",
    "find_attention",
    "unwrap",
]
