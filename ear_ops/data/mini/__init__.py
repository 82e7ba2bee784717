"""Small data sets in the form of XNLI and PAWS-X, and a synonym dictionary, to run a pipeline without a download.

They were written for this project and are dedicated to the public domain (CC0-1.0). They serve demonstrations and
tests only: they are far too small to compare models or methods.
"""

from __future__ import annotations

from pathlib import Path


def mini_data_dir() -> Path:
    """Return the folder that holds `xnli/`, `pawsx/` (`{split}-{language}.tsv`) and `synonyms.json`.

    `ear_ops.data.load_split` takes it as `data_dir`, and `ear_ops.data.load_synonyms` reads `synonyms.json`. Training
    data is English. Development and test data is parallel in every language of the task.
    """
    return Path(__file__).resolve().parent
