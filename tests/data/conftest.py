from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

WriteFile = Callable[[str, "str | bytes"], Path]


@pytest.fixture
def write_file(tmp_path: Path) -> WriteFile:
    """Return a function that writes a file into `tmp_path`. It gzips the file if the name ends in .gz."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = content.encode("utf-8") if isinstance(content, str) else content
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    return write


@pytest.fixture(scope="session")
def xtreme_data() -> Path:
    """Return the folder of the published data, which this repository does not contain."""
    folder = os.environ.get("XTREME_DATA")
    if not folder:
        pytest.skip("XTREME_DATA does not name a folder with the published XNLI and PAWS-X files")
    return Path(folder)
