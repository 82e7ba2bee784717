"""Freed memory that is kept: a second large block is made of pages that the process has already."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ear_ops import memory

PAGES = """
import ctypes, resource, runpy, sys
if sys.argv[2] == "kept":
    runpy.run_path(sys.argv[1])["keep_freed_memory"]()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 64 * 2**20
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_a_second_block_needs_no_fresh_pages() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", PAGES, str(Path(memory.__file__)), how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < 10 < faults("as it comes")
