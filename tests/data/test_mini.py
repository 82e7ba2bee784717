from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter

import pytest

from ear_ops.data.mini import mini_data_dir
from ear_ops.data.pairs import PairExample, available_languages, load_split, read_pairs
from ear_ops.data.synonyms import SynonymAugmenter, load_synonyms
from ear_ops.data.tasks import PAWSX, TASKS, XNLI, Task

# The number of rows in each file. The training data is English, the other splits are parallel in all languages.
ROWS = {("xnli", "train"): 180, ("pawsx", "train"): 60} | {
    (task, split): rows for task in TASKS for split, rows in (("dev", 12), ("test", 24))
}
FILES = [
    (task, split, language)
    for task in TASKS.values()
    for split in ("train", "dev", "test")
    for language in (task.languages if split != "train" else ("en",))
]
EVERY_FILE = pytest.mark.parametrize(
    ("task", "split", "language"), FILES, ids=[f"{task.name}-{split}-{language}" for task, split, language in FILES]
)

# The first word in the Unicode names of the letters of a language. Languages that are not listed have LATIN.
SCRIPTS = {
    "ar": {"ARABIC"},
    "bg": {"CYRILLIC"},
    "el": {"GREEK"},
    "hi": {"DEVANAGARI"},
    "ja": {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"},
    "ko": {"HANGUL"},
    "ru": {"CYRILLIC"},
    "th": {"THAI"},
    "ur": {"ARABIC"},
    "zh": {"CJK"},
}
# Frequent words, by which languages of the same script can be told apart.
FUNCTION_WORDS = {
    "ar": "في من على التي إلى أن لم كل هذا لا هذه",
    "bg": "да ще че беше няма това които към",
    "de": "der die das und ist wird nicht ein eine im den zu hat",
    "en": "the and of is was to in it has not for",
    "es": "el los las y es una del por que su",
    "fr": "le les et est une du des la pas dans au",
    "ru": "что он из был была было это чтобы или",
    "sw": "ya na wa kwa ni katika za la hakuna kila watu",
    "tr": "bir ve için bu çok daha değil kadar sonra",
    "ur": "کے کی میں ہے سے نے کو اور",
    "vi": "của và là có không một trong các được đã",
}


def load(task: Task, split: str, language: str) -> list[PairExample]:
    return load_split(mini_data_dir(), task, split, language)


def texts(examples: list[PairExample]) -> list[str]:
    return [text for example in examples for text in example[:2]]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def overlap(example: PairExample) -> float:
    """Return the number of words in both texts, divided by the number of words in either text."""
    first, second = set(words(example.text1)), set(words(example.text2))
    return len(first & second) / len(first | second)


def first_places(items: list[str]) -> list[int]:
    return [items.index(item) for item in items]


def test_the_folder_holds_exactly_the_documented_files() -> None:
    present = {path.relative_to(mini_data_dir()).as_posix() for path in mini_data_dir().rglob("*.[tj]s*")}
    assert present == {f"{task.name}/{split}-{language}.tsv" for task, split, language in FILES} | {"synonyms.json"}
    assert available_languages(mini_data_dir(), XNLI, "test") == list(XNLI.languages)
    assert available_languages(mini_data_dir(), PAWSX, "dev") == list(PAWSX.languages)


@EVERY_FILE
def test_every_file_has_its_rows_and_as_many_of_each_label(task: Task, split: str, language: str) -> None:
    examples = read_pairs(mini_data_dir() / task.name / f"{split}-{language}.tsv", task)
    labels = Counter(example.label for example in examples)
    share = ROWS[task.name, split] // len(task.labels)
    assert labels == {label: share for label in range(len(task.labels))}


@EVERY_FILE
def test_every_file_is_plain_tsv_without_stray_characters(task: Task, split: str, language: str) -> None:
    content = (mini_data_dir() / task.name / f"{split}-{language}.tsv").read_bytes().decode("utf-8")
    assert content.endswith("\n")
    assert unicodedata.normalize("NFC", content) == content
    # These characters are odd: other spaces and line ends, invisible characters, and the quotes of CSV files. The
    # spelling of Hindi and Urdu needs the zero-width non-joiner and joiner.
    allowed = {"\t", "\n", " "} | ({"\u200c", "\u200d"} if language in ("hi", "ur") else set())
    odd = {c for c in content if unicodedata.category(c)[0] in "ZC" or c == '"'} - allowed
    assert not odd
    for text in texts(load(task, split, language)):
        assert text and text == text.strip() and "  " not in text


@EVERY_FILE
def test_no_row_and_no_pair_of_equal_texts_is_repeated(task: Task, split: str, language: str) -> None:
    examples = load(task, split, language)
    assert len({example[:2] for example in examples}) == len(examples)
    assert all(example.text1 != example.text2 for example in examples)


@EVERY_FILE
def test_every_text_is_in_the_script_of_its_language(task: Task, split: str, language: str) -> None:
    for text in texts(load(task, split, language)):
        letters = [unicodedata.name(character).split()[0] for character in text if character.isalpha()]
        native = sum(letter in SCRIPTS.get(language, {"LATIN"}) for letter in letters)
        assert native > 0.9 * len(letters), text


@EVERY_FILE
def test_languages_of_one_script_are_not_mixed_up(task: Task, split: str, language: str) -> None:
    sentences = texts(load(task, split, language))
    if language in ("ja", "zh"):
        kana = [bool(re.search("[\u3040-\u30ff]", text)) for text in sentences]
        assert all(kana) if language == "ja" else not any(kana)
        return
    counts = Counter(word for text in sentences for word in words(text))
    scripts = SCRIPTS.get(language, {"LATIN"})
    scores = {
        other: sum(counts[word] for word in function_words.split())
        for other, function_words in FUNCTION_WORDS.items()
        if SCRIPTS.get(other, {"LATIN"}) == scripts
    }
    if scores:  # otherwise no other language has this script
        best, *rest = sorted(scores, key=lambda other: scores[other], reverse=True)
        assert best == language and scores[best] > 1.5 * scores[rest[0]]


PARALLEL = [(task, split, language) for task, split, language in FILES if split != "train" and language != "en"]


@pytest.mark.parametrize(
    ("task", "split", "language"),
    PARALLEL,
    ids=[f"{task.name}-{split}-{language}" for task, split, language in PARALLEL],
)
def test_translations_are_parallel(task: Task, split: str, language: str) -> None:
    english, translated = load(task, split, "en"), load(task, split, language)
    assert [example.label for example in translated] == [example.label for example in english]
    assert not set(texts(translated)) & set(texts(english))
    for original, translation in zip(texts(english), texts(translated), strict=True):
        # Years and large numbers are digits in every language, so they reveal a shifted or swapped line.
        assert re.findall(r"\d{3,}", translation) == re.findall(r"\d{3,}", original), translation
    # The translation repeats the same texts as the English data.
    assert first_places(texts(translated)) == first_places(texts(english))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_splits_share_no_text(task: Task) -> None:
    for language in task.languages:
        dev, test = (set(texts(load(task, split, language))) for split in ("dev", "test"))
        assert not dev & test
    train = set(texts(load(task, "train", "en")))
    for split in ("dev", "test"):
        held_out = load(task, split, "en")
        assert not train & set(texts(held_out))
        for text in {example.text1 for example in held_out}:  # nor is a text of the training data similar
            nearest = max(train, key=lambda other: overlap(PairExample(text, other, 0)))
            assert overlap(PairExample(text, nearest, 0)) < 0.5, (text, nearest)


def test_every_xnli_training_premise_comes_with_each_label_once() -> None:
    examples = load(XNLI, "train", "en")
    labels: dict[str, list[int]] = {}
    for example in examples:
        labels.setdefault(example.text1, []).append(example.label)
    assert len(labels) == 60 and all(sorted(of_premise) == [0, 1, 2] for of_premise in labels.values())
    assert all(8 <= len(premise.split()) <= 25 for premise in labels)
    assert all(4 <= len(example.text2.split()) <= 12 for example in examples)


def test_hypotheses_do_not_give_the_label_away() -> None:
    examples = load(XNLI, "train", "en")
    negated = Counter(
        e.label for e in examples if re.search(r"(?i)\b(not?|never|nobody|nothing|without|cannot)\b", e.text2)
    )
    assert min(negated.values()) > 0.25 * negated.total() and len(negated) == 3
    lengths = [sum(len(e.text2.split()) for e in examples if e.label == label) / 60 for label in range(3)]
    assert max(lengths) - min(lengths) < 1


@pytest.mark.parametrize(("split", "language"), [(split, lang) for task, split, lang in FILES if task is PAWSX])
def test_pawsx_has_each_first_sentence_with_both_labels(split: str, language: str) -> None:
    labels: dict[str, list[int]] = {}
    for example in load(PAWSX, split, language):
        labels.setdefault(example.text1, []).append(example.label)
    assert all(sorted(of_sentence) == [0, 1] for of_sentence in labels.values())


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_pawsx_pairs_share_most_words_whatever_the_label(split: str) -> None:
    examples = load(PAWSX, split, "en")
    assert min(map(overlap, examples)) >= 0.6
    means = [sum(overlap(e) for e in examples if e.label == label) * 2 / len(examples) for label in range(2)]
    assert abs(means[0] - means[1]) < 0.1


def test_synonyms_are_lower_case_words_of_the_training_sentences() -> None:
    synonyms = load_synonyms(mini_data_dir() / "synonyms.json")
    known = {word for task in TASKS.values() for text in texts(load(task, "train", "en")) for word in words(text)}
    assert set(synonyms) <= known
    assert sum(bool(neighbours) for neighbours in synonyms.values()) >= 250
    assert synonyms["the"] == synonyms["not"] == []
    for word, neighbours in synonyms.items():
        assert all(re.fullmatch(r"[a-z]+", entry) for entry in (word, *neighbours)), word
        assert word not in neighbours and len(set(neighbours)) == len(neighbours), word


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_synonyms_cover_the_training_sentences(task: Task) -> None:
    synonyms = load_synonyms(mini_data_dir() / "synonyms.json")
    augmenter = SynonymAugmenter({word: neighbours for word, neighbours in synonyms.items() if neighbours})
    changed = [augmenter.augment(text, random.Random(0)) != text for text in texts(load(task, "train", "en"))]
    assert augmenter.found >= 0.15 * augmenter.words
    assert any(changed)
