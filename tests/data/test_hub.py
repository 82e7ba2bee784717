from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ear_ops.data.hub import load_hub_split, pairs_from_dataset
from ear_ops.data.pairs import DataError
from ear_ops.data.tasks import PAWSX, XNLI

datasets = pytest.importorskip("datasets", reason="datasets (extra: train) is not installed")

XNLI_NAMES = ["entailment", "neutral", "contradiction"]


def xnli_rows(language: str, split: str, labels: list[int] = [0, 1, 2]):  # noqa: B006
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=XNLI_NAMES),
        }
    )
    texts = [f"{language} {split} {i}" for i in range(len(labels))]
    columns = {"premise": texts, "hypothesis": [text.upper() for text in texts], "label": labels}
    return datasets.Dataset.from_dict(columns, features=features)


def pawsx_rows(language: str, split: str):
    features = datasets.Features(
        {
            "id": datasets.Value("int32"),
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["0", "1"]),
        }
    )
    columns = {"id": [1, 2], "sentence1": [f"{language} {split}", "NS"], "sentence2": ["x", "y"], "label": [1, 0]}
    return datasets.Dataset.from_dict(columns, features=features)


def save_repository(root: Path, name: str, rows, languages: tuple[str, ...]) -> None:
    """Write a data set as the Hub has it: each config has a folder of Parquet files, and a card lists them."""
    card = ["---", "configs:"]
    for language in languages:
        card += [f"- config_name: {language}", "  data_files:"]
        for split in ("train", "validation", "test"):
            (root / name / language).mkdir(parents=True, exist_ok=True)
            rows(language, split).to_parquet(root / name / language / f"{split}-00000-of-00001.parquet")
            card += [f"  - split: {split}", f"    path: {language}/{split}-*"]
    (root / name / "README.md").write_text("\n".join([*card, "---", ""]))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Enter a folder with the two repositories as local folders, which `datasets` reads instead of the Hub."""
    save_repository(tmp_path, "facebook/xnli", xnli_rows, ("en", "sw"))
    save_repository(tmp_path, "google-research-datasets/paws-x", pawsx_rows, ("en", "ko"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_xnli_labels_are_matched_by_name(hub) -> None:
    assert load_hub_split(XNLI, "train", "en") == [
        ("en train 0", "EN TRAIN 0", XNLI.label_id("entailment")),
        ("en train 1", "EN TRAIN 1", XNLI.label_id("neutral")),
        ("en train 2", "EN TRAIN 2", XNLI.label_id("contradiction")),
    ]


def test_dev_is_validation_in_the_language_asked_for(hub) -> None:
    assert load_hub_split(XNLI, "dev", "sw")[0].text1 == "sw validation 0"
    assert load_hub_split(XNLI, "test", "sw")[0].text1 == "sw test 0"


def test_pawsx_rows_are_all_kept(hub) -> None:
    assert load_hub_split(PAWSX, "dev", "ko") == [("ko validation", "x", 1), ("NS", "y", 0)]


def test_a_data_set_saved_to_disk_is_converted(tmp_path) -> None:
    xnli_rows("de", "test", [2, 2, 0, 1]).save_to_disk(tmp_path / "saved")
    examples = pairs_from_dataset(datasets.load_from_disk(tmp_path / "saved").with_format("torch"), XNLI)
    assert [XNLI.labels[example.label] for example in examples] == [
        "contradiction",
        "contradiction",
        "entailment",
        "neutral",
    ]
    assert examples[3].text1 == "de test 3"
    assert all(type(example.label) is int and type(example.text1) is str for example in examples)


def test_another_schema_is_an_error_that_says_what_came() -> None:
    rows = xnli_rows("en", "test")
    with pytest.raises(
        DataError, match="lacks the column hypothesis: expected premise, hypothesis, label, got premise, l"
    ):
        pairs_from_dataset(rows.remove_columns("hypothesis"), XNLI)
    with pytest.raises(DataError, match="column label: expected a ClassLabel"):
        pairs_from_dataset(rows.cast_column("label", datasets.Value("int64")), XNLI)
    names = datasets.ClassLabel(names=["yes", "neutral", "contradiction"])
    with pytest.raises(DataError, match="column label: unknown label 'yes': xnli has 'contradiction', 'ent"):
        pairs_from_dataset(rows.cast_column("label", datasets.Value("int64")).cast_column("label", names), XNLI)


@pytest.mark.parametrize("label", [-1, None])
def test_a_row_without_a_label_is_an_error(label) -> None:
    with pytest.raises(DataError, match="row 1 of the data set lacks a text or a label"):
        pairs_from_dataset(xnli_rows("en", "test", [0, label, 1]), XNLI)


def test_unknown_names_list_the_known_ones(hub) -> None:
    with pytest.raises(ValueError, match="unknown split 'validation': expected one of train, dev, test"):
        load_hub_split(XNLI, "validation", "en")
    with pytest.raises(ValueError, match="unknown language 'ar': pawsx has en, de, es, fr, ja, ko, zh"):
        load_hub_split(PAWSX, "dev", "ar")


def test_without_datasets_the_message_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install .*\[train\]|install ear-ops\[train\] again"):
        load_hub_split(XNLI, "dev", "en")


def test_the_data_layer_imports_without_datasets_and_transformers() -> None:
    code = (
        "import sys; sys.modules.update(datasets=None, transformers=None, accelerate=None); "
        "import ear_ops.data as d; print(d.XNLI.name)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, done.stdout) == (0, "xnli\n"), done.stderr
