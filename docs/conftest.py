"""The pages are doctests; those that need an extra package are skipped without it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

NEEDS = {"lora.md": "peft", "trainers.md": "accelerate"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        package = NEEDS.get(item.path.name)
        if package is not None and find_spec(package) is None:
            item.add_marker(pytest.mark.skip(reason=f"the page shows {package}, which is not installed"))
