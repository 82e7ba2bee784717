"""Define the shape presets: the inputs of the measured losses, by name."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

LENGTHS = Path(__file__).parent / "xnli_lengths.json"


@dataclass(frozen=True)
class Preset:
    """The shape of a batch: B pairs, H heads, L queries and L keys, D dimensions in a head."""

    pairs: int  # B
    heads: int  # H
    length: int  # L
    dim: int  # D
    key_heads: int | None = None  # heads of the keys; None: H
    is_causal: bool = False
    ragged: bool = False  # the lengths are drawn from the lengths of real XNLI pairs
    layers: int = 1  # of a student and a teacher, which `distillation` compares all

    def lengths(self) -> list[tuple[int, int]] | None:
        """Return the number of real tokens in x and x^a of every pair, or None where nothing is padded."""
        if not self.ragged:
            return None
        counted = json.loads(LENGTHS.read_text())["pairs"]  # [length of x, length of x^a, count]
        drawn = random.Random("lengths").choices(counted, weights=[n for *_, n in counted], k=self.pairs)
        return [(min(a, self.length), min(b, self.length)) for a, b, _ in drawn]


PRESETS = {
    "paper": Preset(32, 12, 128, 64),
    "e5": Preset(32, 12, 128, 32),
    "xnli": Preset(32, 12, 128, 64, ragged=True),
    **{f"long-{2**n}": Preset(1, 12, 2**n, 64) for n in range(9, 15)},
    "gqa": Preset(1, 32, 4096, 128, key_heads=8, is_causal=True),
    "small": Preset(2, 4, 16, 32),
    "distil": Preset(8, 12, 128, 32, layers=12),
}
