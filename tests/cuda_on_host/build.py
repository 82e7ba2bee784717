"""Compiles the CUDA kernels for the host, over the fibers of ``host.cpp``, into ``build/cuda_on_host`` (tests only).

python tests/cuda_on_host/build.py
"""

from __future__ import annotations

from pathlib import Path

from torch.utils.cpp_extension import load

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_on_host"
LIBRARY = BUILD / "ear_ops_cuda_on_host.so"


def build() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    load(
        name=LIBRARY.stem,
        sources=[
            *map(str, sorted(HERE.glob("*.cpp"))),
            *map(str, sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))),
        ],
        extra_include_paths=[str(HERE)],
        extra_cflags=[
            *("-O2", "-g1", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"),
            "-DEAR_OPS_CUDA_ON_HOST",
        ],
        build_directory=str(BUILD),
        is_python_module=False,
        verbose=False,
    )


if __name__ == "__main__":
    build()
