"""The content of a `results.json`, for tests that write it by hand."""

from __future__ import annotations

from typing import Any


def run_results(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Results of a run of `ear` in English with these settings. `changes` replaces entries."""
    score = {"accuracy": 0.5, "correct": 5, "total": 10, "low": 0.2, "high": 0.8}
    return {
        "task": "xnli",
        "split": "dev",
        "regularised": True,
        "collapsed": False,
        "average": 0.5,
        "average_other": None,
        "languages": {"en": score},
        "best": {"step": 8, "dev_accuracy": 0.5},
        "steps": 8,
        "terms": {"cross_entropy": 1.25},
        "replaced": None,
        "notices": [],
        "config": {"method": "ear", "preset": "paper", "model": "tiny", "seed": 1, "data_dir": None, **settings},
        "versions": {"python": "3.11"},
        "date": "2026-01-02",
        **changes,
    }
