"""Every test here runs the CUDA kernels, compiled for the host, in the place of the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import cuda_on_host
from support.host_cases import DTYPES


@pytest.fixture(autouse=True, scope="module")
def kernels() -> Iterator[None]:
    if not cuda_on_host.LIBRARY.exists():
        pytest.skip("not compiled: python tests/cuda_on_host/build.py")
    with cuda_on_host.in_place_of_cpu_kernels():
        yield


@pytest.fixture(autouse=True)
def device_as_usual(kernels: None) -> Iterator[None]:
    cuda_on_host.configure()
    yield
    cuda_on_host.configure()


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
