"""The C library's way with freed memory, which decides a good part of the speed of training on a CPU."""

from __future__ import annotations

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the rest of the process: else a step makes its activations of fresh pages,
    which the kernel has to clear, the more of them the larger its batch is. Elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, or Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never; a step of 64 rows frees more than the 2 GB that it could say
