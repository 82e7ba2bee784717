"""Which backend runs a call, what is said where one cannot run, and every instruction set of the CPU kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import Case, attention_case, pooled_case, qk_case

import ear_ops
from ear_ops.ops import backend, extension, operator

HERE = Path(__file__).parents[1]  # the folder of the tests
PACKAGE = Path(ear_ops.__file__).parent
CASES = {
    "qk_attention_mse": qk_case(5, 7, 3).to(torch.float32),
    "attention_mse": attention_case(5, 7).to(torch.float32),
    "pooled_distance": pooled_case(5, 7).to(torch.float32),
}
needs_cpu_kernels = pytest.mark.skipif(not extension.CPU.loaded, reason=f"no CPU kernels: {extension.CPU.reason}")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the refusal cannot be seen")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EAR_OPS_BACKEND", raising=False)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that calls ran on, in order."""
    seen: list[str] = []
    select = backend.select_backend

    def recorded(*args: object, **kwargs: object) -> str:
        seen.append(select(*args, **kwargs))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(operator, "select_backend", recorded)
    return seen


def call(case: Case, backend: str | None = None) -> torch.Tensor:
    return case.call(case.inputs(), backend)


@pytest.mark.parametrize("op", CASES)
def test_auto_takes_the_kernels_of_the_device(op: str, device: str, ran: list[str]) -> None:
    case = CASES[op].to(device)
    call(case)
    call(case, "auto")
    call(case, device)
    call(case, "reference")
    assert ran == [device, device, device, "reference"]


@pytest.mark.parametrize("op", CASES)
def test_the_environment_names_the_backend_and_the_argument_wins(
    op: str, device: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[op].to(device)
    monkeypatch.setenv("EAR_OPS_BACKEND", "reference")
    call(case)
    call(case, device)
    monkeypatch.setenv("EAR_OPS_BACKEND", device)
    call(case)
    monkeypatch.setenv("EAR_OPS_BACKEND", "")
    call(case)
    assert ran == ["reference", device, device, device]
    monkeypatch.setenv("EAR_OPS_BACKEND", "mps")
    with pytest.raises(ValueError, match="expected one of 'auto', 'reference', 'cpu', 'cuda', got 'mps'"):
        call(case)


def test_the_kernel_and_not_the_reference_computes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call for a kernel that fell back silently would pass every comparison with the reference."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("the reference was called")

    for op in CASES:
        monkeypatch.setattr(operator.OPERATORS[op], "reference", forbidden)
    for case in CASES.values():
        case.to(device).run(device)
        case.to(device).run(None)
        with pytest.raises(AssertionError, match="the reference was called"):
            case.to(device).run("reference")


def test_softcap_runs_on_the_reference(device: str, ran: list[str]) -> None:
    case = qk_case(5, 7, 3, options={"softcap": 2.0}).to(torch.float32).to(device)
    found = call(case)
    assert ran == ["reference"]
    torch.testing.assert_close(found, case.run_plain()[0])
    with pytest.raises(ear_ops.BackendUnavailableError, match=f"'{device}' cannot run qk_attention_mse: softcap"):
        call(case, device)


@no_gpu
@pytest.mark.parametrize("op", CASES)
def test_cuda_without_a_gpu_says_why(op: str) -> None:
    with pytest.raises(
        ear_ops.BackendUnavailableError, match=f"'cuda' cannot run {op}: .*cpu, and .*(CUDA|GPU); use backend='auto'"
    ):
        call(CASES[op], "cuda")
    assert issubclass(ear_ops.BackendUnavailableError, RuntimeError)


def test_a_dtype_that_no_kernel_takes_says_which_it_does(device: str) -> None:
    hidden = torch.zeros(2, 3, 4, device=device).to(torch.float8_e5m2)
    with pytest.raises(ear_ops.BackendUnavailableError, match=r"it takes torch.float32.*got torch.float8_e5m2"):
        ear_ops.pooled_distance(hidden, backend=device)


@pytest.mark.parametrize("op", CASES)
def test_meta_tensors_run_on_the_reference(op: str, ran: list[str]) -> None:
    """Shapes can be worked out without data, as for any function of torch."""
    assert call(CASES[op].to("meta")).device.type == "meta"
    assert ran == ["reference"]


def test_binaries_that_lie_here_were_loaded() -> None:
    """A binary that does not load must fail this suite: every kernel test would be skipped."""
    for name, binary in (("_C_cpu", extension.CPU), ("_C_cuda", extension.CUDA)):
        assert binary.loaded == bool(list(PACKAGE.glob(f"{name}*.so"))), binary.reason
    for device, binary in (("cpu", extension.CPU), ("cuda", extension.CUDA)):
        if binary.loaded:
            assert not [op for op in operator.SCHEMAS if device not in backend.kernels_of(op)]


# --- processes of their own -----------------------------------------------------------------------------------------


def python(*arguments: str, path: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python that finds the package in ``path``, with OpenMP on one thread."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EAR_OPS_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", **environment},
        cwd=HERE,  # not the checkout: with -c Python looks there first
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def isas() -> list[str]:
    """The instruction sets that this processor can run, from the error for an unknown one, the best last."""
    result = python("-c", "import ear_ops, torch; torch.ops.ear_ops.cpu_isa()", EAR_OPS_CPU_ISA="nonsense")
    assert result.returncode != 0 and "EAR_OPS_CPU_ISA: expected one of" in result.stderr, result.stderr
    assert "got 'nonsense'" in result.stderr
    listed = result.stderr.split("expected one of ")[1].split(" (what this processor has)")[0]
    return listed.split(", ")


@needs_cpu_kernels
def test_the_best_instruction_set_runs_by_default(isas: list[str]) -> None:
    assert isas[0] == "portable" and isas[-2:] == ["avx512_bf16-emulated", "amx-emulated"]
    wanted = os.environ.get("EAR_OPS_CPU_ISA")
    assert torch.ops.ear_ops.cpu_isa() == (wanted or isas[-3])


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("isa", "bfloat16"),
    [("portable", "float32 (plain loops)"), ("avx512_bf16-emulated", "bfloat16 (emulated)")],
)
def test_the_report_names_what_products_are_computed_in(isa: str, bfloat16: str) -> None:
    result = python("-m", "ear_ops.env_report", EAR_OPS_CPU_ISA=isa)
    assert f"cpu isa       {isa} (EAR_OPS_CPU_ISA={isa})" in result.stdout, result.stderr
    assert f"bfloat16 in {bfloat16}, float16 in float32" in result.stdout
    assert "float64 in float64 (plain loops)" in result.stdout


@needs_cpu_kernels
@pytest.mark.parametrize(
    "isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx", "avx512_bf16-emulated", "amx-emulated"]
)
def test_every_instruction_set(isa: str, isas: list[str]) -> None:
    """The error rule in every dtype where this processor has it; where it has not, an error that lists what it has."""
    result = python(str(HERE / "support" / "isa_check.py"), EAR_OPS_CPU_ISA=isa)
    if isa in isas:
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.strip() == isa
    else:
        assert result.returncode != 0
        assert f"expected one of {', '.join(isas)} (what this processor has), got '{isa}'" in result.stderr


def copy_of_the_package(folder: Path) -> Path:
    """The Python files alone."""
    ignored = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__", "mini")
    shutil.copytree(PACKAGE, folder / "ear_ops", ignore=ignored)
    return folder


TRY_EVERYTHING = """
import sys  # an editable installation offers its binaries to every package of this name
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import torch, ear_ops
from ear_ops.ops import extension
hidden = torch.randn(2, 3, 4, requires_grad=True)
ear_ops.pooled_distance(hidden).backward()
ear_ops.qk_attention_mse(*[torch.randn(1, 1, 2, 3)] * 4)
try:
    ear_ops.pooled_distance(hidden, backend="cpu")
except ear_ops.BackendUnavailableError as error:
    print(error)
"""


def test_without_binaries_the_reference_runs(tmp_path: Path) -> None:
    result = python("-c", TRY_EVERYTHING, path=copy_of_the_package(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "'cpu' cannot run pooled_distance: no cpu kernels were built" in result.stdout
    assert "UserWarning" not in result.stderr


def test_a_package_built_without_torch_warns_once_and_reports_the_same(tmp_path: Path) -> None:
    """The reference takes over silently otherwise, and nothing tells that an install was meant to be fast."""
    reason = "built without torch in the build environment"
    facts = {"kernels": "", "torch": "", "not_built": {"cpu": reason, "cuda": reason}, "by_choice": []}
    facts |= {"cpu_isas": "", "cuda_architectures": "", "compiler": ""}
    package = copy_of_the_package(tmp_path) / "ear_ops"
    (package / "_build_info.py").write_text(f"def facts():\n    return {facts}\n")
    report = "from ear_ops.env_report import lines; print(*lines(), sep='\\n')"
    result = python("-c", f"{TRY_EVERYTHING}\n{report}", path=tmp_path)
    assert result.returncode == 0, result.stderr
    told = f"no cpu kernels were built ({reason}); "
    assert result.stderr.count(f"the slower reference runs in their place: {told}") == 1
    assert f"cpu kernels   not available: {told}" in result.stdout and "--no-build-isolation" in result.stdout
    assert "built         nothing" in result.stdout


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"torch": "1.0.0", "by_choice": []}, "built for torch 1.0.0, running torch .*reinstall"),
        ({"torch": torch.__version__, "by_choice": []}, "did not load: "),
        (None, "has no build facts beside it; .*install"),
    ],
    ids=["another torch", "broken binary", "no facts"],
)
def test_a_binary_that_does_not_fit_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any] | None, reason: str
) -> None:
    (tmp_path / "_C_other.so").write_bytes(b"not a library")
    monkeypatch.setattr(ear_ops, "__path__", [str(tmp_path)])
    monkeypatch.setattr(extension, "build_info", lambda: facts)
    found = extension.load("other")
    assert not found.loaded and re.search(reason, found.reason), found.reason
    assert found.expected


@pytest.mark.parametrize(
    ("facts", "reason", "expected"),
    [
        (
            {"not_built": {"other": "built without torch in the build environment"}, "by_choice": []},
            r"\(built without torch in the build environment\); .*install --no-build-isolation ",
            True,
        ),
        ({"not_built": {"other": "EAR_OPS_BUILD=none was set"}, "by_choice": ["other"]}, "EAR_OPS_BUILD=none", False),
        (None, "these are source files alone", False),
    ],
    ids=["no torch at the build", "by choice", "a bare source tree"],
)
def test_kernels_that_were_not_built_say_why(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any] | None, reason: str, expected: bool
) -> None:
    monkeypatch.setattr(extension, "build_info", lambda: facts)
    found = extension.load("other")
    assert not found.loaded and found.expected == expected
    assert re.match(rf"no other kernels were built .*{reason}", found.reason), found.reason


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_another_build_is_advised_only_where_it_would_help(monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> None:
    facts = {"not_built": {"cuda": "torch was built without CUDA"}, "by_choice": []}
    monkeypatch.setattr(extension, "build_info", lambda: facts)
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    reason = extension.load("cuda").reason
    assert "torch was built without CUDA" in reason and ("install" in reason) == (cuda is not None)


@pytest.mark.parametrize("expected", [True, False])
def test_expected_kernels_that_do_not_run_warn_once(monkeypatch: pytest.MonkeyPatch, expected: bool) -> None:
    """Such as after an upgrade of torch, or a build without torch. Those that were left out by choice do not."""
    idle = extension.Extension("cpu", False, "built for torch 1.0.0; reinstall with: ...", expected)
    monkeypatch.setitem(backend._EXTENSIONS, "cpu", idle)
    for op in operator.OPERATORS.values():
        monkeypatch.setattr(op, "kernels", frozenset())
    backend._warn_of_idle_kernels.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(CASES["pooled_distance"], "reference")  # asked for
        call(qk_case(5, 7, 3, options={"softcap": 2.0}).to(torch.float32))  # no kernel takes it anyway
        assert not caught
        for _ in range(2):
            for case in CASES.values():
                call(case)
    found = [str(warning.message) for warning in caught]
    assert found == expected * [
        f"the cpu kernels do not run, so the slower reference runs in their place: {idle.reason}"
    ]
    backend._warn_of_idle_kernels.cache_clear()


@needs_cpu_kernels
def test_a_binary_for_a_patch_release_of_the_same_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    release = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    monkeypatch.setattr(extension, "build_info", lambda: {"torch": f"{release}.99+cu130", "by_choice": []})
    assert extension.load("cpu").loaded


def test_function_transforms_run_on_the_reference(ran: list[str]) -> None:
    query = torch.randn(3, 2, 2, 4, 8)

    def loss(query: torch.Tensor) -> torch.Tensor:
        return ear_ops.qk_attention_mse(query, query)

    gradient = torch.func.grad(loss)(query[0])
    given = query[0].clone().requires_grad_()
    loss(given).backward()
    torch.testing.assert_close(gradient, given.grad)
    torch.testing.assert_close(torch.vmap(loss)(query), torch.stack([loss(each) for each in query]))
    with pytest.raises(ear_ops.BackendUnavailableError, match=r"torch\.func"):
        torch.func.grad(lambda query: ear_ops.qk_attention_mse(query, query, backend="cpu"))(query[0])


@pytest.mark.parametrize(
    ("built", "gpu", "runs"),
    [
        ("sm_80 sm_90", (8, 0), True),
        ("sm_80 sm_90", (8, 9), True),
        ("sm_80 sm_90", (10, 0), True),  # translated from what is there of sm_90
        ("sm_80 sm_90", (7, 5), False),
        ("sm_90", (8, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False),  # code for one architecture alone is never translated
        ("sm_100f", (10, 3), True),
        ("sm_100f", (12, 0), False),
        ("sm_80 sm_90a", (10, 0), True),  # translated from what is there of sm_80
    ],
)
def test_a_gpu_that_the_kernels_were_not_built_for_says_so(
    monkeypatch: pytest.MonkeyPatch, built: str, gpu: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpu)
    monkeypatch.setattr(extension, "build_info", lambda: {"cuda_architectures": built})
    reason = backend.why_not_this_gpu.__wrapped__(0)
    assert reason is None if runs else f"the GPU is sm_{gpu[0]}{gpu[1]}" in reason
