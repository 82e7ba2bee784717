"""Test the model file that `benchmarks/packed_model.py` writes for an archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from packed_model import write_with_pieces
from support.e5_writer import E5Writer

from ear_ops.models.e5_format import read_e5_file


def test_a_file_with_some_of_the_pieces_has_their_weights_and_all_others(tmp_path: Path) -> None:
    expected = E5Writer().write(tmp_path / "whole.bin")
    whole, tokens = read_e5_file(tmp_path / "whole.bin"), [0, 1, 2, 3, 5, 9, 11]
    write_with_pieces(whole, tokens, tmp_path / "some.bin")
    some = read_e5_file(tmp_path / "some.bin")
    assert some.pieces == [whole.pieces[token] for token in tokens] and "▁é" in some.pieces
    assert some.scores == [whole.scores[token] for token in tokens]
    assert (some.vocab_size, some.bos_id, some.eos_id, some.pad_id, some.unk_id) == (7, 0, 2, 1, 3)
    for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "num_positions", "num_types"):
        assert getattr(some, name) == getattr(whole, name)
    assert (some.replacements, some.layer_norm_eps) == (whole.replacements, whole.layer_norm_eps)
    assert some.tensors.keys() == whole.tensors.keys()
    for name, values in expected.items():
        values = values[tokens] if name == "emb.word" else values
        np.testing.assert_array_equal(some.tensor(name), values.reshape(-1))
    for wrong in ([0, 1, 2, 5], [0, 1, 3, 2]):
        with pytest.raises(ValueError, match="ascending ids"):
            write_with_pieces(whole, wrong, tmp_path / "wrong.bin")
