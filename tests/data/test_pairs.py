from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ear_ops.data.pairs import (
    DataError,
    PairExample,
    available_languages,
    is_untranslated,
    load_split,
    load_texts,
    read_pairs,
)
from ear_ops.data.tasks import PAWSX, XNLI

TEXT = st.text(st.characters(exclude_characters="\t\n", exclude_categories=("Cs",)))


def test_lines_become_examples_in_order(write_file) -> None:
    path = write_file("dev-en.tsv", "A b.\tC d.\tneutral\nE\tF\tentailment\nG\tH\tcontradiction\n")
    assert read_pairs(path, XNLI) == [("A b.", "C d.", 2), ("E", "F", 1), ("G", "H", 0)]
    assert isinstance(read_pairs(path, XNLI)[0], PairExample)


@given(pairs=st.lists(st.tuples(TEXT, TEXT, st.sampled_from(PAWSX.labels)), min_size=1))
def test_every_text_without_tab_and_line_feed_survives(tmp_path_factory, pairs) -> None:
    path = tmp_path_factory.mktemp("pairs") / "dev-en.tsv"
    # The reader skips a byte order mark at the start of a file, so the first line has no drawn text.
    path.write_bytes("".join("\t".join(pair) + "\n" for pair in [("first", "", "0"), *pairs]).encode())
    assert read_pairs(path, PAWSX)[1:] == [(text1, text2, int(label)) for text1, text2, label in pairs]


@pytest.mark.parametrize(
    "text",
    ['"He said "" so', '"', "a\u2028b", "a\x85b", "a\x0cb\x1cc", "a\rb", " a  b ", "", "NS", "a\u00a0b"],
    ids=ascii,
)
def test_nothing_but_tabs_and_line_feeds_is_special(write_file, text) -> None:
    path = write_file("dev-en.tsv", f"x\ty\tneutral\n{text}\t{text}\tneutral\nx\ty\tneutral\n")
    assert read_pairs(path, XNLI) == [("x", "y", 2), (text, text, 2), ("x", "y", 2)]


@pytest.mark.parametrize(
    "content",
    ["a\tb\t1\r\nc\td\t0\r\n", "\ufeffa\tb\t1\nc\td\t0\n", "a\tb\t1\nc\td\t0"],
    ids=["crlf", "byte order mark", "no final line feed"],
)
@pytest.mark.parametrize("name", ["dev-en.tsv", "dev-en.tsv.gz"])
def test_file_variations_read_the_same(write_file, content, name) -> None:
    assert read_pairs(write_file(name, content), PAWSX) == [("a", "b", 1), ("c", "d", 0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("only one", r"expected 3 tab-separated columns \(text1, text2, label\), got 1: 'only one'"),
        ("", r"expected 3 .*, got 1: ''"),
        ("no\tlabel", r"expected 3 .*, got 2"),
        ("a\tb\tneutral\t", r"expected 3 .*, got 4"),
        ("a\tb\t", "the label is empty; xnli has 'contradiction', 'entailment', 'neutral'"),
        ("a\tb\t\r", "the label is empty"),
        ("a\tb\tNeutral", "unknown label 'Neutral': xnli has 'contradiction', 'entailment', 'neutral'"),
        ("a\tb\tneutral ", "unknown label 'neutral ': xnli has 'contradiction', 'entailment', 'neutral'$"),
        ("a\tb\tcontradictory", "unknown label 'contradictory': .* machine-translated .* spell 'contradiction'"),
        ("a\tb\t" + "x" * 5000, r"unknown label 'x+\.\.\.x+': xnli has .{,60}$"),
        ("a\tb\t1", "unknown label '1': xnli has .*; the labels of pawsx have it: --task pawsx$"),
        (b"a\tb\xff\tneutral", "not UTF-8"),
    ],
    ids=lambda value: ascii(value)[:30],
)
@pytest.mark.parametrize("name", ["dev-en.tsv", "dev-en.tsv.gz"])
def test_a_bad_line_is_an_error_with_file_and_line(write_file, line, message, name) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    path = write_file(name, b"a\tb\tneutral\nc\td\tneutral\n" + raw + b"\ne\tf\tneutral\n")
    with pytest.raises(DataError, match=message) as caught:
        read_pairs(path, XNLI)
    assert str(caught.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    "header",
    ["premise\thypo\tlabel", "id\tsentence1\tsentence2\tlabel", "a\tb\tgold_label"],
)
def test_a_header_is_called_one_in_the_first_line_alone(write_file, header) -> None:
    with pytest.raises(DataError, match=r"dev-en\.tsv:1: .*looks like a header, .*: delete it$"):
        read_pairs(write_file("dev-en.tsv", f"{header}\na\tb\tneutral\n"), XNLI)
    with pytest.raises(DataError, match=r"dev-en\.tsv:2: ") as caught:
        read_pairs(write_file("dev-en.tsv", f"a\tb\tneutral\n{header}\n"), XNLI)
    assert "looks like" not in str(caught.value)


def test_damaged_gzip_is_an_error_with_the_file(tmp_path) -> None:
    path = tmp_path / "dev-en.tsv.gz"
    packed = gzip.compress("".join(f"text {i}\ttext {i * i}\tneutral\n" for i in range(5000)).encode())
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    for damaged in (packed[: len(packed) // 2], bytes(flipped), b"a\tb\tneutral\n"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"dev-en\.tsv\.gz"):
            read_pairs(path, XNLI)


def test_an_empty_or_missing_file_is_an_error(write_file, tmp_path) -> None:
    with pytest.raises(DataError, match=r"dev-en\.tsv: the file is empty"):
        read_pairs(write_file("dev-en.tsv", ""), XNLI)
    with pytest.raises(DataError, match=r"dev-de\.tsv: no such file"):
        read_pairs(tmp_path / "dev-de.tsv", XNLI)


@pytest.mark.parametrize("folder", ["", "xnli/"])
@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz"])
def test_load_split_finds_the_file(write_file, tmp_path, folder, suffix) -> None:
    write_file(f"{folder}dev-sw{suffix}", "a\tb\tneutral\n")
    assert load_split(tmp_path, XNLI, "dev", "sw") == [("a", "b", 2)]
    assert load_split(str(tmp_path), XNLI, "dev", "sw") == [("a", "b", 2)]


def test_the_folder_of_the_task_comes_first(write_file, tmp_path) -> None:
    write_file("dev-en.tsv", "of another task\tb\t1\n")
    write_file("pawsx/dev-en.tsv", "c\td\t0\n")
    write_file("xnli/dev-en.tsv", "a\tb\tneutral\n")
    assert load_split(tmp_path, XNLI, "dev", "en") == [("a", "b", 2)]
    assert load_split(tmp_path, PAWSX, "dev", "en") == [("c", "d", 0)]


def test_languages_are_listed_in_the_order_of_the_task(write_file, tmp_path) -> None:
    for name in ("dev-zh.tsv", "dev-xx.tsv", "dev-it.tsv", "xnli/dev-en.tsv.gz", "dev-ar.tsv", "dev-ar.tsv.gz"):
        write_file(name, "a\tb\tneutral\n")
    for name in ("test-de.tsv", "dev-fr.txt", "dev-fr.tsv.bak", "mydev-fr.tsv", "pawsx/dev-fr.tsv", "dev-fr.tsv/x"):
        write_file(name, "a\tb\tneutral\n")
    assert available_languages(tmp_path, XNLI, "dev") == ["en", "ar", "zh", "it", "xx"]
    assert available_languages(tmp_path, XNLI, "train") == []
    for language in available_languages(tmp_path, XNLI, "dev"):
        assert load_split(tmp_path, XNLI, "dev", language)


def test_a_missing_split_names_the_files_looked_for_and_the_languages_present(write_file, tmp_path) -> None:
    (tmp_path / "xnli").mkdir()
    write_file("dev-en.tsv", "a\tb\tneutral\n")
    write_file("xnli/dev-de.tsv", "a\tb\tneutral\n")
    with pytest.raises(DataError) as caught:
        load_split(tmp_path, XNLI, "dev", "it")
    for name in ("xnli/dev-it.tsv,", "xnli/dev-it.tsv.gz", "dev-it.tsv,", "dev-it.tsv.gz"):
        assert str(tmp_path / name) in str(caught.value)
    assert str(caught.value).endswith("languages present in split 'dev': en, de")
    with pytest.raises(DataError, match="languages present in split 'test': none"):
        load_split(tmp_path, XNLI, "test", "en")


def test_a_missing_folder_is_an_error() -> None:
    for call in (lambda: load_split("nowhere", XNLI, "dev", "en"), lambda: available_languages("nowhere", XNLI, "dev")):
        with pytest.raises(DataError, match="data_dir: nowhere is not a folder"):
            call()


def test_texts_need_no_labels(write_file, tmp_path) -> None:
    path = write_file("xnli/test-de.tsv", "a\tb\nc\td\tneutral\r\ne\tf\t\ng\th\t1\n")
    assert list(load_texts(tmp_path, XNLI, "test", "de")) == [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")]
    for line, got in (("a", 1), ("a\tb\tneutral\tc", 4)):
        path.write_text(f"a\tb\n{line}\n")
        with pytest.raises(DataError, match=rf"test-de\.tsv:2: expected 2 or 3 .*\(text1, text2, label\), got {got}"):
            list(load_texts(tmp_path, XNLI, "test", "de"))
    with pytest.raises(DataError, match="languages present in split 'test': de"):
        list(load_texts(tmp_path, XNLI, "test", "it"))


def test_untranslated_rows_are_kept_and_recognised(write_file) -> None:
    path = write_file("dev-ko.tsv", "NS\tNS\t0\nNS\tb\t0\na\tns\t0\n\t\t0\na\t \t0\nNS.\tb\t0\nThe NS\tSNS\t1\n")
    assert [is_untranslated(example) for example in read_pairs(path, PAWSX)] == [True] * 5 + [False] * 2


def test_the_published_files_have_their_published_sizes(xtreme_data: Path) -> None:
    assert len(load_split(xtreme_data, XNLI, "train", "en")) == 32359
    assert len(load_split(xtreme_data, PAWSX, "train", "en")) == 8531
    for task, rows in ((XNLI, 2490), (PAWSX, 2000)):
        assert available_languages(xtreme_data, task, "dev") == list(task.languages)
        for language in task.languages:
            assert len(load_split(xtreme_data, task, "dev", language)) == rows
    untranslated = {
        language: sum(map(is_untranslated, load_split(xtreme_data, PAWSX, "dev", language)))
        for language in PAWSX.languages
    }
    assert untranslated == {"en": 0, "de": 68, "es": 38, "fr": 8, "ja": 20, "ko": 36, "zh": 16}


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ('"He is glad.","He is happy.","1"', "the line has commas: docs/data.md shows how"),
        ("17\tHe is glad.\tHe is happy.\t1", "the first column looks like an id"),
    ],
)
def test_tables_of_another_kind_get_a_hint(tmp_path: Path, line: str, hint: str) -> None:
    (tmp_path / "train-en.tsv").write_text(f"{line}\n")
    with pytest.raises(DataError, match=f"train-en.tsv:1: expected 3 tab-separated columns .*{hint}"):
        load_split(tmp_path, PAWSX, "train", "en")
    (tmp_path / "train-en.tsv").rename(tmp_path / "train.csv")
    with pytest.raises(DataError, match=r"split 'train': none; .*train\.csv is a CSV: docs/data\.md"):
        load_split(tmp_path, PAWSX, "train", "en")
