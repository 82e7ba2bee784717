"""Reports of runs that were written by hand: each number can be worked out from the predictions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from support.run_results import run_results

from ear_ops.recipes.study.definition import load_study
from ear_ops.recipes.study.paper_tables import TABLES, paper_rows, same_row
from ear_ops.recipes.study.report import differences_table, report, scored_items
from ear_ops.recipes.study.sweep import StudyError, plan_of
from ear_ops.recipes.tables import markdown_table
from ear_ops.recipes.training.checkpoints import write_json

LANGUAGES = ("en", "de", "sw")
LABELS = [i % 3 for i in range(15)]  # of every file of the tiny task


def finish(folder: Path, name: str, settings: dict[str, Any], wrong: dict[str, int]) -> None:
    """A run that has the first `wrong[language]` items wrong."""
    predictions = {
        language: [(label + (i < wrong[language])) % 3 for i, label in enumerate(LABELS)] for language in LANGUAGES
    }
    scores = {
        language: {"accuracy": 1 - count / 15, "correct": 15 - count, "total": 15, "low": 0.0, "high": 1.0}
        for language, count in wrong.items()
    }
    results = run_results(
        settings,
        average=sum(score["accuracy"] for score in scores.values()) / 3,
        languages=scores,
        best={"step": 8, "dev_accuracy": scores["en"]["accuracy"]},
    )
    (folder / name).mkdir(parents=True, exist_ok=True)
    write_json(folder / name / "config.json", {"config": settings})
    log = [{"step": 8, "eval_accuracy": 0.5, "eval_runtime": 2.0}]
    write_json(folder / name / "training.json", {"log": log})
    write_json(folder / name / "predictions.json", predictions)
    write_json(folder / name / "results.json", results)


@pytest.fixture
def make_report(write_study, tmp_path: Path):
    """Writes a study, finishes those of its runs for which `wrong` gives a count, and reports."""

    def make(*groups: dict[str, Any], wrong: Any) -> tuple[dict[str, Any], str]:
        folder = tmp_path / "study"
        folder.mkdir()
        path = write_study(*groups)
        (folder / "study.yaml").write_text(path.read_text())
        study = load_study(path)
        for _ in range(3):  # choices open further groups
            for run in plan_of(study, folder).runs:
                count = wrong(run.settings)
                if count is not None:
                    finish(folder, run.name, run.settings, count)
        report(folder)
        return json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()

    return make


def test_means_deviations_and_the_paper_stand_in_one_table(make_report) -> None:
    def wrong(settings: dict[str, Any]) -> dict[str, int] | None:
        if settings["method"] == "rs-da" and settings["seed"] == 3:
            return None
        base = {"finetune": 6, "rs-da": 3}.get(settings["method"])
        better = 2 * settings["seed"] if settings["method"] == "rs-da" else 0
        return base and {"en": base, "de": base + settings["seed"], "sw": 9 - better}

    content, text = make_report(
        {"name": "methods", "table": "1", "grid": {"method": ["finetune", "rs-da", "adv"], "seed": [1, 2, 3]}},
        wrong=wrong,
    )
    finetune, rs_da, adv = content["sections"][0]["rows"]
    assert finetune["accuracies"]["en"] == [pytest.approx(0.6), 0.0]
    assert finetune["accuracies"]["de"] == [pytest.approx(7 / 15), pytest.approx(1 / 15)]
    assert rs_da["seeds"] == [1, 2] and rs_da["not_run"] == [3]
    assert "accuracies" not in adv and adv["not_run"] == [1, 2, 3]

    # 3 of 15 items in English and German, in every seed; in Swahili 2 and 4.
    difference = rs_da["difference"]
    assert difference["seeds"] == {"1": pytest.approx(8 / 45), "2": pytest.approx(10 / 45)}
    assert all(difference[name][0] == pytest.approx(0.2) for name in (*LANGUAGES, "average"))
    assert difference["en"][1] < 0.2 < difference["en"][2] and "difference" not in finetune

    lines = text.splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("| **finetune**"))
    assert (
        lines[row].startswith("| **finetune** | here, dev, seeds 1, 2, 3 | 60.0 ± 0.0 |") and "46.7 ± 6.7" in lines[row]
    )
    assert lines[row + 1].startswith("| finetune | paper, mBERT | 80.8 | 70 | 49.7 |")
    assert lines[row - 2].startswith("| method | of | en | de | sw | avg |"), "no run has the paper's other languages"
    assert "No run here has ar, bg, el, es, fr, hi, ru, th, tr, ur, vi, zh, which are in the paper's averages." in text
    assert lines[row + 1].endswith("65.4 |  |")
    assert lines[row + 2].startswith("| finetune | paper, XLM-R | 84 |")
    assert "| **adv** | here: not run |" in text
    assert "Not run: method rs-da (seeds 3); method adv (seeds 1, 2, 3)." in text
    assert "| method rs-da | en | +20.0 [" in text and "| 1: +17.8, 2: +22.2 | +20.0 [-8.2, +48.2] |" in text
    assert any(line.startswith("| ear | paper, mBERT |") for line in lines), "rows of the paper that the study lacks"
    assert content["not_in_the_study"] == sorted(TABLES.keys() - {"1"})
    assert "Tables of the paper that no group of the study fills: 2, 3, 4, 5, 6, A.1, A.2, A.3, A.4." in text
    by_name = {entry["name"]: entry for entry in content["runs"]}
    assert by_name[rs_da["runs"][1]]["log"] == [{"step": 8, "eval_accuracy": 0.5}]
    assert by_name[rs_da["runs"][1]]["accuracies"]["sw"] == pytest.approx(10 / 15), "each run, not only their mean"
    assert "5 of 9 runs" in text and "2026-01-02" in text and "python 3.11" in text
    assert "| max_length | 24 |" in text and "batch_size: 8" in text


def test_choices_are_shown_with_their_candidates(make_report) -> None:
    def wrong(settings: dict[str, Any]) -> dict[str, int]:
        return dict.fromkeys(LANGUAGES, 2 if settings["learning_rate"] == 0.2 else 5)

    content, text = make_report(
        {"name": "rate", "grid": {"learning_rate": [0.1, 0.2]}, "select": ["learning_rate"]},
        {"name": "weights", "grid": {"alpha": [0.5, 1.0]}, "baseline": {"alpha": 0.5}},
        wrong=wrong,
    )
    assert content["selections"][0]["chosen"] == {"learning_rate": 0.2}
    assert "## Chosen by `rate`: learning_rate 0.2" in text and "| learning_rate 0.2 | 86.67 |" in text
    assert "| alpha 1.0 | en |" + 3 * " +0.0 [+0.0, +0.0] |" + " 1: +0.0 |" in text
    assert all(row["accuracies"]["en"][0] == pytest.approx(13 / 15) for row in content["sections"][1]["rows"])


def test_a_run_that_collapsed_is_marked(make_report, tmp_path: Path) -> None:
    make_report({"name": "a", "grid": {"alpha": [1.0, 9.0]}}, wrong=lambda settings: dict.fromkeys(LANGUAGES, 5))
    for path in (tmp_path / "study").glob("*/results.json"):
        results = json.loads(path.read_text())
        write_json(path, {**results, "collapsed": results["config"]["alpha"] == 9.0})
    content = report(tmp_path / "study")
    assert [row["collapsed"] for row in content["sections"][0]["rows"]] == [[], [1]]
    text = (tmp_path / "study" / "report.md").read_text()
    assert "| **9.0** * | here" in text and "| **1.0** | here" in text


def test_weights_that_follow_from_ratios_stand_beside_the_terms(make_report, tmp_path: Path) -> None:
    def wrong(settings: dict[str, Any]) -> dict[str, int]:
        return dict.fromkeys(LANGUAGES, 5)

    make_report({"name": "ratios", "grid": {"push_ratio": [0.1], "seed": [1, 2]}}, wrong=wrong)
    for seed, path in enumerate(sorted((tmp_path / "study").glob("*/results.json")), start=1):
        write_json(path, {**json.loads(path.read_text()), "weights": {"alpha": 10.0 * seed}})
    report(tmp_path / "study")
    lines = (tmp_path / "study" / "report.md").read_text().splitlines()
    assert any(line.startswith("Loss terms") and "weights chosen for the wanted ratios" in line for line in lines)
    assert "| row | cross_entropy | alpha, chosen |" in lines and "| push_ratio 0.1 | 1.25 | 15 |" in lines


def test_ratios_that_not_all_seeds_have_are_left_out(make_report, tmp_path: Path) -> None:
    make_report({"name": "a", "grid": {"seed": [1, 2]}}, wrong=lambda settings: dict.fromkeys(LANGUAGES, 5))
    for number, path in enumerate(sorted((tmp_path / "study").glob("*/results.json"))):
        measured = {"pull at query": 1.0 + number} | ({"pull at key": 9.0} if number == 0 else {})
        write_json(path, {**json.loads(path.read_text()), "gradient_ratios": {"before": measured, "after": measured}})
    report(tmp_path / "study")
    lines = (tmp_path / "study" / "report.md").read_text().splitlines()
    assert "| row | cross_entropy | pull at query, before | pull at query, after |" in lines
    assert any(line.endswith("| 1.25 | 1.5 | 1.5 |") for line in lines)


def test_figure_6_is_drawn_from_table_6(make_report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra `analysis`")

    def wrong(settings: dict[str, Any]) -> dict[str, int]:
        return dict.fromkeys(LANGUAGES, 5)

    _, text = make_report(
        {
            "name": "scale",
            "table": "6",
            "settings": {"method": "ear"},
            "grid": {"dictionary_scale": [1, 0.75, 0.5, 0.25]},
        },
        wrong=wrong,
    )
    assert "![Figure 6](figure-6.png)" in text
    assert (tmp_path / "study" / "figure-6.png").read_bytes().startswith(b"\x89PNG")
    assert ">average accuracy (%)</text>" in (tmp_path / "study" / "figure-6.svg").read_text()
    assert "| 0.75 | paper, mBERT |" in text and "68.392" in text


def test_other_data_than_the_run_was_scored_on_are_refused(make_report, data_dir: Path, tmp_path: Path) -> None:
    make_report(
        {"name": "methods", "table": "1", "grid": {"method": ["finetune", "ear"]}},
        wrong=lambda settings: dict.fromkeys(LANGUAGES, 5),
    )
    reason = "10 of 15 predictions in en were right, which the {} items in {} do not say"
    for lines in (14, 15):
        other = tmp_path / f"other{lines}"
        other.mkdir()
        for language in LANGUAGES:
            (other / f"dev-{language}.tsv").write_text("a\tb\tneutral\n" * lines)
        rows = report(tmp_path / "study", str(other))["sections"][0]["rows"]
        assert reason.format(lines, other) in rows[1]["difference"]["missing"], "accuracies stand without the data"
        text = (tmp_path / "study" / "report.md").read_text()
        assert "No difference for method ear: " in text and "| 66.7 |" in text


def test_accuracies_stand_without_predictions(make_report, tmp_path: Path) -> None:
    content, _ = make_report(
        {"name": "methods", "table": "1", "grid": {"method": ["finetune", "ear"]}},
        wrong=lambda settings: dict.fromkeys(LANGUAGES, 5),
    )
    (name,) = content["sections"][0]["rows"][1]["runs"]
    (tmp_path / "study" / name / "predictions.json").unlink()
    row = report(tmp_path / "study")["sections"][0]["rows"][1]
    assert "predictions.json is missing" in row["difference"]["missing"] and row["average"].mean == pytest.approx(2 / 3)


def test_averages_are_over_the_languages_that_all_seeds_have(make_report, tmp_path: Path) -> None:
    make_report(
        {"name": "a", "grid": {"seed": [1, 2]}}, wrong=lambda settings: {"en": 3, "de": 6, "sw": 3 * settings["seed"]}
    )
    path = next(iter((tmp_path / "study").glob("*seed2*/results.json")))
    results = json.loads(path.read_text())
    del results["languages"]["de"]
    write_json(path, {**results, "average": 0.7, "notices": ["no dev data for de: not in the averages"]})
    row = report(tmp_path / "study")["sections"][0]["rows"][0]
    assert list(row["accuracies"]) == ["en", "sw"]
    assert row["average"] == (pytest.approx(0.75), pytest.approx(0.1 / 2**0.5)) and row["average_other"].mean == 0.7
    assert (
        f"{path.parent.name}: no dev data for de: not in the averages."
        in (tmp_path / "study" / "report.md").read_text()
    )


def test_two_runs_are_compared_by_themselves(tmp_path: Path, data_dir: Path) -> None:
    for name, count in (("a", 3), ("b", 6)):
        finish(tmp_path, name, {"data_dir": str(data_dir)}, dict.fromkeys(LANGUAGES, count))
    text = differences_table([tmp_path / "a"], tmp_path / "b", None, markdown_table)
    assert text.splitlines()[0].startswith("| points over") and "| +20.0 [" in text


def test_the_papers_numbers_are_all_there() -> None:
    assert {table: len(paper_rows(table)) for table in TABLES} == {
        **{"1": 9, "2": 9, "3": 4, "4": 3, "A.4": 3, "5": 3, "6": 4},
        **{"A.1": 4, "A.2": 6, "A.3": 7},
    }
    ear = next(row for row in paper_rows("1") if (row.model, row.name) == ("mBERT", "ear"))
    assert ear.accuracies["en"] == 83.2 and ear.accuracies["avg"] == 68.4 and len(ear.accuracies) == 16
    syntax = next(row for row in paper_rows("1") if row.name == "syntax")
    assert "sw" not in syntax.accuracies, "not printed there"
    assert paper_rows("6")[1].accuracies == {"avg": 68.392} and paper_rows("A.4")[0].model == "XLM-R"


@pytest.mark.parametrize("table", ["1", "A.1", "5"])
def test_a_full_row_of_the_paper_agrees_with_its_own_average(table: str) -> None:
    for row in paper_rows(table):
        if "avg" in row.accuracies:
            values = [value for name, value in row.accuracies.items() if name != "avg"]
            assert sum(values) / len(values) == pytest.approx(row.accuracies["avg"], abs=0.06), row


def test_rows_are_matched_by_number_and_by_name() -> None:
    assert same_row("A.3", 1.0, "1") and same_row("6", 1.0, "1.0") and not same_row("A.3", 1.2, "1")
    assert same_row("4", "ear", "EPT+APT") and same_row("A.4", "nt+apt", "NT+APT") and not same_row("1", "ear", "rs-da")
    assert same_row("5", "de", "de")
    for table, spec in TABLES.items():
        baseline = [row for row in paper_rows(table) if same_row(table, spec.baseline, row.name)]
        assert baseline, table


def test_the_data_of_the_package_hold_every_table() -> None:
    import ear_ops.recipes.study

    folder = Path(ear_ops.recipes.study.__file__).with_name("paper")
    assert sorted(path.stem for path in folder.glob("*.csv")) == sorted(f"table-{table}" for table in TABLES)
    for path in folder.glob("*.csv"):
        assert len({len(line) for line in csv.reader(path.open())}) == 1, path


def test_a_group_without_runs_shows_every_language_of_the_paper(make_report) -> None:
    _, text = make_report({"name": "a", "table": "1", "grid": {"method": ["ear"]}}, wrong=lambda settings: None)
    assert "| method | of | en | ar | bg | de |" in text and "No run here has" not in text


def test_the_same_notice_of_many_runs_is_one_line(make_report, tmp_path: Path) -> None:
    make_report({"name": "a", "grid": {"seed": [1, 2, 3]}}, wrong=lambda settings: dict.fromkeys(LANGUAGES, 5))
    names = []
    for path in sorted((tmp_path / "study").glob("*/results.json")):
        write_json(path, {**json.loads(path.read_text()), "notices": ["no dev data for ar: not in the averages"]})
        names.append(path.parent.name)
    report(tmp_path / "study")
    text = (tmp_path / "study" / "report.md").read_text()
    assert text.count("no dev data") == 1 and f"{'; '.join(names)}: no dev data for ar" in text


def test_predictions_of_other_languages_than_the_results_have_are_refused(tmp_path: Path, data_dir: Path) -> None:
    finish(tmp_path, "a", {"data_dir": str(data_dir)}, dict.fromkeys(LANGUAGES, 3))
    write_json(tmp_path / "a" / "predictions.json", {"en": [0] * 15})
    with pytest.raises(StudyError, match=r"predictions\.json has en, and results\.json en, de, sw"):
        differences_table([tmp_path / "a"], tmp_path / "a", None, markdown_table)


def test_items_with_the_same_first_sentence_are_a_group(tmp_path: Path) -> None:
    rows = ["p\th\tneutral", "q\th\tentailment", "p\ti\tneutral", "q\tj\tneutral"]
    (tmp_path / "dev-en.tsv").write_text("".join(f"{row}\n" for row in rows))
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "predictions.json", {"en": [2, 1, 0, 2]})
    score = {"accuracy": 0.75, "correct": 3, "total": 4, "low": 0.0, "high": 1.0}
    scored = scored_items(tmp_path / "run", run_results({"data_dir": str(tmp_path)}, languages={"en": score}))
    assert scored.groups.tolist() == [0, 1, 0, 1]
    assert scored.correct["en"].tolist() == [True, True, False, True]


def test_runs_are_paired_by_the_seeds_that_both_rows_have(make_report) -> None:
    """`finetune` has finished seeds 1 and 2, `ear` seeds 2 and 3."""

    def wrong(settings: dict[str, Any]) -> dict[str, int] | None:
        if settings["seed"] == {"finetune": 3, "ear": 1}[settings["method"]]:
            return None
        return dict.fromkeys(LANGUAGES, settings["seed"] + 3 * (settings["method"] == "finetune"))

    content, _ = make_report(
        {"name": "methods", "table": "1", "grid": {"method": ["finetune", "ear"], "seed": [1, 2, 3]}}, wrong=wrong
    )
    difference = content["sections"][0]["rows"][1]["difference"]
    assert difference["seeds"] == {"2": pytest.approx(0.2)} and difference["average"][0] == pytest.approx(0.2)
