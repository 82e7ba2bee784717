"""On a machine with a GPU: builds, runs the GPU tests, the sanitizers on small shapes, and the benchmarks, in one go.

    make gpu-check
    python benchmarks/gpu_check.py build memcheck racecheck       # these steps alone

Writes six files into ``$OUT`` (else ``build/gpu-check``): ``log.txt``, ``summary.json`` and the results. A step that
cannot run here (a tool is missing, the nine minutes are over) is reported as NOT RUN, never as passed; the exit status
counts failed steps. Called again, it builds nothing that is built: what the time did not reach can be asked for by
name. A sanitizer passes when it came to its summary and no report names a kernel of ours, whatever its tests say of
accuracy, for which there is a step of its own. Needs no network: torch with CUDA, pybind11, pytest
and hypothesis must be there; pytest-xdist and pytest-timeout are used where they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check").resolve()
KERNEL_TESTS = [f"tests/ops/test_{name}.py" for name in ("qk_attention_mse", "attention_mse", "pooled_distance")]
OTHER_TESTS = [
    f"tests/{name}.py"
    for name in ("ops/test_properties", "ops/test_compile", "ops/test_backend", "capture/test_exactness")
]
SECONDS = 9 * 60  # of all steps together
# Kernels that do not run should not be replaced by the reference where speed is measured; a sanitizer sees where an
# allocation ends only if torch asks for each one by itself.
SANITIZERS = ("memcheck", "initcheck", "racecheck", "synccheck")
OF_A_STEP = {
    "training step": {"EAR_OPS_BACKEND": "cuda"},
    **{tool: {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for tool in SANITIZERS},
}
Step = tuple[str, list[str], int, str | None]  # name, command, seconds, the tool it needs


def steps() -> list[Step]:
    """What is worth most first: the time may be short."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-k"]
    small = [*pytest, "cuda and (test_features or test_reductions)", *KERNEL_TESTS]
    bench = [python, "benchmarks/bench_losses.py", "--device", "cuda"]
    long = ["--ops=qk_attention_mse", "--presets=long-512,long-4096,gqa"]
    compiled = ["--ops=qk_attention_mse", "--presets=paper,xnli", "--compile"]
    step = [python, "benchmarks/bench_step.py", "--model=bert-base", "--device=cuda", f"--out={OUT / 'step.json'}"]
    tests = [*pytest, "cuda", "-v", *KERNEL_TESTS, *OTHER_TESTS]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", "8"]
    if importlib.util.find_spec("pytest_timeout"):
        tests += ["--timeout=60"]
    found: list[Step] = [
        ("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 280, "nvcc"),
        ("environment", [python, "-m", "ear_ops.env_report"], 60, None),
        ("losses", [*bench, "--repeats=50", f"--out={OUT / 'losses.json'}"], 80, None),
        ("long rows", [*bench, *long, "--repeats=20", f"--out={OUT / 'long.json'}"], 40, None),
        ("training step", step, 60, None),
        ("tests", tests, 150, None),
        ("compile", [*bench, *compiled, "--repeats=50", f"--out={OUT / 'compile.json'}"], 120, None),
    ]
    ours = ["--kernel-regex", "kns=ear_ops"]
    for tool in SANITIZERS:
        # Without the kernels of torch, initcheck would take what they have written for uninitialised.
        seen = [] if tool == "initcheck" else ours
        command = ["compute-sanitizer", f"--tool={tool}", "--report-api-errors=no", *seen, *small]
        found.append((tool, command, 80, "compute-sanitizer"))
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
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _stop(process)
            return {"step": name, "result": f"FAILED: not done within {seconds} s", "seconds": seconds}
    if name in SANITIZERS:
        result = _verdict(log.read_text().rpartition(f"\n== {name}: ")[2])
    else:
        result = "passed" if status == 0 else f"FAILED: exit status {status}"
    return {"step": name, "result": result, "seconds": round(time.monotonic() - start, 1)}


def _verdict(output: str) -> str:
    """Of a sanitizer: its own lines begin with `=========`."""
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    if not any("SUMMARY" in line for line in lines):
        return "FAILED: it did not come to its summary"
    reports = sum("ear_ops" in line for line in lines)
    return f"FAILED: {reports} lines name our kernels" if reports else "passed"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a step with all its processes, after a chance to say what has failed so far, which pytest takes."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    asked = sys.argv[1:]
    if unknown := set(asked) - {step[0] for step in steps()}:
        names = ", ".join(repr(step[0]) for step in steps())
        raise SystemExit(f"unknown steps {', '.join(sorted(unknown))}: expected some of {names}")
    OUT.mkdir(parents=True, exist_ok=True)
    log = OUT / "log.txt"
    log.write_text("")
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "EAR_OPS_BUILD": "cuda",
        "EAR_OPS_CUDA_ARCHITECTURES": architecture(),
        "HYPOTHESIS_PROFILE": "quick",
    }
    end = time.monotonic() + SECONDS
    rows = []
    for step in (step for step in steps() if not asked or step[0] in asked):
        own = OF_A_STEP.get(step[0], {})
        rows.append(run(step, log, {**environment, **own}, end - time.monotonic()))
        print(f"{rows[-1]['step']:<18} {rows[-1]['result']}", flush=True)
        (OUT / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
        if step[0] == "build" and rows[-1]["result"] != "passed":
            break
    print(f"results and log: {OUT}")
    raise SystemExit(sum(str(row["result"]).startswith("FAILED") for row in rows))


if __name__ == "__main__":
    main()
