"""Difference in accuracy between two finished runs, with a paired bootstrap over the items they were scored on.

    python benchmarks/compare_paired.py RUN BASELINE --data-dir $XTREME_DATA/xnli

Needs a split whose files are parallel, line by line, as those of XNLI are: an item is drawn in all languages at once.
How much a run changes with its seed is not in the interval.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ear_ops.data import get_task, load_split

DRAWS = 2000


def correct(run: Path, data_dir: str | None) -> dict[str, np.ndarray]:
    """Whether each item was right, by language."""
    results = json.loads((run / "results.json").read_text())
    task, split = get_task(results["task"]), results["split"]
    predictions = json.loads((run / "predictions.json").read_text())
    gold = {name: load_split(data_dir or results["config"]["data_dir"], task, split, name) for name in predictions}
    return {name: np.array(predictions[name]) == [pair.label for pair in gold[name]] for name in predictions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("--data-dir", help="where the data are now")
    options = parser.parse_args()
    run, baseline = (correct(folder, options.data_dir) for folder in (options.run, options.baseline))
    if run.keys() != baseline.keys() or len({len(items) for items in [*run.values(), *baseline.values()]}) != 1:
        raise SystemExit("the runs must be scored on the same languages, with as many items in each")
    difference = 100 * np.stack([run[name].astype(float) - baseline[name] for name in run])  # [languages, items]
    for label, rows in (("en", difference[list(run).index("en")]), ("average", difference.mean(axis=0))):
        rng = np.random.default_rng(0)
        draws = [rows[rng.integers(0, len(rows), len(rows))].mean() for _ in range(DRAWS)]
        low, high = np.percentile(draws, [2.5, 97.5])
        print(f"{label:<8} {rows.mean():+.2f} points, 95% interval {low:+.2f} to {high:+.2f}")


if __name__ == "__main__":
    main()
