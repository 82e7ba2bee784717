"""Build the kernels on a machine with a GPU, and run the GPU tests, the sanitizers and the benchmarks, in two calls.

    make gpu-check                                   # both calls, one after the other
    make gpu-check STEPS=tests                       # the first one: build, tests, sanitizers
    make gpu-check STEPS=bench                       # the second one: build where there is none yet, benchmarks
    python benchmarks/gpu_check.py build memcheck    # only these steps

A call gets eight minutes. The results go into ``$OUT``, or into ``build/gpu-check``: a log for each step, the results
of the benchmarks, and ``summary.json``, which is written again as each step begins and ends. A call that is cut off so
keeps what it has, and calls add to the same summary. A step is NOT RUN where a tool is missing or the time is over; it
has not passed then. The exit status is the number of failed steps.

A step with tests in which no test passed on the GPU has failed, for example because all were skipped or deselected. A
sanitizer passes when, besides, it prints its summary and none of its reports names a kernel of this package. Its tests
may fail, because the step `gpu tests` checks accuracy.

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
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check").resolve()
KERNEL_TESTS = [
    f"tests/ops/test_{name}.py" for name in ("qk_attention_mse", "attention_mse", "pooled_distance", "word_kernels")
]
OTHER_TESTS = [
    *(f"tests/ops/test_{name}.py" for name in ("divergences", "mean_heads_kernels")),
    *(f"tests/ops/test_{name}.py" for name in ("properties", "compile", "backend")),
    *("tests/test_functional_errors.py", "tests/capture/test_exactness.py"),
]
SECONDS = 8 * 60  # of a call
# Where speed is measured, the reference must not replace a kernel that cannot run. A sanitizer sees the end of an
# allocation only if torch does not cut several tensors from one allocation.
SANITIZERS = ("memcheck", "racecheck")
SANITIZED = "cuda and test_features and (bfloat16 or float32 and ragged) and not scale"  # some 40 small tests
CALLS = {
    "tests": ("build", "environment", "gpu tests", "hopper tests", *SANITIZERS),
    "bench": ("build", "losses", "comparisons", "long rows", "training step", "compile"),
}
ENVIRONMENT_OF_STEP = {
    "training step": {"EAR_OPS_BACKEND": "cuda"},
    "hopper tests": {"EAR_OPS_CUDA_HOPPER": "1"},
    **{tool: {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for tool in SANITIZERS},
}
Step = tuple[str, list[str], int, str | None]  # name, command, seconds, the tool it needs


def steps() -> dict[str, Step]:
    """Return the steps by name."""
    python = sys.executable
    # -rap lists the tests that passed, with their names.
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-rap", "-k"]
    bench = [python, "benchmarks/bench_losses.py", "--device", "cuda"]
    long = ["--ops=qk_attention_mse", "--presets=long-512,long-4096,gqa"]
    comparisons = ["--ops=qk_attention_kl,qk_attention_js,qk_scores_mse,heads_mean", "--presets=paper,long-512"]
    compiled = ["--ops=qk_attention_mse", "--presets=paper,xnli", "--compile"]
    step = [python, "benchmarks/bench_step.py", "--model=bert-base", "--device=cuda", f"--out={OUT / 'step.json'}"]
    tests = [*pytest, "cuda", "-v"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", "8"]
    if importlib.util.find_spec("pytest_timeout"):
        tests += ["--timeout=60"]
    planned: list[Step] = [
        ("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 280, "nvcc"),
        ("environment", [python, "-m", "ear_ops.env_report"], 60, None),
        ("gpu tests", [*tests, *KERNEL_TESTS, *OTHER_TESTS], 150, None),
        ("hopper tests", [*tests, KERNEL_TESTS[0]], 60, None),
        ("losses", [*bench, "--repeats=50", f"--out={OUT / 'losses.json'}"], 120, None),
        ("comparisons", [*bench, *comparisons, "--repeats=20", f"--out={OUT / 'comparisons.json'}"], 60, None),
        ("long rows", [*bench, *long, "--repeats=20", f"--out={OUT / 'long.json'}"], 60, None),
        ("training step", step, 60, None),
        ("compile", [*bench, *compiled, "--repeats=50", f"--out={OUT / 'compile.json'}"], 120, None),
    ]
    for tool in SANITIZERS:
        watched = [f"--tool={tool}", "--report-api-errors=no", "--kernel-name", "kns=ear_ops"]
        planned.append(
            (tool, ["compute-sanitizer", *watched, *pytest, SANITIZED, *KERNEL_TESTS], 90, "compute-sanitizer")
        )
    return {step[0]: step for step in planned}


def architecture() -> str:
    """Return the architecture of this machine's GPU, so that the build compiles for no other."""
    ask = "import torch; print(*torch.cuda.get_device_capability(), sep='')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"torch finds no GPU: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def run(step: Step, environment: dict[str, str], left: float) -> dict[str, object]:
    """Run a step for at most `left` seconds and return its row of the summary. Its output goes into its own log."""
    name, command, seconds, tool = step
    if left < 10:
        return {"step": name, "result": "NOT RUN: no time was left"}
    if tool is not None and shutil.which(tool, path=environment.get("PATH")) is None:
        return {"step": name, "result": f"NOT RUN: {tool} is not installed"}
    seconds = min(seconds, int(left))
    start = time.monotonic()
    log = OUT / f"{name.replace(' ', '-')}.log"
    with log.open("w") as file:
        file.write(f"== {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _stop(process)
            return {"step": name, "result": f"FAILED: not done within {seconds} s", "seconds": seconds}
    output = log.read_text().partition("\n")[2]
    of_status = "passed" if status == 0 else f"FAILED: exit status {status}"
    result = _verdict(output) if name in SANITIZERS else of_status
    row: dict[str, object] = {"step": name, "result": result, "seconds": round(time.monotonic() - start, 1)}
    if "pytest" in command:
        row["gpu_tests_passed"] = passed = len(PASSED_ON_GPU.findall(output))
        if result == "passed" and passed == 0:
            row["result"] = "FAILED: no test passed on the GPU"
    return row


# A line of pytest's last section, of a test that the fixture `device` gave a GPU.
PASSED_ON_GPU = re.compile(r"^PASSED .*\[(?:.*-)?cuda(?:-.*)?\]$", re.MULTILINE)


def _verdict(output: str) -> str:
    """Return the result of a sanitizer from its output, where its lines begin with `=========`."""
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    if not any("SUMMARY" in line for line in lines):
        return "FAILED: it did not come to its summary"
    reports = sum("ear_ops" in line for line in lines)
    return f"FAILED: {reports} lines name our kernels" if reports else "passed"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a step with all its processes. It first gets an interrupt, after which pytest reports its failures."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write(row: dict[str, object]) -> None:
    """Put the row of a step into the summary, in the place of an older one."""
    path = OUT / "summary.json"
    rows = {old["step"]: old for old in (json.loads(path.read_text()) if path.exists() else [])}
    rows[row["step"]] = {**row, "at": time.strftime("%Y-%m-%d %H:%M:%S")}
    path.write_text(json.dumps(list(rows.values()), indent=1) + "\n")


def run_call(names: Sequence[str], environment: dict[str, str]) -> int:
    """Run steps within the time of a call and return how many failed. A failed build ends it."""
    end = time.monotonic() + SECONDS
    failed = 0
    for name in names:
        _write({"step": name, "result": "FAILED: cut off"})
        row = run(steps()[name], {**environment, **ENVIRONMENT_OF_STEP.get(name, {})}, end - time.monotonic())
        _write(row)
        print(f"{name:<18} {row['result']}", flush=True)
        failed += str(row["result"]).startswith("FAILED")
        if name == "build" and row["result"] != "passed":
            break
    return failed


def main() -> None:
    asked = sys.argv[1:] or list(CALLS)
    if unknown := set(asked) - {*steps(), *CALLS}:
        names = ", ".join(repr(name) for name in (*CALLS, *steps()))
        raise SystemExit(f"unknown steps {', '.join(sorted(unknown))}: expected some of {names}")
    calls = [CALLS[name] for name in asked if name in CALLS]
    if single := [name for name in asked if name not in CALLS]:
        calls.append(tuple(single))
    OUT.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "EAR_OPS_BUILD": "cuda",
        "EAR_OPS_CUDA_ARCHITECTURES": architecture(),
        "HYPOTHESIS_PROFILE": "quick",
    }
    failed = sum(run_call(names, environment) for names in calls)
    print(f"results and logs: {OUT}")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
