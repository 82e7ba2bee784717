"""Fixtures and hypothesis profiles of the whole suite; helpers are in ``support/``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

sys.path.append(str(Path(__file__).parent))  # `support`, also for --import-mode=importlib

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=25, **_COMMON)
settings.register_profile("ci", max_examples=15, derandomize=True, print_blob=True, **_COMMON)
settings.register_profile("thorough", max_examples=1000, **_COMMON)
settings.register_profile("quick", max_examples=10, phases=[Phase.explicit, Phase.generate], **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """A device with kernels, also the name of their backend; skipped, with the reason, where it cannot run here."""
    from ear_ops.ops import extension

    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is false")
    extension = {"cpu": extension.CPU, "cuda": extension.CUDA}[name]
    if not extension.loaded:
        pytest.skip(f"no {name} kernels: {extension.reason}")
    return name


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random BERT classifier and its tokenizer."""
    from support.tiny_task import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model"))
