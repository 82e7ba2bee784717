"""What nvcc made of the kernels: registers, spills, the instructions that speed depends on and how many of them run.

    python csrc/cuda/check_build.py            the core set: head dimension 64 in bfloat16 and float32 (divergences:
                                               and averages over heads: bfloat16); the others
    python csrc/cuda/check_build.py --all      every instance; the core set is counted
    python csrc/cuda/check_build.py FILE ...   these
    python csrc/cuda/check_build.py --record   and write down what was counted, in counts.json

It fails where a kernel is amiss. Spilled registers are an error on every architecture. Tensor-core kernels
must hold HMMA instructions, 16-byte asynchronous copies and, in the backward, 16-byte stores. They may not execute more
instructions for a tile than counts.json says, nor take more modelled cycles (docs/contributing/kernel-model.md). Counts
are compared under the version of ptxas that made the recorded ones. No GPU is needed; nvcc is, and for the instructions
nvdisasm (PyPI: nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from sass import counts, issue  # noqa: E402
from sass.counts import Case, Host  # noqa: E402
from sass.listing import Kernel, parse  # noqa: E402

WORDS = "qk_words.cu"
OTHERS = ("attention_mse.cu", "pooled_distance.cu", WORDS)
HOPPER = "qk_hopper.cu"  # for sm_90a alone
CORE = ("qk_bfloat16_64", "qk_float_64", "qk_divergences_bfloat16_64", "mean_bfloat16_64")
CORE = (*(f"instances/{name}.cu" for name in CORE), HOPPER, *OTHERS)
ARCHITECTURES = ("80", "90")
ALL_COMPARISONS = (counts.MSE, "kKl", "kJs")  # of averages over heads
RECORD = HERE / "counts.json"
INSTRUCTIONS = {
    "HMMA": r"\bHMMA\.",
    "HGMMA": r"\bHGMMA\.",
    "tiles": r"\bUTMALDG\.",
    "copies": r"\bLDGSTS\.E\.(BYPASS\.)?(LTC128B\.)?128\b",
    "stores": r"\bSTG\.E\.128\b",
}


def tool(name: str) -> str | None:
    """A program of the toolkit, from PATH or from its PyPI package."""
    packages = [Path(folder) / "nvidia" for folder in sys.path]
    places = [path for folder in packages if folder.is_dir() for path in folder.glob(f"*/bin/{name}")]
    return shutil.which(name) or next(map(str, places), None)


def ptxas_version() -> str:
    said = subprocess.run(["ptxas", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    return version[1] if version else said.strip()


def demangled(name: str) -> str:
    """``forward_short<bfloat16, 64>`` out of a mangled name."""
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    plain = plain.replace("ear_ops::cuda::", "").replace("(int)", "")
    plain = re.sub(r"\(.*\)$", "", plain.replace("(Role)0", "queries").replace("(Role)1", "keys"))
    return plain.removeprefix("void ").replace("(bool)1", "vectorized").replace("(bool)0", "elements")


@dataclass(frozen=True)
class Built:
    """One file, compiled for one architecture. The object file is there while the context of `built` is."""

    source: Path
    architecture: str
    objects: Path
    registers: dict[str, int]
    spills: dict[str, tuple[int, int]]  # bytes of the stack frame, and bytes stored and loaded
    kernels: dict[str, Kernel] | None  # None without nvdisasm


def cases_of(source: Path) -> list[tuple[Host, str, Case]]:
    """What is counted of a file: its host code, a name of the call, and the call."""
    if source.name == HOPPER:
        host = Host("launches.cpp", "bfloat16", 64, hopper=True)
        return [(host, case.name, case) for case in counts.HOPPER_CASES]
    if source.name == WORDS:
        hosts = [Host("launches_words.cpp", element, 64) for element in counts.ELEMENT_BYTES]
        return [(host, f"{host.element} {case.name}", case) for host in hosts for case in counts.WORD_CASES]
    name = re.fullmatch(r"(qk|qk_divergences|mean)_([a-z]+\d*)_(\d+)", source.stem)
    if name is None:
        return []
    element, features = name[2], int(name[3])
    if name[1] == "mean":
        squares, *others = (Host("launches_mean.cpp", element, features, comparison) for comparison in ALL_COMPARISONS)
        cases = [(squares, case) for case in counts.MEAN_CASES] + [(host, counts.MEAN_CASES[0]) for host in others]
        return [(host, f"{host.comparison} {case.name}", case) for host, case in cases]
    comparisons = re.findall(r"Comparison::(\w+)", source.read_text())
    hosts = [Host("launches.cpp", element, features, comparison) for comparison in comparisons]
    if comparisons == [counts.MSE]:
        return [(hosts[0], case.name, case) for case in counts.CASES]
    return [(host, f"{host.comparison} {case.name}", case) for host in hosts for case in counts.DIVERGENCE_CASES]


@contextlib.contextmanager
def built(source: Path, architecture: str) -> Iterator[Built]:
    """Compile a file for one architecture, its host code too."""
    with tempfile.TemporaryDirectory() as name:
        folder, objects = Path(name), Path(name) / "kernels.o"
        command = ["nvcc", "-std=c++17", "-O3", "-c", "-Xptxas=-v", "--keep"]
        command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        command += ["--keep-dir", name, str(source.resolve()), "-o", str(objects)]
        report = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if report.returncode:
            raise SystemExit(f"{source.name}, sm_{architecture}: nvcc failed\n{report.stderr}")
        reported = re.findall(
            r"Function properties for (\S+)\n"
            r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
            r".*?Used (\d+) registers",
            report.stderr,
        )
        if not reported:
            raise SystemExit(f"{source.name}, sm_{architecture}: the compiler's report holds no kernel")
        kernels = None
        if (nvdisasm := tool("nvdisasm")) is not None:
            (cubin,) = folder.glob("*.cubin")
            done = subprocess.run([nvdisasm, "-hex", cubin], capture_output=True, text=True, check=True)
            kernels = parse(done.stdout)
        yield Built(
            source=source,
            architecture=architecture,
            objects=objects,
            registers={name: int(registers) for name, *_, registers in reported},
            spills={name: (int(stack), int(stores) + int(loads)) for name, stack, stores, loads, _ in reported},
            kernels=kernels,
        )


def facts(file: Built) -> list[dict[str, Any]]:
    """A row for each kernel in a file."""
    rows = []
    for name, registers in file.registers.items():
        stack, spills = file.spills[name]
        row: dict[str, Any] = {"kernel": demangled(name), "architecture": f"sm_{file.architecture}"}
        row |= {"registers": registers, "stack": stack, "spills": spills}
        if file.kernels is not None:
            texts = [instruction.opcode for instruction in file.kernels[name].instructions]
            for key, pattern in INSTRUCTIONS.items():
                row[key] = sum(bool(re.match(pattern, text + ".")) for text in texts)
        rows.append(row)
    return rows


def counted(file: Built) -> tuple[dict[str, Any], list[str]]:
    """The counts of every case by its name, and complaints about tensor-core kernels that no case starts."""
    rows: dict[str, Any] = {}
    cases = cases_of(file.source)
    if file.kernels is None or not cases:
        return rows, []
    device, started = issue.DEVICES[file.architecture], set()
    programs = {host: host.build(file.objects, file.objects.parent) for host in {host for host, *_ in cases}}
    for host, name, case in cases:
        launches = counts.launches_of(programs[host], case, host.features, device)
        started |= {launch.kernel for launch in launches}
        result = counts.count(case, launches, file.kernels, file.registers, file.architecture)
        row = result.row(device)
        row["kernels"] = [demangled(name) for name in row["kernels"]]
        rows[f"{file.source.name}, sm_{file.architecture}, {name}"] = row
    of_products = {
        name
        for name, kernel in file.kernels.items()
        if any(instruction.name == "HMMA" for instruction in kernel.instructions)
    }
    return rows, [
        f"{demangled(name)}, sm_{file.architecture}: no case of sass/counts.py starts it; add one"
        for name in sorted(of_products - started)
    ]


def complaints(row: dict[str, Any]) -> list[str]:
    amiss = []
    if row["spills"] > 0:
        amiss.append(f"spills {row['spills']} bytes")
    tensor_cores = re.match(r"(forward_short|forward_long|backward|backward_short|(?:words|mean)_\w+)<", row["kernel"])
    if re.match(r"(forward|gradient)_hopper<", row["kernel"]):
        return amiss + [f"holds no {name}" for name in ("HGMMA", "tiles") if row.get(name) == 0]
    of_gradient = ("stores",) if re.match("backward|mean_gradient", row["kernel"]) else ()
    needed = ("HMMA", "copies", *of_gradient) if tensor_cores else ()
    amiss += [f"holds no {name}" for name in needed if row.get(name) == 0]
    return amiss


def check_one(task: tuple[Path, str, bool]) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """The facts of a file for an architecture, and if asked for its counts."""
    source, architecture, counts_too = task
    with built(source, architecture) as file:
        return facts(file), *(counted(file) if counts_too else ({}, []))


def gate(recorded: dict[str, Any], version: str, measured: dict[str, Any], files: list[str]) -> tuple[str, list[str]]:
    """Compare counts with the recorded ones. Return what to print and the complaints."""
    if not measured:
        return "NOT RUN: counts, because there is no nvdisasm or no file of instances/ was asked for", []
    if recorded.get("ptxas") != version:
        return f"NOT RUN: the gate on counts; recorded under ptxas {recorded.get('ptxas')}, this is {version}", []
    worse = counts.complaints(recorded["rows"], measured, files)
    return f"counts: {len(measured)} calls compared, {len(worse)} complaints", worse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--record", action="store_true", help="write the counts of these files into counts.json")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    sources = options.files or [HERE / name for name in CORE]
    if options.all:
        sources = [*(HERE / name for name in (HOPPER, *OTHERS)), *sorted(HERE.glob("instances/*.cu"))]
    core = {HERE / name for name in CORE}
    tasks = [
        (source, name, bool(options.files) or source in core)
        for source in sources
        for name in (("90a",) if source.name == HOPPER else ARCHITECTURES)
    ]
    rows: list[dict[str, Any]] = []
    measured: dict[str, Any] = {}
    problems: list[str] = []
    with ProcessPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        for of_kernels, of_cases, unstarted in pool.map(check_one, tasks):
            for row in of_kernels:
                amiss = complaints(row)
                problems += [f"{row['kernel']}, {row['architecture']}: {text}" for text in amiss]
                print("  ".join(f"{key} {value}" for key, value in row.items()), *amiss, sep="  ", flush=True)
            for name, counted_row in of_cases.items():
                print(f"  {name}: " + "  ".join(f"{key} {counted_row[key]}" for key in counts.GATED), flush=True)
            rows += of_kernels
            measured |= of_cases
            problems += unstarted
    if any("HMMA" not in row for row in rows):
        print("NOT CHECKED: instructions (there is no nvdisasm)")
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {"ptxas": None, "rows": {}}
    files, version = [source.name for source in sources], ptxas_version()
    if options.record:
        kept = {} if recorded["ptxas"] != version else recorded["rows"]
        kept = {name: row for name, row in kept.items() if name.split(",")[0] not in files}
        written = {"ptxas": version, "rows": dict(sorted((kept | measured).items()))}
        RECORD.write_text(json.dumps(written, indent=1) + "\n")
    else:
        said, worse = gate(recorded, version, measured, [source.name for source, _, counts_too in tasks if counts_too])
        print(said)
        problems += worse
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    if problems:
        raise SystemExit("\n".join([f"{len(problems)} complaints:", *problems]))


if __name__ == "__main__":
    main()
