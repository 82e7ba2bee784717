"""The pages are doctests; those that need an extra package are skipped without it.

The code stands in Markdown fences. Doctest would read a closing fence behind expected output as one more line of that
output, so the fence is cut off here.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

NEEDS = {"lora.md": "peft", "trainers.md": "accelerate"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.DoctestItem) and item.path.suffix == ".md":
            for example in item.dtest.examples:
                example.want = example.want.partition("```")[0]
                example.exc_msg = example.exc_msg and example.exc_msg.partition("```")[0]
        package = NEEDS.get(item.path.name)
        if package is not None and find_spec(package) is None:
            item.add_marker(pytest.mark.skip(reason=f"the page shows {package}, which is not installed"))
