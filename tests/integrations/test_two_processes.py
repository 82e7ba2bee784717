"""Two processes on half of the pairs each get the gradients of eager attention on all of them in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch without gloo", allow_module_level=True)

from support import sharded, two_processes


@pytest.mark.parametrize(
    ("wrapping", "views"), [("ddp", "one forward"), ("ddp", "two forwards"), ("fsdp2", "one forward")]
)
@pytest.mark.parametrize(("reduction", "padded"), [("mean", False), ("equations", True)])
def test_gradients_are_those_of_one_process(
    tmp_path: Path, wrapping: str, views: str, reduction: str, padded: bool
) -> None:
    """Where every process has as many pairs; `mean` moreover counts as many tokens in each."""
    expected = sharded.step_of_eager_attention(reduction, padded)
    shares = two_processes.run(sharded.step, tmp_path, wrapping, views, reduction, padded)
    losses = [float(gradients.pop("loss")) for gradients in shares]
    assert sum(losses) / 2 == pytest.approx(float(expected.pop("loss")), rel=1e-5)
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for gradients in shares:
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            error = float((gradients[name] - gradient).norm())
            assert error <= 1e-5 * max(float(gradient.norm()), 1e-2 * largest), (name, error)


def test_ragged_means_are_normalised_by_each_process(tmp_path: Path) -> None:
    """What the documentation says of `mean` where the processes count different numbers of tokens."""
    expected = sharded.step_of_eager_attention("mean", True)
    gradients, _ = two_processes.run(sharded.step, tmp_path, "ddp", "one forward", "mean", True)
    name = "bert.encoder.layer.1.attention.self.query.weight"
    assert not torch.allclose(gradients[name], expected[name], rtol=1e-3)
