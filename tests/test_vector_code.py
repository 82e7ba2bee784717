"""What the compiler made of the CPU kernels' loops: vectors that it does not take apart.

GCC does that without a word for what it cannot do with a whole vector, and the loop then takes several times as long.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from ear_ops.ops import extension

# A vector that is put together from single lanes. Taking lanes out is how a sum over them ends.
FROM_LANES = re.compile(r"\b(vpinsr[bdqw]|vinsertps|vunpcklps)\b")


@pytest.mark.skipif(not extension.CPU.loaded, reason=f"no CPU kernels: {extension.CPU.reason}")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are those of x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_loops_keep_their_vectors_whole() -> None:
    binary = extension.CPU.reason.removeprefix("loaded from ")
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", binary]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wide, from_lanes = 0, {}
    for function in re.split(r"\n(?=[0-9a-f]+ <)", listing):
        name = function.split("\n", 1)[0]
        if "<float>" not in name or "anonymous namespace" not in name or "%zmm" not in function:
            continue
        wide += 1
        if (count := len(FROM_LANES.findall(function))) > 2:  # a scalar at the end of a row may need some
            from_lanes[name] = count
    assert wide > 20, "the loops for AVX-512 were not found"
    assert not from_lanes
