"""Builds the extension modules; everything else about the package is in pyproject.toml.

``EAR_OPS_BUILD``: ``auto`` (default: CPU kernels where a C++ compiler works, CUDA kernels where torch has CUDA and
there is an nvcc; what cannot be built is left out), ``cpu`` (these or fail), ``cuda`` (both or fail; neither a GPU nor
a torch with CUDA is needed to compile) or ``none``.

``EAR_OPS_CUDA_ARCHITECTURES`` names what the CUDA kernels are compiled for, ``80 90`` by default. The last name
without a letter is also compiled to PTX, which later GPUs translate. A name such as ``90a`` never is.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
BUILD = os.environ.get("EAR_OPS_BUILD", "auto")
CHOICES = ("auto", "cpu", "cuda", "none")
if BUILD not in CHOICES:
    raise SystemExit(f"EAR_OPS_BUILD: expected one of {', '.join(CHOICES)}, got {BUILD!r}")


def architecture(name: str) -> str:
    """``90`` out of ``90``, ``sm_90`` or ``9.0``; a letter, as in ``90a``, stays."""
    match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)", name, re.ASCII)
    if match is None:
        raise SystemExit(f"EAR_OPS_CUDA_ARCHITECTURES: expected names such as 80, 90 or 90a, got {name!r}")
    return "".join(match.groups())


def architectures(text: str) -> list[str]:
    """The names in a text, in its order, without repetitions."""
    return list(dict.fromkeys(architecture(name) for name in text.split() or [""]))


CUDA_ARCHITECTURES = architectures(os.environ.get("EAR_OPS_CUDA_ARCHITECTURES", "80 90"))


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


def cuda_home() -> Path | None:
    """Where the CUDA toolkit lies, None without one."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    parts = ("bin/nvcc", "include/cuda_runtime.h")  # an nvcc alone may be a script that calls one elsewhere
    return next((Path(home) for home in homes if home and all((Path(home) / part).exists() for part in parts)), None)


def builds_cuda() -> bool:
    import torch

    if BUILD == "cuda" and cuda_home() is None:
        raise SystemExit("EAR_OPS_BUILD=cuda: no CUDA toolkit (nvcc, headers) on PATH, in CUDA_HOME or /usr/local/cuda")
    return BUILD == "cuda" or (BUILD == "auto" and torch.version.cuda is not None and cuda_home() is not None)


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").glob(pattern))


def extensions() -> list:
    import torch
    from torch.utils.cpp_extension import CppExtension

    try:
        import pybind11
    except ImportError:
        raise SystemExit(
            "ear-ops: pybind11 is not installed in the build environment. Run `pip install ninja 'pybind11>=2.13'` and "
            "install again with --no-build-isolation, or set EAR_OPS_BUILD=none to install without kernels"
        ) from None
    cuda = builds_cuda()
    isas = "portable avx2 avx512" if platform.machine() in ("x86_64", "AMD64") else "portable"
    facts = {
        "EAR_OPS_VERSION": version(),
        "EAR_OPS_TORCH_VERSION": torch.__version__,
        "EAR_OPS_KERNELS": "cpu cuda" if cuda else "cpu",
        "EAR_OPS_CPU_ISAS": isas,
        "EAR_OPS_CUDA_ARCHITECTURES": " ".join(f"sm_{a}" for a in CUDA_ARCHITECTURES) if cuda else "",
    }
    flags = ["-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-attributes"]
    if "-O" not in os.environ.get("CFLAGS", ""):  # which comes first on the command line, so would lose
        flags.append("-O3")
    if torch.backends.openmp.is_available():
        flags.append("-fopenmp")  # at::parallel_for runs through it
    headers = relative("**/*.h") + relative("**/*.cuh")
    found = [
        CppExtension(
            "ear_ops._build_info",
            ["csrc/module.cpp"],
            include_dirs=[pybind11.get_include()],
            define_macros=[(name, f'"{value}"') for name, value in facts.items()],
            extra_compile_args=flags,
        ),
        CppExtension("ear_ops._C_cpu", relative("cpu/**/*.cpp"), depends=headers, extra_compile_args=flags),
    ]
    if cuda:
        # The CUDA runtime is linked in, so that the module loads where there is no driver.
        extension = CppExtension(
            "ear_ops._C_cuda",
            relative("cuda/**/*.cpp"),
            depends=headers + relative("cuda/**/*.cu"),
            extra_compile_args=flags,
            library_dirs=[str(cuda_home() / "lib64")],
            extra_link_args=["-lcudart_static", "-ldl", "-lrt", "-lpthread"],
        )
        extension.cuda_sources = relative("cuda/**/*.cu")
        found.append(extension)
    return found


def generate_code(names: list[str]) -> list[str]:
    """nvcc's flags: machine code for every architecture, and PTX of the last one without a letter."""
    plain = [name for name in names if name.isdigit()]
    targets = [(name, f"sm_{name}") for name in names] + [(name, f"compute_{name}") for name in plain[-1:]]
    return [f"-gencode=arch=compute_{virtual},code={code}" for virtual, code in targets]


def compile_cuda(sources: list[str], folder: Path) -> list[str]:
    """The object files of ``.cu`` files; those older than a source or header are compiled anew."""
    read = [*relative("cuda/**/*.cu*"), *relative("cuda/**/*.h"), *relative("*.h")]
    newest = max((HERE / name).stat().st_mtime for name in read)
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *generate_code(CUDA_ARCHITECTURES)]
    objects = folder / "_".join(CUDA_ARCHITECTURES)  # objects for other architectures are no use

    def compile_one(source: str) -> str:
        target = objects / Path(source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.stat().st_mtime < newest:
            subprocess.run([cuda_home() / "bin" / "nvcc", *flags, "-c", HERE / source, "-o", target], check=True)
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return list(pool.map(compile_one, sources))


def build_commands() -> dict:
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuildExtension(BuildExtension):
        """CUDA sources, then the rest. May fail: without kernels the package still installs and runs the reference."""

        def build_extensions(self) -> None:
            try:
                for extension in self.extensions:
                    if sources := getattr(extension, "cuda_sources", []):
                        extension.extra_objects = compile_cuda(sources, Path(self.build_temp) / "cuda")
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
