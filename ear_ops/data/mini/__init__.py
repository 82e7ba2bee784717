"""Embedded mini XNLI and PAWS-X with a small synonym dictionary: see that a pipeline runs, with nothing to download.

Written for this project and dedicated to the public domain (CC0-1.0). For demonstrations and tests only: the sets are
far too small for a claim about any model or method.
"""

from __future__ import annotations

from pathlib import Path


def mini_data_dir() -> Path:
    """Return the folder that holds `xnli/`, `pawsx/` (`{split}-{language}.tsv`) and `synonyms.json`.

    It serves as `data_dir` of `ear_ops.data.load_split`; `synonyms.json` is read by `ear_ops.data.load_synonyms`.
    Training data is English; development and test data is parallel in every language of the task.
    """
    return Path(__file__).resolve().parent
