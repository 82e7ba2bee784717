"""The folder of a run. It belongs to one configuration, and one process at a time works in it.

config.json                     the configuration, the versions at the start, and digests of the files that were read
checkpoints/checkpoint-N/       while training; the manifest of a checkpoint is written last
weights.json                    the weights that follow from ratios, where the configuration has ratios
model/                          the best checkpoint, when the training is over
training.json                   the log, the best step, the notices
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
from ear_ops.recipes.training import checkpoints, processes
from ear_ops.recipes.training.config import TrainConfig
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.shapes import misfit
from ear_ops.recipes.training.sources import digests, model_digest

_INITIAL_FILES = {".lock", "config.json", "config.json.tmp"}  # all that a run leaves that computed nothing
_PACKAGES = ("ear-ops", "torch", "transformers", "accelerate", "tokenizers")


class RunFolderError(EarOpsError, RuntimeError):
    """The folder belongs to something else, is in use, or lacks what was asked for."""


class FolderInUseError(RunFolderError):
    """Another process works in the folder. The folder is free again when that process ends or is killed."""


def claim(folder: Path, config: TrainConfig) -> None:
    """Make `folder` the folder of a run with this configuration, unless it is that already.

    A folder with nothing but a config.json is taken over: its run computed nothing, for example because its data were
    missing. Hold the lock of the folder while you call this.

    Raises:
        RunFolderError: the folder holds a run of another configuration, a run whose input files have changed since, or
            files that no run wrote. Nothing is overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in folder.iterdir() if path.name not in _INITIAL_FILES and not _is_empty(path))
    if (folder / "config.json").exists():
        load_config(folder)  # raises where another program wrote the file
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
    content = {"config": config.to_dict(), "versions": versions(), "files": digests(config)}
    checkpoints.write_json(folder / "config.json", content)


def changed_files(folder: Path, config: TrainConfig) -> list[str]:
    """The input files, and the model folder, whose contents have changed since the run of this folder began.

    What is missing does not count.
    """
    then = _digests_then(folder)
    return [path for path, digest in digests(config).items() if then.get(path, digest) != digest]


def check_model(folder: Path) -> None:
    """Raise RunFolderError where the model of a run is missing or damaged. The message says what to do."""
    if damage := checkpoints.damage(folder / "model"):
        advice = "finish the run with `ear-ops train` first"
        if (folder / "results.json").exists():
            advice = "bring its files back as they were, or delete the folder and train again"
        raise RunFolderError(f"{folder} holds no complete model ({damage}), so nothing was scored: {advice}")


def check_initial_model(folder: Path, model: str) -> None:
    """Raise RunFolderError where a run began from a local model whose files have changed since."""
    then = _digests_then(folder)
    for path, digest in model_digest(model).items():
        if then.get(path, digest) != digest:
            raise RunFolderError(
                f"{folder} holds a run that began from other contents of {path}, which are needed now: bring these back"
            )


def _digests_then(folder: Path) -> dict[str, str]:
    """The digests of the files that the run read when it began; older versions wrote none."""
    return read_json(folder / "config.json", {"files?": {"*": str}}).get("files", {})


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def check_config(folder: Path, config: TrainConfig) -> None:
    """Raise RunFolderError where the folder holds a run of another configuration. The message lists the differences."""
    saved, now = load_config(folder).to_dict(), config.to_dict()
    differing = [name for name in now if saved[name] != now[name]]
    if differing:
        changes = "; ".join(f"{name}: {saved[name]!r} there, {now[name]!r} now" for name in differing)
        raise RunFolderError(
            f"{folder} holds a run of another configuration ({changes}): choose another --output-dir, or delete it"
        )


def load_config(folder: Path) -> TrainConfig:
    """The configuration of a run. Settings that are newer than the run have their defaults.

    Raises:
        RunFolderError: the folder holds no run, or a config.json of another program.
        ConfigError: this version does not know a setting of the run.
    """
    if not (folder / "config.json").is_file():
        raise RunFolderError(f"{folder} holds no run: there is no config.json in it")
    saved = read_json(folder / "config.json")
    if misfit(saved, {"config": dict}):
        raise RunFolderError(f"{folder} holds no run: its config.json was written by something else")
    try:
        return TrainConfig.from_dict(saved["config"], output_dir=str(folder))
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder. The system removes the lock when the process ends or is killed.

    Raises:
        FolderInUseError: another process works in the folder.
        OSError: the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks, so the user has to keep processes apart
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
    """The versions that numbers depend on, and the device, threads and processes, which decide the order of sums."""
    import torch

    packages = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            from ear_ops import __version__

            packages[package] = f"{__version__} (not installed)" if package == "ear-ops" else "not installed"
    packages["ear-ops"] += _commit()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {**packages, "device": device, "processes": str(processes.count())}


def _commit() -> str:
    """The commit of a checkout as ` (5619ddb)`, or ` (5619ddb-dirty)` with changes; empty without checkout or git."""
    checkout = Path(__file__).parents[3]
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return f" ({subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()})"
    except (OSError, subprocess.CalledProcessError):
        return ""


def read_json(path: Path, shape: Any = None) -> Any:
    """The content of a file. Raises RunFolderError where the file is missing or no JSON, or `misfit` names a fault."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise RunFolderError(f"{os.fspath(path.parent)}: no such folder") from None
        raise RunFolderError(f"{os.fspath(path)} is missing: the run is not finished") from None
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{os.fspath(path)} is damaged: {error}") from None
    if shape is not None and (problem := misfit(content, shape)):
        raise RunFolderError(f"{os.fspath(path)} is damaged: {problem}")
    return content
