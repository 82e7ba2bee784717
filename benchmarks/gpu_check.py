"""On a machine with a GPU: builds, runs the GPU tests, the sanitizers on small shapes, and the benchmarks, in one go.

    make gpu-check

Writes six files into ``$OUT`` (else ``build/gpu-check``): ``log.txt``, ``summary.json`` and the results. A step that
cannot run here (a tool is missing, the eight minutes are over) is reported as NOT RUN, never as passed; the exit status
counts failed steps. Needs no network: torch with CUDA, pybind11, pytest and hypothesis must be there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check").resolve()
KERNEL_TESTS = ["tests/test_qk_attention_mse.py", "tests/test_attention_mse.py", "tests/test_pooled_distance.py"]
OTHER_TESTS = [
    f"tests/{name}.py" for name in ("test_properties", "test_compile", "test_backends", "capture/test_exactness")
]
SECONDS = 8 * 60  # of all steps together
Step = tuple[str, list[str], int, str | None]  # name, command, seconds, the tool it needs


def steps() -> list[Step]:
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k"]
    small = [*pytest, "cuda and (test_features or test_reductions)", *KERNEL_TESTS]
    bench = [python, "benchmarks/bench_losses.py", "--device", "cuda", "--repeats", "30"]
    found: list[Step] = [
        ("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 240, "nvcc"),
        ("environment", [python, "-m", "ear_ops.env_report"], 60, None),
        ("tests", [*pytest, "cuda", *KERNEL_TESTS, *OTHER_TESTS], 180, None),
        ("losses", [*bench, "--compile", "--out", str(OUT / "losses.json")], 120, None),
        (
            "long rows",
            [*bench, "--ops=qk_attention_mse", "--presets=long-4096,gqa", f"--out={OUT / 'long.json'}"],
            60,
            None,
        ),
    ]
    step = [python, "benchmarks/bench_step.py", "--model=bert-base", "--device=cuda", f"--out={OUT / 'step.json'}"]
    found.append(("training step", step, 90, None))
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", *small]
        found.append((tool, command, 60, "compute-sanitizer"))
    found.append(("compiler's report", [python, "csrc/cuda/check_build.py", f"--out={OUT / 'build.json'}"], 90, "nvcc"))
    return found


def architecture() -> str:
    """Of the GPU that is here: kernels for others need not be compiled."""
    ask = "import torch; print(*torch.cuda.get_device_capability(), sep='')"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"there is no GPU that torch can use: {found.stderr.strip().splitlines()[-1]}")
    return found.stdout.strip()


def run(step: Step, log: Path, environment: dict[str, str], left: float) -> dict[str, object]:
    name, command, seconds, tool = step
    if left < 10:
        return {"step": name, "result": "NOT RUN: no time was left"}
    if tool is not None and shutil.which(tool) is None and not Path(f"/usr/local/cuda/bin/{tool}").exists():
        return {"step": name, "result": f"NOT RUN: there is no {tool}"}
    seconds = min(seconds, int(left))
    start = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n== {name}: {' '.join(command)}\n")
        file.flush()
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            return {"step": name, "result": f"FAILED: not done within {seconds} s", "seconds": seconds}
    result = "passed" if status == 0 else f"FAILED: exit status {status}"
    return {"step": name, "result": result, "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    log = OUT / "log.txt"
    log.write_text("")
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]),
        "PYTHONPATH": str(ROOT),
        "EAR_OPS_BUILD": "cuda",
        "EAR_OPS_CUDA_ARCHITECTURES": architecture(),
    }
    end = time.monotonic() + SECONDS
    rows = []
    for step in steps():
        rows.append(run(step, log, environment, end - time.monotonic()))
        print(f"{rows[-1]['step']:<18} {rows[-1]['result']}", flush=True)
        (OUT / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
        if step[0] == "build" and rows[-1]["result"] != "passed":
            break
    print(f"results and log: {OUT}")
    raise SystemExit(sum(str(row["result"]).startswith("FAILED") for row in rows))


if __name__ == "__main__":
    main()
