"""The command `ear-ops`: train, evaluate, compare, sweep, report, analyse, augment, bench.

The options of `train` are the fields of `TrainConfig`. The commands import transformers and accelerate, which takes
seconds, only when they run, so `--help` and mistakes show at once.
"""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from ear_ops import __version__
from ear_ops.errors import EarOpsError
from ear_ops.installation import install
from ear_ops.recipes.tables import markdown_table, terminal_table
from ear_ops.recipes.training import processes
from ear_ops.recipes.training.config import SETTING_TYPES, TrainConfig
from ear_ops.recipes.training.errors import ConfigError

try:
    import typer
    from typer.core import TyperCommand, TyperGroup
except ModuleNotFoundError:
    raise ModuleNotFoundError(f"the ear-ops command needs typer: {install('train')}", name="typer") from None


class _GroupedHelp:
    """Plain help under the headings that rich draws as panels on a terminal."""

    def format_options(self: Any, context: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            if record := parameter.get_help_record(context):
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(parameter.rich_help_panel or usual, []).append(record)
        for name, command in getattr(self, "commands", {}).items():
            sections.setdefault(command.rich_help_panel, []).append((name, command.get_short_help_str(limit=200)))
        options = sections.pop("Options", [])  # `--help` alone, in the longer lists
        for heading, records in [*sections.items(), ("Options", options)]:
            with formatter.section(heading):
                formatter.write_dl(records)


class _Command(_GroupedHelp, TyperCommand):
    pass


class _Commands(_GroupedHelp, TyperGroup):
    pass


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # `main` changes it on a terminal
    help="Train and score zero-shot cross-lingual classifiers with attention and embedding regularizers.",
)

# The extra that brings each optional package.
_EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "rich", "typer"), "train"),
    **dict.fromkeys(("matplotlib", "sklearn"), "analysis"),
}
_DataDir = Annotated[str | None, typer.Option(help="Folder with the data now.  [default: the folder that was read]")]
_TRAINING, _STUDIES, _DATA_AND_SPEED = "Train and score", "Studies", "Data and speed"  # headings of the commands

# The headings of the options of `train`.
_SETTINGS = {
    "Data": (
        *("task", "source_language", "data_dir", "hub", "max_train_examples", "synonyms", "match", "dictionary_scale"),
        *("variants_file", "variants", "seed"),
    ),
    "Method and weights": (
        *("method", "preset", "alpha", "beta", "push_ratio", "pull_ratio", "layer", "reduction"),
        *("perturbation", "adversarial_steps", "measure_gradients"),
    ),
    "Model and input": ("model", "pooling", "padding", "max_length", "freeze_embeddings", "prune_vocabulary"),
    "Optimisation": (
        *("batch_size", "group_by_length", "learning_rate", "epochs", "warmup_ratio", "weight_decay"),
        *("max_grad_norm", "bf16", "compile"),
    ),
    "Evaluation and output": (
        *("evaluations_per_epoch", "eval_split", "languages", "eval_batch_size", "logging_steps", "output_dir"),
    ),
}
_DATA_SETTINGS = set(_SETTINGS["Data"]) - {"variants_file", "variants"}


def _command(heading: str, **options: Any) -> Callable[..., Any]:
    return app.command(cls=_Command, rich_help_panel=heading, **options)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ear_ops {__version__}")
        raise typer.Exit


@app.callback()
def _check_processes(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    if processes.count() > 1 and context.invoked_subcommand not in ("train", "evaluate"):
        raise ConfigError(
            f"`ear-ops {context.invoked_subcommand}` runs in one process, and a launcher started {processes.count()}: "
            f"start it without torchrun or accelerate launch. Only `train` and `evaluate` share their work between "
            f"processes. Several sweeps that are started one by one may share a folder"
        )


_ADVICE = {  # by the number of an error of the system
    errno.ENOSPC: "; free space, and run the same command again",
    errno.EACCES: "; expected a path that you may read and write",
    errno.EROFS: "; expected a path that you may write to",
    errno.EEXIST: "; expected a folder, and this is a file",
    errno.ENOTDIR: "; expected a folder, and part of this path is a file",
    errno.EISDIR: "; expected a file, and this is a folder",
}


@contextmanager
def _saying_how_to_go_on(advice: str) -> Iterator[None]:
    """Where the user interrupts the command, print the advice and end with the exit code of a SIGINT."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nInterrupted. {advice}", file=sys.stderr)
        raise typer.Exit(130) from None


def main() -> None:
    """The entry point. A mistake that the user can correct ends with one line and exit code 1.

    Any other error is a fault of the package and shows its traceback.
    """
    if sys.stdout.isatty():
        app.rich_markup_mode = "markdown"  # in "rich", the "[default: ...]" of a help text would be a tag
    try:
        app()
    except (EarOpsError, OSError) as error:
        advice = _ADVICE.get(error.errno or 0, "") if isinstance(error, OSError) else ""
        sys.exit(f"error: {' '.join(line.strip() for line in str(error).splitlines())}{advice}")
    except ImportError as error:
        extra = _missing_extra(error)
        if extra is None:
            raise
        advice = "" if f"[{extra}]" in str(error) else f": {install(extra)}"
        sys.exit(f"error: {error}{advice}")


def _missing_extra(error: ImportError) -> str | None:
    """The extra whose package is missing, or None where the error has another reason."""
    for cause in (error, error.__cause__):
        if isinstance(cause, ModuleNotFoundError) and cause.name in _EXTRAS:
            return _EXTRAS[cause.name]
    return None


def _settings_as_options(names: Collection[str]) -> Callable[..., Callable[..., None]]:
    """Replace the `**settings` of a command by an option for each field of `TrainConfig` that `names` has."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        options = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        settings = {setting.name: setting for setting in fields(TrainConfig)}
        headings = {name: heading for heading, group in _SETTINGS.items() for name in group}
        for name in filter(names.__contains__, headings):
            kind, setting = SETTING_TYPES[name], settings[name]
            default = typer.Option(
                setting.default,
                *([f"--{name.replace('_', '-')}"] if kind is bool else []),
                help=setting.metadata["help"],
                show_default=bool(setting.default),
                rich_help_panel=headings[name],
            )
            options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
        vars(function)["__signature__"] = inspect.Signature(options)  # typer reads it
        function.__annotations__ = {option.name: option.annotation for option in options}
        return function

    return decorate


@_command(_TRAINING)
@_settings_as_options(SETTING_TYPES)
def train(**settings: Any) -> None:
    """Train on one language and print the accuracy in every language. An interrupted run goes on where it stopped."""
    from ear_ops.recipes.training.results import results_text

    config = TrainConfig(**settings)
    processes.say(
        terminal_table(["setting", "value"], [[name, str(value)] for name, value in config.summary().items()])
    )
    processes.say(f"The other settings are as by default: {config.output_dir}/config.json will hold them all.\n")

    with _saying_how_to_go_on("The same command goes on from the last checkpoint."):
        results = _run_module().train(config)
    processes.say(f"\n{results_text(results, terminal_table)}")
    processes.say(f"Tables, configuration and model are in {config.output_dir}.")


@_command(_TRAINING)
def evaluate(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    eval_split: Annotated[str | None, typer.Option(help="dev or test.  [default: as configured]")] = None,
    data_dir: _DataDir = None,
) -> None:
    """Score a finished run again, or on another split."""
    from ear_ops.recipes.training.results import results_text

    processes.say(results_text(_run_module().evaluate(folder, eval_split, data_dir), terminal_table).rstrip("\n"))


@_command(_TRAINING)
def compare(
    folders: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    baseline: Annotated[
        str | None, typer.Option(metavar="RUN", help="Print the paired differences from this run too.")
    ] = None,
    data_dir: _DataDir = None,
) -> None:
    """Print a table of finished runs, with a row for each run and a column for each language."""
    from ear_ops.recipes.training.results import comparison, read_results

    if baseline is not None and all(Path(folder).resolve() == Path(baseline).resolve() for folder in folders):
        raise ConfigError(f"baseline: got {baseline}, the only run: name the runs to compare with it too")
    runs = [read_results(Path(folder) / "results.json") for folder in folders]
    table = markdown_table if markdown else terminal_table
    print(comparison(runs, table))
    if baseline is not None:
        from ear_ops.recipes.study.report import differences_table

        print("\n" + differences_table([Path(folder) for folder in folders], Path(baseline), data_dir, table))


def _list_studies(wanted: bool) -> None:
    """Print the names of the package's studies, each with the first sentence of its file."""
    if not wanted:
        return
    from ear_ops.recipes.study.definition import package_studies

    studies = package_studies()
    for name, path in studies.items():
        first_sentence = re.split(r"(?<=[.?])\s", path.read_text(encoding="utf-8").removeprefix("# "))[0]
        print(f"{name:16} {first_sentence}")
    print(f"To change one, copy its file from {next(iter(studies.values())).parent}.")
    raise typer.Exit


@_command(_STUDIES)
def sweep(
    study: Annotated[str, typer.Argument(help="Name of a study of the package, or a YAML file; see docs/studies.md.")],
    output_dir: Annotated[str, typer.Option(help="Folder of the study.  [default: runs/STUDY]")] = "",
    groups: Annotated[
        list[str] | None,
        typer.Option(
            "--group", metavar="NAME", help="Run only this group and those that choose settings for it; repeatable."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and run nothing.")] = False,
    list_studies: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_studies, help="Print the studies of the package.")
    ] = False,
) -> None:
    """Train every run of a study that is not finished. Several processes may share the folder."""
    folder = output_dir or f"runs/{Path(study).stem}"
    _run_module()
    from ear_ops.recipes.study.sweep import outline
    from ear_ops.recipes.study.sweep import sweep as run_study

    if dry_run:
        print(outline(study, folder, groups or (), terminal_table))
        return

    with _saying_how_to_go_on("Finished runs are kept; the same command goes on from the last checkpoint."):
        progress = run_study(study, folder, groups=groups or ())
    if progress.failed:
        names = "; ".join(f"{name}: {reason}" for name, reason in progress.failed.items())
        sys.exit(
            f"error: {len(progress.failed)} runs failed ({names}). Finished runs are kept; the same command goes on"
        )
    part = f"{', '.join(groups)} in {study}" if groups else study
    print(f"All runs of {part} are finished: `ear-ops report {folder}` makes the tables.")


@_command(_STUDIES)
def report(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of a study.")],
    data_dir: _DataDir = None,
) -> None:
    """Write the paper's tables with the results of a study beside the paper's numbers."""
    from ear_ops.recipes.study.report import report as write_report

    content = write_report(folder, data_dir)
    print(f"{content['finished']} of {content['planned']} runs: the tables are in {folder}/report.md.")


@_command(_DATA_AND_SPEED)
@_settings_as_options(_DATA_SETTINGS)
def augment(
    *,
    output: Annotated[str, typer.Option(help="File to write: .tsv or .tsv.gz.")],
    num_variants: Annotated[int | None, typer.Option(help="Variants of each pair.  [default: 3; pawsx: 10]")] = None,
    **settings: Any,
) -> None:
    """Write variants of the training pairs as TSV, for `train --variants-file`."""
    from ear_ops.recipes.training.sources import write_variants_file

    print(write_variants_file(TrainConfig(**settings, method="finetune").data, output, num_variants))


@_command(_STUDIES)
def analyse(
    folders: Annotated[list[str], typer.Argument(metavar="FOLDER...", help="Studies, or finished runs with models.")],
    parallel: Annotated[str, typer.Option(help="Folder with XX-en.tsv (sentence, tab, English).")],
    output_dir: Annotated[str, typer.Option(help="Folder for tables and figures.")] = "analysis",
    synonyms: Annotated[str | None, typer.Option(help="Dictionary with the words of figure 4.")] = None,
    limit: Annotated[int | None, typer.Option(help="Sentences of each language.  [default: all]")] = None,
) -> None:
    """Measure the alignment of languages in each layer, before and after training, and draw figures 3 to 5."""
    _run_module()
    from ear_ops.recipes.analysis.alignment_report import analyse as run_analysis

    run_analysis(folders, parallel, output_dir, synonyms=synonyms, limit=limit)
    print(f"Measures and figures are in {output_dir}.")


# The scripts of `benchmarks/` by the name that the command takes.
_BENCHMARKS = {
    **{name: f"bench_{name}.py" for name in ("all", "losses", "step", "distil", "epoch", "capture", "words")},
    "report": "report.py",
    "compare": "compare_results.py",
}
# Torch's profiler measures memory. It would print a line at its starts, and of memory from before them.
_QUIET_PROFILER = {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@_command(_DATA_AND_SPEED, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="|".join(_BENCHMARKS))],
) -> None:
    """Measure speed and memory, draw results, or compare two of them (in a checkout); see `bench NAME -h`."""
    import subprocess

    if name not in _BENCHMARKS:
        raise ConfigError(f"bench: expected one of {', '.join(_BENCHMARKS)}, got {name!r}")
    folder = Path(__file__).parents[2] / "benchmarks"
    if not folder.is_dir():
        raise FileNotFoundError(f"the benchmarks come with a checkout, not with the installed package: no {folder}")
    command = [sys.executable, str(folder / _BENCHMARKS[name]), *context.args]
    sys.exit(subprocess.call(command, env={**_QUIET_PROFILER, **os.environ}))


def _run_module() -> Any:
    """The module that trains, imported with everything that it needs.

    transformers then draws no progress bar for the files that it loads and saves.
    """
    from transformers.utils import logging

    from ear_ops.memory import keep_freed_memory

    keep_freed_memory()
    logging.disable_progress_bar()
    from ear_ops.recipes.training import run

    return run


if __name__ == "__main__":
    main()
