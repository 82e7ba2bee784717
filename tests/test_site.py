"""The documentation site: its API pages, its pictures, and how its hooks turn pages of the repository into its own."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

import ear_ops
import ear_ops.data
import ear_ops.models

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"


@pytest.mark.parametrize("package", [ear_ops, ear_ops.data, ear_ops.models], ids=lambda package: package.__name__)
def test_the_api_pages_show_every_public_name(package):
    page = DOCS / "api" / f"{package.__name__.removeprefix('ear_ops.')}.md"
    shown = re.findall(rf"^::: {package.__name__}\.(\w+)$", page.read_text(encoding="utf-8"), re.M)
    assert sorted(shown) == sorted(package.__all__)


def test_the_pictures_are_what_their_script_draws():
    pictures = runpy.run_path(str(DOCS / "concepts" / "pictures.py"))["PICTURES"]
    drawn = {f"{name}.svg": draw() for name, draw in pictures.items()}
    committed = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "concepts").glob("*.svg")}
    assert drawn == committed, "run python docs/concepts/pictures.py"


@pytest.fixture(scope="module")
def in_site():
    """From the path of a page below docs/ and its Markdown to the Markdown that the site shows."""
    structure = pytest.importorskip("mkdocs.structure.files")
    hooks = runpy.run_path(str(DOCS / "theme" / "hooks.py"))
    config = SimpleNamespace(docs_dir=str(DOCS), site_dir="site", use_directory_urls=False, plugins=None)
    config.plugins = SimpleNamespace(_current_plugin="hooks")
    names = ("attach.md", "concepts/capture.md", "examples/index.md")
    pages = [structure.File(page, str(DOCS), "site", False) for page in names]
    files = hooks["on_files"](structure.Files(pages), config)

    def convert(page: str, markdown: str) -> str:
        file = SimpleNamespace(src_uri=page, abs_src_path=str(DOCS / page))
        return hooks["on_page_markdown"](markdown, SimpleNamespace(file=file), config, files)

    return convert


@pytest.mark.parametrize(
    ("page", "in_repository", "expected"),
    [
        ("attach.md", "[how](concepts/capture.md#a)", "[how](concepts/capture.md#a)"),
        ("concepts/capture.md", "[all](../attach.md)", "[all](../attach.md)"),
        ("attach.md", "[how to help](../CONTRIBUTING.md)", "[how to help](CONTRIBUTING.md)"),
        (
            "concepts/capture.md",
            "![time](../../benchmarks/results/speed/xeon-avx512/length.svg)",
            "![time](../benchmarks/results/speed/xeon-avx512/length.svg)",
        ),
        ("attach.md", "[runs](../benchmarks/results/scale/#a)", "[runs](benchmarks/results/scale/README.md#a)"),
        ("attach.md", "the [build](../setup.py) file", "the build (`setup.py`) file"),
        ("attach.md", "[dead](../missing.md)", "[dead](../missing.md)"),
        ("attach.md", "[paper](https://example.org/a.md)", "[paper](https://example.org/a.md)"),
        ("attach.md", "[](const Tensor& like)", "[](const Tensor& like)"),
        ("attach.md", "[steps](notebooks/first-steps.ipynb)", "[steps](notebooks/first-steps.md)"),
        ("examples/index.md", "see [it](distil_a_teacher.py)", "see it (`examples/distil_a_teacher.py`)"),
        ("attach.md", "```python\n>>> 1\n1\n```", "```pycon\n>>> 1\n1\n```"),
        ("attach.md", "```python\nx = 1\n```", "```python\nx = 1\n```"),
    ],
)
def test_links_of_the_repository_work_in_the_site(in_site, page, in_repository, expected):
    assert in_site(page, in_repository) == expected


def test_a_link_to_a_script_on_a_line_of_its_own_becomes_its_source(in_site):
    source = (DOCS / "examples" / "distil_a_teacher.py").read_text(encoding="utf-8")
    page = in_site("examples/index.md", "Above.\n\n[distil_a_teacher.py](distil_a_teacher.py)\n\nBelow.")
    assert page == f'Above.\n\n```python title="docs/examples/distil_a_teacher.py"\n{source}```\n\nBelow.'


def test_a_notebook_becomes_a_page_with_its_output(in_site):
    def code(source, *outputs):
        return {"cell_type": "code", "source": [source], "outputs": list(outputs)}

    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "[next](components-and-gradient-ratios.ipynb)"]},
        code("print(1)", {"output_type": "stream", "name": "stdout", "text": ["1\n"]}),
        code("plot()", {"data": {"image/png": "iVBO\nRw0=\n", "text/plain": ["<Figure>"]}}),
        code("ear", {"data": {"text/html": ["<b>ear</b>"], "text/plain": ["Attachment()"]}}),
        code("1 + 1", {"data": {"text/plain": ["2"]}}),
    ]
    page = in_site("notebooks/first-steps.ipynb", json.dumps({"cells": cells}))
    assert page.split("\n\n") == [
        "# Title",
        "[next](components-and-gradient-ratios.md)",
        "```python\nprint(1)\n```",
        "```text\n1\n```",
        "```python\nplot()\n```",
        '<img alt="The picture that this code draws" src="data:image/png;base64,iVBORw0=">',
        "```python\near\n```",
        "<b>ear</b>",
        "```python\n1 + 1\n```",
        "```text\n2\n```",
        "[Download this notebook](first-steps.ipynb)\n",
    ]
