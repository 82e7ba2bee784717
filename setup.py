"""Builds the extension modules; everything else about the package is in pyproject.toml.

``EAR_OPS_BUILD`` chooses the kernels. ``auto`` (default) builds CPU kernels where a C++ compiler works, and CUDA
kernels where torch has CUDA and there is an nvcc. Kernels that do not build are left out, each kind alone; the build
prints and records the reason. ``cpu`` builds the CPU kernels or fails. ``cuda`` builds both kinds or fails; it needs
neither a GPU nor a torch with CUDA. ``none`` builds nothing.

``EAR_OPS_CUDA_ARCHITECTURES`` names what the CUDA kernels are compiled for, ``80 90`` by default. The last name
without a letter is also compiled to PTX, which later GPUs translate. A name such as ``90a`` never is.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent
BUILD = os.environ.get("EAR_OPS_BUILD", "auto")
CHOICES = ("auto", "cpu", "cuda", "none")
CPU, CUDA, FACTS = "ear_ops._C_cpu", "ear_ops._C_cuda", "ear_ops._build_info"
KERNELS = {"cpu": CPU, "cuda": CUDA}  # as the build facts name them
LEFT_OUT = {
    CPU: "the CPU kernels were not built; plain PyTorch runs in their place",
    CUDA: "the CUDA kernels were not built; plain PyTorch runs in their place",
    FACTS: "the build facts were not built; kernels do not load without them, and plain PyTorch runs",
}


def architecture(name: str) -> str:
    """``90`` out of ``90``, ``sm_90`` or ``9.0``; a letter, as in ``90a``, stays."""
    match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)", name, re.ASCII)
    if match is None:
        raise SystemExit(f"EAR_OPS_CUDA_ARCHITECTURES: expected names such as 80, 90 or 90a, got {name!r}")
    return "".join(match.groups())


def architectures(text: str) -> list[str]:
    """The names in a text, in its order, without repetitions."""
    return list(dict.fromkeys(architecture(name) for name in text.split() or [""]))


if BUILD not in CHOICES:
    raise SystemExit(f"EAR_OPS_BUILD: expected one of {', '.join(CHOICES)}, got {BUILD!r}")
CUDA_ARCHITECTURES = architectures(os.environ.get("EAR_OPS_CUDA_ARCHITECTURES", "80 90"))


def version() -> str:
    lines = (HERE / "pyproject.toml").read_text().splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version = "))


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").glob(pattern))


# --- what can be built ----------------------------------------------------------------------------------------------


def why_nothing() -> str | None:
    """Why nothing can be built here, None where something can."""
    if BUILD == "none":
        return "EAR_OPS_BUILD=none was set"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the build environment (install it first, then use pip's --no-build-isolation)"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return (
            "pybind11 is not installed in the build environment "
            "(run `pip install ninja 'pybind11>=2.13'`, then use pip's --no-build-isolation)"
        )
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        return "no C++ compiler was found"
    return None


def cuda_home() -> Path | None:
    """Where the CUDA toolkit lies, None without one."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    parts = ("bin/nvcc", "include/cuda_runtime.h")  # an nvcc alone may be a script that calls one elsewhere
    return next((Path(home) for home in homes if home and all((Path(home) / part).exists() for part in parts)), None)


def why_no_cuda() -> str | None:
    """Why no CUDA kernels are to be built, None where they are."""
    import torch

    if BUILD == "cpu":
        return "EAR_OPS_BUILD=cpu was set"
    if BUILD == "auto" and torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if cuda_home() is None:
        return "no CUDA toolkit (nvcc, headers) is on PATH, in CUDA_HOME or in /usr/local/cuda"
    return None


# --- the extensions -------------------------------------------------------------------------------------------------


def compiler_flags() -> list[str]:
    import torch

    flags = ["-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-attributes"]
    if "-O" not in os.environ.get("CFLAGS", ""):  # which comes first on the command line, so would lose
        flags.append("-O3")
    if torch.backends.openmp.is_available():
        flags.append("-fopenmp")  # at::parallel_for runs through it
    return flags


def extensions() -> list:
    """The extensions to build; the build facts come last, because they say what was built."""
    import pybind11
    from torch.utils.cpp_extension import CppExtension

    flags = compiler_flags()
    headers = relative("**/*.h") + relative("**/*.cuh")
    planned = [CppExtension(CPU, relative("cpu/**/*.cpp"), depends=headers, extra_compile_args=flags)]
    if why_no_cuda() is None:
        # The CUDA runtime is linked in, so that the module loads where there is no driver.
        extension = CppExtension(
            CUDA,
            relative("cuda/**/*.cpp"),
            depends=headers + relative("cuda/**/*.cu"),
            extra_compile_args=flags,
            library_dirs=[str(cuda_home() / "lib64")],
            extra_link_args=["-lcudart_static", "-ldl", "-lrt", "-lpthread"],
        )
        extension.cuda_sources = relative("cuda/**/*.cu")
        planned.append(extension)
    include = [pybind11.get_include()]
    planned.append(Extension(FACTS, ["csrc/module.cpp"], include, extra_compile_args=flags, language="c++"))
    return planned


def build_facts(not_built: dict[str, str]) -> dict[str, str]:
    """What csrc/module.cpp hands out; ``not_built`` maps the kinds of kernels left out to their reasons."""
    import torch

    isas = "portable avx2 avx512" if platform.machine() in ("x86_64", "AMD64") else "portable"
    return {
        "VERSION": version(),
        "TORCH_VERSION": torch.__version__,
        "KERNELS": " ".join(kind for kind in KERNELS if kind not in not_built),
        "CPU_ISAS": "" if "cpu" in not_built else isas,
        "CUDA_ARCHITECTURES": "" if "cuda" in not_built else " ".join(f"sm_{name}" for name in CUDA_ARCHITECTURES),
        "CPU_NOT_BUILT": not_built.get("cpu", ""),
        "CUDA_NOT_BUILT": not_built.get("cuda", ""),
    }


def write_facts(folder: Path, not_built: dict[str, str]) -> Path:
    """Write the header ``build_facts.h``; a string of JSON is also one of C++."""
    lines = [
        f"#define EAR_OPS_{name} {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in build_facts(not_built).items()
    ]
    header = folder / "build_facts.h"
    folder.mkdir(parents=True, exist_ok=True)
    header.write_text("".join(lines), encoding="utf-8")
    return header


# --- compiling ------------------------------------------------------------------------------------------------------


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

    def compile_source(source: str) -> str:
        target = objects / Path(source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.stat().st_mtime < newest:
            command = [cuda_home() / "bin" / "nvcc", *flags, "-c", HERE / source, "-o", target]
            if subprocess.run(command).returncode:
                raise RuntimeError(f"nvcc failed on {source}")
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return list(pool.map(compile_source, sources))


@contextmanager
def output_copied_to(log: Path) -> Iterator[None]:
    """Write what this process and its compilers print to a file, too."""
    sys.stdout.flush()
    stdout, stderr = os.dup(1), os.dup(2)
    with subprocess.Popen(["tee", log], stdin=subprocess.PIPE) as tee:
        os.dup2(tee.stdin.fileno(), 1)
        os.dup2(tee.stdin.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)


def compiler_error(output: str) -> str | None:
    """The first error in a compiler's or linker's output, None where it holds none."""
    pattern = re.compile(r"\b(error|fatal|ld)\b[ \w#-]*:", re.IGNORECASE)
    return next((line for line in output.splitlines() if pattern.search(line) and "warning" not in line), None)


def one_line(text: str) -> str:
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return textwrap.shorten(printable, 250, placeholder=" ...")


def build_commands() -> dict:
    from torch.utils.cpp_extension import BuildExtension

    class BuildKernels(BuildExtension):
        """Builds each extension alone; with EAR_OPS_BUILD=auto those that fail are left out."""

        def initialize_options(self) -> None:
            super().initialize_options()
            self.not_built: dict[str, str] = {}

        def finalize_options(self) -> None:
            super().finalize_options()
            self.parallel = None  # the build facts come last

        def build_extensions(self) -> None:
            if reason := why_no_cuda():
                self.leave_out(CUDA, reason)
            try:
                super().build_extensions()
            except Exception as error:  # torch's own checks, before any extension
                if BUILD != "auto":
                    raise
                for extension in list(self.extensions):
                    self.leave_out(extension.name, one_line(str(error)))
            self.remove_left_out(Path(self.build_lib))

        def build_extension(self, extension) -> None:
            with tempfile.TemporaryDirectory() as folder:
                log = Path(folder) / "output"
                try:
                    with output_copied_to(log):
                        self.compile_extension(extension)
                except Exception as error:
                    if BUILD != "auto":
                        raise
                    reason = one_line(compiler_error(log.read_text(errors="replace")) or str(error))
                    self.leave_out(extension.name, f"{reason} (`pip install -v` shows the compiler's whole output)")

        def compile_extension(self, extension) -> None:
            if extension.name == FACTS:
                header = write_facts(Path(self.build_temp).resolve(), self.not_built)
                extension.include_dirs.append(str(header.parent))
                extension.depends.append(str(header))
            if sources := getattr(extension, "cuda_sources", []):
                extension.extra_objects = compile_cuda(sources, Path(self.build_temp) / "cuda")
            super().build_extension(extension)

        def leave_out(self, name: str, reason: str) -> None:
            """Build the others without it, and say why."""
            self.extensions = [extension for extension in self.extensions if extension.name != name]
            self.not_built |= {kind: reason for kind, module in KERNELS.items() if module == name}
            if BUILD == "auto":
                print(f"ear-ops: {LEFT_OUT[name]}. Reason: {reason}", flush=True)

        def remove_left_out(self, folder: Path) -> None:
            """Remove what an earlier build left of extensions that this one left out."""
            built = {extension.name for extension in self.extensions}
            for name in LEFT_OUT.keys() - built:
                (folder / self.get_ext_filename(name)).unlink(missing_ok=True)

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            self.remove_left_out(HERE)

    return {"build_ext": BuildKernels}


def main() -> None:
    if (reason := why_nothing()) is None:
        if BUILD == "cuda" and (reason := why_no_cuda()):
            raise SystemExit(f"EAR_OPS_BUILD=cuda: {reason}")
        setup(ext_modules=extensions(), cmdclass=build_commands())
    elif BUILD in ("auto", "none"):
        print(f"ear-ops: no kernels were built; plain PyTorch runs in their place. Reason: {reason}")
        setup()
    else:
        raise SystemExit(f"EAR_OPS_BUILD={BUILD}: {reason}")


if __name__ == "__main__":
    main()
