"""The paper's tables from the runs of a study: the content of `report.json`, which `report.md` shows as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ear_ops.data import DataError, get_task, load_split
from ear_ops.data.mini import mini_data_dir
from ear_ops.recipes.study.definition import Group, Member, Plan, Run, Settings, load_study
from ear_ops.recipes.study.paper_tables import TABLES, paper_rows, same_row
from ear_ops.recipes.study.rendering import figure_6, markdown, points
from ear_ops.recipes.study.statistics import Estimate, Items, accuracy_differences, estimate, interval_over_seeds
from ear_ops.recipes.study.sweep import STUDY_FILE, StudyError, plan_of, results_of
from ear_ops.recipes.tables import Table
from ear_ops.recipes.training.checkpoints import write_atomically, write_json
from ear_ops.recipes.training.config import MINI
from ear_ops.recipes.training.errors import NotComparableError
from ear_ops.recipes.training.folder import RunFolderError, read_json
from ear_ops.recipes.training.results import read_results, source_of


@dataclass
class Row:
    """One row of a table.

    Attributes:
        settings: name the row.
        planned: all runs of the row.
        results: the finished runs and their results, by seed.
    """

    settings: Settings
    planned: list[Run]
    results: dict[int, tuple[Run, dict[str, Any]]]


def scored_items(folder: Path, results: dict[str, Any], data_dir: str | None = None) -> Items:
    """Whether the run predicted each item correctly, by language.

    Args:
        folder: of the run, with its predictions.
        results: of the run.
        data_dir: where the data are now; by default the folder that the run read.

    Raises:
        DataError: the data are missing or malformed.
        StudyError: the run was scored on other data.
    """
    predictions = read_json(folder / "predictions.json", {"*": [int]})
    if predictions.keys() != results["languages"].keys():
        raise StudyError(
            f"{folder}: predictions.json has {', '.join(predictions) or 'no language'}, and results.json "
            f"{', '.join(results['languages'])}: score the run again with `ear-ops evaluate`"
        )
    data_dir = data_dir or results["config"]["data_dir"]
    if data_dir is None:
        raise StudyError(f"{folder}: its data came from the Hub: pass --data-dir with the same data as files")
    place = (str(mini_data_dir()) if data_dir == MINI else data_dir, results["task"], results["split"])
    correct = {}
    for language, predicted in predictions.items():
        labels, _ = _labels_and_groups(*place, language)
        counted = results["languages"][language]
        if len(labels) != len(predicted) or int((labels == np.array(predicted)).sum()) != counted["correct"]:
            raise StudyError(
                f"{folder}: {counted['correct']} of {len(predicted)} predictions in {language} were right, which the "
                f"{len(labels)} items in {data_dir} do not say: these are not the data that the run was scored on"
            )
        correct[language] = labels == np.array(predicted)
    source = source_of(results)
    _, groups = _labels_and_groups(*place, source if source in correct else next(iter(correct)))
    return Items(correct, groups, source)


@lru_cache(maxsize=64)
def _labels_and_groups(
    data_dir: str, task: str, split: str, language: str
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """The label and the group of each item. Items with the same first sentence are a group. [items], [items]"""
    examples = load_split(data_dir, get_task(task), split, language)
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(example.text1, len(numbers)) for example in examples]
    return np.array([example.label for example in examples]), np.array(groups)


def differences_table(folders: Sequence[Path], baseline: Path, data_dir: str | None, table: Table) -> str:
    """A table of the differences in accuracy between finished runs and a baseline, by a paired bootstrap over items.

    Args:
        folders: of the runs.
        baseline: the folder of the run to compare with.
        data_dir: where the data are now; by default the folder that the runs read.
        table: how the table is drawn.

    Raises:
        RunFolderError, DataError, StudyError: a run is not finished, or its data are missing.
        NotComparableError: the runs were not scored on the same items.
    """
    sides = {
        folder: scored_items(folder, read_results(folder / "results.json"), data_dir) for folder in (*folders, baseline)
    }
    languages = list(sides[baseline].correct)
    header = [f"points over {baseline}", *languages, "avg", "avg w/o sources"]
    rows = []
    for folder in folders:
        if folder != baseline:
            differences = accuracy_differences([sides[folder]], [sides[baseline]])
            names = [*languages, "average", "average_other"]
            rows.append([str(folder), *(points(differences[name]) if name in differences else "" for name in names)])
    return table(header, rows)


def report(folder: str | Path, data_dir: str | None = None) -> dict[str, Any]:
    """Write `report.json`, `report.md` and, with matplotlib, `figure-6.png` and `.svg` into the folder of a study.

    Args:
        folder: of a study. Where runs are not finished, the report says so.
        data_dir: where the data are now, for the paired differences; by default the folder that the runs read.

    Returns:
        What `report.json` holds.

    Raises:
        StudyError: the folder holds no study.
        ConfigError: the study cannot be read.
        RunFolderError: a finished run is damaged, or has other settings than the study.
    """
    folder = Path(folder)
    if not (folder / STUDY_FILE).is_file():
        raise StudyError(f"{folder} holds no study: run `ear-ops sweep STUDY --output-dir {folder}` first")
    study = load_study(folder / STUDY_FILE)
    plan = plan_of(study, folder)
    content: dict[str, Any] = {
        "selections": [
            {
                "group": selection.group.name,
                "for": selection.group.only_for,
                "candidates": [
                    {"settings": settings, "dev_accuracy": value} for settings, value in selection.candidates
                ],
                "chosen": selection.chosen,
            }
            for selection in plan.selections
        ],
        "waiting": {group.name: chooser for group, chooser in plan.waiting},
        "sections": [_section(group, plan, folder, data_dir) for group in study.groups],
        "not_in_the_study": sorted(TABLES.keys() - {group.table for group in study.groups}),
        **_provenance(plan, folder),
        "study": study.text,
    }
    content["figure_6"] = figure_6(content, folder / "figure-6.png")
    write_json(folder / "report.json", content)
    write_atomically(folder / "report.md", markdown(content))
    return content


def _section(group: Group, plan: Plan, folder: Path, data_dir: str | None) -> dict[str, Any]:
    """One group: its rows, the rows of the paper's table, and the differences from the baseline."""
    spec = TABLES[group.table] if group.table else None
    rows = _rows([member for member in plan.members if member.group == group], folder)
    wanted = group.baseline or ({spec.axis: spec.baseline} if spec else {})
    baseline = next((row for row in rows if wanted and wanted.items() <= row.settings.items()), None)
    paper = paper_rows(group.table) if group.table else []
    entries: list[dict[str, Any]] = []
    for row in rows:
        entry = _entry(row)
        entry["paper"] = [
            vars(paper_row)
            for paper_row in paper
            if spec and same_row(group.table or "", row.settings[spec.axis], paper_row.name)
        ]
        if baseline is not None and row is not baseline:
            entry["difference"] = _difference(row, baseline, folder, data_dir)
        entries.append(entry)
    shown = {paper_row["name"] for entry in entries for paper_row in entry["paper"]}
    return {
        "group": group.name,
        "table": group.table,
        "title": spec.title if spec else group.name,
        "axes": [spec.axis] if spec else group.axes,
        "baseline": baseline.settings if baseline else None,
        "rows": entries,
        "paper_only": [vars(paper_row) for paper_row in paper if paper_row.name not in shown],
    }


def _rows(members: Iterable[Member], folder: Path) -> list[Row]:
    rows: dict[str, Row] = {}
    for member in members:
        settings = member.row()
        row = rows.setdefault(repr(settings), Row(settings, [], {}))
        if member.run not in row.planned:
            row.planned.append(member.run)
        results = results_of(folder, member.run)
        if results is not None:
            row.results[member.run.settings["seed"]] = (member.run, results)
    return list(rows.values())


def _entry(row: Row) -> dict[str, Any]:
    finished = [results for _, results in row.results.values()]
    entry: dict[str, Any] = {
        "settings": row.settings,
        "runs": [run.name for run, _ in row.results.values()],
        "seeds": sorted(row.results),
        "not_run": sorted(run.settings["seed"] for run in row.planned if run.settings["seed"] not in row.results),
        "collapsed": sorted(seed for seed, (_, results) in row.results.items() if results["collapsed"]),
    }
    if finished:
        languages = [
            name for name in finished[0]["languages"] if all(name in results["languages"] for results in finished)
        ]
        entry["split"] = finished[0]["split"]
        entry["items"] = {name: finished[0]["languages"][name]["total"] for name in languages}
        entry["accuracies"] = {
            name: estimate([results["languages"][name]["accuracy"] for results in finished]) for name in languages
        }
        entry.update(_averages(finished, languages))
        shared = set.intersection(*(set(results["terms"]) for results in finished))
        entry["terms"] = {
            name: estimate([results["terms"][name] for results in finished])
            for name in finished[0]["terms"]
            if name in shared
        }
        weights = [results["weights"] for results in finished if results.get("weights")]
        if len(weights) == len(finished):
            entry["weights"] = {name: estimate([run_weights[name] for run_weights in weights]) for name in weights[0]}
        ratios = [results["gradient_ratios"] for results in finished if results.get("gradient_ratios")]
        if len(ratios) == len(finished):
            entry["gradient_ratios"] = {
                when: {
                    name: estimate([run_ratios[when][name] for run_ratios in ratios])
                    for name in ratios[0][when]
                    if all(name in run_ratios[when] for run_ratios in ratios)
                }
                for when in ratios[0]
            }
    return entry


def _averages(finished: Sequence[dict[str, Any]], languages: Sequence[str]) -> dict[str, Estimate]:
    """The averages over these languages, which all runs have.

    `average_other` leaves out the language trained on, `average_translated` the items without a translation.
    """
    values: dict[str, list[float]] = {}
    for results in finished:
        scores = {name: results["languages"][name] for name in languages}
        parts = {
            "average": [score["accuracy"] for score in scores.values()],
            "average_other": [score["accuracy"] for name, score in scores.items() if name != source_of(results)],
            "average_translated": [s["translated"]["accuracy"] for s in scores.values() if "translated" in s],
        }
        for name, part in parts.items():
            if part:
                values.setdefault(name, []).append(mean(part))
    return {name: estimate(run_averages) for name, run_averages in values.items() if len(run_averages) == len(finished)}


def _difference(row: Row, baseline: Row, folder: Path, data_dir: str | None) -> dict[str, Any] | None:
    """The differences by language, on average, for each seed, and over the seeds that both rows have.

    Differences need the data of the runs. Where they cannot be read, `missing` holds the reason.
    """
    seeds = sorted(row.results.keys() & baseline.results.keys())
    if not seeds:
        return None
    try:
        sides = [
            [
                scored_items(folder / run.name, results, data_dir)
                for run, results in (side.results[seed] for seed in seeds)
            ]
            for side in (row, baseline)
        ]
        differences = accuracy_differences(sides[0], sides[1])
    except (DataError, StudyError, NotComparableError, RunFolderError, OSError) as error:
        return {"missing": str(error)}
    by_seed = {seed: row.results[seed][1]["average"] - baseline.results[seed][1]["average"] for seed in seeds}
    return {"seeds": by_seed, "over_seeds": interval_over_seeds(list(by_seed.values())), **differences}


_MACHINE_SUFFIXES = ("_runtime", "_per_second", "total_flos")  # entries of the log that depend on the machine


def _provenance(plan: Plan, folder: Path) -> dict[str, Any]:
    """How the numbers were made: settings that all runs share, versions, dates, and the log of each run."""
    finished = [(run, results) for run in plan.runs if (results := results_of(folder, run)) is not None]
    configurations = [results["config"] for _, results in finished]
    shared = {
        name: value
        for name, value in (configurations[0] if configurations else {}).items()
        if all(configuration.get(name) == value for configuration in configurations)
    }
    versions = list({str(results["versions"]): results["versions"] for _, results in finished}.values())
    runs = [
        {
            "name": run.name,
            "date": results["date"],
            "steps": results["steps"],
            "pairs": results.get("pairs"),
            "best": results["best"],
            "accuracies": {language: score["accuracy"] for language, score in results["languages"].items()},
            "average": results["average"],
            "timing": results.get("timing"),
            "notices": results["notices"],
            "log": _log(folder / run.name),
            "settings": {name: value for name, value in results["config"].items() if name not in shared},
        }
        for run, results in finished
    ]
    return {
        "planned": len(plan.runs),
        "finished": len(finished),
        "shared_settings": shared,
        "versions": versions,
        "runs": runs,
    }


def _log(folder: Path) -> list[dict[str, Any]] | None:
    """Losses, terms and dev accuracies by step, or None where the log has been deleted."""
    path = folder / "training.json"
    if not path.exists():
        return None
    return [
        {k: v for k, v in line.items() if not k.endswith(_MACHINE_SUFFIXES)}
        for line in read_json(path, {"log": [dict]})["log"]
    ]
