"""The paper's tables: which setting makes a row, and the paper's own numbers (Ding et al., COLING 2022)."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).with_name("paper")


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper.

    Args:
        title: what it shows.
        axis: the setting whose value makes a row.
        column: of the file, what names a row there.
        baseline: the value of `axis` that the others are compared with.
        model: what the file leaves unsaid: the model of its rows.
        names: values of `axis` that the file calls something else.
    """

    title: str
    axis: str
    column: str
    baseline: Any
    model: str = "mBERT"
    names: dict[Any, str] = field(default_factory=dict)


_TARGETS = {"ear": "EPT+APT", "nt+apt": "NT+APT", "ept+srpt": "EPT+SRPT"}

TABLES: dict[str, PaperTable] = {
    "1": PaperTable("Methods, XNLI", "method", "method", "finetune"),
    "2": PaperTable("Methods, PAWS-X", "method", "method", "finetune"),
    "3": PaperTable("Ablation, XNLI", "method", "method", "ear"),
    "4": PaperTable("Replaced targets, XNLI", "method", "targets", "ear", names=_TARGETS),
    "A.4": PaperTable("Replaced targets, XNLI, second model", "method", "targets", "ear", "XLM-R", _TARGETS),
    "5": PaperTable("Source language, XNLI", "source_language", "source", "en"),
    "6": PaperTable("Scale of the dictionary, XNLI", "dictionary_scale", "scale", 1.0),
    "A.1": PaperTable("Layer of the attention pull, XNLI, alpha = beta = 1", "layer", "layer", 6),
    "A.2": PaperTable("Weight beta of the attention pull, XNLI, alpha = 1", "beta", "beta", 0.1),
    "A.3": PaperTable("Weight alpha of the embedding push, XNLI, beta = 0.1", "alpha", "alpha", 1.0),
}


@dataclass(frozen=True)
class PaperRow:
    model: str
    name: str  # as the file has it
    accuracies: dict[str, float]  # in percent, by language and `avg`, as far as printed


def paper_rows(table: str) -> list[PaperRow]:
    """The rows of a table in the paper's order, on the test sets."""
    spec = TABLES[table]
    with open(_FOLDER / f"table-{table}.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    other = {"model", spec.column, "dictionary_size"}
    return [
        PaperRow(
            model=line.get("model", spec.model),
            name=line[spec.column],
            accuracies={name: float(value) for name, value in line.items() if name not in other and value},
        )
        for line in lines
    ]


def same_row(table: str, value: Any, name: str) -> bool:
    """Whether a value of the table's axis is the row called `name` in the file: 1.0 is `1`, `ear` may be `EPT+APT`."""
    value = TABLES[table].names.get(value, value)
    try:
        return float(value) == float(name)
    except (TypeError, ValueError):
        return str(value) == name
