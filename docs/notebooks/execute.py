"""Executes the notebooks of this folder in place, one after the other: `make notebooks`.

Timestamps, versions and the name of the kernel are left out, so that a second execution changes nothing but numbers and
pictures that really differ.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(path: Path) -> None:
    """Runs all cells of one notebook and writes it back. Raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    options = {"kernel_name": "python3", "record_timing": False, "coalesce_streams": True, "timeout": 600}
    NotebookClient(notebook, **options).execute()
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        print(path.name)
        execute(path)
