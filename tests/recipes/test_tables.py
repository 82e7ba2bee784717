from __future__ import annotations

import sys

import pytest

from ear_ops.recipes.tables import markdown_table, terminal_table, text_table

HEADER, ROWS = ["name", "points"], [["a", "+1.0 [+0.5, +1.5]"], ["[red] longer", "2"]]


def test_text_table_aligns_columns() -> None:
    assert text_table(["name", "n"], [["a", "10"], ["longer", "2"]]) == (
        "name     n\n------  --\na       10\nlonger   2"
    )


def test_markdown_table_aligns_numbers_to_the_right() -> None:
    assert markdown_table(["name", "n"], [["a", "10"]]) == "| name | n |\n| --- | ---: |\n| a | 10 |"


def test_what_is_no_terminal_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert terminal_table(HEADER, ROWS) == text_table(HEADER, ROWS)


def test_on_a_terminal_rich_draws_every_cell_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for name, value in {"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    text = terminal_table(HEADER, ROWS)
    assert text != text_table(HEADER, ROWS) and "\u2500\u2500" in text
    assert all(cell in text for cell in (*HEADER, *ROWS[0], *ROWS[1])), "also one that looks like markup"
