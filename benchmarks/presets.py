"""The inputs that the losses are measured on, by name."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

LENGTHS = Path(__file__).parent / "xnli_lengths.json"


@dataclass(frozen=True)
class Preset:
    """B pairs of H heads (G of keys), L queries on L keys, D dimensions a head."""

    pairs: int
    heads: int
    length: int
    dim: int
    key_heads: int | None = None
    is_causal: bool = False
    ragged: bool = False  # lengths drawn from those of real XNLI pairs

    def lengths(self) -> list[tuple[int, int]] | None:
        """Real tokens of x and x^a of every pair, None where nothing is padded."""
        if not self.ragged:
            return None
        counted = json.loads(LENGTHS.read_text())["pairs"]  # [length, length of x^a, how often]
        drawn = random.Random("lengths").choices(counted, weights=[n for *_, n in counted], k=self.pairs)
        return [(min(a, self.length), min(b, self.length)) for a, b, _ in drawn]


PRESETS = {
    "paper": Preset(32, 12, 128, 64),
    "e5": Preset(32, 12, 128, 32),
    "xnli": Preset(32, 12, 128, 64, ragged=True),
    **{f"long-{2**n}": Preset(1, 12, 2**n, 64) for n in range(9, 15)},
    "gqa": Preset(1, 32, 4096, 128, key_heads=8, is_causal=True),
    "small": Preset(2, 4, 16, 32),
}
