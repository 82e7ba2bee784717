from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ear_ops.data.pairs import DataError, load_split
from ear_ops.data.synonyms import SynonymAugmenter, load_synonyms
from ear_ops.data.tasks import XNLI
from ear_ops.data.views import PairViews

MOVIE = {"movie": ["film", "cinema", "picture"], "a": [], "good": ["fine"], "it's": ["tis"], "UNK": ["unknown"]}
WORDS = st.sampled_from(
    ["movie", "Movie", "movie.", "a", "good", "x", "", "\u00a0", "NS", "(GOOD)", "--", "\u201cGood\u201d"]
)


def outcomes(text: str, match: str) -> set[str]:
    augmenter = SynonymAugmenter(MOVIE, match=match)
    return {augmenter.augment(text, random.Random(seed)) for seed in range(60)}


@pytest.mark.parametrize("match", ["exact", "normalised"])
def test_a_word_becomes_a_uniform_draw_from_itself_and_its_neighbours(match) -> None:
    augmenter = SynonymAugmenter(MOVIE, match=match)
    rng = random.Random(3)
    drawn = Counter(augmenter.augment("movie", rng) for _ in range(8000))
    assert set(drawn) == {"movie", "film", "cinema", "picture"}
    assert sum((count - 2000) ** 2 / 2000 for count in drawn.values()) < 21.2  # chi squared, 3 degrees, p = 1e-4


def test_words_of_one_text_are_drawn_independently() -> None:
    assert outcomes("movie good good", "exact") == {
        f"{first} {second} {third}"
        for first in ("movie", "film", "cinema", "picture")
        for second in ("good", "fine")
        for third in ("good", "fine")
    }


@pytest.mark.parametrize("text", ["Movie", "GOOD", "movie.", "(good", "good,good", "a", "other", "", " ", "\u00a0good"])
def test_exact_finds_a_word_only_as_it_stands(text) -> None:
    assert outcomes(text, "exact") == {text}


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("good", "fine"),
        ("Good", "Fine"),
        ("GOOD", "FINE"),
        ("gOOD", "fine"),
        ("good.", "fine."),
        ("(\u201cGood!\u201d),", "(\u201cFine!\u201d),"),
        ("$good+", "$fine+"),
        ("It's", "Tis"),
        ("it's,", "tis,"),
        ("UNK", "UNKNOWN"),
    ],
)
def test_normalised_looks_behind_case_and_punctuation_and_keeps_them(text, other) -> None:
    assert outcomes(text, "normalised") == {text, other}


PRONOUNS = {"i": ["me"], "i'm": ["im"], "a": ["any"], "o'brien": ["o'neill"], "paris": ["london"]}


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("yes I do", "yes me do"),
        ("yes, (I) do", "yes, (me) do"),
        ("yes I'm in", "yes im in"),
        ("yes I\u2019m in", None),
        ("I do", "Me do"),
        ("\u201cI do", "\u201cMe do"),
        ("- I do", "- Me do"),
        ("Yes. I do", "Yes. Me do"),
        ("(Yes!) I do", "(Yes!) Me do"),
        ("Yes ... I do", "Yes ... Me do"),
        ("I'm in", "Im in"),
        ("A man", "Any man"),
        ("plan A works", "plan any works"),
        ("say I'M in", "say IM in"),
        ("with O'Brien", "with O'neill"),
        ("in Paris", "in London"),
    ],
)
def test_the_capital_of_a_single_letter_counts_at_the_beginning_of_a_sentence_alone(text, other) -> None:
    augmenter = SynonymAugmenter(PRONOUNS, match="normalised")
    seen = {augmenter.augment(text, random.Random(seed)) for seed in range(40)}
    assert seen == ({text, other} if other else {text})


@pytest.mark.parametrize("text", ["good,good", "un-good", "...", "a", "A.", "goods", "unk", "", "good\u00a0"])
def test_normalised_does_not_find_what_is_not_there(text) -> None:
    assert outcomes(text, "normalised") == {text}


@given(words=st.lists(WORDS), seed=st.integers(0, 5), match=st.sampled_from(["exact", "normalised"]))
def test_spaces_and_unknown_words_survive_and_the_counts_are_true(words, seed, match) -> None:
    augmenter = SynonymAugmenter(MOVIE, match=match)
    text = " ".join(words)
    result = augmenter.augment(text, random.Random(seed))
    before, after = text.split(" "), result.split(" ")
    assert len(before) == len(after)
    assert [word == "" for word in before] == [word == "" for word in after]
    assert augmenter.words == sum(word != "" for word in before)
    assert augmenter.replaced == sum(old != new for old, new in zip(before, after, strict=True))
    findable = {"exact": {"movie", "good", "a"}, "normalised": {"movie", "good", "a", "Movie", "movie.", "(GOOD)"}}
    findable["normalised"].add("\u201cGood\u201d")
    assert augmenter.found == sum(word in findable[match] for word in before)
    assert SynonymAugmenter({}, match=match).augment(text, random.Random(seed)) == text


def test_the_same_seed_gives_the_same_text() -> None:
    text = "a good movie is a good movie is a good movie"
    assert (
        SynonymAugmenter(MOVIE).augment(text, random.Random("7/2/31")) == "a fine film is a fine movie is a fine cinema"
    )


def test_counts_add_up_over_texts_and_are_printed() -> None:
    augmenter = SynonymAugmenter(MOVIE)
    assert augmenter.replaced_share == 0.0
    for seed in range(1000):
        augmenter.augment("a movie is x", random.Random(seed))
    assert (augmenter.words, augmenter.found) == (4000, 2000)
    assert 700 < augmenter.replaced < 800  # three quarters of the 1000 times "movie"
    assert augmenter.replaced_share == augmenter.replaced / 4000
    share = f"{augmenter.replaced / 40:.1f}%"
    assert augmenter.summary() == f"replaced {augmenter.replaced} of 4,000 words ({share}), 2,000 in the dictionary"


def test_an_unknown_match_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown match 'fuzzy': expected one of exact, normalised"):
        SynonymAugmenter(MOVIE, match="fuzzy")


def test_a_dictionary_is_read_whole_and_in_order(write_file) -> None:
    loaded = load_synonyms(write_file("synonyms.json", json.dumps(MOVIE)))
    assert list(loaded.items()) == list(MOVIE.items())


def test_a_share_counts_all_entries_and_rounds_down(write_file) -> None:
    full = {f"word{i}": ["x"] if i % 2 else [] for i in range(49975)}
    path = write_file("synonyms.json", json.dumps(full))
    shares = {scale: load_synonyms(path, scale) for scale in (1.0, 0.75, 0.5, 0.25)}
    assert [len(share) for share in shares.values()] == [49975, 37481, 24987, 12493]  # table 6
    assert set(shares[0.25]) < set(shares[0.5]) < set(shares[0.75]) < set(full)
    assert list(shares[0.5]) == [word for word in full if word in shares[0.5]]
    assert all(shares[0.5][word] == full[word] for word in shares[0.5])
    assert 0.48 < sum(map(bool, shares[0.5].values())) / 24987 < 0.52
    assert load_synonyms(path, 0.5) == shares[0.5]
    both = len(set(load_synonyms(path, 0.5, seed=1)) & set(shares[0.5]))
    assert 0.48 < both / 24987 < 0.52  # another seed keeps another half


@pytest.mark.parametrize(("scale", "kept"), [(0.29, 29), (0.57, 57), (0.999, 99), (0.01, 1)])
def test_a_share_is_free_of_floating_point(write_file, scale, kept) -> None:
    path = write_file("synonyms.json", json.dumps({f"word{i}": [] for i in range(100)}))
    assert len(load_synonyms(path, scale)) == kept


def test_which_words_a_share_keeps_never_changes(write_file) -> None:
    path = write_file("synonyms.json", json.dumps({word: ["x"] for word in "abcdefghij"}))
    assert "".join(load_synonyms(path, 0.4, seed=5)) == "acdj"


def test_words_outside_the_share_are_never_replaced(write_file) -> None:
    path = write_file("synonyms.json", json.dumps({f"word{i}": ["x"] for i in range(40)}))
    kept = load_synonyms(path, 0.25)
    augmenter = SynonymAugmenter(kept, match="normalised")
    text = " ".join(f"word{i}" for i in range(40))
    replaced: set[str] = set()
    for seed in range(60):
        words = augmenter.augment(text, random.Random(seed)).split(" ")
        replaced.update(old for old, new in zip(text.split(" "), words, strict=True) if old != new)
    assert replaced == set(kept)
    assert len(kept) == 10


@pytest.mark.parametrize("scale", [0, -0.5, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_an_error(write_file, scale) -> None:
    path = write_file("synonyms.json", json.dumps(MOVIE))
    with pytest.raises(ValueError, match="scale: expected a share"):
        load_synonyms(path, scale)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": [],\n "b" ["c"]}', r":2: not JSON"),
        ("", r":1: not JSON"),
        ('["a"]', "expected a JSON object from words to lists of neighbours, got an array"),
        ('{"a": "b"}', "expected a list of words as the neighbours of 'a', got 'b'"),
        ('{"x": [], "a": ["b", 3]}', r"neighbours of 'a', got \['b', 3\]"),
        (b'{"a": ["\xff"]}', "not UTF-8"),
        ("[" * 100_000, "expected a JSON object .* got a deeper one"),
        ('{"a": ' + "[" * 500 + "]" * 500 + "}", r"neighbours of 'a', got \[\[.{,60}$"),
        ('{"a": ["b"], "c": ' + "1" * 5000 + "}", "not JSON: .*digits"),
        ('{"a": ["b"], "c\\ud800": []}', r"'c\\ud800' has half of a surrogate pair"),
        ('{"a": ["b\\udc80"]}', r"'b\\udc80' has half of a surrogate pair"),
        ('{"a": ["b"], "c": [], "a": ["d"]}', "'a' occurs twice: join its neighbours in one list"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_bad_dictionary_is_an_error_with_the_path(write_file, content, message) -> None:
    path = write_file("synonyms.json", content)
    with pytest.raises(DataError, match=message) as caught:
        load_synonyms(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_dictionary_is_an_error_with_the_path(tmp_path) -> None:
    with pytest.raises(DataError, match=r"synonyms\.json: no such file"):
        load_synonyms(tmp_path / "synonyms.json")


def test_the_published_dictionary_and_its_share_of_replaced_words(xtreme_data) -> None:
    path = xtreme_data / "synonyms" / "counterfitted_neighbors.json"
    assert [len(load_synonyms(path, scale)) for scale in (1.0, 0.75, 0.5, 0.25)] == [49975, 37481, 24987, 12493]
    synonyms = load_synonyms(path)
    examples = load_split(xtreme_data, XNLI, "train", "en")[:4000]
    shares = {}
    for match in ("exact", "normalised"):
        augmenter = SynonymAugmenter(synonyms, match=match)
        for item in PairViews(examples, augmenter):
            assert len(item["augmented"]) == 2
        shares[match] = augmenter.replaced_share
    assert shares == {"exact": pytest.approx(0.355, abs=0.01), "normalised": pytest.approx(0.445, abs=0.01)}


def test_a_whole_surrogate_pair_is_a_character(write_file) -> None:
    assert load_synonyms(write_file("synonyms.json", '{"\\ud83d\\ude00": ["x"]}')) == {"\U0001f600": ["x"]}
