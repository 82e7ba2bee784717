"""What a release needs: one version, every source in build.toml, every file in the source distribution."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import ear_ops

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")
ADDED = {"PKG-INFO", "setup.cfg"}  # by setuptools, beside the folder ear_ops.egg-info
BUILD = """
import sys
sys.modules["torch"] = None  # what is installed must not matter
from setuptools import build_meta
print(build_meta.build_sdist("dist"))
"""


def tracked() -> list[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not in a checkout, or there is no git")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def test_the_sdist_holds_every_tracked_file(tmp_path: Path) -> None:
    names = tracked()
    generated = ["ear_ops/_build_info.py", "ear_ops/_C_cpu.abi3.so", "csrc/cpu/__pycache__/check.cpython-310.pyc"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in generated:  # what builds leave in a folder
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    result = subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    packed = {name for name in packed if not name.startswith("ear_ops.egg-info/")} - ADDED
    assert packed == {name for name in names if not name.startswith(LEFT_OUT)}


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("pyproject.toml", r'^version = "(.+)"$'), ("CITATION.cff", r"^version: (.+)$")],
)
def test_the_version_is_the_same_everywhere(name: str, pattern: str) -> None:
    assert re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE) == [ear_ops.__version__]


def test_build_toml_lists_every_source_once() -> None:
    """It has no patterns."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    build = tomllib.loads((ROOT / "build.toml").read_text())
    listed = [name for part in (build["torch"], *build["kernel"].values()) for name in part["src"]]
    kinds = (".h", ".cuh", ".cpp", ".cu")
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.suffix in kinds}
    # The build facts, and programs that only the check of the build runs.
    left_out = {name for name in sources if name.startswith("csrc/cuda/sass/")} | {"csrc/module.cpp"}
    assert sorted(listed) == sorted(sources - left_out)
