"""Check for which architectures of transformers the capture of attention is exact, and write a table of them.

    python benchmarks/check_architectures.py                       # all text and vision types
    python benchmarks/check_architectures.py --rows rows.jsonl     # keeps every row, and goes on after them
    python benchmarks/check_architectures.py bert llama --jobs 1   # prints the rows of some types

Every type has another process. Without types as arguments, the script writes ``architectures.json`` and
``architectures.md`` to ``benchmarks/results/architectures``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import re
import resource
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import support_path  # noqa: F401 (makes `support` importable)

RESULTS = Path(__file__).parent / "results" / "architectures"
SECONDS, MEMORY = 60, 8 << 30  # of processor time and of address space that a model type may take


def sweep(model_types: list[str], jobs: int, kept: Path | None = None) -> list[dict[str, Any]]:
    """Return the rows of ``model_types``. Another process makes each row, so that a crash loses one row only.

    Args:
        model_types: the types to check.
        jobs: how many processes run at a time.
        kept: a file with a row in each line. Its rows are not made again, and each new row is added.
    """
    context = multiprocessing.get_context("fork")
    lines = kept.read_text().splitlines() if kept and kept.exists() else []
    rows = [row for row in map(json.loads, lines) if row["type"] in model_types]
    done = {row["type"] for row in rows}
    pending, running = [model_type for model_type in model_types if model_type not in done], []
    while pending or running:
        while pending and len(running) < jobs:
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(pending[0], sending))
            process.start()
            sending.close()
            running.append((pending.pop(0), process, receiving))
        ready = multiprocessing.connection.wait([receiving for _, _, receiving in running])
        for entry in [entry for entry in running if entry[2] in ready]:
            model_type, process, receiving = entry
            try:
                row = receiving.recv()
            except EOFError:
                row = {}
            process.join()
            rows.append(row or _failed(model_type, f"its process ended with {process.exitcode} (time or memory)"))
            running.remove(entry)
            print(json.dumps(rows[-1]), flush=True)
            if kept:
                with kept.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    return sorted(rows, key=lambda row: model_types.index(row["type"]))


def _work(model_type: str, sending: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from support.attention_check import check

    try:
        row = check(model_type)
    except Exception as error:
        said = re.sub(r" from '[^']*'", "", " ".join(str(error).split()))  # the path of a module on this machine
        row = _failed(model_type, f"{type(error).__name__}: {said[:200]}")
    sending.send(row)


def _failed(model_type: str, reason: str) -> dict[str, Any]:
    return {"type": model_type, "status": "failed", "reason": reason}


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "date": str(date.today())}
    lines = ",\n".join(map(json.dumps, rows))
    head = json.dumps({"command": "python benchmarks/check_architectures.py", "versions": versions})
    (folder / "architectures.json").write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')
    (folder / "architectures.md").write_text(markdown(rows, versions))


def markdown(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    swept = [row for row in rows if "kind" in row]
    lines = [
        "# Architectures",
        "",
        f"Made by `python benchmarks/check_architectures.py` on {versions['date']}: transformers "
        f"{versions['transformers']}, torch {versions['torch']}, float32 on a CPU, tiny random models.",
        "",
        "For each model type, the greatest difference on real rows between the attention matrix that the losses see "
        "(and the attention pull made of it) and the one that eager attention returns, over all layers that have one, "
        "padded on the right and on the left. The model's own output is bit-identical with and without the recorder. "
        "FlashAttention runs on no CPU: its column is a stand-in in plain torch, registered under its name, which gets "
        "its masks; a dash means that the model does not run under it, or attends differently under it, and then what "
        "is captured is what the stand-in computed (`stand_in` in architectures.json).",
        "",
        "| kind | correct | refused | wrong |",
        "|---|---|---|---|",
    ]
    for name, kinds in (("text", ("text", "encoder-decoder")), ("vision", ("vision",))):
        counts = Counter(row["status"] for row in swept if row["kind"] in kinds)
        lines.append(f"| {name} | {counts['correct']} | {counts['refused']} | {counts['wrong']} |")
    lines += [
        "",
        "| type | kind | mechanism | layers | default | eager | flash stand-in |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in swept:
        if row["status"] in ("correct", "wrong"):
            difference = dict(row["difference"])
            eager, flash = (_number(difference.pop(name, None)) for name in ("eager", "flash_attention_2"))
            default = " ".join(f"{_number(value)} ({name})" for name, value in difference.items()) or "eager"
            name = row["type"] if row["status"] == "correct" else f"{row['type']} **wrong**"
            if "difference_float64" in row:
                name += f" (in float64: {max(row['difference_float64'].values()):.1e})"
            cells = (name, row["kind"], row["mechanism"], str(row["layers"]), default, eager, flash)
            lines.append(f"| {' | '.join(cells)} |")
    for title, status in (("Refused", "refused"), ("No matrix to compare with", "not compared")):
        others = [row for row in swept if row["status"] == status]
        lines += ["", f"## {title}", "", "| type | kind | why |", "|---|---|---|"] if others else []
        lines += [f"| {row['type']} | {row['kind']} | {_cell(next(iter(row['refused'])))} |" for row in others]
    lines += [
        "",
        "## Not swept",
        "",
        "Types that are neither text nor vision models (they take audio, or images and text together), or that could "
        "not be built small and run.",
    ]
    lines += ["", "| type | why |", "|---|---|"]
    lines += [f"| {row['type']} | {_cell(row['reason'])} |" for row in rows if "kind" not in row]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; by default all of them, which writes the results")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rows", type=Path, help="a file that keeps every row; rows that it has are not made again")
    arguments = parser.parse_args()
    import warnings

    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    import support.attention_check  # noqa: F401 (before the fork, because the import takes longer than a row)

    rows = sweep(arguments.types or list(MODEL_MAPPING_NAMES), arguments.jobs, arguments.rows)
    print(Counter((row.get("kind", "-"), row["status"]) for row in rows))
    if not arguments.types:
        write(rows, arguments.output)


if __name__ == "__main__":
    main()
