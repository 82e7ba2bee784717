"""Write the offline model with some of its pieces only, so that an archive stays small."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ear_ops.models.e5_format import E5File

WORD_EMBEDDINGS = "emb.word"


def write_with_pieces(e5: E5File, tokens: Sequence[int], path: str | os.PathLike[str]) -> None:
    """Write a model file that has some pieces of `e5`, numbered anew in their order. No weight changes.

    `ear_ops.models.e5_format` describes and reads the format.

    Args:
        e5: the whole model.
        tokens: the ids of the pieces to keep, in ascending order. The special tokens must be among them.
        path: the file to write.

    Raises:
        ValueError: a special token is missing, or the ids are not in ascending order.
    """
    new_ids = {old: new for new, old in enumerate(tokens)}
    specials = (e5.bos_id, e5.eos_id, e5.pad_id, e5.unk_id)
    if list(tokens) != sorted(new_ids) or not new_ids.keys() >= set(specials):
        raise ValueError(f"tokens: expected ascending ids with {specials} among them")
    texts = [e5.pieces[token].encode() for token in tokens]
    sizes = (e5.hidden_size, e5.num_layers, e5.num_heads, e5.intermediate_size, len(tokens), e5.num_positions)
    head = b"E5S1" + struct.pack("<I7ifi", 1, *sizes, e5.num_types, e5.layer_norm_eps, 32)
    head += struct.pack("<5iQ", len(tokens), *(new_ids[special] for special in specials), sum(map(len, texts)))
    head += np.cumsum([0, *map(len, texts)]).astype("<u4").tobytes()
    head += np.array([e5.scores[token] for token in tokens], "<f4").tobytes() + b"".join(texts)
    table = [struct.pack(f"<IB{len(to)}I", codepoint, len(to), *to) for codepoint, to in e5.replacements.items()]
    head += struct.pack("<iI", len(table), sum(map(len, table))) + b"".join(table) + struct.pack("<i", len(e5.tensors))
    offset = len(head) + sum(2 + len(name.encode()) + struct.calcsize("<BIQQ") for name in e5.tensors)
    directory, body = [], []
    for name, stored in e5.tensors.items():
        raw, elements = e5.data[stored.offset : stored.offset + stored.num_bytes], stored.elements
        if name == WORD_EMBEDDINGS:  # Q4_0 blocks do not cross rows, so a row is a whole number of bytes
            raw, elements = raw.reshape(e5.vocab_size, -1)[list(tokens)].reshape(-1), len(tokens) * e5.hidden_size
        directory.append(struct.pack("<H", len(name.encode())) + name.encode())
        directory.append(struct.pack("<BIQQ", stored.dtype, elements, offset, len(raw)))
        body.append(raw.tobytes())
        offset += len(raw)
    Path(path).write_bytes(head + b"".join(directory) + b"".join(body))
