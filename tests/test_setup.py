"""What setup.py builds, leaves out and records, on a project of a few empty sources and an nvcc that is a script."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import torch
from setuptools import Distribution

ROOT = Path(__file__).parents[1]
SOURCES = ("cpu/register.cpp", "cpu/qk/problem.cpp", "cuda/ops.cpp", "cuda/elementwise.cu", "cuda/instances/float.cu")
BROKEN = "#error this source is broken\n"
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.2, V13.2.51"; exit; fi
echo "$@" >> "$NVCC_LOG"
while [ "$1" != -c ]; do shift; done
c++ -x c++ -fPIC -c "$2" -o "$4"
"""
NVCC_FAILS = """#!/bin/sh
echo "nvcc warning : an error: to come" >&2
echo "nvcc fatal   : Unsupported gpu architecture 'compute_20'" >&2
exit 1
"""
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
needs_pybind11 = pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="pybind11 is not installed")
needs_setuptools = pytest.mark.skipif(
    int(setuptools.__version__.split(".")[0]) < 77, reason=f"setuptools {setuptools.__version__} is older than 77"
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with this setup.py, a torch that has CUDA, and a toolkit whose nvcc is a script."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in (*SOURCES, "module.cpp", "cuda/args.h"):
        write(tmp_path / "csrc" / name, "")
    write(tmp_path / "ear_ops" / "__init__.py", "")
    toolkit = tmp_path / "toolkit"
    write(toolkit / "include" / "cuda_runtime.h", "")
    write(toolkit / "lib64" / "libcudart_static.a", "!<arch>\n")
    write(toolkit / "bin" / "nvcc", NVCC).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("EAR_OPS_BUILD", "EAR_OPS_WHEEL", "EAR_OPS_CUDA_ARCHITECTURES", "CXX", "LDFLAGS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CFLAGS", "-O0")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("NVCC_LOG", str(tmp_path / "nvcc.log"))
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem.split(".")[0], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_build(project: Path, in_place: bool = False) -> None:
    """Build into ``lib`` by way of ``temp``, and copy beside the sources if ``in_place``."""
    setup = load(project / "setup.py")
    options = {"packages": ["ear_ops"], "ext_modules": setup.extensions(), "cmdclass": setup.build_commands()}
    command = Distribution(options).get_command_obj("build_ext")
    command.build_lib, command.build_temp, command.inplace = str(project / "lib"), str(project / "temp"), in_place
    command.ensure_finalized()
    command.run()


def build(project: Path, in_place: bool = False) -> dict[str, Any]:
    """The facts of a build, as they stand in build_facts.h, or else in the Python file."""
    (project / "temp" / "build_facts.h").unlink(missing_ok=True)
    run_build(project, in_place)
    header = project / "temp" / "build_facts.h"
    if not header.exists():
        return load(project / "lib" / "ear_ops" / "_build_info.py").facts()
    return json.loads(json.loads(header.read_text().removeprefix("#define EAR_OPS_FACTS ")))


def binaries(folder: Path) -> set[str]:
    return {path.name.split(".")[0] for path in (folder / "ear_ops").glob("*.so")}


def facts_module(folder: Path) -> Path:
    """The one file with the build facts."""
    (path,) = (folder / "ear_ops").glob("_build_info.*")
    return path


def write_nvcc(project: Path, script: str) -> None:
    (project / "toolkit" / "bin" / "nvcc").write_text(script)


# --- which kernels fall out -----------------------------------------------------------------------------------------


@needs_compiler
@needs_pybind11
def test_all_kernels_are_built_from_every_folder_and_recorded(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAR_OPS_CUDA_ARCHITECTURES", "80 90a")
    recorded = build(project)
    assert binaries(project / "lib") == {"_C_cpu", "_C_cuda", "_build_info"}
    assert recorded["kernels"] == "cpu cuda" and recorded["cuda_architectures"] == "sm_80 sm_90a"
    assert recorded["not_built"] == {} and recorded["by_choice"] == []
    assert sum(path.name.endswith(".abi3.so") for path in (project / "lib" / "ear_ops").iterdir()) == 2
    objects = {path.relative_to(project / "temp").as_posix() for path in (project / "temp").rglob("*.o")}
    assert "csrc/cpu/qk/problem.o" in objects and "cuda/80_90a/csrc/cuda/instances/float.o" in objects


@needs_compiler
@needs_pybind11
def test_cpu_kernels_remain_where_nvcc_fails(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The facts are read from the module that is installed, so this compiles the one in csrc."""
    write_nvcc(project, NVCC_FAILS)
    shutil.copy(ROOT / "csrc" / "module.cpp", project / "csrc" / "module.cpp")
    recorded = build(project)
    assert binaries(project / "lib") == {"_C_cpu", "_build_info"}
    assert recorded["kernels"] == "cpu" and recorded["cuda_architectures"] == ""
    reason = (
        "nvcc fatal : Unsupported gpu architecture 'compute_20' (`pip install -v` shows the compiler's whole output)"
    )
    line = f"ear-ops: the CUDA kernels were not built; plain PyTorch runs in their place. Reason: {reason}\n"
    output = capfd.readouterr().out
    assert line in output and "nvcc warning : an error: to come" in output
    installed = load(facts_module(project / "lib")).facts()
    assert installed["not_built"] == {"cuda": reason}
    assert installed["kernels"] == "cpu" and "portable" in installed["cpu_isas"]
    assert installed["cuda_architectures"] == "" and installed["torch"] == torch.__version__


@needs_compiler
@needs_pybind11
def test_cuda_kernels_remain_where_the_cpu_kernels_fail(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(project / "csrc" / "cpu" / "qk" / "problem.cpp", BROKEN)
    recorded = build(project)
    assert binaries(project / "lib") == {"_C_cuda", "_build_info"}
    assert recorded["kernels"] == "cuda" and recorded["cpu_isas"] == ""
    assert recorded["cuda_architectures"] == "sm_80 sm_90"
    assert "the CPU kernels were not built; plain PyTorch runs" in capfd.readouterr().out
    assert "error: #error this source is broken (`pip install -v` shows" in recorded["not_built"]["cpu"]


@needs_compiler
@needs_pybind11
def test_the_install_succeeds_where_every_compiler_fails(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_nvcc(project, NVCC_FAILS)
    for name in ("cpu/register.cpp", "module.cpp"):
        write(project / "csrc" / name, BROKEN)
    run_build(project)
    assert binaries(project / "lib") == set()
    assert "the build facts were not compiled; a Python file holds them" in capfd.readouterr().out
    recorded = load(facts_module(project / "lib")).facts()
    assert recorded["kernels"] == recorded["torch"] == "" and recorded["by_choice"] == []
    assert "this source is broken" in recorded["not_built"]["cpu"] and "nvcc" in recorded["not_built"]["cuda"]


@needs_compiler
@needs_pybind11
def test_a_failure_of_torch_itself_leaves_out_everything(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.cpp_extension import BuildExtension

    def fails(self: object) -> None:
        raise RuntimeError("the compiler has\nno version")

    monkeypatch.setattr(BuildExtension, "_check_abi", fails)
    run_build(project)
    assert binaries(project / "lib") == set()
    assert capfd.readouterr().out.count("Reason: the compiler has no version\n") == 3
    reasons = load(facts_module(project / "lib")).facts()["not_built"]
    assert reasons == dict.fromkeys(["cpu", "cuda"], "the compiler has no version")


@needs_compiler
@pytest.mark.parametrize("wheel", [False, True])
def test_kernels_without_pybind11_have_their_facts_in_a_python_file(
    project: Path, monkeypatch: pytest.MonkeyPatch, wheel: bool
) -> None:
    """Such as in a build environment with torch alone, and in the wheel that serves every Python version."""
    monkeypatch.setenv("EAR_OPS_BUILD", "cpu")
    if wheel:
        monkeypatch.setenv("EAR_OPS_WHEEL", "1")
    else:
        monkeypatch.setitem(sys.modules, "pybind11", None)
    run_build(project)
    assert binaries(project / "lib") == {"_C_cpu"}
    recorded = load(facts_module(project / "lib")).facts()
    assert recorded["kernels"] == "cpu" and recorded["torch"] == torch.__version__ and recorded["compiler"]
    assert recorded["not_built"] == {"cuda": "EAR_OPS_BUILD=cpu was set"} and recorded["by_choice"] == ["cuda"]


@needs_compiler
@needs_pybind11
@pytest.mark.parametrize("choice", ["cpu", "cuda"])
@pytest.mark.parametrize("broken", ["cpu", "cuda"])
def test_kernels_asked_for_by_name_are_built_or_the_build_fails(
    project: Path, monkeypatch: pytest.MonkeyPatch, choice: str, broken: str
) -> None:
    monkeypatch.setenv("EAR_OPS_BUILD", choice)
    if broken == "cpu":
        write(project / "csrc" / "cpu" / "register.cpp", BROKEN)
    else:
        write_nvcc(project, NVCC_FAILS)
    if (choice, broken) == ("cpu", "cuda"):  # nvcc is not called
        recorded = build(project)
        assert recorded["kernels"] == "cpu" and recorded["not_built"]["cuda"] == "EAR_OPS_BUILD=cpu was set"
    else:
        with pytest.raises(Exception, match="nvcc failed on" if broken == "cuda" else "compiling|exit status 1"):
            build(project)


@needs_compiler
@needs_pybind11
@pytest.mark.parametrize(
    ("missing", "reason"),
    [("torch with CUDA", "was built without CUDA"), ("toolkit", "no CUDA toolkit (nvcc, headers) is on PATH")],
)
def test_kernels_that_cannot_be_built_are_not_tried(
    project: Path, monkeypatch: pytest.MonkeyPatch, missing: str, reason: str
) -> None:
    if missing == "torch with CUDA":
        monkeypatch.setattr(torch.version, "cuda", None)
    setup = load(project / "setup.py")
    if missing == "toolkit":
        monkeypatch.setattr(setup, "cuda_home", lambda: None)
    why = setup.why_no_cuda()
    assert reason in why
    assert [extension.name for extension in setup.extensions()] == ["ear_ops._C_cpu", "ear_ops._build_info"]
    assert setup.build_facts({"cuda": why})["not_built"] == {"cuda": why}


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_a_toolkit_of_another_cuda_than_that_of_torch_is_named_with_both_versions(
    project: Path, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    monkeypatch.setenv("EAR_OPS_BUILD", choice)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    setup = load(project / "setup.py")
    why = setup.why_no_cuda()
    assert why == (
        f"nvcc in {project / 'toolkit'} is of CUDA 13.2 and torch {torch.__version__} is of CUDA 12.8; "
        "set CUDA_HOME to a toolkit of CUDA 12"
    )
    if choice == "cuda":
        monkeypatch.setattr(setup, "why_nothing", lambda: None)
        with pytest.raises(SystemExit, match=re.escape(f"EAR_OPS_BUILD=cuda: {why}")):
            setup.main()
        monkeypatch.setattr(torch.version, "cuda", None)  # has no CUDA that could be another
        assert setup.why_no_cuda() is None


def test_a_toolkit_of_the_same_major_version_or_of_an_unknown_one_is_used(project: Path) -> None:
    setup = load(project / "setup.py")
    assert setup.why_no_cuda() is None  # 13.2 and 13.0
    write_nvcc(project, "#!/bin/sh\n")
    assert setup.why_no_cuda() is None


def test_flags_are_those_of_the_compiler(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CFLAGS")
    setup = load(project / "setup.py")
    unix = [*setup.compiler_flags(windows=False), *setup.cuda_flags(windows=False)]
    windows = [*setup.compiler_flags(windows=True), *setup.cuda_flags(windows=True)]
    assert "-O3" in unix and "-fvisibility=hidden" in unix and not any("/" in flag for flag in unix)
    assert "/O2" in windows and not any("-f" in flag or flag.startswith("-W") for flag in windows)
    assert not any("openmp" in flag for flag in unix + windows)  # kernels run on the threads of torch
    assert setup.cuda_runtime(windows=True)["libraries"] == ["cudart_static"]
    assert "-lcudart_static" in setup.cuda_runtime(windows=False)["extra_link_args"]


# --- nothing can be built -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["torch", "compiler"])
def test_what_is_missing_is_told_and_fails_only_where_kernels_were_asked_for(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    if missing == "compiler":
        monkeypatch.setenv("PATH", str(project))
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    reason = "no C++ compiler was found" if missing == "compiler" else "built without torch in the build environment"
    calls: list[dict[str, Any]] = []
    for choice in ("auto", "cpu", "cuda"):
        monkeypatch.setenv("EAR_OPS_BUILD", choice)
        setup = load(project / "setup.py")
        monkeypatch.setattr(setup, "setup", lambda **options: calls.append(options))
        if choice == "auto":
            setup.main()
            line = f"ear-ops: no kernels were built; plain PyTorch runs in their place. Reason: {reason}"
            assert line in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit, match=re.escape(f"EAR_OPS_BUILD={choice}: {reason}")):
                setup.main()
    assert [set(options["cmdclass"]) for options in calls] == [{"build_py"}]


BUILD_BACKEND = """
import sys
from setuptools import build_meta
getattr(build_meta, sys.argv[1])("dist")
"""
WITHOUT_TORCH = 'import sys\nsys.modules["torch"] = None  # as in an isolated build environment\n'


def call_build_backend(project: Path, program: str, hook: str = "build_wheel") -> Path:
    """Call a hook as pip and uv do, and return the wheel that it made."""
    for name in ("README.md", "LICENSE"):
        write(project / name, "")
    result = subprocess.run([sys.executable, "-c", program, hook], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    return wheel


@needs_setuptools
@pytest.mark.parametrize("choice", ["auto", "none"])
@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_a_package_without_kernels_says_why(
    project: Path, monkeypatch: pytest.MonkeyPatch, hook: str, choice: str
) -> None:
    """What earlier builds left, which Python would prefer, is removed."""
    monkeypatch.setenv("EAR_OPS_BUILD", choice)
    for folder in (project, project / "build" / "lib"):
        for name in ("_C_cpu.cpython-310.so", "_C_cuda.abi3.so", "_build_info.cpython-310.so"):
            write(folder / "ear_ops" / name, "of an earlier build")
    wheel = call_build_backend(project, WITHOUT_TORCH + BUILD_BACKEND, hook)
    if hook == "build_wheel":
        assert wheel.name.endswith("-py3-none-any.whl")
        shutil.unpack_archive(wheel, project / "lib", "zip")
    folder = project / "lib" if hook == "build_wheel" else project
    assert binaries(folder) == set()
    recorded = load(facts_module(folder)).facts()
    reason = "EAR_OPS_BUILD=none was set" if choice == "none" else "built without torch in the build environment"
    assert recorded["not_built"] == {"cpu": reason, "cuda": reason}
    assert recorded["by_choice"] == (["cpu", "cuda"] if choice == "none" else [])
    assert recorded["torch"] == recorded["kernels"] == ""


def test_cuda_kernels_asked_for_without_a_toolkit_fail(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAR_OPS_BUILD", "cuda")
    setup = load(project / "setup.py")
    monkeypatch.setattr(setup, "why_nothing", lambda: None)
    monkeypatch.setattr(setup, "cuda_home", lambda: None)
    with pytest.raises(SystemExit, match="EAR_OPS_BUILD=cuda: no CUDA toolkit"):
        setup.main()


def test_an_unknown_choice_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAR_OPS_BUILD", "gpu")
    with pytest.raises(SystemExit, match="EAR_OPS_BUILD: expected one of auto, cpu, cuda, none, got 'gpu'"):
        load(project / "setup.py")


@needs_compiler
@needs_setuptools
def test_the_wheel_of_a_release_is_for_one_torch_and_every_python(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EAR_OPS_BUILD", "cpu")
    monkeypatch.setenv("EAR_OPS_WHEEL", "1")
    wheel = call_build_backend(project, BUILD_BACKEND)
    release = ".".join(torch.__version__.split(".")[:2])
    version = load(project / "setup.py").version()
    assert re.match(rf"ear_ops-{re.escape(f'{version}+torch{release}')}-cp310-abi3-\w+\.whl$", wheel.name), wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {"ear_ops/_C_cpu.abi3.so", "ear_ops/_build_info.py"} <= set(names)
    assert not any("cpython" in name for name in names)


# --- builds after other builds --------------------------------------------------------------------------------------


@needs_compiler
@needs_pybind11
def test_kernels_of_an_earlier_build_do_not_stay_where_they_are_left_out(project: Path) -> None:
    build(project, in_place=True)
    assert binaries(project) == {"_C_cpu", "_C_cuda", "_build_info"}
    write_nvcc(project, NVCC_FAILS)
    os.utime(project / "csrc" / "cuda" / "args.h")
    for path in (project / "temp" / "cuda").rglob("*.o"):
        os.utime(path, (0, 0))
    assert build(project, in_place=True)["kernels"] == "cpu"
    assert binaries(project) == binaries(project / "lib") == {"_C_cpu", "_build_info"}


@needs_compiler
@needs_pybind11
def test_facts_of_another_kind_or_python_do_not_stay_beside_the_new_ones(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EAR_OPS_BUILD", "cpu")
    for folder in (project, project / "lib"):
        write(folder / "ear_ops" / "_build_info.py", "of an earlier build")
        write(folder / "ear_ops" / "_C_cpu.cpython-310.so", "of an earlier build")
    run_build(project, in_place=True)
    for folder in (project, project / "lib"):
        assert facts_module(folder).suffix == ".so" and len(list((folder / "ear_ops").glob("_C_cpu.*"))) == 1
    monkeypatch.setitem(sys.modules, "pybind11", None)
    run_build(project, in_place=True)
    assert facts_module(project).name == facts_module(project / "lib").name == "_build_info.py"


@needs_compiler
@needs_pybind11
def test_cuda_sources_are_compiled_again_for_other_architectures_alone(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for names in ("80", "80", "90"):
        monkeypatch.setenv("EAR_OPS_CUDA_ARCHITECTURES", names)
        assert build(project)["cuda_architectures"] == f"sm_{names}"
    commands = (project / "nvcc.log").read_text().splitlines()
    assert [re.findall("code=(sm_..)", command) for command in commands] == [["sm_80"]] * 2 + [["sm_90"]] * 2


def test_the_kernels_for_hopper_are_compiled_for_it_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other architectures do not have their instructions."""
    monkeypatch.setenv("EAR_OPS_CUDA_ARCHITECTURES", "80 90")
    write(project / "csrc" / "cuda" / "qk_hopper.cu", "")
    assert build(project)["cuda_architectures"] == "sm_80 sm_90"
    (command,) = (line for line in (project / "nvcc.log").read_text().splitlines() if "qk_hopper" in line)
    assert re.findall(r"code=(sm_\w+)", command) == ["sm_90a"]


# --- names of architectures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names", "code"),
    [
        ("80 90", "80 90", "80:sm_80 90:sm_90 90:compute_90"),
        ("80 90 90a", "80 90 90a", "80:sm_80 90:sm_90 90a:sm_90a 90:compute_90"),
        ("90a", "90a", "90a:sm_90a"),
        ("100f 120a", "100f 120a", "100f:sm_100f 120a:sm_120a"),
        ("sm_90a 8.6 10.0a  8.6", "90a 86 100a", "90a:sm_90a 86:sm_86 100a:sm_100a 86:compute_86"),
    ],
)
def test_architectures(project: Path, monkeypatch: pytest.MonkeyPatch, text: str, names: str, code: str) -> None:
    """Code for an architecture with a letter is never emitted as PTX, which would run nowhere else."""
    monkeypatch.setenv("EAR_OPS_CUDA_ARCHITECTURES", text)
    setup = load(project / "setup.py")
    assert names.split() == setup.CUDA_ARCHITECTURES
    targets = (target.split(":") for target in code.split())
    flags = [f"-gencode=arch=compute_{virtual},code={real}" for virtual, real in targets]
    assert setup.generate_code(setup.CUDA_ARCHITECTURES) == flags


@pytest.mark.parametrize("text", ["", "abc", "9", "90b", "compute_90", "90+PTX", "8.0;9.0", "80 ninety"])
def test_what_names_no_architecture_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("EAR_OPS_CUDA_ARCHITECTURES", text)
    message = f"EAR_OPS_CUDA_ARCHITECTURES: expected names such as 80, 90 or 90a, got {text.split(' ')[-1]!r}"
    with pytest.raises(SystemExit, match=f"^{re.escape(message)}$"):
        load(project / "setup.py")


# --- reasons --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("[1/2] c++ -Werror -c a.cpp\na.cpp:1:2: error: no such type", "a.cpp:1:2: error: no such type"),
        ("a.cpp:1:10: fatal error: torch.h: No such file", "a.cpp:1:10: fatal error: torch.h: No such file"),
        ("g++: internal compiler error: Killed", "g++: internal compiler error: Killed"),
        ("ld: warning: old\n/usr/bin/ld: cannot find -lc10\ncollect2: error: ld", "/usr/bin/ld: cannot find -lc10"),
        ('a.cu(3): error: identifier "x" is undefined', 'a.cu(3): error: identifier "x" is undefined'),
        ("FAILED: build: a.o", None),
    ],
)
def test_the_reason_is_the_first_error(project: Path, output: str, message: str | None) -> None:
    assert load(project / "setup.py").compiler_error(output) == message


@needs_compiler
def test_any_text_can_be_recorded(project: Path) -> None:
    """Reasons hold what compilers say: quotes, backslashes, dollars, letters beyond ASCII."""
    setup = load(project / "setup.py")
    reason = setup.one_line('«x» is "$HOME"\n\x1b[31m\\n %s \\u0041 é 🙂')
    assert reason == '«x» is "$HOME" [31m\\n %s \\u0041 é 🙂'
    setup.write_header(project, {"cpu": reason})
    program = '#include "build_facts.h"\n#include <cstdio>\nint main() { std::fputs(EAR_OPS_FACTS, stdout); }\n'
    subprocess.run(["c++", "-o", "print", write(project / "print.cpp", program)], check=True)
    printed = subprocess.run(["./print"], capture_output=True, check=True).stdout
    assert json.loads(printed)["not_built"] == {"cpu": reason}
    setup.write_module(project, {"cpu": reason})
    assert load(project / "_build_info.py").facts() == json.loads(printed)
