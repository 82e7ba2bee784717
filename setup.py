"""Builds the extension modules; everything else about the package is in pyproject.toml.

``EAR_OPS_BUILD``: ``auto`` (default: CPU kernels where a C++ compiler works, else none), ``cpu`` (fail without them) or
``none``. ``cuda`` is reserved for the CUDA kernels.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
BUILD = os.environ.get("EAR_OPS_BUILD", "auto")
CHOICES = ("auto", "cpu", "cuda", "none")
if BUILD not in CHOICES:
    raise SystemExit(f"EAR_OPS_BUILD: expected one of {', '.join(CHOICES)}, got {BUILD!r}")
if BUILD == "cuda":
    raise SystemExit("EAR_OPS_BUILD=cuda: this version has no CUDA kernels yet; use auto, cpu or none")


def version() -> str:
    lines = (HERE / "pyproject.toml").read_text().splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version = "))


def why_not() -> str | None:
    """Why nothing can be built here, None where it can."""
    if BUILD == "none":
        return "EAR_OPS_BUILD=none"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the build environment (install it first, then use pip's --no-build-isolation)"
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        return "no C++ compiler was found"
    return None


def extensions() -> list:
    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension

    isas = "portable avx2 avx512" if platform.machine() in ("x86_64", "AMD64") else "portable"
    facts = {
        "EAR_OPS_VERSION": version(),
        "EAR_OPS_TORCH_VERSION": torch.__version__,
        "EAR_OPS_KERNELS": "cpu",
        "EAR_OPS_CPU_ISAS": isas,
        "EAR_OPS_CUDA_ARCHITECTURES": "",
    }
    flags = ["-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-attributes"]
    if "-O" not in os.environ.get("CFLAGS", ""):  # which comes first on the command line, so would lose
        flags.append("-O3")
    if torch.backends.openmp.is_available():
        flags.append("-fopenmp")  # at::parallel_for runs through it
    return [
        CppExtension(
            "ear_ops._build_info",
            ["csrc/module.cpp"],
            include_dirs=[pybind11.get_include()],
            define_macros=[(name, f'"{value}"') for name, value in facts.items()],
            extra_compile_args=flags,
        ),
        CppExtension(
            "ear_ops._C_cpu",
            sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc" / "cpu").glob("*.cpp")),
            depends=sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").rglob("*.h")),
            extra_compile_args=flags,
        ),
    ]


def build_commands() -> dict:
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuildExtension(BuildExtension):
        """A build that may fail: without kernels the package installs all the same and runs the reference."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if BUILD != "auto":
                    raise
                print(f"ear-ops: kernels were not built, the reference will run: {error}")
                self.extensions = []

    return {"build_ext": OptionalBuildExtension}


reason = why_not()
if reason is None:
    setup(ext_modules=extensions(), cmdclass=build_commands())
elif BUILD in ("auto", "none"):
    print(f"ear-ops: kernels are not built, the reference will run: {reason}")
    setup()
else:
    raise SystemExit(f"EAR_OPS_BUILD={BUILD}: {reason}")
