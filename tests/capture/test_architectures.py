"""Check the capture of some model types. benchmarks/check_architectures.py checks every type."""

from __future__ import annotations

import pytest
from support.attention_check import STAND_IN, check

INTERFACE = (
    "bert", "electra", "modernbert", "llama", "gemma2", "qwen3", "mistral", "gpt2", "opt", "deepseek_v3", "t5", "bart",
    "albert", "vit", "dinov2", "swin",
)  # fmt: skip
INSIDE = ("deberta-v2", "bloom", "falcon", "xlnet")
REFUSED = {"gpt_oss": "attention sinks", "longformer": "sparse and local attention", "mamba": "no self-attention"}


@pytest.mark.parametrize("model_type", [*INTERFACE, *INSIDE])
def test_captured_attention_is_that_of_eager(model_type):
    row = check(model_type)
    assert row["status"] == "correct", row
    assert row["mechanism"] == ("inside the module" if model_type in INSIDE else "attention interface")
    assert model_type in (*INSIDE, "swin", "t5") or STAND_IN in row["difference"], row


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_captured_is_refused(model_type):
    row = check(model_type)
    assert row["status"] == "refused", row
    assert any(REFUSED[model_type] in reason for reason in row["refused"])
