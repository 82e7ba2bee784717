"""Builds the extension modules; everything else about the package is in pyproject.toml.

``EAR_OPS_BUILD`` chooses the kernels. ``auto`` (default) builds CPU kernels where a C++ compiler works, and CUDA
kernels where torch has CUDA and there is an nvcc. Kernels that do not build are left out, each kind alone; the build
prints and records the reason. ``cpu`` builds the CPU kernels or fails. ``cuda`` builds both kinds or fails; it needs
neither a GPU nor a torch with CUDA. ``none`` builds nothing. What was built, and why the rest was not, is recorded in
``ear_ops._build_info``: a binary where pybind11 is installed, else a Python file.

``EAR_OPS_CUDA_ARCHITECTURES`` names what the CUDA kernels are compiled for, ``80 90`` by default. The last name
without a letter is also compiled to PTX, which later GPUs translate. A name such as ``90a`` never is. The kernels for
Hopper alone are compiled for ``90a``, whatever the names are.

``EAR_OPS_WHEEL=1`` makes the wheel that a release publishes: for every Python from 3.10, and with a version that names
the torch that it is for, such as ``0.2.0+torch2.13``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
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
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

HERE = Path(__file__).parent
BUILD = os.environ.get("EAR_OPS_BUILD", "auto")
CHOICES = ("auto", "cpu", "cuda", "none")
WHEEL = os.environ.get("EAR_OPS_WHEEL") == "1"
CPU, CUDA, FACTS = "ear_ops._C_cpu", "ear_ops._C_cuda", "ear_ops._build_info"
KERNELS = {"cpu": CPU, "cuda": CUDA}  # as the build facts name them
HOPPER = "qk_hopper.cu"
LEFT_OUT = {
    CPU: "the CPU kernels were not built; plain PyTorch runs in their place",
    CUDA: "the CUDA kernels were not built; plain PyTorch runs in their place",
    FACTS: "the build facts were not compiled; a Python file holds them",
}
WINDOWS = os.name == "nt"


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
        return "built without torch in the build environment"
    if not WINDOWS and shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        return "no C++ compiler was found"
    return None


def cuda_home() -> Path | None:
    """Where the CUDA toolkit lies, None without one."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    parts = ("bin/nvcc", "include/cuda_runtime.h")  # an nvcc alone may be a script that calls one elsewhere
    return next((Path(home) for home in homes if home and all((Path(home) / part).exists() for part in parts)), None)


def cuda_release(home: Path) -> str | None:
    """The release of a toolkit, such as ``13.0``; None where its nvcc does not say."""
    version = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+\.\d+)", version.stdout)
    return release and release[1]


def why_no_cuda() -> str | None:
    """Why no CUDA kernels are to be built, None where they are."""
    import torch

    if BUILD == "cpu":
        return "EAR_OPS_BUILD=cpu was set"
    if BUILD == "auto" and torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if (home := cuda_home()) is None:
        return "no CUDA toolkit (nvcc, headers) is on PATH, in CUDA_HOME or in /usr/local/cuda"
    release, wanted = cuda_release(home), torch.version.cuda
    if release and wanted and release.split(".")[0] != wanted.split(".")[0]:
        return (
            f"nvcc in {home} is of CUDA {release} and torch {torch.__version__} is of CUDA {wanted}; "
            f"set CUDA_HOME to a toolkit of CUDA {wanted.split('.')[0]}"
        )
    return None


# --- the extensions -------------------------------------------------------------------------------------------------


def compiler_flags(windows: bool = WINDOWS) -> list[str]:
    """The flags of MSVC, else those of GCC and Clang. torch adds the language standard."""
    if windows:
        return ["/O2"]
    flags = ["-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-attributes"]
    if "-O" not in os.environ.get("CFLAGS", ""):  # which comes first on the command line, so would lose
        flags.append("-O3")
    return flags


def cuda_flags(windows: bool = WINDOWS, names: list[str] = CUDA_ARCHITECTURES) -> list[str]:
    """The flags of nvcc for these architectures."""
    host = "/O2,/MD" if windows else "-fPIC,-fvisibility=hidden"
    return ["-std=c++17", "-O3", f"-Xcompiler={host}", *generate_code(names)]


def cuda_runtime(windows: bool = WINDOWS) -> dict[str, list[str]]:
    """The CUDA runtime, which is linked in, so that the kernels load where there is no driver."""
    home = cuda_home()
    if windows:
        return {"library_dirs": [str(home / "lib" / "x64")], "libraries": ["cudart_static"]}
    link = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return {"library_dirs": [str(home / "lib64")], "extra_link_args": link}


def extensions() -> list:
    """The extensions to build; the build facts come last, because they say what was built."""
    from torch.utils.cpp_extension import CppExtension

    headers = relative("**/*.h") + relative("**/*.cuh")
    # The kernels are libraries for torch's loader. They hold nothing of Python, so they serve every Python version.
    options = {"extra_compile_args": compiler_flags(), "py_limited_api": True}
    planned = [CppExtension(CPU, relative("cpu/**/*.cpp"), depends=headers, **options)]
    if why_no_cuda() is None:
        # csrc/cuda/sass holds a program of its own, which only the check of the build compiles.
        sources, depends = relative("cuda/*.cpp"), headers + relative("cuda/**/*.cu")
        extension = CppExtension(CUDA, sources, depends=depends, **cuda_runtime(), **options)
        extension.cuda_sources = relative("cuda/**/*.cu")
        planned.append(extension)
    if not WHEEL:  # whose facts must serve every Python version, too
        try:
            import pybind11
        except ImportError:
            return planned
        include = [pybind11.get_include()]
        planned.append(
            Extension(FACTS, ["csrc/module.cpp"], include, extra_compile_args=compiler_flags(), language="c++")
        )
    return planned


# --- the build facts ------------------------------------------------------------------------------------------------


def compiler() -> str:
    """What the C++ compiler says of itself, empty where it says nothing."""
    command = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
    except OSError:
        return ""


def build_facts(not_built: dict[str, str]) -> dict:
    """What ``ear_ops._build_info.facts()`` returns; ``not_built`` maps kinds of kernels to why they were left out."""
    built = [kind for kind in KERNELS if kind not in not_built]
    torch_version = ""
    if built:
        import torch

        torch_version = torch.__version__
    isas = "portable avx2 avx512" if platform.machine() in ("x86_64", "AMD64") else "portable"
    return {
        "version": version(),
        "torch": torch_version,
        "compiler": compiler() if built else "",
        "kernels": " ".join(built),
        "cpu_isas": isas if "cpu" in built else "",
        "cuda_architectures": " ".join(f"sm_{name}" for name in CUDA_ARCHITECTURES) if "cuda" in built else "",
        "not_built": not_built,
        "by_choice": {"none": ["cpu", "cuda"], "cpu": ["cuda"]}.get(BUILD, []),
    }


def write_header(folder: Path, not_built: dict[str, str]) -> Path:
    """Write ``build_facts.h``: the facts in JSON, as a string of JSON, which is also one of C++."""
    header = folder / "build_facts.h"
    folder.mkdir(parents=True, exist_ok=True)
    header.write_text(f"#define EAR_OPS_FACTS {json.dumps(json.dumps(build_facts(not_built)))}\n")
    return header


def write_module(package: Path, not_built: dict[str, str]) -> None:
    """Write ``_build_info.py``, which takes the place of the binary."""
    doc = '"""Facts recorded when the package was built; setup.py wrote this file."""'
    text = f"{doc}\n\n\ndef facts() -> dict:\n    return {build_facts(not_built)!r}\n"
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_info.py").write_text(text, encoding="utf-8")


def remove_stale(package: Path, made: set[str]) -> None:
    """Remove what an earlier build left of kernels and facts that this one did not make.

    Python would prefer a binary with facts of another build to a new Python file.
    """
    for name in (CPU, CUDA, FACTS):
        for path in package.glob(f"{name.removeprefix('ear_ops.')}.*"):
            if path.name not in made:
                path.unlink()


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
    objects = folder / "_".join(CUDA_ARCHITECTURES)  # objects for other architectures are no use

    def compile_source(source: str) -> str:
        target = objects / Path(source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.stat().st_mtime < newest:
            names = ["90a"] if Path(source).name == HOPPER else CUDA_ARCHITECTURES
            command = [cuda_home() / "bin" / "nvcc", *cuda_flags(names=names), "-c", HERE / source, "-o", target]
            if subprocess.run(command).returncode:
                raise RuntimeError(f"nvcc failed on {source}")
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return list(pool.map(compile_source, sources))


COPY_TO_LOG = """
import os, sys
with open(sys.argv[1], "wb") as log:
    while part := os.read(0, 65536):
        log.write(part)
        os.write(1, part)
"""


@contextmanager
def output_copied_to(log: Path) -> Iterator[None]:
    """Write what this process and its compilers print to a file, too."""
    sys.stdout.flush()
    stdout, stderr = os.dup(1), os.dup(2)
    with subprocess.Popen([sys.executable, "-c", COPY_TO_LOG, log], stdin=subprocess.PIPE) as copy:
        os.dup2(copy.stdin.fileno(), 1)
        os.dup2(copy.stdin.fileno(), 2)
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


class BuildPython(build_py):
    """Records why there are no kernels where nothing can be built."""

    def run(self) -> None:
        super().run()
        package = (HERE if self.editable_mode else Path(self.build_lib)) / "ear_ops"
        write_module(package, dict.fromkeys(KERNELS, why_nothing()))
        remove_stale(package, {"_build_info.py"})


class TorchVersion(egg_info):
    """Adds the torch that a wheel is for to its version."""

    def finalize_options(self) -> None:
        import torch

        self.tag_build = "+torch" + ".".join(torch.__version__.split(".")[:2])
        super().finalize_options()


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
            self.finish(Path(self.build_lib) / "ear_ops")

        def build_extension(self, extension) -> None:
            with tempfile.TemporaryDirectory() as folder:
                log = Path(folder) / "output"
                try:
                    with output_copied_to(log):
                        self.compile_extension(extension)
                except Exception as error:
                    if BUILD != "auto" and extension.name != FACTS:
                        raise
                    reason = one_line(compiler_error(log.read_text(errors="replace")) or str(error))
                    self.leave_out(extension.name, f"{reason} (`pip install -v` shows the compiler's whole output)")

        def compile_extension(self, extension) -> None:
            if extension.name == FACTS:
                header = write_header(Path(self.build_temp).resolve(), self.not_built)
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

        def finish(self, package: Path) -> None:
            """Leave in a folder what this build made, and nothing of an earlier one."""
            made = {Path(self.get_ext_filename(extension.name)).name for extension in self.extensions}
            if FACTS not in {extension.name for extension in self.extensions}:
                write_module(package, self.not_built)
                made.add("_build_info.py")
            remove_stale(package, made)

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            self.finish(HERE / "ear_ops")

    return {"build_ext": BuildKernels}


def main() -> None:
    if (reason := why_nothing()) is None:
        if BUILD == "cuda" and (reason := why_no_cuda()):
            raise SystemExit(f"EAR_OPS_BUILD=cuda: {reason}")
        commands, options = build_commands(), {}
        if WHEEL:
            commands["egg_info"] = TorchVersion
            options["bdist_wheel"] = {"py_limited_api": "cp310"}
        setup(ext_modules=extensions(), cmdclass=commands, options=options)
    elif BUILD in ("auto", "none"):
        print(f"ear-ops: no kernels were built; plain PyTorch runs in their place. Reason: {reason}")
        setup(cmdclass={"build_py": BuildPython})
    else:
        raise SystemExit(f"EAR_OPS_BUILD={BUILD}: {reason}")


if __name__ == "__main__":
    main()
