"""docs/contributing/add-an-op.md does what it says: its files, and no others, make an operator with a kernel."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

import ear_ops
from ear_ops.ops import extension

ROOT = Path(__file__).parents[2]
PACKAGE = Path(ear_ops.__file__).parent
PAGE = ROOT / "docs" / "contributing" / "add-an-op.md"

CHECK = """
import sys  # an editable installation offers its files to every package of this name
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import torch, ear_ops
from ear_ops.ops.problem import attention_problem
torch.ops.load_library(sys.argv[1])
from ear_ops.ops.qk_attention_l1 import QK_ATTENTION_L1

def sums(*views, backend):
    names = ("attention_mask", "attention_mask_aug", "query_mask", "query_mask_aug", "attn_bias", "attn_bias_aug")
    rest = dict.fromkeys((*names, "scale", "window", "softcap"))
    problem, _ = attention_problem(*views, **rest, is_causal=False, count_padded_queries=False)
    return QK_ATTENTION_L1.sums(problem, backend)

torch.manual_seed(0)
views = [torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
both = [torch.cat([views[0], views[2]]), torch.cat([views[1], views[3]]), None, None]
for inputs in (views, both):
    torch.testing.assert_close(sums(*inputs, backend="cpu"), sums(*inputs, backend="reference"))
squares = [sums(*views, backend=backend).square().sum() for backend in ("cpu", "reference")]
torch.testing.assert_close(*[torch.autograd.grad(square, views) for square in squares])
half = [view.detach().bfloat16() for view in views]
torch.testing.assert_close(sums(*half, backend="cpu"), sums(*half, backend="reference"))
detached = [view.detach() for view in views]
torch.library.opcheck(torch.ops.ear_ops.qk_attention_l1.default, (*detached, *[None] * 4, 0.5, False, 0, None))
print(QK_ATTENTION_L1.kernels)
"""


def files_of_the_page() -> dict[str, str]:
    """The text of each file that the page shows, by its path."""
    blocks = re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return dict(blocks)


def compile_kernel(source: Path, library: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    includes = [f"-I{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command = [
        compiler,
        "-std=c++20",
        "-O0",
        "-shared",
        "-fPIC",
        *includes,
        str(source),
        "-o",
        str(library),
        *libraries,
    ]
    subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True)


@pytest.mark.skipif(not extension.CPU.loaded, reason=f"no CPU kernels: {extension.CPU.reason}")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_the_walk_through_adds_an_operator_with_one_file_a_language(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "mini", "recipes")
    shutil.copytree(PACKAGE, tmp_path / "ear_ops", ignore=ignored)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=ignored)
    files = files_of_the_page()
    assert sorted(files) == ["csrc/cpu/qk_attention_l1.cpp", "ear_ops/ops/qk_attention_l1.py"]
    for path, text in files.items():
        assert not (tmp_path / path).exists(), f"{path} is no new file"
        (tmp_path / path).write_text(text, encoding="utf-8")

    library = tmp_path / "qk_attention_l1.so"
    compile_kernel(tmp_path / "csrc/cpu/qk_attention_l1.cpp", library)
    result = subprocess.run(
        [sys.executable, "-c", CHECK, str(library)],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "frozenset({'cpu'})"
    for folder, copied in (("ear_ops", PACKAGE.parent), ("csrc", ROOT)):
        changed = [
            path.relative_to(tmp_path).as_posix()
            for path in (tmp_path / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
            if not (original := copied / path.relative_to(tmp_path)).exists() or not filecmp.cmp(path, original, False)
        ]
        assert changed == [path for path in files if path.startswith(folder)]
