"""Build the kernels on a machine with a GPU, and run the GPU tests, the benchmarks and the sanitizers.

    make gpu-check
    python benchmarks/gpu_check.py build memcheck racecheck       # only these steps

The script writes ``log.txt``, ``summary.json`` and the results into ``$OUT``, or into ``build/gpu-check``. All steps
together get nine minutes. A step is NOT RUN where a tool is missing or the time is over; it has not passed then. The
exit status is the number of failed steps. Another call does not build again, so it can run by name the steps that the
first one did not reach.

A sanitizer passes when it prints its summary and none of its reports names a kernel of this package. Its tests may
fail, because the step `tests` checks accuracy. A step whose tests are all skipped or deselected has failed.

The script needs torch with CUDA, pybind11, pytest and hypothesis, and no network. It uses pytest-xdist and
pytest-timeout where they are installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
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
# Where speed is measured, the reference must not replace a kernel that cannot run. A sanitizer sees the end of an
# allocation only if torch does not cut several tensors from one allocation.
SANITIZERS = ("memcheck", "initcheck", "racecheck", "synccheck")
ENVIRONMENT_OF_STEP = {
    "training step": {"EAR_OPS_BACKEND": "cuda"},
    **{tool: {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for tool in SANITIZERS},
}
Step = tuple[str, list[str], int, str | None]  # name, command, seconds, the tool it needs


def steps() -> list[Step]:
    """Return the steps. The most useful steps come first, because the time may be short."""
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
    planned: list[Step] = [
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
        # initcheck must also watch torch's kernels. Otherwise it takes the memory that they wrote for uninitialised.
        watched = [] if tool == "initcheck" else ours
        command = ["compute-sanitizer", f"--tool={tool}", "--report-api-errors=no", *watched, *small]
        planned.append((tool, command, 80, "compute-sanitizer"))
    return planned


def architecture() -> str:
    """Return the architecture of this machine's GPU, so that the build compiles for no other."""
    ask = "import torch; print(*torch.cuda.get_device_capability(), sep='')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"torch finds no GPU: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def run(step: Step, log: Path, environment: dict[str, str], left: float) -> dict[str, object]:
    name, command, seconds, tool = step
    if left < 10:
        return {"step": name, "result": "NOT RUN: no time was left"}
    if tool is not None and shutil.which(tool) is None and not Path(f"/usr/local/cuda/bin/{tool}").exists():
        return {"step": name, "result": f"NOT RUN: {tool} is not installed"}
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
    output = log.read_text().rpartition(f"\n== {name}: ")[2]
    of_status = "passed" if status == 0 else f"FAILED: exit status {status}"
    result = _verdict(output) if name in SANITIZERS else of_status
    if result == "passed" and "pytest" in command and not _ran_tests(output):
        result = "FAILED: no test ran, all were skipped or deselected"
    return {"step": name, "result": result, "seconds": round(time.monotonic() - start, 1)}


def _verdict(output: str) -> str:
    """Return the result of a sanitizer from its output, where its lines begin with `=========`."""
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    if not any("SUMMARY" in line for line in lines):
        return "FAILED: it did not come to its summary"
    reports = sum("ear_ops" in line for line in lines)
    return f"FAILED: {reports} lines name our kernels" if reports else "passed"


def _ran_tests(output: str) -> bool:
    """Whether a test passed or failed, as the last line of pytest counts them."""
    summaries = re.findall(r"^.* in \d+\.\d+s\b.*$", output, re.MULTILINE)
    return bool(summaries and re.search(r"\b[1-9]\d* (passed|failed)\b", summaries[-1]))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a step with all its processes. It first gets an interrupt, after which pytest reports its failures."""
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
        added = ENVIRONMENT_OF_STEP.get(step[0], {})
        rows.append(run(step, log, {**environment, **added}, end - time.monotonic()))
        print(f"{rows[-1]['step']:<18} {rows[-1]['result']}", flush=True)
        (OUT / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
        if step[0] == "build" and rows[-1]["result"] != "passed":
            break
    print(f"results and log: {OUT}")
    raise SystemExit(sum(str(row["result"]).startswith("FAILED") for row in rows))


if __name__ == "__main__":
    main()
