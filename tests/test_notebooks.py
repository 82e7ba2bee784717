"""The notebooks as they are committed: valid, executed in order, without noise, and true to the package's names."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

import ear_ops

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
OF_ONE_COMPUTER = re.compile(r"(?<![\w.:/])/(home|root|tmp|usr|opt|work|Users)/|site-packages|localhost", re.I)


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    notebook_path: Path = request.param
    return notebook_path


@pytest.fixture
def notebook(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_three_notebooks_and_the_examples_page_links_them() -> None:
    page = (NOTEBOOKS.parent / "examples" / "index.md").read_text(encoding="utf-8")
    assert len(PATHS) == 3
    assert all(f"(../notebooks/{path.name})" in page for path in PATHS)


def test_it_is_a_valid_and_small_notebook(path: Path, notebook: dict[str, Any]) -> None:
    assert path.stat().st_size < 300_000
    assert notebook["nbformat"] == 4
    assert notebook["cells"][0]["cell_type"] == "markdown" and notebook["cells"][0]["source"][0].startswith("# ")
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)


def test_it_was_executed_in_order_without_errors_or_noise(notebook: dict[str, Any]) -> None:
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run make notebooks"
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] != "error", output
            assert output.get("name") != "stderr", "".join(output["text"])


def test_it_says_nothing_of_the_computer_that_executed_it(notebook: dict[str, Any]) -> None:
    for cell in notebook["cells"]:
        texts = ["".join(cell["source"])]
        for output in cell.get("outputs", []):
            texts += ["".join(output.get("text", "")), *map("".join, output.get("data", {}).values())]
        for text in texts:
            match = None if len(text) > 20_000 else OF_ONE_COMPUTER.search(text)  # not pictures, which are base64
            assert match is None, f"{cell['id']}: {match and text[max(match.start() - 40, 0) : match.end() + 40]}"


def test_the_names_of_the_package_that_its_code_uses_exist(notebook: dict[str, Any]) -> None:
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in code_cells(notebook)))
    used = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ear_ops"):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ear_ops":
            assert hasattr(ear_ops, node.attr), ast.unparse(node)
            used += 1
    assert used
