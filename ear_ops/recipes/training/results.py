"""The results of runs as text and Markdown. `results` below is the content of `results.json`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ear_ops.data.pairs import UNTRANSLATED
from ear_ops.recipes.tables import Table, markdown_table, text_table
from ear_ops.recipes.training.errors import NotComparableError
from ear_ops.recipes.training.evaluation import LanguageScore, Score
from ear_ops.recipes.training.folder import RunFolderError, read_json
from ear_ops.recipes.training.shapes import NUMBER, misfit

_SCORE = {"accuracy": NUMBER, "correct": int, "total": int, "low": NUMBER, "high": NUMBER}
_RATIOS = {"*": NUMBER}
TRAINING = {  # what `training.json` holds; older versions lack the optional keys
    "steps": int,
    "pairs?": (type(None), int),
    "untranslated?": int,
    "best": {"step": (type(None), int), "dev_accuracy": NUMBER},
    "terms": {"*": NUMBER},
    "collapsed": bool,
    "notices": [str],
    "replaced": (type(None), {"summary": str}),
    "gradient_ratios?": (type(None), {"before": _RATIOS, "after": _RATIOS}),
    "weights?": {"*": NUMBER},
    "timing?": (type(None), dict),
}
_RESULTS = {
    **TRAINING,
    "task": str,
    "split": str,
    "regularised": bool,
    "average": NUMBER,
    "average_other": (type(None), NUMBER),
    "average_translated?": NUMBER,
    "languages": {"*": {**_SCORE, "translated?": _SCORE}},
    "config": {
        "method": str,
        "preset": str,
        "model": str,
        "seed": int,
        "source_language?": str,
        "data_dir": (type(None), str),
    },
    "versions": {"*": str},
    "date": str,
}


def read_results(path: Path) -> dict[str, Any]:
    """The content of a `results.json`.

    Raises:
        RunFolderError: the file is missing, or its content is not what a run writes.
    """
    content: dict[str, Any] = read_json(path)
    problem = misfit(content, _RESULTS) or ("" if content["languages"] else "it names no language")
    if problem:
        raise RunFolderError(
            f"{path} is damaged: {problem}. Delete it and start the run again: a kept model is only scored"
        )
    return content


def summarise(scores: Sequence[LanguageScore], source_language: str = "en") -> dict[str, Any]:
    """The accuracy of each language and their averages, ready for JSON.

    Every language has the same weight in an average. `average_other` leaves out the language trained on.
    """
    languages: dict[str, dict[str, Any]] = {}
    for entry in scores:
        languages[entry.language] = _score_to_dict(entry.all)
        if entry.translated:
            languages[entry.language]["translated"] = _score_to_dict(entry.translated)
    return {**_averages(languages, source_language), "languages": languages}


def _averages(languages: dict[str, dict[str, Any]], source: str) -> dict[str, float | None]:
    averages = {
        "average": _mean(score["accuracy"] for score in languages.values()),
        "average_other": _mean(score["accuracy"] for language, score in languages.items() if language != source),
    }
    translated = [score["translated"]["accuracy"] for score in languages.values() if "translated" in score]
    return {**averages, "average_translated": _mean(translated)} if translated else averages


def results_text(results: dict[str, Any], table: Table = text_table) -> str:
    """Title, notices, a row for each language, and remarks, in plain text.

    Args:
        results: of the run.
        table: how tables are drawn.
    """
    warnings = [f"WARNING: {notice}" for notice in results["notices"]]
    lines = [_title(results), *warnings, "", _language_table(results, table), *_remarks(results, table)]
    return "\n".join(lines) + "\n"


def results_markdown(results: dict[str, Any]) -> str:
    """The same in Markdown, with the configuration and versions of the run."""
    lines = [f"# {_title(results)}", ""]
    for notice in results["notices"]:
        lines += [f"> **Warning:** {notice}", ""]
    lines += [_language_table(results, markdown_table), *_remarks(results, markdown_table)]
    settings = [[name, str(value)] for name, value in results["config"].items() if value is not None]
    versions = [[name, version] for name, version in results["versions"].items()]
    lines += ["", "## Configuration", "", markdown_table(["setting", "value"], settings)]
    lines += ["", "## Versions", "", markdown_table(["package", "version"], versions), ""]
    return "\n".join(lines)


def comparison(runs: Sequence[dict[str, Any]], table: Table = text_table) -> str:
    """A table with a row for each run and a column for each language, accuracies in percent.

    The averages are over the languages that all runs have.

    Args:
        runs: their results.
        table: how the table is drawn.

    Raises:
        NotComparableError: the runs were not scored on the same task and split.
    """
    for key in ("task", "split"):
        values = sorted({run[key] for run in runs})
        if len(values) != 1:
            raise NotComparableError(f"runs of one {key} can be compared, got {', '.join(values)}")
    languages = list(dict.fromkeys(language for run in runs for language in run["languages"]))
    sources = {source_of(run) for run in runs}
    source = sources.pop() if len(sources) == 1 else "source"
    names = {"average": "avg", "average_other": f"avg w/o {source}", "average_translated": "avg w/o NS"}
    shared = [language for language in languages if all(language in run["languages"] for run in runs)]
    averages = [
        _averages({language: run["languages"][language] for language in shared}, source_of(run)) for run in runs
    ]
    shown = [key for key in names if any(run_averages.get(key) is not None for run_averages in averages)]
    header = ["run", *languages, *(names[key] for key in shown)]
    rows = []
    for run, name, run_averages in zip(runs, _run_names(runs), averages, strict=True):
        scores = [run["languages"].get(language) for language in languages]
        cells = [_percent(score["accuracy"]) if score else "" for score in scores]
        rows.append([name, *cells, *(_percent(run_averages.get(key)) for key in shown)])
    notices = [(name, notice) for run, name in zip(runs, _run_names(runs), strict=True) for notice in run["notices"]]
    notes = grouped_notices(notices)
    if len(shared) < len(languages):
        notes.append(f"Averages are over the languages that all runs have: {', '.join(shared) or 'none'}.")
    return "\n".join([table(header, rows), *notes])


def grouped_notices(notices: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each kind of notice, in place of a line for each run.

    Notices are of one kind where they differ in their numbers alone. The line holds the first of them.

    Args:
        notices: the name of a run and a notice of it, as often as there are such pairs.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for name, notice in notices:
        kinds.setdefault(re.sub(r"\b[0-9a-f]{10}\b|\d[\d.,]*", "0", notice), []).append((name, notice))
    lines = []
    for (name, notice), *others in kinds.values():
        names = "; ".join(other_name for other_name, _ in others)
        if all(other == notice for _, other in others):
            lines.append(f"{'; '.join([name, names]) if names else name}: {notice}.")
        else:
            lines.append(f"{name}: {notice}. With other numbers also: {names}.")
    return lines


def _language_table(results: dict[str, Any], table: Table) -> str:
    scores = results["languages"]
    translated = any("translated" in score for score in scores.values())
    header = ["language", "accuracy", "95% interval", "items"]
    header += ["without NS", "95% interval", "items"] if translated else []
    rows = []
    for language, score in scores.items():
        row = [language, *_cells(score)]
        rows.append(row + _cells(score["translated"]) if "translated" in score else row + [""] * (3 * translated))
    rows.append(_average_row("average", results["average"], results.get("average_translated"), len(header)))
    source = source_of(results)
    if results["average_other"] is not None and source in scores:
        rows.append(_average_row(f"average without {source}", results["average_other"], None, len(header)))
    return table(header, rows)


def _average_row(name: str, accuracy: float, translated: float | None, width: int) -> list[str]:
    row = [name, _percent(accuracy), "", ""] + [""] * (width - 4)
    if translated is not None:
        row[4] = _percent(translated)
    return row


def _remarks(results: dict[str, Any], table: Table) -> list[str]:
    remarks = []
    if results.get("replaced"):
        remarks.append("Augmented view: " + results["replaced"]["summary"] + ".")
    if results.get("weights"):
        weights = ", ".join(f"{name} {weight:.4g}" for name, weight in results["weights"].items())
        remarks.append(f"Weights of the terms: {weights}, measured for the wanted ratios.")
    if results.get("gradient_ratios"):
        remarks.append("Gradient norms of the unweighted terms over cross-entropy's, before and after training:")
        remarks.append(_ratio_table(results["gradient_ratios"], table))
    if results.get("pairs"):
        count = results.get("untranslated")
        left_out = f"; {count:,} more were left out, {UNTRANSLATED}" if count else ""
        remarks.append(f"Trained on {results['pairs']:,} pairs{left_out}.")
    if results.get("best"):
        best = results["best"]
        accuracy = _percent(best["dev_accuracy"])
        remarks.append(
            f"Checkpoint of step {best['step']} of {results['steps']}: best on {source_of(results)} dev, {accuracy}."
        )
    return [line for remark in remarks for line in ("", remark)]


def _ratio_table(ratios: dict[str, dict[str, float]], table: Table) -> str:
    """A row for each term and place, with its gradient ratio before and after training."""
    names = list(dict.fromkeys(name for at in ratios.values() for name in at))
    rows = [[name, *(f"{at[name]:.3g}" if name in at else "" for at in ratios.values())] for name in names]
    return table(["term", *ratios], rows)


def _title(results: dict[str, Any]) -> str:
    return f"{results['task']} {results['split']}, {_run_names([results])[0]}, {results['config']['model']}"


def _run_names(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Names such as `ear (paper), seed 1`. Runs that would share a name get the settings in which they differ."""
    names = []
    for run in runs:
        preset = f" ({run['config']['preset']})" if run["regularised"] else ""
        source = "" if source_of(run) == "en" else f", from {source_of(run)}"
        names.append(f"{run['config']['method']}{preset}{source}, seed {run['config']['seed']}")
    distinct = []
    for run, name in zip(runs, names, strict=True):
        same = [other["config"] for other, other_name in zip(runs, names, strict=True) if other_name == name]
        differing = [key for key, value in run["config"].items() if any(other.get(key) != value for other in same)]
        settings = [f"{key} {run['config'][key]}" for key in differing if key not in ("data_dir", "synonyms")]
        distinct.append(", ".join([name, *settings]) + " *" * run["collapsed"])
    return distinct


def source_of(run: dict[str, Any]) -> str:
    """The language that a run was trained on."""
    return run["config"].get("source_language", "en")  # older runs have no such setting


def _score_to_dict(score: Score) -> dict[str, Any]:
    low, high = score.interval
    return {"accuracy": score.accuracy, "low": low, "high": high, "correct": score.correct, "total": score.total}


def _cells(score: dict[str, Any]) -> list[str]:
    return [_percent(score["accuracy"]), f"{_percent(score['low'])}-{_percent(score['high'])}", str(score["total"])]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None
