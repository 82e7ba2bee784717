"""The example scripts: each runs as a user runs it, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NEEDS = {"attach_to_models.py": "peft", "use_the_trainer.py": "accelerate"}


def run(name: str) -> str:
    """What the script prints, offline and on one thread; skipped without the package that it shows."""
    needed = NEEDS.get(name)
    if needed is not None and find_spec(needed) is None:
        pytest.skip(f"the example shows {needed}, which is not installed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, printed: str) -> list[tuple[float, ...]]:
    """The numbers in the groups of `pattern`, for each place where it occurs."""
    return [tuple(float(group) for group in match.groups()) for match in re.finditer(pattern, printed)]


def test_attached_models_come_to_attend_alike() -> None:
    printed = run("attach_to_models.py")
    differences = numbers(r"differed by ([\d.]+) and now by ([\d.]+)\.", printed)
    assert len(differences) == 2, printed
    assert all(last < first / 2 for first, last in differences), printed


def test_the_trainer_logs_terms_that_fall() -> None:
    printed = run("use_the_trainer.py")
    lines = numbers(r"task_loss ([\d.]+), embedding_push (-[\d.]+), attention_pull.3 ([\d.]+)", printed)
    assert len(lines) == 3, printed
    assert all(last < first for first, last in zip(lines[0], lines[-1], strict=True)), printed
    assert "loss on the development pairs" in printed


def test_a_student_comes_to_attend_like_its_teacher() -> None:
    printed = run("distil_a_teacher.py")
    differences = numbers(r"teacher: ([\d.]+) -> ([\d.]+)", printed)
    assert len(differences) == 4, printed
    assert all(last < first for first, last in differences), printed


def test_a_regularizer_of_your_own_lowers_its_term() -> None:
    printed = run("write_a_regularizer.py")
    ((before,), (after,)) = numbers(r"paid ([\d.]+)%", printed)
    assert after < before / 2, printed


def test_two_processes_have_the_gradients_of_one() -> None:
    printed = run("train_in_two_processes.py")
    ((difference,),) = numbers(r"difference to one process with all 8 pairs is ([\d.e+-]+)\.", printed)
    assert difference < 1e-5, printed


def test_every_script_is_short_tested_and_on_the_page() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    page = (EXAMPLES / "index.md").read_text(encoding="utf-8")
    assert len(SCRIPTS) == 5
    for script in SCRIPTS:
        assert len(script.read_text(encoding="utf-8").splitlines()) <= 80, script.name
        assert f'run("{script.name}")' in tested, script.name
        assert f"\n[{script.name}]({script.name})\n" in page, script.name
