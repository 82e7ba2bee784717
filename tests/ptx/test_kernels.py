"""The kernels as nvcc compiles them, inline assembly included, run by the interpreter against the float64 reference.

``make check-ptx`` runs the core, ``make ptx-full`` everything; ``make test`` runs none of it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest
from ptx.checks import ARCHITECTURES, Check, checks, primitives
from ptx.compiler import HOPPER, SOURCES, Compiler, demangled
from ptx.device import in_place_of_cpu_kernels
from support import cuda_on_host

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
    pytest.mark.skipif(not cuda_on_host.LIBRARY.exists(), reason="not compiled: python tests/cuda_on_host/build.py"),
]


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiler]:
    folder = tmp_path_factory.mktemp("ptx")
    return {architecture: Compiler(architecture, folder) for architecture in ARCHITECTURES}


@pytest.fixture(scope="module")
def launched() -> dict[str, set[str]]:
    """The kernels that ran, by architecture."""
    return {architecture: set() for architecture in ARCHITECTURES}


def parameters() -> Iterator[object]:
    """Every check on every architecture; of the core, every other one on each."""
    for number, check in enumerate(checks()):
        for turn, architecture in enumerate(check.architectures):
            in_turn = number % 2 == turn or len(check.architectures) == 1
            if check.core_architecture:
                in_turn = architecture == check.core_architecture
            mark = pytest.mark.ptx if check.core and in_turn else pytest.mark.ptx_full
            marks = [mark, pytest.mark.xdist_group(architecture)]
            yield pytest.param(check, architecture, id=f"{check.name}-{architecture}", marks=marks)


# Its shared memory does not hold these; chunks of 64 features, or kernels for rows of any length, take their calls.
TOO_LARGE_FOR_SM_80 = re.compile(r"<float, 128,|forward_short<float, 96, 128,|backward_short<\S+, 128, 128,")

# With `--dist loadgroup`, one process compiles the kernels of an architecture and runs all of its tests.
of_each_architecture = pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ARCHITECTURES]
)


@pytest.mark.parametrize(("check", "architecture"), parameters())
def test_kernels(
    check: Check, architecture: str, compilers: dict[str, Compiler], launched: dict[str, set[str]]
) -> None:
    with in_place_of_cpu_kernels(compilers[architecture]) as device:
        check.run()
    if check.name.startswith("hopper"):
        assert any("_hopper" in name for name in device.launched), "another kernel ran"
    launched[architecture].update(device.launched)


@pytest.mark.ptx
@of_each_architecture
def test_primitives(architecture: str, compilers: dict[str, Compiler]) -> None:
    primitives(compilers[architecture])


@pytest.mark.ptx_full
@of_each_architecture
def test_no_kernel_was_left_out(
    architecture: str, compilers: dict[str, Compiler], launched: dict[str, set[str]]
) -> None:
    folder = SOURCES / "cuda"
    sources = [*folder.glob("instances/*.cu"), folder / "attention_mse.cu", folder / "pooled_distance.cu"]
    sources.append(folder / "qk_words.cu")
    sources += [folder / HOPPER] if architecture == "sm_90" else []
    names = {name for source in sources for name in compilers[architecture].kernels(source)}
    left_out = {demangled(name) for name in names - launched[architecture]}
    if architecture == "sm_80":
        left_out = {name for name in left_out if not TOO_LARGE_FOR_SM_80.search(name)}
    assert not left_out, "\n".join(sorted(left_out))
