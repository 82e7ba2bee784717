"""The interpreter in the place of a GPU: the operators' own host code starts kernels, which run as PTX.

So grids, shared memory and arguments are what the code says and nothing is repeated here. The host code comes out of
``tests/cuda_on_host``, which knows each kernel by its mangled name, the same that nvcc gives it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ptx.compiler import Compiler
from ptx.machine import run
from ptx.memory import Extent, GlobalMemory
from support import cuda_on_host

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_void_p,  # an error's text; a char* would be freed before it is read
    ctypes.c_char_p,
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int64,
)


class Device:
    """Runs what is launched; keeps what went wrong, since no exception passes through the host code."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.launched: list[str] = []  # mangled names of kernels
        self.error: Exception | None = None
        self._memory: GlobalMemory | None = None
        self._text = ctypes.create_string_buffer(b"the interpreter reports an error")
        self._function = _LAUNCH(self._launch)
        self.function = ctypes.cast(self._function, ctypes.c_void_p).value

    def _launch(
        self, name: bytes, grid: int, threads: int, shared_bytes: int, arguments: int, argument_bytes: int
    ) -> int | None:
        try:
            self.launched.append(name.decode())
            extents = _memory_of_the_call()
            if self._memory is None:
                self._memory = GlobalMemory(extents)
            assert self._memory.extents == extents, "the call made memory between its launches, which is not modelled"
            run(
                self.compiler.program(name.decode()),
                ctypes.string_at(arguments, argument_bytes),
                self._memory,
                grid=grid,
                threads=threads,
                shared_bytes=shared_bytes,
            )
            self._memory.give_back()  # before the host code reads them
        except Exception as error:
            self.error = error
            return ctypes.addressof(self._text)
        return None

    def around(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        """One call of an operator: its launches share their memory, and at its end all results must be there."""

        def call(*arguments: Any) -> Any:
            self.error = self._memory = None
            try:
                result = operator(*arguments)
            except RuntimeError:
                if self.error is not None:
                    raise self.error from None
                raise
            if self._memory is not None:
                self._memory.check_complete()
            return result

        return call


def _memory_of_the_call() -> list[Extent]:
    numbers = torch.ops.ear_ops_cuda_on_host.memory()
    extents = [
        Extent(address, size, written=writes > 0, rewritten=writes > 1)
        for address, size, writes in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    ]
    return [extent for extent in extents if extent.bytes]


@contextlib.contextmanager
def in_place_of_cpu_kernels(compiler: Compiler) -> Iterator[Device]:
    """The operators on CPU tensors run the kernels' PTX."""
    device = Device(compiler)
    with cuda_on_host.in_place_of_cpu_kernels(device.around):
        cuda_on_host.configure(architecture=compiler.architecture)
        torch.ops.ear_ops_cuda_on_host.set_device(device.function)
        try:
            yield device
        finally:
            torch.ops.ear_ops_cuda_on_host.set_device(0)
