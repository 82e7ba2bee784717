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
from ear_ops import env_report, installation

PACKAGE = Path(ear_ops.__file__).parent
OPTIONS = "install --no-build-isolation --no-cache-dir --force-reinstall --no-deps"
REBUILD = f"reinstall with: pip install 'setuptools>=77' ninja && pip {OPTIONS} "


def installed_from(
    monkeypatch: pytest.MonkeyPatch, folder: Path, facts: dict[str, Any] | None, installer: str = "pip"
) -> None:
    """As in site-packages, with what the installer wrote down."""
    monkeypatch.setattr(installation, "_CHECKOUT", folder)
    files = {"direct_url.json": None if facts is None else json.dumps(facts), "INSTALLER": f"{installer}\n"}
    found = SimpleNamespace(read_text=files.get)
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


@pytest.mark.parametrize("facts", [None, {}])
def test_where_a_rebuild_is_not_known_the_words_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any] | None
) -> None:
    installed_from(monkeypatch, tmp_path, facts)
    assert re.search("--no-deps from the path or URL that it was installed from", installation.rebuild())
    assert re.match(r"install ear-ops\[train\] again from the path or URL", installation.install("train"))


def test_a_wheel_is_replaced_by_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are for one torch."""
    facts = {"url": "file:///tmp/ear_ops-0.2.0+torch2.13-cp310-abi3-linux_x86_64.whl", "archive_info": {}}
    installed_from(monkeypatch, tmp_path, facts)
    assert installation.rebuild().startswith("install the wheel of ear-ops for this torch, or its source distribution")


def test_the_command_is_that_of_the_installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that uv made has no pip."""
    installed_from(monkeypatch, tmp_path, {"url": "file:///home/me/ear", "dir_info": {}}, installer="uv")
    command = f"uv pip install 'setuptools>=77' ninja && uv pip {OPTIONS} /home/me/ear"
    assert installation.rebuild() == f"reinstall with: {command}"
    assert installation.install("train").startswith("uv pip install --no-build-isolation ")


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


# --- a copy that hides the installed one ----------------------------------------------------------------------------


def write_installed(site: Path, editable: Path | None = None) -> None:
    """An installation as pip leaves it: the package itself, or a note of where it lies."""
    info = site / "ear_ops-0.2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ear-ops\nVersion: 0.2.0\n")
    if editable:
        facts = {"url": editable.as_uri(), "dir_info": {"editable": True}}
        (info / "direct_url.json").write_text(json.dumps(facts))
    else:
        (site / "ear_ops").mkdir()


@pytest.mark.parametrize("kind", ["none", "copy", "editable of this", "editable of another"])
def test_the_installed_copy_that_these_files_hide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """From inside a checkout Python takes the source tree, and a report would be silently on that."""
    checkout, site, other = tmp_path / "checkout", tmp_path / "site", tmp_path / "other"
    (checkout / "ear_ops.egg-info").mkdir(parents=True)  # a build leaves it
    (checkout / "ear_ops.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: ear-ops\nVersion: 0.2.0\n")
    editable = {"editable of this": checkout, "editable of another": other}.get(kind)
    if kind != "none":
        write_installed(site, editable)
    monkeypatch.setattr(installation, "_CHECKOUT", checkout)
    monkeypatch.setattr("sys.path", [str(checkout), str(site)])
    hidden = {"copy": site / "ear_ops", "editable of another": other / "ear_ops"}.get(kind)
    assert installation.hidden_copy() == hidden
    monkeypatch.setattr(env_report, "hidden_copy", installation.hidden_copy)
    told = [line for line in env_report.lines() if line.startswith("reported ")]
    assert len(told) == (hidden is not None)
    if hidden:
        assert f"{PACKAGE}, which hides the installed {hidden}; for a report on that one, run this in" in told[0]


def test_an_installed_copy_hides_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as in an environment that sees the packages of another one."""
    for name in ("environment", "system"):
        write_installed(tmp_path / name)
    monkeypatch.setattr(installation, "_CHECKOUT", tmp_path / "environment")
    monkeypatch.setattr("sys.path", [str(tmp_path / "environment"), str(tmp_path / "system")])
    assert installation.hidden_copy() is None
