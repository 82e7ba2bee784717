"""The tables of the paper (Ding et al., COLING 2022): the setting that makes their rows, and their numbers."""

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
        title: of the table.
        axis: the setting that has another value in each row.
        column: the column of the file that names the rows.
        baseline: the value of `axis` that the other rows are compared with.
        model: the model of the rows, where the file has no such column.
        names: the file's names of those values of `axis` that it names otherwise.
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
    """One row of a table in the paper.

    Attributes:
        model: that was trained.
        name: of the row in the file.
        accuracies: in percent, by language and as `avg`, as far as the paper prints them.
    """

    model: str
    name: str
    accuracies: dict[str, float]


def paper_rows(table: str) -> list[PaperRow]:
    """The rows of a table, in the order of the paper. The paper has scored the test sets."""
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
    """Whether a value of the table's axis belongs to the row `name` of the file, such as 1.0 to the row `1`."""
    value = TABLES[table].names.get(value, value)
    try:
        return float(value) == float(name)
    except (TypeError, ValueError):
        return str(value) == name
