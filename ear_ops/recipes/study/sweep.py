"""Running a study: every run once, in the order of the file, by one or more processes.

The folder of a study holds `study.yaml` and a folder for each run. A process claims a run by locking the folder of the
run. The system removes the lock when the process ends, also when it is killed. The next process then continues the run
from its newest complete checkpoint. Processes share nothing else.
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

from ear_ops.errors import EarOpsError
from ear_ops.recipes.study.definition import Group, Plan, Run, Study, load_study
from ear_ops.recipes.tables import Table, text_table
from ear_ops.recipes.training import checkpoints, run
from ear_ops.recipes.training.folder import (
    FolderInUseError,
    changed_files,
    check_config,
    locked,
)
from ear_ops.recipes.training.results import read_results
from ear_ops.recipes.training.sources import missing_inputs

logger = logging.getLogger(__name__)

STUDY_FILE = "study.yaml"
PREVIOUS_STUDY_FILE = "study.previous.yaml"

_EXPLAINED = (EarOpsError, OSError)  # their messages need no traceback
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # the next run would fail by them too


class StudyError(EarOpsError, RuntimeError):
    """A study could not be finished, or a folder holds no study. Finished runs are kept."""


@dataclass
class Progress:
    """The work of one process.

    Attributes:
        finished: names of the runs that it trained.
        failed: for each run that failed, the reason.
    """

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def results_of(folder: Path, run: Run) -> dict[str, Any] | None:
    """The results of a run, or None if it is not finished.

    Raises:
        RunFolderError: the results are of other settings, from a version with other defaults.
    """
    path = folder / run.name / "results.json"
    if not path.exists():
        return None
    check_config(path.parent, run.config(folder))
    return read_results(path)


def plan_of(study: Study, folder: Path) -> Plan:
    """The runs of the study, with the choices that its finished runs allow."""
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
    """Train every run that is not finished, and return when all runs are finished or have failed.

    A failed run is reported, and the other runs go on. The same call tries it again. A full disk stops the process.
    Finished runs are always kept.

    Args:
        study_file: see `ear_ops.recipes.study.definition`.
        folder: of the study; it is made if it does not exist.
        groups: run only these groups, and the groups that choose a setting for them; by default all.
        wait: seconds between two looks at the runs that other processes work on.
        say: takes each line about the progress.

    Raises:
        ConfigError: the study cannot be read, has no such group, or has a run with settings that cannot be used.
            Nothing has run then.
        StudyError: the disk is full or cannot be written.
    """
    study, folder = load_study(study_file), Path(folder)
    # With this plan, a mistake in any group shows before the first run.
    supposed = study.plan(lambda run: 0.0)
    asked = study.only(groups).groups if groups else study.groups
    plan_of(study, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FolderInUseError), locked(folder):  # another process that holds the lock writes the same file
        _write_study(study, folder, say)
    for notice in _notices(supposed, asked, folder):
        say(notice)
    progress, waited = Progress(), False
    while True:
        plan = plan_of(study, folder)
        runs = _of_groups(plan, asked)
        before, busy = len(progress.finished), False
        for number, planned in enumerate(runs, start=1):
            if planned.name in progress.failed:
                continue
            try:
                if results_of(folder, planned) is None:
                    with locked(folder / planned.name):
                        pass  # a run that another process works on is not announced here
                    say(f"[{number}/{len(runs)}] {planned.name}")
                    results = run.train(planned.config(folder))
                    progress.finished.append(planned.name)
                    say(f"[{number}/{len(runs)}] {planned.name}: {100 * results['average']:.1f} on average")
                if planned.name not in plan.kept_models and not plan.may_keep(planned):
                    _drop_model(folder / planned.name)
            except FolderInUseError:
                busy = True
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                    raise StudyError(
                        f"{planned.name}: {error}. Finished runs are kept; the same command goes on"
                    ) from error
                reason = str(error)
                if not isinstance(error, _EXPLAINED):  # such as a full device; the next run may succeed
                    reason = f"{type(error).__name__}: {error}"
                    logger.exception("%s", planned.name)
                progress.failed[planned.name] = reason
                say(f"[{number}/{len(runs)}] {planned.name} FAILED: {reason}")
        if busy:
            if not waited:
                say("Other processes work on all runs that are left: waiting for them.")
            waited = True
            time.sleep(wait)
        elif len(progress.finished) == before and plan == plan_of(study, folder):
            return progress


def outline(study_file: str | Path, folder: str | Path, groups: Sequence[str] = (), table: Table = text_table) -> str:
    """A table of what `sweep` would run: for each group its runs, the finished ones, and the choice that it waits for.

    Args:
        study_file, folder, groups: as for `sweep`.
        table: how the table is drawn.

    Raises:
        ConfigError, RunFolderError: as for `sweep`.
    """
    study, folder = load_study(study_file), Path(folder)
    asked = study.only(groups).groups if groups else study.groups
    waiting = {group.name: chooser for group, chooser in plan_of(study, folder).waiting}
    plan = study.plan(lambda run: 0.0 if (known := _dev_accuracy(folder, run)) is None else known)
    rows = []
    for name, groups_of_row in [*((group.name, (group,)) for group in asked), ("all, each once", asked)]:
        runs = _of_groups(plan, groups_of_row)
        finished = sum(results_of(folder, run) is not None for run in runs)
        rows.append([name, str(len(runs)), str(finished), waiting.get(name, "")])
    header = ["group", "runs", "finished", "waits for the choice of"]
    return "\n".join([table(header, rows), *_notices(plan, asked, folder)])


def _of_groups(plan: Plan, groups: Sequence[Group]) -> list[Run]:
    """The known runs of these groups, every run once."""
    return list(dict.fromkeys(member.run for member in plan.members if member.group in groups))


def _notices(plan: Plan, groups: Sequence[Group], folder: Path) -> list[str]:
    """A line for each missing input of the runs that are left, and for each changed input of finished runs."""
    runs = _of_groups(plan, groups)
    finished = [planned for planned in runs if (folder / planned.name / "results.json").exists()]
    left = [planned for planned in runs if planned not in finished]
    needed = Counter(path for planned in left for path in missing_inputs(planned.config(folder)))
    notices = [f"{path} is not there: {count} runs need it and will fail" for path, count in needed.items()]
    changed: dict[str, list[str]] = {}
    for planned in finished:
        if files := changed_files(folder / planned.name, planned.config(folder)):
            changed.setdefault(", ".join(files), []).append(planned.name)
    for contents, names in changed.items():
        notices.append(
            f"{', '.join(names)} read other contents of {contents}: delete the folder of a run to run it again"
        )
    return notices


def _write_study(study: Study, folder: Path, say: Callable[[str], None]) -> None:
    """Write the study into its folder, for the report. A study that it replaces is kept under another name."""
    path = folder / STUDY_FILE
    if path.exists() and (before := path.read_text(encoding="utf-8", errors="replace")) != study.text:
        checkpoints.write_atomically(folder / PREVIOUS_STUDY_FILE, before)
        say(f"{folder} held another study, which is now {PREVIOUS_STUDY_FILE} there; reports will be of the new one.")
    checkpoints.write_atomically(path, study.text)


def _drop_model(folder: Path) -> None:
    """Delete the model of a finished run. Its predictions and results are kept."""
    if (folder / "model").exists():
        with suppress(FolderInUseError), locked(folder):
            if (folder / "model").exists():
                checkpoints.remove(folder / "model")
