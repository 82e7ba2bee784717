"""Running a study: every run once, the first of the file first, by as many processes as there are, through any kill.

A folder belongs to a study: `study.yaml`, as it was read, and a folder for each run. A process claims a run by the lock
of the run's folder, which the system lifts when the process ends, however it ends; then the run goes on from its newest
complete checkpoint, in whatever process comes next. Nothing else is shared.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ear_ops.data import DataError
from ear_ops.errors import EarOpsError
from ear_ops.models import OfflineModelError
from ear_ops.recipes.study.definition import Group, Plan, Run, Study, load_study
from ear_ops.recipes.tables import Table, text_table
from ear_ops.recipes.training import checkpoints, run
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.folder import (
    FolderInUseError,
    RunFolderError,
    changed_files,
    check_config,
    locked,
    read_json,
)
from ear_ops.recipes.training.sources import missing_inputs

logger = logging.getLogger(__name__)

STUDY_FILE = "study.yaml"
PREVIOUS_STUDY_FILE = "study.previous.yaml"

_EXPLAINED = (DataError, ConfigError, RunFolderError, OfflineModelError, OSError)  # their messages say it all
_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # the next run would fare no better


class StudyError(EarOpsError, RuntimeError):
    """A study that could not be finished, or a folder that holds none. What is finished is kept."""


@dataclass
class Progress:
    """What one process did: the runs that it trained, and why others failed, by name."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def results_of(folder: Path, run: Run) -> dict[str, Any] | None:
    """The results of a finished run, None of one that is not.

    Raises:
        RunFolderError: they are of other settings, from a version with other defaults.
    """
    path = folder / run.name / "results.json"
    if not path.exists():
        return None
    check_config(path.parent, run.config(folder))
    return read_json(path)


def plan_of(study: Study, folder: Path) -> Plan:
    """The runs of the study, with the choices that the finished ones allow."""

    return study.plan(lambda run: _dev_accuracy(folder, run))


def _dev_accuracy(folder: Path, run: Run) -> float | None:
    results = results_of(folder, run)
    return None if results is None else results["best"]["dev_accuracy"]


def sweep(
    study_file: str | Path,
    folder: str | Path,
    *,
    groups: Sequence[str] = (),
    wait: float = 10.0,
    say: Callable[[str], None] = print,
) -> Progress:
    """Run what is not finished, and return when all of it is, by this process or by others.

    A run that fails is reported, and the others go on; the same call tries it again. A full disk stops the process.
    Whatever happens, finished runs stay.

    Args:
        study_file: see `ear_ops.recipes.study.definition`.
        folder: of the study; made if it is not there.
        groups: run these alone, and the groups that choose a setting for them; by default all.
        wait: seconds between two looks at the runs that other processes work on.
        say: takes each line about the progress.

    Raises:
        ConfigError: the study cannot be read, a run of it has settings that cannot be used, or it has no such group.
            Nothing has run then.
        StudyError: the disk is full or cannot be written.
    """
    study, folder = load_study(study_file), Path(folder)
    # A mistake in the file should show before anything runs, whatever will be chosen.
    supposed = study.plan(lambda run: 0.0)
    asked = study.only(groups).groups if groups else study.groups
    plan_of(study, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FolderInUseError), locked(folder):  # whoever is in there writes the same
        _write_study(study, folder, say)
    for notice in _notices(supposed, asked, folder):
        say(notice)
    progress, waited = Progress(), False
    while True:
        plan = plan_of(study, folder)
        runs = _of_groups(plan, asked)
        before, busy = len(progress.finished), False
        for number, each in enumerate(runs, start=1):
            if each.name in progress.failed:
                continue
            try:
                if results_of(folder, each) is None:
                    with locked(folder / each.name):
                        pass  # what other processes are at is not announced here
                    say(f"[{number}/{len(runs)}] {each.name}")
                    results = run.train(each.config(folder))
                    progress.finished.append(each.name)
                    say(f"[{number}/{len(runs)}] {each.name}: {100 * results['average']:.1f} on average")
                if each.name not in plan.kept_models and not plan.may_keep(each):
                    _drop_model(folder / each.name)
            except FolderInUseError:
                busy = True
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
                    raise StudyError(
                        f"{each.name}: {error}. Finished runs are kept; the same command goes on"
                    ) from error
                reason = str(error)
                if not isinstance(error, _EXPLAINED):  # memory of the device, a fault of ours: the others may do well
                    reason = f"{type(error).__name__}: {error}"
                    logger.exception("%s", each.name)
                progress.failed[each.name] = reason
                say(f"[{number}/{len(runs)}] {each.name} FAILED: {reason}")
        if busy:
            if not waited:
                say("What is left is in the hands of other processes: waiting for them.")
            waited = True
            time.sleep(wait)
        elif len(progress.finished) == before and plan == plan_of(study, folder):
            return progress


def outline(study_file: str | Path, folder: str | Path, groups: Sequence[str] = (), table: Table = text_table) -> str:
    """What `sweep` would run: a row for each group, how many of its runs are finished, and what it waits for.

    Raises:
        ConfigError, RunFolderError: as `sweep`.
    """
    study, folder = load_study(study_file), Path(folder)
    asked = study.only(groups).groups if groups else study.groups
    waiting = {group.name: chooser for group, chooser in plan_of(study, folder).waiting}
    plan = study.plan(lambda run: 0.0 if (known := _dev_accuracy(folder, run)) is None else known)
    rows = []
    for names, own in [*((group.name, (group,)) for group in asked), ("all, each once", asked)]:
        runs = _of_groups(plan, own)
        finished = sum(results_of(folder, run) is not None for run in runs)
        rows.append([names, str(len(runs)), str(finished), waiting.get(names, "")])
    header = ["group", "runs", "finished", "waits for the choice of"]
    return "\n".join([table(header, rows), *_notices(plan, asked, folder)])


def _of_groups(plan: Plan, groups: Sequence[Group]) -> list[Run]:
    return list(dict.fromkeys(member.run for member in plan.members if member.group in groups))


def _notices(plan: Plan, groups: Sequence[Group], folder: Path) -> list[str]:
    """What the runs that are left need and is not there, and what has changed since the others read it."""
    runs = _of_groups(plan, groups)
    finished = [each for each in runs if (folder / each.name / "results.json").exists()]
    left = [each for each in runs if each not in finished]
    needed = Counter(path for each in left for path in missing_inputs(each.config(folder)))
    notices = [f"{path} is not there: {count} runs need it and will fail" for path, count in needed.items()]
    for each in finished:
        if changed := changed_files(folder / each.name, each.config(folder)):
            notices.append(
                f"{each.name} read other contents of {', '.join(changed)}: delete its folder to run it again"
            )
    return notices


def _write_study(study: Study, folder: Path, say: Callable[[str], None]) -> None:
    """Keep the study with its runs, for the report; what it replaces stays under another name."""
    path = folder / STUDY_FILE
    if path.exists() and (before := path.read_text(encoding="utf-8")) != study.text:
        checkpoints.write_atomically(folder / PREVIOUS_STUDY_FILE, before)
        say(f"{folder} held another study, which is now {PREVIOUS_STUDY_FILE} there; reports will be of this one.")
    checkpoints.write_atomically(path, study.text)


def _drop_model(folder: Path) -> None:
    """Delete the model of a finished run: the predictions and results stay."""
    if (folder / "model").exists():
        with suppress(FolderInUseError), locked(folder):
            if (folder / "model").exists():
                checkpoints.remove(folder / "model")
