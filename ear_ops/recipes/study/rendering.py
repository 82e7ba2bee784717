"""A report as Markdown, and its figure. `content` below is the content of `report.json`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ear_ops.installation import install
from ear_ops.recipes.drawing import COLOURS, PAGE_WIDTH, figure
from ear_ops.recipes.study.statistics import DRAWS, Difference, Estimate
from ear_ops.recipes.tables import markdown_table
from ear_ops.recipes.training.results import grouped_notices

_AVERAGES = {"average": "avg", "average_other": "avg w/o source", "average_translated": "avg w/o NS"}


def markdown(content: dict[str, Any]) -> str:
    """The whole report, with a section for each group of the study."""
    lines = ["# Report", ""]
    lines += [f"{content['finished']} of {content['planned']} runs are finished."]
    if content["waiting"]:
        lines += [f"Groups that wait for a choice are not counted: `{'`, `'.join(content['waiting'])}`."]
    lines += [
        "",
        "Accuracy in %, mean ± sample standard deviation over seeds. The paper's rows are its printed numbers, on the "
        "test sets and with other models: compare the pattern, not the level. * marks runs whose cross-entropy stayed "
        "at chance. The dev set of the language trained on (the source) has chosen each checkpoint and the settings "
        "below, so an accuracy on that set is a little too high.",
    ]
    for selection in content["selections"]:
        lines += _selection(selection)
    for section in content["sections"]:
        lines += _section(section, content)
    if content["not_in_the_study"]:
        lines += [
            "",
            f"Tables of the paper that no group of the study fills: {', '.join(content['not_in_the_study'])}.",
        ]
    return "\n".join([*lines, *_provenance(content)]) + "\n"


def figure_6(content: dict[str, Any], path: Path) -> str | None:
    """Draw the accuracy over the scale of the dictionary, of the study and of the paper, as PNG and SVG.

    It needs matplotlib.

    Returns:
        None, or the reason why the figure was not drawn.
    """
    rows = [row for section in content["sections"] if section["table"] == "6" for row in section["rows"]]
    points = [(row["settings"]["dictionary_scale"], row["average"]) for row in rows if "average" in row]
    if not points:
        return "figure 6 was not drawn: no run of table 6 is finished"
    if importlib.util.find_spec("matplotlib") is None:
        return f"figure 6 was not drawn: it needs matplotlib ({install('analysis')})"
    points.sort()
    printed = [(float(paper_row["name"]), paper_row["accuracies"]["avg"]) for row in rows for paper_row in row["paper"]]
    with figure(path, PAGE_WIDTH, 2.4) as drawn:
        ours, paper = drawn.subplots(1, 2)
        ours.errorbar(
            [scale for scale, _ in points],
            [100 * value.mean for _, value in points],
            yerr=[100 * (value.deviation or 0) for _, value in points],
            color=COLOURS[0],
            marker="o",
            capsize=3,
        )
        ours.set_title("this study (mean and deviation over seeds)")
        paper.plot(*zip(*sorted(printed), strict=True), marker="s", color=COLOURS[1])
        paper.set_title("paper, mBERT")
        for axes in (ours, paper):
            axes.set_xlabel("share of the dictionary")
            axes.set_ylabel("average accuracy (%)")
    return None


def _selection(selection: dict[str, Any]) -> list[str]:
    chosen = _settings_text(selection["chosen"])
    scope = f" for {_settings_text(selection['for'])}" if selection["for"] else ""
    rows = [
        [_settings_text(candidate["settings"]), f"{100 * candidate['dev_accuracy']:.2f}"]
        for candidate in selection["candidates"]
    ]
    table = markdown_table(["candidate", "dev accuracy of the source language"], rows)
    return ["", f"## Chosen by `{selection['group']}`{scope}: {chosen}", "", table]


def _section(section: dict[str, Any], content: dict[str, Any]) -> list[str]:
    title = f"Table {section['table']}: {section['title']}" if section["table"] else section["title"]
    lines = ["", f"## {title} (group `{section['group']}`)", ""]
    if not section["rows"]:
        return [*lines, f"Not run: it waits for the choice of `{content['waiting'][section['group']]}`."]
    ours = [name for row in section["rows"] for name in row.get("accuracies", {})]
    theirs = [name for row in _paper_rows(section) for name in row["accuracies"] if name != "avg"]
    languages = list(dict.fromkeys(theirs + ours))
    absent = [name for name in languages if name not in ours] if ours else []
    languages = [name for name in languages if name not in absent]
    averages = [key for key in _AVERAGES if key == "average" or any(key in row for row in section["rows"])]
    header = [", ".join(section["axes"]), "of", *languages, *(_AVERAGES[key] for key in averages)]
    rows = []
    for row in section["rows"]:
        rows.append(_own_row(row, languages, averages))
        rows += [_paper_row(paper_row, languages, averages) for paper_row in row["paper"]]
    rows += [_paper_row(paper_row, languages, averages) for paper_row in section["paper_only"]]
    lines.append(markdown_table(header, rows))
    if absent:
        lines += ["", f"No run here has {', '.join(absent)}, which are in the paper's averages."]
    lines += _missing(section) + _differences(section) + _terms(section)
    if section["table"] == "6":
        lines += ["", content["figure_6"] or "![Figure 6](figure-6.png) [SVG](figure-6.svg)"]
    return lines


def _paper_rows(section: dict[str, Any]) -> list[dict[str, Any]]:
    return [paper_row for row in section["rows"] for paper_row in row["paper"]] + section["paper_only"]


def _own_row(row: dict[str, Any], languages: list[str], averages: list[str]) -> list[str]:
    name = "**" + ", ".join(str(value) for value in row["settings"].values()) + "**" + " *" * bool(row["collapsed"])
    if not row["seeds"]:
        return [name, "here: not run", *[""] * (len(languages) + len(averages))]
    cells = [_percent(row["accuracies"].get(language)) for language in languages]
    where = f"here, {row['split']}, seed{'s' * (len(row['seeds']) > 1)} {_listed(row['seeds'])}"
    return [name, where, *cells, *(_percent(row.get(key)) for key in averages)]


def _paper_row(row: dict[str, Any], languages: list[str], averages: list[str]) -> list[str]:
    cells = [f"{row['accuracies'][name]:g}" if name in row["accuracies"] else "" for name in languages]
    average = [f"{row['accuracies'].get('avg', '')}" if key == "average" else "" for key in averages]
    return [row["name"], f"paper, {row['model']}", *cells, *average]


def _missing(section: dict[str, Any]) -> list[str]:
    missing = [
        f"{_settings_text(row['settings'])} (seeds {_listed(row['not_run'])})"
        for row in section["rows"]
        if row["not_run"]
    ]
    return ["", f"Not run: {'; '.join(missing)}."] if missing else []


def _differences(section: dict[str, Any]) -> list[str]:
    averages = {"average": "avg", "average_other": "avg w/o sources"}
    rows: list[list[str]] = []
    without: list[tuple[str, str]] = []
    for row in section["rows"]:
        difference = row.get("difference") or {}
        if "missing" in difference:
            without.append((f"No difference for {_settings_text(row['settings'])}", difference["missing"]))
        elif difference:
            first = next(name for name in difference if name not in ("seeds", "over_seeds", *_AVERAGES))
            cells = [points(difference[name]) if name in difference else "" for name in (first, *averages)]
            by_seed = ", ".join(f"{seed}: {100 * value:+.1f}" for seed, value in difference["seeds"].items())
            over_seeds = points(difference["over_seeds"]) if difference["over_seeds"] else ""
            rows.append([_settings_text(row["settings"]), first, *cells, by_seed, over_seeds])
    missing = [part for line in grouped_notices(without) for part in ("", line)]
    if not rows:
        return missing
    header = ["row", "first language", "difference", *averages.values(), "avg by seed", "avg, over seeds"]
    return [
        *missing,
        "",
        f"Difference from {_settings_text(section['baseline'])} in points, with the 95% interval of a paired bootstrap "
        f"over items ({DRAWS:,} draws). Items with the same first sentence are drawn together, in all languages. Runs "
        "are paired by seed and averaged over seeds. These intervals leave out how much a run changes with its seed. "
        "The last column has it: Student's t over the seeds. It is wide for few seeds, and missing for one seed. If "
        "its interval holds 0, the runs do not show a difference, even where the other intervals leave out 0. All "
        "languages are in `report.json`.",
        "",
        markdown_table(header, rows),
    ]


def _terms(section: dict[str, Any]) -> list[str]:
    """A table of loss terms, of weights that follow from ratios, and of gradient ratios, as far as they are known."""
    rows, names = [], []
    for row in section["rows"]:
        values = {
            **row.get("terms", {}),
            **{f"{name}, chosen": weight for name, weight in row.get("weights", {}).items()},
        }
        for when, ratios in row.get("gradient_ratios", {}).items():
            values.update({f"{name}, {when}": value for name, value in ratios.items()})
        rows.append((row, values))
        names += [name for name in values if name not in names]
    if not names:
        return []
    table = [
        [_settings_text(row["settings"]), *(f"{values[name].mean:.3g}" if name in values else "" for name in names)]
        for row, values in rows
        if values
    ]
    measured = any("gradient_ratios" in row for row in section["rows"])
    weights = any("weights" in row for row in section["rows"])
    text = "Loss terms over the last quarter of training, unweighted"
    text += "; weights chosen for the wanted ratios" if weights else ""
    text += "; gradient norms of the unweighted terms over that of the cross-entropy" if measured else ""
    return ["", f"{text}:", "", markdown_table(["row", *names], table)]


def _provenance(content: dict[str, Any]) -> list[str]:
    lines = ["", "## Settings", ""]
    shared = [[name, str(value)] for name, value in content["shared_settings"].items() if value is not None]
    lines += [markdown_table(["setting of all runs", "value"], shared)]
    for versions in content["versions"]:
        lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    for line in grouped_notices((run["name"], notice) for run in content["runs"] for notice in run["notices"]):
        lines += ["", line]
    dates = sorted({run["date"] for run in content["runs"]})
    lines += ["", f"Date: {dates[0]} to {dates[-1]}." if dates else "Date: nothing was run."]
    lines += ["", "## Study", "", "```yaml", content["study"].rstrip(), "```"]
    return lines


def _settings_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _percent(value: Estimate | None) -> str:
    if value is None:
        return ""
    deviation = "" if value.deviation is None else f" ± {100 * value.deviation:.1f}"
    return f"{100 * value.mean:.1f}{deviation}"


def points(value: Difference) -> str:
    """A difference of shares and its interval, in percentage points."""
    return f"{100 * value.mean:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
