"""The command in a message that says to install again names the place that the package came from."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ear_ops
from ear_ops import installation

PACKAGE = Path(ear_ops.__file__).parent
REBUILD = "reinstall with: pip install --no-build-isolation --force-reinstall --no-deps "


def installed_from(monkeypatch: pytest.MonkeyPatch, folder: Path, facts: dict[str, Any] | None) -> None:
    """As in site-packages, with what pip wrote down."""
    monkeypatch.setattr(installation, "_CHECKOUT", folder)
    text = None if facts is None else json.dumps(facts)
    found = SimpleNamespace(read_text=lambda name: text if name == "direct_url.json" else None)
    monkeypatch.setattr(metadata, "distribution", lambda name: found)


@pytest.mark.parametrize(
    ("facts", "place", "with_extra"),
    [
        (
            {"url": "file:///home/me/ear%20ops", "dir_info": {"editable": True}},
            "--editable '/home/me/ear ops'",
            "--editable '/home/me/ear ops[train]'",
        ),
        ({"url": "file:///home/me/ear", "dir_info": {}}, "/home/me/ear", "'/home/me/ear[train]'"),
        (
            {"url": "https://host/ear.git", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "git+https://host/ear.git",
            "'ear-ops[train] @ git+https://host/ear.git'",
        ),
        (
            {"url": "https://host/ear.tar.gz", "archive_info": {}},
            "https://host/ear.tar.gz",
            "'ear-ops[train] @ https://host/ear.tar.gz'",
        ),
    ],
    ids=["editable", "folder", "git", "archive"],
)
def test_the_place_that_pip_wrote_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], place: str, with_extra: str
) -> None:
    installed_from(monkeypatch, tmp_path, facts)
    assert installation.rebuild() == REBUILD + place
    assert installation.install("train") == f"pip install --no-build-isolation {with_extra}"


@pytest.mark.parametrize("facts", [None, {}, {"url": "file:///tmp/ear_ops-0.1.0-cp311.whl", "archive_info": {}}])
def test_where_a_rebuild_is_not_known_the_words_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any] | None
) -> None:
    installed_from(monkeypatch, tmp_path, facts)
    assert re.search("--no-deps from the path or URL that it was installed from", installation.rebuild())
    if not facts:
        assert re.match(r"install ear-ops\[train\] again from the path or URL", installation.install("train"))


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(metadata, "distribution", missing)
    assert "from the path or URL" in installation.rebuild()


def test_files_in_a_checkout_are_that_checkout() -> None:
    """Whatever pip wrote down of another one."""
    if not (PACKAGE.parent / "setup.py").is_file():
        pytest.skip("not in a checkout")
    assert installation.rebuild() == f"{REBUILD}--editable {PACKAGE.parent}"
