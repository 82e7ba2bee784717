"""Measure everything that is committed for a kind of processor, into `benchmarks/results/speed/KIND`.

    ear-ops bench all
    ear-ops bench all --only qk,distil --into FOLDER

A file of results holds the processor, its threads, the versions and the command that made it. `OMP_NUM_THREADS` decides
the threads. `ear-ops bench report` then makes the plots and tables of all committed results.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from measuring import facts
from report import SPEED

SCRIPTS = Path(__file__).parent
ROOT = SCRIPTS.parent
RUNS = {  # the name of a file of results, and what measures it
    "qk": "losses --ops qk_attention_mse --presets paper,e5,xnli,small --modes forward+backward --compile --repeats 9",
    "given": "losses --ops attention_mse,pooled_distance --presets paper,xnli,small --modes forward+backward --compile "
    "--repeats 9",
    "long": "losses --ops qk_attention_mse --presets long-512,long-1024,long-2048 --modes forward+backward --compile "
    "--repeats 5 --longest 2",
    "longest": "losses --ops qk_attention_mse --presets gqa,long-4096 --dtypes bfloat16 --modes forward+backward "
    "--repeats 2",
    "divergences": "losses --ops qk_attention_kl,qk_attention_js,qk_scores_mse "
    "--presets paper,e5,xnli,long-512,long-2048 --modes forward+backward --repeats 5 --longest 2",
    "heads": "losses --ops heads_mean --presets paper,xnli,long-512,long-2048 --modes forward+backward --repeats 5 "
    "--longest 2",
    "distillation": "losses --ops distillation --presets distil --modes forward+backward --compile --repeats 5",
    "distil": "distil --repeats 5",
    "step": "step --dtypes float32 --repeats 3",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(RUNS), help="some of %(default)s")
    parser.add_argument("--into", type=Path, help="the folder of the results, in the place of that of the processor")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := sorted(set(names) - RUNS.keys()):
        raise SystemExit(f"--only: expected names out of {', '.join(RUNS)}, got {', '.join(unknown)}")
    folder = options.into.resolve() if options.into else SPEED / str(facts()["kind"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        script, *arguments = shlex.split(RUNS[name])
        out = folder / f"{name}.json"
        shown = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out  # a committed command has no absolute path
        arguments += ["--out", str(shown)]
        print(f"ear-ops bench {script} {shlex.join(arguments)}", flush=True)
        start = time.monotonic()
        subprocess.run([sys.executable, str(SCRIPTS / f"bench_{script}.py"), *arguments], cwd=ROOT, check=True)
        print(f"{name} took {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
