from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ear_ops.data.pairs import DataError, PairExample
from ear_ops.data.synonyms import SynonymAugmenter
from ear_ops.data.tasks import PAWSX, XNLI
from ear_ops.data.variants import VariantGroup, read_variants, write_variants
from ear_ops.data.views import PairViews

SYNONYMS = {word: [f"{word}{i}" for i in range(9)] for word in ("a", "b", "c")}
EXAMPLES = [PairExample("a b", 'say "c"', 2), PairExample("c", "b a", 0), PairExample("a b", 'say "c"', 2)]


def augmenter() -> SynonymAugmenter:
    return SynonymAugmenter(SYNONYMS)


def test_a_line_has_the_six_columns(tmp_path) -> None:
    path = tmp_path / "new folder" / "train-en.tsv"
    assert write_variants(path, EXAMPLES, XNLI, augmenter(), num_variants=3) == 9
    lines = path.read_bytes().decode().split("\n")
    assert lines.pop() == ""
    rows = [line.split("\t") for line in lines]
    assert [row[2:] for row in rows] == [
        [label, text1, text2, label]
        for text1, text2, label in [
            ("a b", 'say "c"', "neutral"),
            ("c", "b a", "contradiction"),
            (*EXAMPLES[0][:2], "neutral"),
        ]
        for _ in range(3)
    ]
    assert [[word[0] for word in row[0].split(" ")] for row in rows[:3]] == [["a", "b"]] * 3
    assert len({tuple(row[:2]) for row in rows}) > 6


def test_variants_are_what_the_epochs_of_pair_views_draw(tmp_path) -> None:
    path = tmp_path / "train-en.tsv.gz"
    counting = augmenter()
    write_variants(path, EXAMPLES, XNLI, counting, num_variants=4, seed=11)
    groups = read_variants(path, XNLI)
    views = PairViews(EXAMPLES, augmenter(), seed=11)
    for variant in range(4):
        views.set_epoch(variant)
        assert [group.variants[variant] for group in groups] == [item["augmented"] for item in views]
    assert [group.original for group in groups] == EXAMPLES
    assert counting.words == 4 * (4 + 3 + 4)


TEXT = st.text(st.sampled_from('abc \r"\u2028\x85\x0c\u00e9'), max_size=8)


@given(
    examples=st.lists(st.builds(PairExample, TEXT, TEXT, st.integers(0, 1)), min_size=1, unique=True),
    num_variants=st.integers(1, 4),
    suffix=st.sampled_from([".tsv", ".tsv.gz"]),
)
def test_what_is_written_is_read_back(tmp_path_factory, examples, num_variants, suffix) -> None:
    path = tmp_path_factory.mktemp("variants") / f"train-en{suffix}"
    write_variants(path, examples, PAWSX, augmenter(), num_variants)
    groups = read_variants(path, PAWSX)
    assert [group.original for group in groups] == examples
    assert {len(group.variants) for group in groups} == {num_variants}


def test_the_authors_files_are_read(write_file) -> None:
    path = write_file(
        "train-en.tsv",
        "A1\tB1\tneutral\tA\tB\tneutral\nA2\tB\tneutral\tA\tB\tneutral\n"
        "C1\tD1\tentailment\tC\tD\tentailment\n"
        "A3\tB\tentailment\tA\tB\tentailment\nA4\tB\tentailment\tA\tB\tentailment",
    )
    assert read_variants(path, XNLI) == [
        VariantGroup(PairExample("A", "B", 2), (("A1", "B1"), ("A2", "B"))),
        VariantGroup(PairExample("C", "D", 1), (("C1", "D1"),)),
        VariantGroup(PairExample("A", "B", 1), (("A3", "B"), ("A4", "B"))),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a\tb\tneutral", "expected 6 tab-separated columns .*, got 3"),
        ("a\tb\tneutral\tc\td\tentailment", "labels differ: 'neutral' augmented, 'entailment' original"),
        ("a\tb\tno\tc\td\tno", "unknown label 'no': xnli has"),
        ("a\tb\t\tc\td\t", "the label is empty"),
    ],
)
def test_a_bad_line_is_an_error_with_file_and_line(write_file, line, message) -> None:
    path = write_file("train-en.tsv", f"a\tb\tneutral\ta\tb\tneutral\n{line}\n")
    with pytest.raises(DataError, match=message) as caught:
        read_variants(path, XNLI)
    assert str(caught.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize("text", ["tab\there", "line\nfeed"])
def test_what_tsv_cannot_hold_is_refused_and_an_older_file_stays(tmp_path, text) -> None:
    path = tmp_path / "train-en.tsv"
    path.write_text("older")
    with pytest.raises(DataError, match="example 1 holds a tab or a line feed"):
        write_variants(path, [EXAMPLES[0], PairExample("a", text, 0)], XNLI, augmenter(), num_variants=1)
    assert path.read_text() == "older"
    assert [entry.name for entry in tmp_path.iterdir()] == ["train-en.tsv"]


def test_the_same_input_gives_the_same_bytes(tmp_path, monkeypatch) -> None:
    contents = set()
    for day, name in enumerate(("one.tsv.gz", "two.tsv.gz", "three.tsv")):
        monkeypatch.setattr("time.time", lambda seconds=86400.0 * (day + 1): seconds)
        write_variants(tmp_path / name, EXAMPLES, XNLI, augmenter(), num_variants=2, seed=1)
        contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 2
    assert gzip.decompress((tmp_path / "one.tsv.gz").read_bytes()) == (tmp_path / "three.tsv").read_bytes()


def test_at_least_one_variant_is_asked_for(tmp_path) -> None:
    with pytest.raises(ValueError, match="num_variants: expected at least 1, got 0"):
        write_variants(tmp_path / "train-en.tsv", EXAMPLES, XNLI, augmenter(), num_variants=0)
