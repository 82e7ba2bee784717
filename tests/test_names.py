"""Names say what they hold: a few empty words are not names of variables or parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EMPTY = {"each", "found", "given", "here", "one", "own", "there", "told"}
FILES = [path for folder in ("ear_ops", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and name of everything that is assigned, or a parameter."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_empty_names(path: Path) -> None:
    empty = [
        f"line {line}: {name}" for line, name in names(ast.parse(path.read_text(encoding="utf-8"))) if name in EMPTY
    ]
    assert not empty, f"name what these hold: {', '.join(empty)}"
