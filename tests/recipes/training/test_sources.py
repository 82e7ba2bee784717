from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ear_ops.data import DataError, PairExample
from ear_ops.recipes.training import sources
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.sources import (
    evaluation_texts,
    load_augmenter,
    load_split_of,
    load_training_data,
    missing_inputs,
    unchanged_notice,
    write_variants_file,
)


@pytest.fixture
def variants_file(make_config, tmp_path: Path) -> str:
    path = str(tmp_path / "variants.tsv")
    write_variants_file(make_config().data, path, num_variants=4)
    return path


def test_the_originals_do_not_depend_on_the_method(make_config) -> None:
    plain, paired = (
        load_training_data(make_config(max_train_examples=7).data, two_views) for two_views in (False, True)
    )
    assert [item["original"] for item in plain.views] == [item["original"] for item in paired.views]
    assert len(plain.views) == 7 and "augmented" not in plain.views[0] and "augmented" in paired.views[0]
    assert plain.replaced is None and paired.replaced is not None and paired.views.epoch == 0


def test_a_variants_file_gives_one_variant_an_epoch_or_all_rows(make_config, variants_file: str) -> None:
    drawn = load_training_data(make_config(synonyms=None, variants_file=variants_file).data, True).views
    every_row = make_config(synonyms=None, variants_file=variants_file, variants="all").data
    assert len(drawn) == 60
    seen = set()
    for epoch in range(12):
        drawn.set_epoch(epoch)
        seen.add(drawn[0]["augmented"])
    every = load_training_data(every_row, True).views
    assert len(every) == 240
    assert seen == {every[i]["augmented"] for i in range(4)}
    assert {every[i]["original"] for i in range(4)} == {drawn[0]["original"]}
    plain = load_training_data(
        make_config(synonyms=None, variants_file=variants_file, variants="all").data, False
    ).views
    assert [plain[i]["original"] for i in range(240)] == [every[i]["original"] for i in range(240)]
    first = load_training_data(
        make_config(synonyms=None, variants_file=variants_file, variants="all", max_train_examples=2).data, True
    )
    assert len(first.views) == 8


def test_texts_are_all_that_the_run_can_show(make_config, variants_file: str) -> None:
    data = load_training_data(make_config(max_train_examples=5).data, True)
    texts = list(data.texts(epochs=3))
    shown = [text for item in data.views for text in item["original"]]
    for epoch in range(3):
        data.views.set_epoch(epoch)
        shown += [text for item in data.views for text in item["augmented"]]
    assert sorted(texts) == sorted(shown)
    from_file = load_training_data(
        make_config(max_train_examples=5, synonyms=None, variants_file=variants_file).data, True
    )
    assert len(list(from_file.texts(epochs=1))) == 5 * (2 + 4 * 2)
    # 15 items of two texts in two splits and three languages
    assert len(list(evaluation_texts(make_config()))) == 15 * 2 * 2 * 3


def test_labels_are_needed_in_the_scored_split_alone(make_config, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir, tmp_path / "data")
    for path in (tmp_path / "data" / "xnli").glob("test-*.tsv"):  # as XTREME's own script writes them
        path.write_text("".join(line.rpartition("\t")[0] + "\n" for line in path.read_text().splitlines()))
    config = make_config(data_dir=str(tmp_path / "data"))
    assert list(evaluation_texts(config)) == list(evaluation_texts(make_config()))
    with pytest.raises(DataError, match=r"test-en\.tsv:1: expected 3 .*got 2"):
        list(evaluation_texts(make_config(data_dir=str(tmp_path / "data"), eval_split="test")))


def test_a_share_of_the_dictionary_replaces_less(make_config) -> None:
    whole = load_training_data(make_config().data, True).replaced
    half = load_training_data(make_config(dictionary_scale=0.5).data, True).replaced
    assert whole is not None and half is not None
    assert 0 < half["found"] < whole["found"] and half["words"] == whole["words"]


def test_languages_are_those_asked_for_or_those_at_hand(make_config) -> None:
    assert list(load_split_of(make_config().data, "dev")) == ["en", "de", "sw"]
    assert list(load_split_of(make_config().data, "test", ["sw"])) == ["sw"]
    with pytest.raises(DataError, match=r"dev-zh\.tsv"):
        load_split_of(make_config().data, "dev", ["en", "zh"])


def test_a_split_that_is_not_there_says_where_it_was_looked_for(make_config, tmp_path: Path) -> None:
    (tmp_path / "train-en.tsv").write_text("a\tb\tneutral\n")
    with pytest.raises(DataError, match=r"test-en\.tsv"):
        load_split_of(make_config(data_dir=str(tmp_path)).data, "test")


def test_the_hub_is_asked_for_the_tasks_languages(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(task, split: str, language: str) -> list[PairExample]:
        asked.append((task.name, split, language))
        return [PairExample("a", "b", 0)]

    monkeypatch.setattr(sources, "load_hub_split", load)
    config = make_config(hub=True, data_dir=None, task="pawsx")
    assert list(load_split_of(config.data, "test")) == ["en", "de", "es", "fr", "ja", "ko", "zh"]
    load_training_data(config.data, two_views=False)
    assert asked[0] == ("pawsx", "test", "en") and asked[-1] == ("pawsx", "train", "en")


def test_the_built_in_data_come_with_their_synonyms(make_config) -> None:
    pytest.importorskip("ear_ops.data.mini", reason="the built-in data are not there")
    data = load_training_data(make_config(data_dir="mini", synonyms=None).data, True)
    assert len(data.views) >= 120 and data.replaced is not None and data.replaced["replaced"] > 0
    assert len(load_split_of(make_config(data_dir="mini").data, "test")) == 15


def test_what_a_run_needs_and_is_not_there_shows_without_reading(make_config, data_dir: Path, tmp_path: Path) -> None:
    assert missing_inputs(make_config()) == []
    shutil.copytree(data_dir, tmp_path / "data")
    for path in (tmp_path / "data" / "xnli").glob("test-*.tsv"):
        path.unlink()
    config = make_config(data_dir=str(tmp_path / "data"), eval_split="test", model="./nowhere")
    assert missing_inputs(config) == ["./nowhere", str(tmp_path / "data" / "test-en.tsv")]
    assert missing_inputs(make_config(model="bert-base-multilingual-cased")) == [], "which may be on the Hub"


def test_a_dictionary_that_replaces_nothing_is_noticed(make_config, tmp_path: Path) -> None:
    synonyms = tmp_path / "synonyms.json"
    synonyms.write_text("{}")
    with pytest.raises(ConfigError, match=r"synonyms: expected words with synonyms, found none in .*synonyms\.json"):
        load_augmenter(make_config(synonyms=str(synonyms)).data)
    synonyms.write_text('{"nirgends": ["nie"]}')
    data = load_training_data(make_config(synonyms=str(synonyms)).data, two_views=True)
    assert "no word was replaced, so both views are the same" in (unchanged_notice(data.replaced) or "")
    assert unchanged_notice(None) is None
    words = {word for example in data.views.examples for word in example.text1.split()}
    synonyms.write_text(json.dumps({word: [f"{word}s"] for word in words}))
    data = load_training_data(make_config(synonyms=str(synonyms)).data, two_views=True)
    assert unchanged_notice(data.replaced) is None


def test_variants_need_a_dictionary(make_config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no words to replace: pass --synonyms"):
        write_variants_file(make_config(method="finetune", synonyms=None).data, str(tmp_path / "v.tsv"))


@pytest.mark.parametrize("two_views", [False, True])
def test_untranslated_pairs_are_left_out_and_counted(
    make_config, data_dir: Path, tmp_path: Path, two_views: bool
) -> None:
    rows = ["\t\t0", "a0 a1\tb0\t1", "a0\tNS\t0", "a2\tb1\t0", "a3\tb2\t1"]
    (tmp_path / "train-ko.tsv").write_text("".join(f"{row}\n" for row in rows))
    settings = {"task": "pawsx", "data_dir": str(tmp_path), "source_language": "ko", "max_train_examples": 2}
    data = load_training_data(make_config(**settings).data, two_views)
    assert [example.text1 for example in data.views.examples] == ["a0 a1", "a2"] and data.untranslated == 2
    path = str(tmp_path / "variants.tsv")
    message = write_variants_file(make_config(**settings).data, path, num_variants=2)
    assert "4 lines, 2 variants of 2 pairs; 2 pairs left out, because a text is empty or the marker NS" in message
    with open(path, "a") as file:
        file.write("\tb\t0\t\tb\t0\n" * 2)
    with_file = load_training_data(make_config(**settings, synonyms=None, variants_file=path).data, two_views)
    assert with_file.views.examples == data.views.examples and with_file.untranslated == 1
    if two_views:
        assert with_file.views[0]["augmented"] in {data.views[0]["augmented"], *with_file.groups[0].variants}
    (tmp_path / "train-ko.tsv").write_text(f"{rows[0]}\n")
    with pytest.raises(DataError, match="all 1 training pairs are left out, because a text is empty"):
        load_training_data(make_config(**settings).data, two_views)
