from __future__ import annotations

from pathlib import Path

import pytest

from ear_ops.recipes.study.definition import Run, Study, load_study
from ear_ops.recipes.training.errors import ConfigError


def names(study: Study, **accuracies: float) -> list[str]:
    return [run.name for run in study.plan(lambda run: None).runs]


def settings(study: Study, *wanted: str, dev=lambda run: None) -> list[tuple[object, ...]]:
    return [tuple(run.settings[name] for name in wanted) for run in study.plan(dev).runs]


def test_groups_are_products_in_the_order_of_the_file(write_study) -> None:
    study = load_study(
        write_study(
            {"name": "methods", "grid": {"method": ["finetune", "ear"], "seed": [1, 2]}},
            {
                "name": "sources",
                "settings": {"method": "ear"},
                "cases": [{"source_language": "de", "max_length": 30}, {"source_language": "sw", "max_length": 40}],
                "grid": {"beta": [0.5, 1.0]},
            },
        )
    )
    assert settings(study, "method", "seed", "source_language", "max_length", "beta") == [
        ("finetune", 1, "en", 24, 0.1),
        ("finetune", 2, "en", 24, 0.1),
        ("ear", 1, "en", 24, 0.1),
        ("ear", 2, "en", 24, 0.1),
        ("ear", 1, "de", 30, 0.5),
        ("ear", 1, "de", 30, 1.0),
        ("ear", 1, "sw", 40, 0.5),
        ("ear", 1, "sw", 40, 1.0),
    ]
    assert len(set(names(study))) == 8 and all("/" not in name for name in names(study))


def test_what_would_compute_the_same_is_one_run(write_study) -> None:
    study = load_study(
        write_study(
            {
                "name": "a",
                "grid": {"method": ["finetune", "rs-da"], "beta": [0.1, 1], "preset": ["paper", "equations"]},
            },
            {"name": "b", "settings": {"method": "finetune", "learning_rate": "1e-3"}, "grid": {"layer": [1, 2]}},
            {"name": "c", "settings": {"method": "ear"}, "grid": {"beta": [1, 1.0, "1e0"], "perturbation": [0.1, 0.3]}},
            {"name": "d", "settings": {"method": "ear"}, "grid": {"beta": [0.1], "preset": ["paper", "equations"]}},
            {"name": "e", "settings": {"method": "finetune"}, "grid": {"preset": ["paper", "released"]}},
        )
    )
    assert settings(study, "method", "beta", "reduction", "padding") == [
        ("finetune", 0.1, "mean", "longest"),
        ("rs-da", 0.1, "mean", "longest"),
        ("ear", 1.0, "mean", "longest"),
        ("ear", 0.1, "mean", "longest"),
        ("ear", 0.1, "equations", "longest"),
        ("finetune", 0.1, "mean", "max_length"),
    ]


def test_a_measurement_at_a_layer_tells_runs_apart_that_the_layer_does_not(write_study) -> None:
    """The gradients of push and pull are measured whether or not the method has them."""
    groups = [{"name": "a", "grid": {"method": ["finetune", "rs-da"], "layer": [1, 2], "reduction": ["mean", "sum"]}}]
    assert settings(load_study(write_study(*groups)), "method", "layer", "reduction") == [
        ("finetune", 6, "mean"),
        ("rs-da", 6, "mean"),
    ]
    measured = load_study(write_study(*groups, measure_gradients=1))
    assert names(measured)[0] == names(load_study(write_study(*groups)))[0], (
        "finetune has one view: nothing is measured"
    )
    assert settings(measured, "method", "layer", "reduction") == [
        ("finetune", 6, "mean"),
        *(("rs-da", layer, reduction) for layer in (1, 2) for reduction in ("mean", "sum")),
    ]


def test_ratios_are_an_axis_of_the_methods_that_have_the_weight(write_study) -> None:
    study = load_study(
        write_study(
            {
                "name": "a",
                "grid": {"push_ratio": [0.1, 1], "pull_ratio": [0.1], "method": ["rs-da", "ear-no-ept", "ear-no-apt"]},
            },
            {"name": "b", "settings": {"method": "ear"}, "grid": {"push_ratio": [0.1, "1e-1", None]}},
        )
    )
    assert settings(study, "method", "alpha", "push_ratio", "beta", "pull_ratio") == [
        ("rs-da", 1.0, None, 0.1, None),
        ("ear-no-ept", 1.0, None, None, 0.1),
        ("ear-no-apt", None, 0.1, 0.1, None),
        ("ear-no-apt", None, 1.0, 0.1, None),
        ("ear", None, 0.1, 0.1, None),
        ("ear", 1.0, None, 0.1, None),
    ]


def test_a_name_depends_on_nothing_but_what_differs_from_the_defaults() -> None:
    """So that studies go on under a version with more settings; pinned, because folders of runs are found by it."""
    run = Run.of({"data_dir": "mini", "method": "rs-da", "seed": 7})
    assert run == Run.of({"data_dir": "mini", "method": "rs-da", "seed": 7, "epochs": 1, "perturbation": 0.3})
    assert run.name == "xnli-rs-da-seed7-0da0727aaa"
    assert run != Run.of({"data_dir": "mini", "method": "rs-da", "seed": 7, "dictionary_scale": 0.5})


def test_a_choice_holds_for_the_groups_below_that_do_not_say_otherwise(write_study) -> None:
    study = load_study(
        write_study(
            {
                "name": "rate",
                "settings": {"method": "finetune"},
                "grid": {"learning_rate": [1.0e-4, 2.0e-4], "seed": [1, 2]},
                "select": ["learning_rate"],
            },
            {
                "name": "radius",
                "settings": {"method": "adv"},
                "grid": {"perturbation": [0.01, 0.3]},
                "select": ["perturbation"],
                "for": {"method": "adv"},
            },
            {"name": "methods", "grid": {"method": ["finetune", "adv", "rs-rp"]}},
            {"name": "own", "settings": {"method": "adv", "perturbation": 0.7, "learning_rate": 0.5}},
        )
    )
    plan = study.plan(lambda run: None)
    assert [(group.name, chooser) for group, chooser in plan.waiting] == [("radius", "rate"), ("methods", "rate")]
    assert len(plan.runs) == 4 + 1, "the group `own` takes nothing over, and need not wait"
    rates = {(1.0e-4, 1): 0.9, (1.0e-4, 2): 0.1, (2.0e-4, 1): 0.6, (2.0e-4, 2): 0.5}

    def first(run: Run) -> float | None:
        return rates.get((run.settings["learning_rate"], run.settings["seed"])) if "finetune" in run.name else None

    plan = study.plan(first)
    assert [(group.name, chooser) for group, chooser in plan.waiting] == [("methods", "radius")]
    assert plan.selections[0].chosen == {"learning_rate": 2.0e-4}, "the best on average over seeds, not the best run"
    assert settings(study, "method", "learning_rate", dev=first)[4:] == [("adv", 2.0e-4)] * 2 + [("adv", 0.5)]

    def both(run: Run) -> float | None:
        return first(run) if "finetune" in run.name else run.settings["perturbation"]

    assert not study.plan(both).waiting
    assert settings(study, "method", "learning_rate", "perturbation", dev=both)[6:] == [
        ("rs-rp", 2.0e-4, 0.1),
        ("adv", 0.5, 0.7),
    ], "finetune and adv of the group `methods` are runs that the groups above have made already"


def test_a_choice_for_some_runs_looks_at_what_they_are_in_the_end(write_study) -> None:
    """`ear` is the default, and 2 is the 2.0 of a setting that is a number."""
    study = load_study(
        write_study(
            {
                "name": "a",
                "grid": {"beta": [0.3, 0.7]},
                "select": ["beta"],
                "for": {"method": "ear", "alpha": 2, "seed": 1},
            },
            {"name": "b", "settings": {"alpha": "2e0"}, "grid": {"max_length": [30]}},
            {"name": "c", "grid": {"max_length": [31]}},
        )
    )
    runs = settings(study, "beta", "max_length", dev=lambda run: run.settings["beta"])
    assert runs[2:] == [(0.7, 30), (0.1, 31)]


def test_a_group_alone_comes_with_what_chooses_for_it(write_study) -> None:
    radius = {"grid": {"perturbation": [0.1, 0.3]}, "select": ["perturbation"]}
    study = load_study(
        write_study(
            {
                "name": "rate",
                "settings": {"method": "finetune"},
                "grid": {"learning_rate": [1.0e-4, 2.0e-4]},
                "select": ["learning_rate"],
            },
            {"name": "main", "grid": {"method": ["finetune", "ear"]}},
            {"name": "adv-radius", "settings": {"method": "adv"}, **radius, "for": {"method": "adv"}},
            {
                "name": "rs-rp-radius",
                "settings": {"method": "rs-rp", "learning_rate": 0.5},
                **radius,
                "for": {"method": "rs-rp"},
            },
            {"name": "methods", "grid": {"method": ["ear", "adv"]}},
            {"name": "own", "settings": {"method": "rs-rp", "learning_rate": 0.1}},
        )
    )

    def groups(*names: str) -> list[str]:
        return [group.name for group in study.only(names).groups]

    assert groups("main") == ["rate", "main"]
    assert groups("methods") == ["rate", "adv-radius", "methods"], "the choice is made at the chosen rate"
    assert groups("own") == ["rs-rp-radius", "own"]
    assert groups("own", "main") == ["rate", "main", "rs-rp-radius", "own"]
    whole = {run.name for run in study.plan(lambda run: 0.5).runs}
    for name in ("main", "methods", "own"):
        assert {run.name for run in study.only([name]).plan(lambda run: 0.5).runs} < whole, "the runs keep their names"
    with pytest.raises(ConfigError, match=r"none called mein; it has rate, main, adv-radius"):
        study.only(["mein"])


def test_environment_variables_are_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("base: {data_dir: '${SOME_DATA}/xnli', method: '${SOME_METHOD}'}\ngroups: [{name: a}]\n")
    for name, value in (("SOME_DATA", None), ("SOME_METHOD", "")):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"study\.yaml: expected .* variables SOME_DATA, SOME_METHOD to be set"):
        load_study(path)
    monkeypatch.setenv("SOME_METHOD", "finetune")
    with pytest.raises(ConfigError, match=r"the environment variables SOME_DATA to be set"):
        load_study(path)
    monkeypatch.setenv("SOME_DATA", "/there")
    study = load_study(path)
    assert settings(study, "data_dir") == [("/there/xnli",)]
    monkeypatch.delenv("SOME_DATA")
    path.write_text(study.text)
    assert names(load_study(path)) == names(study), "the text that is kept needs no variables"


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"grid": {"seed": [1]}}, ["name"]),
        ({"name": "a", "grids": {}}, ["group 1 (a)", "'grids'", "grid"]),
        ({"name": "a", "grid": {"bta": [1]}}, ["group 1 (a): grid", "'bta'", "beta"]),
        ({"name": "a", "grid": {"beta": 1}}, ["grid: beta", "list"]),
        ({"name": "a", "settings": {"output_dir": "x"}}, ["output_dir"]),
        ({"name": "a", "table": "7"}, ["table '7'", "A.1"]),
        ({"name": "a", "table": ["1"]}, ["group 1 (a)", "unknown table ['1']"]),
        ({"name": "a", "select": [["beta"]]}, ["group 1 (a): select", "names of settings", "[['beta']]"]),
        ({"name": "a", "grid": {"beta": [[1]]}}, ["group 'a'", "beta: expected a number, got [1]"]),
        ({"name": "a", "grid": {"beta": [10**400]}}, ["group 'a'", "beta: expected a number"]),
        ({"name": "a", "grid": {"beta": [float("nan")]}}, ["group 'a'", "beta must be a finite number"]),
        (
            {"name": "a", "grid": {"beta": [1]}, "select": ["beta"], "for": {"alpha": [1]}},
            ["group 1 (a): for: alpha: expected a number, got [1]"],
        ),
        ({"name": "a", "select": ["beta"]}, ["select", "beta", "does not vary"]),
        ({"name": "a", "grid": {"beta": [1]}, "select": "beta"}, ["group 1 (a): select", "list", "'beta'"]),
        (
            {"name": "a", "cases": [{"beta": 1}, {"alpha": 1}], "select": ["beta"]},
            ["select", "beta", "one of the cases"],
        ),
        ({"name": "a", "for": {"method": "ear"}}, ["group 1 (a): for", "no `select`"]),
        (
            {"name": "a", "grid": {"beta": [1]}, "select": ["beta"], "for": {"method": "eer"}},
            ["group 'a': for", "no run of a group below", "{'method': 'eer'}"],
        ),
        ({"name": "a", "keep_model": "no"}, ["group 1 (a): keep_model", "true or false", "'no'"]),
        (
            {"name": "a", "grid": {"method": ["ear", "rs-da"]}, "baseline": {"method": "finetune"}},
            ["group 'a': baseline", "{'method': 'ear'}, {'method': 'rs-da'}", "got {'method': 'finetune'}"],
        ),
        ({"name": "a", "grid": {"beta": [1]}, "baseline": {"alpha": 1.0}}, ["group 'a': baseline", "alpha"]),
        ({"name": "a", "settings": {"method": "eer"}}, ["group 'a'", "unknown method 'eer'"]),
        ({"name": "a", "settings": {"beta": "much"}}, ["group 'a'", "beta", "'much'"]),
        (
            {"name": "a", "table": "1", "grid": {"method": ["ear"], "beta": [0.1, 1]}},
            ["group 'a'", "one row", "method"],
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(write_study, group: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_study(write_study(group)).plan(lambda run: None)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: {", ["not YAML"]),
        ("- a", ["base and groups"]),
        ("base: {}\ngroups: []", ["groups", "list"]),
        ("base: {}\ngroups: [{name: a}, {name: a}]", ["a more than once"]),
        ("basis: {}", ["'basis'"]),
        ("base: {}\ngroups:\n  - name: a\ngroups:\n  - name: b", ["key 'groups' in line 4 is in line 2 already"]),
        (
            "base: {}\ngroups: [{name: a, grid: {seed: [1],\n seed: [2]}}]",
            ["key 'seed' in line 3", "line 2 already"],
        ),
        ("base: {seed: 1, seed: 1}\ngroups: [{name: a}]", ["key 'seed' in line 1"]),
        ("[" * 20_000 + "]" * 20_000, ["nested too deeply"]),  # other tests raise the limit of Python
        ("{a: " * 20_000 + "}" * 20_000, ["nested too deeply"]),
        ("base: {seed: 1" + "0" * 5000 + "}", ["not YAML", "digits"]),
        ("base: 2001-99-99", ["not YAML", "month"]),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_file_that_is_no_study_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_study(tmp_path / "s.yaml")
    assert all(word in str(error.value) for word in ["s.yaml", *words])
    with pytest.raises(ConfigError, match="no such study"):
        load_study(tmp_path / "none.yaml")


def test_a_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "base: {data_dir: mini}\n"
        "groups:\n"
        "  - name: a\n    settings: &shared {method: finetune, seed: 1}\n"
        "  - name: b\n    settings: {<<: *shared, seed: 2}\n"
    )
    assert settings(load_study(path), "method", "seed") == [("finetune", 1), ("finetune", 2)]
