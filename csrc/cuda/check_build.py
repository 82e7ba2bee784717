"""What nvcc made of the kernels: registers, spills, the instructions that speed depends on; fails where one is amiss.

    python csrc/cuda/check_build.py            the core set: head dimension 64 in bfloat16 and float32; the others
    python csrc/cuda/check_build.py --all      every instance
    python csrc/cuda/check_build.py FILE ...   these

More than a few spilled bytes are an error on every architecture; tensor-core kernels must hold HMMA instructions,
16-byte asynchronous copies and, in the backward, 16-byte stores. No GPU is needed; nvcc is, and for the instructions
cuobjdump (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OTHERS = ("attention_mse.cu", "pooled_distance.cu")
CORE = ("instances/qk_bfloat16_64.cu", "instances/qk_float_64.cu", *OTHERS)
ARCHITECTURES = ("80", "90")
SPILLED_AT_MOST = 16  # bytes stored and loaded: two registers, put off once a tile (float32, head dimension 96, sm_80)
INSTRUCTIONS = {
    "HMMA": r"\bHMMA\.",
    "copies": r"\bLDGSTS\.E\.(BYPASS\.)?(LTC128B\.)?128\b",
    "stores": r"\bSTG\.E\.128\b",
}


def tool(name: str) -> str | None:
    """A program of the toolkit, from PATH or from its PyPI package."""
    packages = [Path(folder) / "nvidia" for folder in sys.path]
    places = [found for folder in packages if folder.is_dir() for found in folder.glob(f"*/bin/{name}")]
    return shutil.which(name) or next(map(str, places), None)


def demangled(name: str) -> str:
    """``forward_short<bfloat16, 64>`` out of a mangled name."""
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"\(.*\)$", "", plain.replace("ear_ops::cuda::", "").replace("(int)", ""))
    return plain.removeprefix("void ").replace("(bool)1", "vectorized").replace("(bool)0", "elements")


def compile_one(source: Path, architecture: str) -> list[dict[str, Any]]:
    """A row of facts for each kernel in a file."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v", source, "-o", cubin]
        report = subprocess.run(command, capture_output=True, text=True)
        if report.returncode:
            raise SystemExit(f"{source.name}, sm_{architecture}: nvcc failed\n{report.stderr}")
        sass = listing(cubin)
    found = re.findall(
        r"Function properties for (\S+)\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers",
        report.stderr,
    )
    rows = []
    for name, stack, stores, loads, registers in found:
        row: dict[str, Any] = {"kernel": demangled(name), "architecture": f"sm_{architecture}"}
        row |= {"registers": int(registers), "stack": int(stack), "spills": int(stores) + int(loads)}
        if sass is not None:
            row |= {key: len(re.findall(pattern, sass.get(name, ""))) for key, pattern in INSTRUCTIONS.items()}
        rows.append(row)
    if not rows:
        raise SystemExit(f"{source.name}, sm_{architecture}: the compiler's report holds no kernel")
    return rows


def listing(cubin: Path) -> dict[str, str] | None:
    """The instructions of each kernel, None without cuobjdump."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        return None
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ["PATH"]])
    command = [cuobjdump, "-sass", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}).stdout
    parts = re.split(r"\n\s*Function : (\S+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def complaints(row: dict[str, Any]) -> list[str]:
    found = []
    if row["spills"] > SPILLED_AT_MOST:
        found.append(f"spills {row['spills']} bytes")
    tensor_cores = re.match(r"(forward_short|forward_long|backward)<", row["kernel"])
    needed = ("HMMA", "copies", *(("stores",) if row["kernel"].startswith("backward<") else ())) if tensor_cores else ()
    found += [f"holds no {name}" for name in needed if row.get(name) == 0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    sources = options.files or [HERE / name for name in CORE]
    if options.all:
        sources = [*(HERE / name for name in OTHERS), *sorted(HERE.glob("instances/*.cu"))]
    tasks = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    rows: list[dict[str, Any]] = []
    bad = 0
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        for found in pool.map(lambda task: compile_one(*task), tasks):
            for row in found:
                problems = complaints(row)
                bad += bool(problems)
                print("  ".join(f"{key} {value}" for key, value in row.items()), *problems, sep="  ", flush=True)
            rows += found
    if any("HMMA" not in row for row in rows):
        print("NOT CHECKED: instructions (there is no cuobjdump with nvdisasm)")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    if bad:
        raise SystemExit(f"{bad} kernels are not as they must be")


if __name__ == "__main__":
    main()
