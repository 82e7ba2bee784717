"""Say what changed between two results of the benchmarks.

    ear-ops bench compare OLD NEW

OLD and NEW are files of results, or folders of them. A line shows the medians of a row in both, and new over old: below
1 the new one is faster. It says `faster` or `slower` where the ranges from p20 to p80 do not touch. Where eager was
measured, the line also has its time over that of the row: such ratios survive other work on the computer. Processor,
threads and versions that differ are named first, because they change times as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]  # the facts and the rows of a file
KEYS = ("op", "model", "data", "preset", "dtype", "mode", "provider")  # what tells the rows of a result apart
UNIMPORTANT = ("date", "command")


def read(path: Path) -> list[Result]:
    """Return the results in a file, or in all files of a folder."""
    paths = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not paths:
        raise SystemExit(f"{path}: expected a file of results or a folder with some, got a folder without any")
    return [json.loads(file.read_text()) for file in paths]


def differing_facts(old: list[Result], new: list[Result]) -> list[str]:
    """Return a warning for each fact, such as the processor or the number of threads, that is not the same."""
    warnings = []
    for name in dict.fromkeys(name for result in (*old, *new) for name in result["facts"] if name not in UNIMPORTANT):
        values = [sorted({str(result["facts"].get(name, "unknown")) for result in side}) for side in (old, new)]
        if values[0] != values[1]:
            warnings.append(f"warning: {name} was {', '.join(values[0])} and is {', '.join(values[1])}")
    return warnings


def rows_by_key(results: list[Result]) -> dict[tuple[str, ...], dict]:
    rows = [row for result in results for row in result["rows"] if "median_ms" in row]
    return {tuple(str(row[key]) for key in KEYS if key in row): row for row in rows}


def change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return `faster` or `slower` where the ranges from p20 to p80 of both rows do not touch, and nothing otherwise."""
    if new["p80_ms"] < old["p20_ms"]:
        return "faster"
    return "slower" if new["p20_ms"] > old["p80_ms"] else ""


def line(key: tuple[str, ...], old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    ratio = new["median_ms"] / old["median_ms"]
    parts = [
        f"{' '.join(key):<62}{old['median_ms']:10.3f} ms {new['median_ms']:10.3f} ms {ratio:7.2f} {change(old, new):<6}"
    ]
    for name, title in (("eager_over_this", "eager over this"), ("fraction_of_limit", "of the limit")):
        if name in old and name in new:
            parts.append(f"{title} {old[name]:.2f} -> {new[name]:.2f}")
    if old.get("correct") != new.get("correct"):
        parts.append("error too large now" if not new.get("correct") else "error no longer too large")
    return "  ".join(parts).rstrip()


def comparison(old: list[Result], new: list[Result]) -> str:
    """Return warnings, a line for each row that both results have, and the rows that only one of them has."""
    before, after = rows_by_key(old), rows_by_key(new)
    printed = differing_facts(old, new)
    printed += [line(key, before[key], after[key]) for key in before if key in after]
    for only, title in ((before.keys() - after.keys(), "only in OLD"), (after.keys() - before.keys(), "only in NEW")):
        printed += [f"{title}: {' '.join(key)}" for key in sorted(only)]
    return "\n".join(printed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    print(comparison(read(options.old), read(options.new)))


if __name__ == "__main__":
    main()
