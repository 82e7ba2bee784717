"""A finished run looked at from inside, before and after its training."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="needs the extra `analysis`")
pytest.importorskip("matplotlib", reason="needs the extra `analysis`")

import numpy as np
import torch

from ear_ops.data import DataError, load_parallel
from ear_ops.models.classifier import load_classifier
from ear_ops.models.vocabulary import restore_vocabulary
from ear_ops.recipes.analysis.alignment_report import _synonym_groups, analyse
from ear_ops.recipes.analysis.figures import scatter_panels, tsne
from ear_ops.recipes.analysis.states import alignment_by_layer
from ear_ops.recipes.drawing import figure
from ear_ops.recipes.study.definition import load_study
from ear_ops.recipes.study.sweep import StudyError, plan_of, sweep
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.folder import RunFolderError, load_config
from ear_ops.recipes.training.run import train


@pytest.fixture
def parallel_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "parallel"
    folder.mkdir()
    for language, shift in (("de", 1), ("sw", 3)):
        lines = [f"b{(i + shift) % 8} c{i % 8} d{i % 5}\ta{i % 8} a{i // 8} d{i % 5}\n" for i in range(24)]
        (folder / f"{language}-en.tsv").write_text("".join(lines))
    return folder


def test_measures_and_figures_of_a_run(write_study, data_dir: Path, parallel_dir: Path, tmp_path: Path) -> None:
    study = write_study(
        {"name": "kept", "keep_model": True}, method="ear", epochs=3, learning_rate=3.0e-3, prune_vocabulary=True
    )
    (name,) = sweep(study, tmp_path / "study").finished
    run, output = tmp_path / "study" / name, tmp_path / "analysis"
    synonyms = tmp_path / "synonyms.json"  # with a neighbour of no piece, which cannot be pictured
    synonyms.write_text(json.dumps({**json.loads((data_dir / "synonyms.json").read_text()), "d1": [" ", "b1"]}))
    content = analyse([run], parallel_dir, output, synonyms=synonyms, limit=20)

    entry = content["runs"][name]
    model, small = load_classifier(str(run / "model"), 3)
    whole, tokenizer = load_classifier(load_config(run).model, 3)
    assert len(small) < len(tokenizer), "or the next line shows nothing"
    assert entry["before"] == alignment_by_layer(whole, tokenizer, load_parallel(parallel_dir, 20))
    restore_vocabulary(model, small, whole, tokenizer)
    assert entry["after"] == alignment_by_layer(whole, tokenizer, load_parallel(parallel_dir, 20))
    assert entry["before"] != entry["after"] and entry["before"]["sentences"] == {"de": 20, "sw": 20}
    assert json.loads((output / "analysis.json").read_text())["runs"][name]["method"] == "ear"

    lines = [line for line in (output / "analysis.md").read_text().splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 3 and "retrieval, before" in lines[0]
    expected = 100 * (entry["after"]["retrieval"]["de"][2] + entry["after"]["retrieval"]["sw"][2]) / 2
    assert lines[-1].split(" | ")[2] == f"{expected:.1f}"
    figures = [f"layers-{name}", *(f"figure-{number}-{name}" for number in (3, 4, 5))]
    assert list(entry["figures"]) == figures
    for stem in figures:
        assert (output / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({stem}.png)" in (output / "analysis.md").read_text()
    drawn = [(output / f"{stem}.svg").read_text() for stem in figures]
    assert ">retrieval accuracy (%)</text>" in drawn[0]
    for scatter in drawn[1:]:
        assert ">before training</text>" in scatter and ">after training</text>" in scatter
    assert drawn[3].count(">German</text>") == 3, "in both panels and in the legend"


def test_runs_of_one_pretrained_model_share_its_measures(
    write_study, parallel_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(
        {"name": "kept", "keep_model": True, "grid": {"seed": [1, 2]}},
        method="finetune",
        epochs=1,
        learning_rate=3.0e-3,
    )
    folders = [tmp_path / "study" / name for name in sweep(study, tmp_path / "study").finished]
    second = analyse(folders[1:], parallel_dir, tmp_path / "second")["runs"][folders[1].name]
    measured = []

    def counted(*args, **kwargs):
        measured.append(alignment_by_layer(*args, **kwargs))
        return measured[-1]

    monkeypatch.setattr("ear_ops.recipes.analysis.alignment_report.alignment_by_layer", counted)
    both = analyse(folders, parallel_dir, tmp_path / "both")["runs"]
    assert len(measured) == 3
    assert both[folders[1].name] == second and both[folders[0].name]["after"] != second["after"]


def test_of_a_study_the_runs_with_models_are_analysed(write_study, parallel_dir: Path, tmp_path: Path) -> None:
    groups = [
        {"name": "other", "settings": {"method": "finetune", "seed": 2}},
        {"name": "kept", "keep_model": True, "grid": {"method": ["finetune", "ear"]}},
    ]
    study, folder = write_study(*groups, epochs=1), tmp_path / "study"
    sweep(study, folder, groups=["other"])
    with pytest.raises(StudyError, match=r"no run of this study has its model yet.*keep_model"):
        analyse([folder], parallel_dir, tmp_path / "analysis")
    _, finetune, ear = (run.name for run in plan_of(load_study(study), folder).runs)
    train(plan_of(load_study(study), folder).runs[1].config(folder))
    content = analyse([folder], parallel_dir, tmp_path / "analysis")
    assert list(content["runs"]) == [finetune] and content["not_run"] == [ear]
    assert f"Not run yet: {ear}." in (tmp_path / "analysis" / "analysis.md").read_text()


def test_a_run_without_its_model_is_named(write_study, parallel_dir: Path, tmp_path: Path) -> None:
    (name,) = sweep(write_study({"name": "a"}, method="finetune", epochs=1), tmp_path / "study").finished
    with pytest.raises(StudyError, match=r"no complete model.*keep_model"):
        analyse([tmp_path / "study" / name], parallel_dir, tmp_path / "analysis")
    assert not (tmp_path / "analysis").exists()


def test_a_run_is_not_compared_with_another_model_than_it_began_from(
    write_study, tiny_model: Path, parallel_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "tiny")
    study = write_study({"name": "a", "keep_model": True}, method="finetune", epochs=1, model=str(tmp_path / "tiny"))
    (name,) = sweep(study, tmp_path / "study").finished
    with open(tmp_path / "tiny" / "config.json", "a") as file:
        file.write("\n")
    with pytest.raises(RunFolderError, match=r"began from other contents of .*tiny"):
        analyse([tmp_path / "study" / name], parallel_dir, tmp_path / "analysis")
    (tmp_path / "study" / name / "model" / "config.json").unlink()
    with pytest.raises(StudyError, match=r"no complete model \(config\.json is missing\)"):
        analyse([tmp_path / "study" / name], parallel_dir, tmp_path / "analysis")


def test_figure_4_shows_words_that_the_sentences_use(tmp_path: Path) -> None:
    synonyms = {
        "unused": ["u1", "u2", "u3"],
        "good": ["well", "nice", "fine"],
        "well": ["good", "nice", "right"],  # stands with `good` already
        "house": ["home"],
        "often": ["always", "mostly", "daily"],
    }
    (tmp_path / "synonyms.json").write_text(json.dumps(synonyms))
    groups = _synonym_groups(tmp_path / "synonyms.json", ["Good is good", "well often", "A house a house a house"])
    assert groups == [
        *(("good", word) for word in ("good", "well", "nice", "fine")),
        *(("often", word) for word in ("often", "always", "mostly", "daily")),
        *(("house", word) for word in ("house", "home")),
    ]


def test_too_few_sentences_are_named(write_study, parallel_dir: Path, tmp_path: Path) -> None:
    study = write_study({"name": "kept", "keep_model": True}, method="finetune", epochs=1)
    (name,) = sweep(study, tmp_path / "study").finished
    (parallel_dir / "de-en.tsv").write_text("b1\ta1\n" * 3)
    with pytest.raises(DataError, match="expected at least 4 sentences of each language, got fewer of de"):
        analyse([tmp_path / "study" / name], parallel_dir, tmp_path / "analysis")


def test_before_and_after_are_one_space_in_which_lines_join_translations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = []

    def squares(vectors: torch.Tensor) -> np.ndarray:
        embedded.append(vectors)
        return vectors[:, :2].numpy()

    monkeypatch.setattr("ear_ops.recipes.analysis.figures.tsne", squares)
    before = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    panels = {"before": before, "after": before + 3}
    axes = {}

    @contextmanager
    def kept(path: Path, width: float, height: float):
        with figure(path, width, height) as drawn:
            yield drawn
            axes[path.name] = drawn.axes

    monkeypatch.setattr("ear_ops.recipes.analysis.figures.figure", kept)
    scatter_panels(tmp_path / "a.png", panels, ["en", "en", "$de", "$de"], links=[(0, 2), (1, 3)])
    assert len(embedded) == 1 and torch.equal(embedded[0], torch.cat([before, before + 3]))
    first, second = axes["a.png"]
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    for panel, points in zip((first, second), panels.values(), strict=True):
        lines = [path.vertices.tolist() for path in panel.collections[0].get_paths()]
        assert lines == [points[[0, 2]].tolist(), points[[1, 3]].tolist()]
        assert {text.get_text() for text in panel.texts} == {"en", "$de"}
        assert panel.get_xlabel() and len({tuple(dots.get_facecolor()[0]) for dots in panel.collections[1:]}) == 2
    assert "$de</text>" in (tmp_path / "a.svg").read_text()
    scatter_panels(tmp_path / "b.png", panels, ["en", "en", "$de", "$de"], links=[(0, 2), (1, 3)])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes(), "the same figure is the same file"


def test_a_picture_is_the_same_twice() -> None:
    vectors = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    assert (tsne(vectors) == tsne(vectors)).all() and tsne(vectors).shape == (12, 2)
    with pytest.raises(ValueError, match="at least 4"):
        tsne(vectors[:3])


def test_too_few_sentences_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"limit: expected at least 4 .*, got -5"):
        analyse([], tmp_path, tmp_path, limit=-5)
