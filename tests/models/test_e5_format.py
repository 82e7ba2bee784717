from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ear_ops.models.e5_format import E5FormatError, dequantise_q4_0, read_e5_file


def test_dequantise_follows_the_definition() -> None:
    # Byte j holds weight j in its low half and weight j + 16 in its high half: 0x8F is 15 - 8 = 7 and 8 - 8 = 0.
    nibbles = bytes([0x8F, 0x10] + [0x88] * 14)
    weights = dequantise_q4_0(np.frombuffer(np.float16(0.5).tobytes() + nibbles, np.uint8))
    expected = np.zeros(32, np.float32)
    expected[0], expected[1], expected[17] = 3.5, -4.0, -3.5
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, expected)


def test_head_and_tensors_are_read(tmp_path: Path, e5_writer: Any) -> None:
    expected = e5_writer.write(tmp_path / "e5.bin")
    e5 = read_e5_file(tmp_path / "e5.bin")
    assert (e5.hidden_size, e5.num_layers, e5.num_heads, e5.intermediate_size) == (32, 1, 2, 64)
    assert (e5.vocab_size, e5.num_positions, e5.num_types, e5.layer_norm_eps) == (14, 16, 2, 1e-5)
    assert (e5.bos_id, e5.eos_id, e5.pad_id, e5.unk_id) == (0, 2, 1, 3)
    assert list(zip(e5.pieces, e5.scores, strict=True)) == e5_writer.pieces
    assert e5.replacements == {1: (), 0xFB01: (ord("f"), ord("i"))}
    assert e5.tensors.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(e5.tensor(name), values.reshape(-1))


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("magic", b"GGUF", "b'GGUF'"),
        ("version", 2, "version 1 .* got 2"),
        ("block", 64, "blocks of 32 weights, got 64"),
    ],
)
def test_another_format_is_an_error(
    tmp_path: Path, e5_writer: Any, attribute: str, value: object, message: str
) -> None:
    setattr(e5_writer, attribute, value)
    e5_writer.write(tmp_path / "e5.bin")
    with pytest.raises(E5FormatError, match=message):
        read_e5_file(tmp_path / "e5.bin")


def test_a_file_cut_off_anywhere_is_an_error(tmp_path: Path, e5_writer: Any) -> None:
    expected = e5_writer.write(tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    for length in [4, 10, 50, 80, 150, 200, 300, 800, len(whole) - 1]:
        (tmp_path / "cut.bin").write_bytes(whole[:length])
        with pytest.raises(E5FormatError, match=r"damaged at byte|take .* bytes, got|starts with"):
            e5 = read_e5_file(tmp_path / "cut.bin")
            for name in expected:
                e5.tensor(name)


def test_an_unknown_tensor_dtype_is_an_error(tmp_path: Path, e5_writer: Any) -> None:
    e5_writer.write(tmp_path / "e5.bin")
    entry = struct.pack("<H", 8) + b"l0.aln.w"
    data = (tmp_path / "e5.bin").read_bytes()
    assert data.count(entry) == 1
    (tmp_path / "e5.bin").write_bytes(data.replace(entry + b"\x00", entry + b"\x07"))
    with pytest.raises(E5FormatError, match=r"l0\.aln\.w: expected dtype 0 .* got 7"):
        read_e5_file(tmp_path / "e5.bin").tensor("l0.aln.w")


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "e5.bin").write_bytes(b"")
    with pytest.raises(E5FormatError, match=r"e5\.bin: .* got an empty file"):
        read_e5_file(tmp_path / "e5.bin")


# From byte 8 on, the file holds seven sizes, a float and the size of a block; from byte 44 on, the pieces and four ids.
@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (8, -32, "width: expected at least 1, got -32"),
        (12, 0, "layers: expected at least 1, got 0"),
        (16, 3, "a multiple of the 3 heads, got 32"),
        (24, -1, "vocabulary: expected at least 1, got -1"),
        (44, -1, "pieces: expected at least 1, got -1"),
        (44, 2**31 - 1, "damaged at byte"),
        (48, -1, "bos: expected 0 to 11, got -1"),
        (60, 12, "unk: expected 0 to 11, got 12"),
    ],
)
def test_a_size_or_an_id_out_of_range_is_an_error(
    tmp_path: Path, e5_writer: Any, offset: int, value: int, message: str
) -> None:
    e5_writer.write(tmp_path / "e5.bin")
    data = bytearray((tmp_path / "e5.bin").read_bytes())
    struct.pack_into("<i", data, offset, value)
    (tmp_path / "e5.bin").write_bytes(data)
    with pytest.raises(E5FormatError, match=message):
        read_e5_file(tmp_path / "e5.bin")


@pytest.mark.parametrize(("count", "name"), [(2, "replacements"), (21, "tensors")])
def test_a_negative_count_is_an_error(tmp_path: Path, e5_writer: Any, count: int, name: str) -> None:
    e5_writer.write(tmp_path / "e5.bin")
    data = (tmp_path / "e5.bin").read_bytes()
    table = data.index(struct.pack("<IB", 0x01, 0) + struct.pack("<IB2I", 0xFB01, 2, ord("f"), ord("i")))
    place = table - 8 if name == "replacements" else table + 18
    assert data[place : place + 4] == struct.pack("<i", count)
    (tmp_path / "e5.bin").write_bytes(data[:place] + struct.pack("<i", -2) + data[place + 4 :])
    with pytest.raises(E5FormatError, match=rf"{name}: expected at least \d, got -2"):
        read_e5_file(tmp_path / "e5.bin")
