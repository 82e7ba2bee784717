from __future__ import annotations

from pathlib import Path

import pytest

from ear_ops.data import DataError, load_parallel


def test_every_language_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "fr-en.tsv").write_text("Bonjour.\tHello.\nOui.\tYes.\n")
    (tmp_path / "de-en.tsv").write_text("Ja.\tYes.\n")
    (tmp_path / "README.md").write_text("not data")
    assert load_parallel(tmp_path) == {"de": [("Ja.", "Yes.")], "fr": [("Bonjour.", "Hello."), ("Oui.", "Yes.")]}
    assert load_parallel(tmp_path, limit=1)["fr"] == [("Bonjour.", "Hello.")]
    with open(tmp_path / "de-en.tsv", "a") as file:
        file.write("one column\n")
    with pytest.raises(DataError, match=r"de-en\.tsv:2: expected 2 tab-separated columns \(sentence, English\)"):
        load_parallel(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no parallel sentences; expected files such as de-en\.tsv"):
        load_parallel(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        load_parallel(tmp_path / "none")
