"""Write small files in the format of the offline model."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class E5Writer:
    """Writes a small file in the format of ``e5-small-q4.bin``. A test changes attributes to get a wrong file."""

    hidden: int = 32
    layers: int = 1
    heads: int = 2
    intermediate: int = 64
    positions: int = 16
    magic: bytes = b"E5S1"
    version: int = 1
    block: int = 32
    layer_norm_eps: float = 1e-5
    pieces: list[tuple[str, float]] = field(
        default_factory=lambda: [
            ("<s>", 0.0),
            ("<pad>", 0.0),
            ("</s>", 0.0),
            ("<unk>", 0.0),
            *[("▁", -4.0), ("▁ab", -2.0), ("a", -5.0), ("b", -5.0), ("c", -5.0), ("▁é", -3.0), ("\uff5e", -6.0)],
            ("<mask>", 0.0),
        ]
    )
    skip: str | None = None

    @property
    def vocab(self) -> int:
        return len(self.pieces) + 2  # the embedding has spare rows, as in the real file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        c, f = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {
            "emb.word": (self.vocab, c),
            "emb.pos": (self.positions, c),
            "emb.type": (2, c),
            "emb.ln.w": (c,),
            "emb.ln.b": (c,),
        }
        for i in range(self.layers):
            for name, shape in {
                "q": (c, c),
                "k": (c, c),
                "v": (c, c),
                "ao": (c, c),
                "fi": (f, c),
                "fo": (c, f),
            }.items():
                shapes |= {f"l{i}.{name}.w": shape, f"l{i}.{name}.b": shape[:1]}
            for name in ("aln", "oln"):
                shapes |= {f"l{i}.{name}.w": (c,), f"l{i}.{name}.b": (c,)}
        return {name: shape for name, shape in shapes.items() if name != self.skip}

    def write(self, path: Path) -> dict[str, np.ndarray]:
        """Write the file, and return the tensors that a reader must get from it."""
        rng = np.random.default_rng(0)
        expected, stored = {}, {}
        for name, shape in self.shapes().items():
            if len(shape) == 2 and name not in ("emb.pos", "emb.type"):
                blocks = int(np.prod(shape)) // 32
                scales = rng.uniform(0.001, 0.1, blocks).astype("<f2")
                quants = rng.integers(0, 16, (blocks, 32)).astype(np.uint8)
                packed = b""
                for scale, quant in zip(scales, quants, strict=True):
                    packed += scale.tobytes() + bytes(int(quant[j]) | int(quant[j + 16]) << 4 for j in range(16))
                expected[name] = ((quants.astype(np.float32) - 8) * scales.astype(np.float32)[:, None]).reshape(shape)
                stored[name] = (1, packed)
            else:
                expected[name] = rng.normal(size=shape).astype("<f4")
                stored[name] = (0, expected[name].tobytes())

        texts = [piece.encode() for piece, _ in self.pieces]
        head = self.magic + struct.pack("<I", self.version)
        sizes = (self.hidden, self.layers, self.heads, self.intermediate, self.vocab, self.positions, 2)
        head += struct.pack("<7ifi", *sizes, self.layer_norm_eps, self.block)
        head += struct.pack("<5iQ", len(texts), 0, 2, 1, 3, sum(map(len, texts)))
        head += np.cumsum([0, *map(len, texts)]).astype("<u4").tobytes()
        head += np.array([score for _, score in self.pieces], "<f4").tobytes() + b"".join(texts)
        table = struct.pack("<IB", 0x01, 0) + struct.pack("<IB2I", 0xFB01, 2, ord("f"), ord("i"))
        head += struct.pack("<iI", 2, len(table)) + table + struct.pack("<i", len(stored))
        offset = len(head) + sum(2 + len(name) + 21 for name in stored)
        directory, body = b"", b""
        for name, (dtype, data) in stored.items():
            elements = expected[name].size
            directory += struct.pack("<H", len(name)) + name.encode()
            directory += struct.pack("<BIQQ", dtype, elements, offset + len(body), len(data))
            body += data
        path.write_bytes(head + directory + body)
        return expected
