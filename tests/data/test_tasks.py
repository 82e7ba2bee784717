from __future__ import annotations

import pytest

from ear_ops.data.tasks import PAWSX, TASKS, XNLI, get_task


def test_class_indices_are_those_of_xtreme() -> None:
    assert [XNLI.label_id(label) for label in ("contradiction", "entailment", "neutral")] == [0, 1, 2]
    assert [PAWSX.label_id(label) for label in ("0", "1")] == [0, 1]


def test_languages_stand_in_the_order_of_the_papers_tables() -> None:
    assert " ".join(XNLI.languages) == "en ar bg de el es fr hi ru sw th tr ur vi zh"
    assert " ".join(PAWSX.languages) == "en de es fr ja ko zh"


def test_tasks_are_found_by_name() -> None:
    assert get_task("xnli") is XNLI
    assert get_task("pawsx") is PAWSX
    assert list(TASKS) == ["xnli", "pawsx"]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown task 'mnli': expected one of xnli, pawsx"):
        get_task("mnli")
    with pytest.raises(ValueError, match="unknown label 'maybe': xnli has 'contradiction', 'entailment', 'neutral'"):
        XNLI.label_id("maybe")
