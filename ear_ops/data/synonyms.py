"""Replace words by synonyms (Huang et al., 2021): a word becomes a uniform draw from itself and its neighbours.

The dictionary is a JSON object that maps a word to the list of its neighbours. An example is
`counterfitted_neighbors.json`, which comes from counter-fitted embeddings (Alzantot et al., 2018).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

from ear_ops.data.draws import draw_index
from ear_ops.data.pairs import DataError
from ear_ops.errors import shown

MATCHES = ("exact", "normalised")

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SENTENCE_END = re.compile(r"[.!?\u2026]\W*$")


def load_synonyms(path: str | Path, scale: float = 1.0, seed: int = 0) -> dict[str, list[str]]:
    """Read a synonym dictionary, or a share of it (Ding et al., 2022, table 6).

    Args:
        path: a JSON object that maps words to lists of words, in UTF-8.
        scale: the share of the entries to keep, 0 < scale <= 1. The number is rounded down: 0.75 keeps 37,481 of
            49,975 entries. Entries without neighbours count, too. With one seed, a larger share holds a smaller one.
        seed: decides which entries a share holds.

    Returns:
        The kept entries in the order of the file.

    Raises:
        DataError: the file is missing, or is not UTF-8, not JSON, or not an object from words to lists of words. Also
            where a word occurs twice, or has half of a surrogate pair, which is no character.
        ValueError: `scale` is out of range.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale: expected a share of the dictionary, 0 < scale <= 1, got {scale}")
    synonyms = _read_dictionary(Path(path))
    kept = int(Fraction(str(scale)) * len(synonyms))  # a fraction is exact: in floating point, 0.29 of 100 is 28
    if kept == len(synonyms):
        return synonyms
    # The entries are ranked by a digest. So the order of the file does not matter, and a larger share holds a smaller.
    share = set(sorted(synonyms, key=lambda word: _digest(f"{seed}/{word}"))[:kept])
    return {word: neighbours for word, neighbours in synonyms.items() if word in share}


class SynonymAugmenter:
    """Replaces words by synonyms and counts the words that it replaces.

    A text is split at single spaces. A word with neighbours becomes a uniform draw from itself and its neighbours.
    Every other word and every space stay.

    Args:
        synonyms: the neighbours of each word, from `load_synonyms`.
        match: how a word is looked up. `"exact"` takes the word as it is, with its case (Huang et al., 2021).
            `"normalised"` then also tries the word in lower case, without leading and trailing punctuation. The drawn
            word gets the punctuation back. It is capitalised, or all in capitals, where the word was. The capital of
            a single letter, as in `I` and `I'm`, counts only at the beginning of a sentence.

    Attributes:
        words: how many words it has seen (runs of characters other than a space).
        found: how many of these words the dictionary has, with neighbours or without.
        replaced: how many of these words became another word.

    Each process counts its own words: the workers of a data loader do not add to these counts.
    """

    def __init__(self, synonyms: dict[str, list[str]], match: str = "exact") -> None:
        if match not in MATCHES:
            raise ValueError(f"unknown match {match!r}: expected one of {', '.join(MATCHES)}")
        self.synonyms = synonyms
        self.match = match
        self.words = 0
        self.found = 0
        self.replaced = 0

    @property
    def replaced_share(self) -> float:
        """The share of the words that became another word, from 0 to 1. It is 0 before the first word."""
        return self.replaced / self.words if self.words else 0.0

    def summary(self) -> str:
        """Return the counts in one line, such as `replaced 13 of 100 words (13.0%), 40 in the dictionary`."""
        return (
            f"replaced {self.replaced:,} of {self.words:,} words ({self.replaced_share:.1%}), "
            f"{self.found:,} in the dictionary"
        )

    def augment(self, text: str, rng: random.Random) -> str:
        """Return `text` with the synonyms that `rng` draws. The result depends on the text and the state of `rng`."""
        words = text.split(" ")
        return " ".join([self._draw(words, index, rng) if word else word for index, word in enumerate(words)])

    def _draw(self, words: list[str], index: int, rng: random.Random) -> str:
        self.words += 1
        word = words[index]
        prefix, core, suffix = "", word, ""
        neighbours = self.synonyms.get(word)
        if neighbours is None and self.match == "normalised":
            prefix, core, suffix = _split_punctuation(word)
            neighbours = self.synonyms.get(core.lower())
        if neighbours is None:
            return word
        self.found += 1
        choice = draw_index(rng, 1 + len(neighbours)) if neighbours else 0
        if choice == 0:
            return word
        drawn = neighbours[choice - 1]
        if self.match == "normalised":
            if not _starts_with_lone_letter(core) or _begins_sentence(words[:index]):
                drawn = _copy_capitals(core, drawn)
            drawn = prefix + drawn + suffix
        self.replaced += drawn != word
        return drawn


def _split_punctuation(word: str) -> tuple[str, str, str]:
    """Split a word into leading punctuation and symbols, the core, and trailing punctuation and symbols."""
    start, end = 0, len(word)
    while start < end and unicodedata.category(word[start])[0] in "PS":
        start += 1
    while start < end and unicodedata.category(word[end - 1])[0] in "PS":
        end -= 1
    return word[:start], word[start:end], word[end:]


def _starts_with_lone_letter(core: str) -> bool:
    """Whether a word is like `I` and `I'm`, whose capital says nothing. That of `O'Brien` says that it is a name."""
    letter, _, rest = core.replace("\u2019", "'").partition("'")
    return len(letter) == 1 and rest == rest.lower()


def _begins_sentence(words_before: list[str]) -> bool:
    """Whether the next word is the first of a sentence. Words of punctuation alone, such as dashes, do not count."""
    for word in reversed(words_before):
        if _SENTENCE_END.search(word):
            return True
        if any(character.isalnum() for character in word):
            return False
    return True


def _copy_capitals(pattern: str, word: str) -> str:
    if len(pattern) > 1 and pattern.isupper():
        return word.upper()
    if pattern[:1].isupper():
        return word[:1].upper() + word[1:]
    return word


def _read_dictionary(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a JSON object from words to lists of neighbours")

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for word, neighbours in pairs:
            if word in entries:
                raise DataError(f"{path}: {shown(word)} occurs twice: join its neighbours in one list")
            entries[word] = neighbours
        return entries

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=object_of)
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from None
    except RecursionError:
        raise DataError(f"{path}: expected a JSON object from words to lists of neighbours, got a deeper one") from None
    except ValueError as error:  # such as a number of thousands of digits
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object from words to lists of neighbours, got {_json_type(content)}")
    for word, neighbours in content.items():
        if not isinstance(neighbours, list) or not all(isinstance(neighbour, str) for neighbour in neighbours):
            raise DataError(
                f"{path}: expected a list of words as the neighbours of {shown(word)}, got {shown(neighbours)}"
            )
    if _ESCAPED_SURROGATE.search(text):
        for word in chain(content, *content.values()):
            if any("\ud800" <= character <= "\udfff" for character in word):
                raise DataError(f"{path}: {shown(word)} has half of a surrogate pair, which is no character")
    return content


def _json_type(content: object) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(content), "a number")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
