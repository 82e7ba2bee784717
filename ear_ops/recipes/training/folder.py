"""The folder of a run: which configuration it belongs to, how far it got, and that one process works in it.

config.json                     the configuration, the versions it started with, and digests of the files it read
checkpoints/checkpoint-N/       while training; each ends with its manifest
model/                          the best checkpoint, when training is over
training.json                   the log, the best step, what is to be said about the run
results.json, results.md, predictions.json
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ear_ops.errors import EarOpsError
from ear_ops.recipes.training import processes
from ear_ops.recipes.training.checkpoints import write_json
from ear_ops.recipes.training.config import TrainConfig
from ear_ops.recipes.training.sources import digests

_OWN_FILES = {".lock", "config.json", "config.json.tmp"}  # what a run that computed nothing may have left
_PACKAGES = ("ear-ops", "torch", "transformers", "accelerate", "tokenizers")


class RunFolderError(EarOpsError, RuntimeError):
    """The output folder belongs to something else, is in use, or does not hold what was asked for."""


class FolderInUseError(RunFolderError):
    """Another process works in the folder; it is free again when that process ends, however it ends."""


def claim(folder: Path, config: TrainConfig) -> None:
    """Make `folder` the folder of a run with this configuration, or find that it is already.

    A folder with a config.json alone is of a run that computed nothing, such as one whose data were not found: it is
    taken over. Call it under the lock of the folder.

    Raises:
        RunFolderError: it holds a run of another configuration (the message lists the settings that differ), one that
            read files which have changed since, or files that no run wrote. Nothing is overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in folder.iterdir() if path.name not in _OWN_FILES and not _is_empty(path))
    if (folder / "config.json").exists():
        load_config(folder)  # which something else may have written
        if others:
            check_config(folder, config)
            if changed := changed_files(folder, config):
                raise RunFolderError(
                    f"{folder} holds a run that read other contents of {', '.join(changed)}: bring these back, choose "
                    "another --output-dir, or delete the folder"
                )
            return
    elif others:
        raise RunFolderError(
            f"{folder} is not empty and holds no run (it has {', '.join(others[:5])}): choose another --output-dir"
        )
    content = {"config": config.to_dict(), "versions": versions(), "files": digests(config.data)}
    write_json(folder / "config.json", content)


def changed_files(folder: Path, config: TrainConfig) -> list[str]:
    """The files with other contents now than when the run of this folder began; those that are gone do not count."""
    then = read_json(folder / "config.json").get("files", {})  # which runs of older versions do not have
    return [path for path, digest in digests(config.data).items() if then.get(path, digest) != digest]


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def check_config(folder: Path, config: TrainConfig) -> None:
    """Raises RunFolderError where the folder holds a run of another configuration; the message lists the settings that
    differ."""
    saved, now = load_config(folder).to_dict(), config.to_dict()
    differing = [name for name in now if saved[name] != now[name]]
    if differing:
        changes = "; ".join(f"{name}: {saved[name]!r} there, {now[name]!r} now" for name in differing)
        raise RunFolderError(
            f"{folder} holds a run of another configuration ({changes}): choose another --output-dir, or delete it"
        )


def load_config(folder: Path) -> TrainConfig:
    """The configuration of a run; settings that are newer than the run have their defaults.

    Raises:
        RunFolderError: the folder holds no run, or a config.json that no run wrote.
        ConfigError: the run has a setting that this version does not know.
    """
    if not (folder / "config.json").is_file():
        raise RunFolderError(f"{folder} holds no run: there is no config.json in it")
    saved = read_json(folder / "config.json")
    if not isinstance(saved, dict) or "config" not in saved:
        raise RunFolderError(f"{folder} holds no run: its config.json was written by something else")
    return TrainConfig.from_dict(saved["config"], output_dir=str(folder))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of the folder; the system lifts the lock when the process ends, however it ends.

    Raises:
        FolderInUseError: another process is in there.
        OSError: the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows: there the user has to take care
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUseError(f"{folder} is in use by another process: wait for it, or stop it first") from None
        yield


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, of a checkout with its commit, and the numbers of threads and processes,
    which decide the order of sums."""
    import torch

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            from ear_ops import __version__

            found[package] = f"{__version__} (not installed)" if package == "ear-ops" else "not installed"
    found["ear-ops"] += _commit()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {**found, "device": device, "processes": str(processes.count())}


def _commit() -> str:
    """` (5619ddb)`, ` (5619ddb-dirty)` with changes of its own; nothing where there is no checkout or git."""
    checkout = Path(__file__).parents[3]
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return f" ({subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()})"
    except (OSError, subprocess.CalledProcessError):
        return ""


def read_json(path: Path) -> Any:
    """Raises RunFolderError naming the file when it is not there or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise RunFolderError(f"{os.fspath(path.parent)}: no such folder") from None
        raise RunFolderError(f"{os.fspath(path)} is missing: the run is not finished") from None
    except ValueError as error:
        raise RunFolderError(f"{os.fspath(path)} is damaged: {error}") from None
