from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("typer", reason="the command line needs the extra `train`")

from typer.testing import CliRunner

import ear_ops
from ear_ops.data import XNLI, read_variants
from ear_ops.errors import BackendUnavailableError, EarOpsError
from ear_ops.installation import install
from ear_ops.recipes import cli
from ear_ops.recipes.training.config import TrainConfig
from ear_ops.recipes.training.errors import ConfigError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_help_names_every_command_and_every_setting() -> None:
    commands = run("--help")
    assert all(
        name in commands for name in ("train", "evaluate", "compare", "sweep", "report", "analyse", "augment", "bench")
    )
    train = run("train", "--help")
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in train
    assert "[default: 32]" in train and "[default: the preset's]" in train and "--no-hub" not in train
    augment = run("augment", "--help")
    assert "--dictionary-scale" in augment and "--num-variants" in augment and "--epochs" not in augment


def sections(text: str) -> dict[str, str]:
    """The text below each heading of a help."""
    parts = re.split(r"^(\S[^\n]*):\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_commands_and_settings_stand_under_headings() -> None:
    commands = {heading: re.findall(r"^  (\w+) ", text, re.M) for heading, text in sections(run("--help")).items()}
    assert commands.pop("Options") == [] and set(commands) == {"Train and score", "Studies", "Data and speed"}
    assert commands["Studies"] == ["sweep", "report", "analyse"]
    settings = {
        heading: re.findall(r"^  --([\w-]+)", text, re.M) for heading, text in sections(run("train", "--help")).items()
    }
    assert settings.pop("Options") == ["help"] and len(settings) == 5
    names = [name.replace("-", "_") for group in settings.values() for name in group]
    assert sorted(names) == sorted(TrainConfig.__dataclass_fields__), "every setting once"
    assert "alpha" in settings["Method and weights"] and "epochs" in settings["Optimisation"]


def test_on_a_terminal_the_help_keeps_its_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.app, "rich_markup_mode", "markdown")
    train = run("train", "--help")
    assert "\u2500 Method and weights \u2500" in train and "[default: the preset's]" in train


def test_the_studies_of_the_package_are_listed() -> None:
    lines = run("sweep", "--list").splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["pawsx", "scale", "source-language", "xnli"]
    assert lines[0].endswith(" PAWS-X, table 2.") and Path(lines[-1].split(" from ")[1].rstrip(".")).is_dir()


def test_options_reach_the_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    class Module:
        @staticmethod
        def train(config: TrainConfig) -> None:
            seen.append(config)
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run_module", lambda: Module)
    arguments = ["--data-dir", "mini", "--method", "rs-da", "--bf16", "--max-train-examples", "7", "--beta", "0.5"]
    CliRunner().invoke(cli.app, ["train", *arguments, "--output-dir", str(tmp_path)])
    expected = TrainConfig(
        data_dir="mini", method="rs-da", bf16=True, max_train_examples=7, beta=0.5, output_dir=str(tmp_path)
    )
    assert seen == [expected]


def test_train_prints_the_settings_that_matter_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_run_module", lambda: None)
    output = CliRunner().invoke(cli.app, ["train", "--data-dir", "mini", "--preset", "released"]).output
    lines = dict(line.split(maxsplit=1) for line in output.splitlines() if len(line.split(maxsplit=1)) == 2)
    assert lines["alpha"] == "0.1" and lines["beta"] == "1.0" and lines["reduction"] == "padded_mean"
    assert lines["output_dir"] == "runs/xnli-ear-seed1"
    assert "eval_batch_size" not in lines and "runs/xnli-ear-seed1/config.json will hold them all" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["error:", "--data-dir", "mini"]),
        (["train", "--data-dir", "mini", "--method", "eer"], ["error:", "unknown method 'eer'", "rs-da"]),
        (["evaluate", "no-such-run"], ["error:", "no-such-run", "no run"]),
        (["evaluate", "run", "--eval-split", "tset"], ["error: eval_split: expected dev or test, got 'tset'"]),
        (["compare", "no-such-run", "--baseline", "other"], ["error:", "no-such-run: no such folder"]),
        (["sweep", "no-such.yaml"], ["error:", "no-such.yaml: no such study", "pawsx, scale, source-language, xnli"]),
        (["report", "no-such-study"], ["error:", "holds no study", "ear-ops sweep"]),
        pytest.param(
            ["analyse", "no-such-run", "--parallel", "p"],
            ["error:", "no-such-run holds no run"],
            marks=pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs the extra `analysis`"),
        ),
        (["compare", "no-such-run"], ["error:", "no-such-run: no such folder"]),
        (["augment", "--data-dir", "no-such-data", "--output", "x.tsv", "--synonyms", "s.json"], ["no-such-data"]),
        (["augment", "--data-dir", "mini", "--output", "x.tsv", "--num-variants", "0"], ["num_variants", "at least 1"]),
        (["compare", "run", "--baseline", "./run"], ["baseline: got ./run, the only run"]),
        (["train", "--data-dir", "mini", "--output-dir", __file__], [__file__, "File exists", "expected a folder"]),
        (["augment", "--data-dir", "no-such-data", "--output", "x.csv"], ["output", ".tsv or .tsv.gz, got 'x.csv'"]),
    ],
)
def test_mistakes_end_with_one_line(arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ear-ops", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    message = str(end.value)
    assert message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in words)


def test_an_interrupted_training_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: TrainConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run_module", lambda: SimpleNamespace(train=interrupted))
    result = CliRunner().invoke(cli.app, ["train", "--data-dir", "mini"])
    assert result.exit_code == 130 and "The same command goes on from the last checkpoint" in result.stderr


def test_the_version_is_printed() -> None:
    assert run("--version") == f"ear_ops {ear_ops.__version__}\n"


def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_run_module", broken)
    monkeypatch.setattr(sys, "argv", ["ear-ops", "evaluate", "run"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def raised_by(error: Exception, monkeypatch: pytest.MonkeyPatch) -> BaseException:
    """What ends `ear-ops evaluate` where its work raises `error`."""

    def broken() -> None:
        raise error

    monkeypatch.setattr(cli, "_run_module", broken)
    monkeypatch.setattr(sys, "argv", ["ear-ops", "evaluate", "run"])
    with pytest.raises(BaseException) as end:
        cli.main()
    return end.value


def test_an_import_that_our_own_code_breaks_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        ImportError("cannot import name 'trian' from 'ear_ops.recipes.training.run'", name="ear_ops"),
        ModuleNotFoundError("No module named 'ear_ops.recipes.trianing'", name="ear_ops.recipes.trianing"),
        ModuleNotFoundError("No module named 'sklearn.manifolds'", name="sklearn.manifolds"),
    ):
        assert raised_by(error, monkeypatch) is error


def test_a_missing_package_of_an_extra_is_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    end = raised_by(ModuleNotFoundError("No module named 'accelerate'", name="accelerate"), monkeypatch)
    assert str(end) == f"error: No module named 'accelerate': {install('train')}"
    advised = f"analyse needs matplotlib: {install('analysis')}"
    end = raised_by(ModuleNotFoundError(advised, name="matplotlib"), monkeypatch)
    assert str(end) == f"error: {advised}", "the advice stands there once"
    chained = ImportError(f"reading from the Hub needs the package datasets: {install('train')}")
    chained.__cause__ = ModuleNotFoundError("No module named 'datasets'", name="datasets")
    assert isinstance(raised_by(chained, monkeypatch), SystemExit)


def test_the_packages_of_the_extras_are_those_of_the_project() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    lines = dict(re.findall(r"^(train|analysis) = \[(.*)\]$", pyproject, re.M))
    modules = {"scikit-learn": "sklearn"}
    for extra, line in lines.items():
        packages = [name for name in re.findall(r'"([\w-]+)[>=]', line) if name != "ear-ops"]
        assert packages and all(cli._EXTRAS[modules.get(name, name)] == extra for name in packages)


def test_every_error_of_the_package_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that the command line has never heard of."""

    class NewError(EarOpsError):
        pass

    assert str(raised_by(NewError("what to do"), monkeypatch)) == "error: what to do"
    assert str(raised_by(BackendUnavailableError("no kernels"), monkeypatch)) == "error: no kernels"


def test_bench_offers_the_scripts_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(cli.__file__).parents[2] / "benchmarks"
    if not folder.is_dir():
        pytest.skip("the package is not in a checkout")
    expected = {path.stem.removeprefix("bench_"): path for path in folder.glob("bench_*.py")}
    expected |= {"report": folder / "report.py", "compare": folder / "compare_results.py"}
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda command, env: started.append(command) or 0)
    for name in expected:
        CliRunner().invoke(cli.app, ["bench", name, "--repeats", "2"])
    assert started == [[sys.executable, str(path), "--repeats", "2"] for path in expected.values()]
    assert set(cli._BENCHMARKS) == expected.keys()
    names = "all, losses, step, distil, epoch, capture, words, report, compare"
    with pytest.raises(ConfigError, match=f"bench: expected one of {names}, got 'speed'"):
        CliRunner().invoke(cli.app, ["bench", "speed"], catch_exceptions=False)


def test_augment_writes_a_file_that_training_reads(tmp_path: Path) -> None:
    (tmp_path / "train-en.tsv").write_text("a b c\td e\tneutral\nb b\tf\tentailment\n")
    (tmp_path / "synonyms.json").write_text(json.dumps({"b": ["x", "y"], "z": ["a"]}))
    common = ["augment", "--data-dir", str(tmp_path), "--synonyms", str(tmp_path / "synonyms.json")]
    output = run(*common, "--output", str(tmp_path / "variants.tsv"))
    assert "6 lines, 3 variants of 2 pairs" in output and "replaced" in output
    groups = read_variants(tmp_path / "variants.tsv", XNLI)
    assert [group.original.text1 for group in groups] == ["a b c", "b b"]
    assert {word for group in groups for variant in group.variants for word in variant[0].split()} <= set("abcxy")
    output = run(
        *common,
        *("--output", str(tmp_path / "more.tsv.gz"), "--num-variants", "5", "--max-train-examples", "1"),
        *("--dictionary-scale", "0.5", "--seed", "3"),
    )
    assert "5 lines, 5 variants of 1 pairs" in output
    with pytest.raises(ConfigError, match=r"output: .*train-en\.tsv exists, and would be overwritten"):
        run(*common, "--output", str(tmp_path / "train-en.tsv"))
    assert len(read_variants(tmp_path / "more.tsv.gz", XNLI)[0].variants) == 5


def test_pawsx_gets_ten_variants(tmp_path: Path) -> None:
    (tmp_path / "train-en.tsv").write_text("a b\tb a\t1\n")
    (tmp_path / "synonyms.json").write_text('{"b": ["x"]}')
    arguments = ["--task", "pawsx", "--data-dir", str(tmp_path), "--synonyms", str(tmp_path / "synonyms.json")]
    assert "10 lines" in run("augment", *arguments, "--output", str(tmp_path / "v.tsv"))


def test_the_help_does_not_wait_for_transformers() -> None:
    program = (
        "import sys, ear_ops.recipes.cli; print('transformers.trainer' in sys.modules, 'accelerate' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("missing", "module"), [("typer", "ear_ops.recipes.cli"), ("accelerate", "ear_ops.recipes.training.pair_trainer")]
)
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, missing: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {missing}: {re.escape(install('train'))}$"):
        importlib.import_module(module)


def test_a_sweep_with_failed_runs_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from ear_ops.recipes.study import sweep

    monkeypatch.setattr(
        sweep, "sweep", lambda study, folder, groups: sweep.Progress(["a"], {"b": f"no file in {folder}"})
    )
    result = CliRunner().invoke(cli.app, ["sweep", "studies/one.yaml"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "1 runs failed (b: no file in runs/one)" in str(result.output) + str(result.exception)
    monkeypatch.setattr(sweep, "sweep", lambda study, folder, groups: sweep.Progress([*groups]))
    assert "ear-ops report there" in run("sweep", "studies/one.yaml", "--output-dir", "there")
    assert "runs of a, b in studies/one.yaml" in run("sweep", "studies/one.yaml", "--group", "a", "--group", "b")


DEEP = "[" * 100_000


def short(content: str | bytes) -> str:
    """The name of a test with this content."""
    return ascii(content)[:20]


def message_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What `ear-ops` with these arguments ends with. It is one line, and no traceback."""
    monkeypatch.setattr(sys, "argv", ["ear-ops", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    message = str(end.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize("content", ["{}", "[]", "3", DEEP, '{"task": "xnli"}', "1" * 5000, b"\xff", ""], ids=short)
@pytest.mark.parametrize("name", ["results.json", "config.json", "training.json", "predictions.json"])
def test_a_damaged_file_of_a_run_is_named(
    finished: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: str | bytes
) -> None:
    folder = Path(finished.output_dir)
    other = shutil.copytree(folder, tmp_path / "other")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    readers = {
        "results.json": (["compare", str(folder)], ["evaluate", str(folder)]),
        "config.json": (["evaluate", str(folder)],),
        "training.json": (["evaluate", str(folder)],),
        "predictions.json": (["compare", str(folder), "--baseline", str(other)],),
    }
    if content == "{}" and name == "predictions.json":
        assert "predictions.json has no language" in message_of(*readers[name], monkeypatch)
        return
    for arguments in readers[name]:
        message = message_of(arguments, monkeypatch)
        assert str(folder) in message and ("config.json" if name == "config.json" else name) in message


def test_a_finished_run_with_damaged_results_is_not_shown(
    finished: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ear_ops.recipes.training import run as training

    (Path(finished.output_dir) / "results.json").write_text("{}")
    with pytest.raises(EarOpsError, match=r"results\.json is damaged: steps is missing\. Delete it and start the run"):
        training.train(finished)
    (Path(finished.output_dir) / "results.json").unlink()
    monkeypatch.setattr(training, "_fit", lambda *arguments: pytest.fail("trained again"))
    assert training.train(finished)["steps"] == 16


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", DEEP, '{"a": "b"}', '{"a": ["\\ud800"]}', '{"a": ' + "1" * 5000 + "}", b"\xff"],
    ids=short,
)
def test_a_damaged_dictionary_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "train-en.tsv").write_text("a\tb\tneutral\n")
    path = tmp_path / "synonyms.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["augment", "--data-dir", str(tmp_path), "--synonyms", str(path), "--output", str(tmp_path / "v.tsv")]
    assert str(path) in message_of(arguments, monkeypatch)


@pytest.mark.parametrize(
    "content",
    ["[" * 600 + "]" * 600, "a: b: c", "groups: 1", "1: 2", "groups: [{name: a, table: [1]}]", b"\xff", "\0"],
    ids=short,
)
@pytest.mark.parametrize("command", ["sweep", "report"])
def test_a_damaged_study_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | bytes, command: str
) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = [str(path), "--output-dir", str(tmp_path / "runs")] if command == "sweep" else [str(tmp_path)]
    assert str(path) in message_of([command, *arguments], monkeypatch)


def test_numbers_that_are_none_are_refused_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = (("--learning-rate", "inf"), ("--learning-rate", "nan"), ("--alpha", "-1"), ("--beta", "-inf"))
    for option, value in wrong:
        message = message_of(["train", "--data-dir", "mini", option, value], monkeypatch)
        assert option.removeprefix("--").replace("-", "_") in message


@pytest.mark.parametrize("damage", ["truncated", "tokenizer.json", "config.json"])
def test_a_damaged_model_is_named(
    finished: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    folder = Path(finished.output_dir) / "model"
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    if damage == "truncated":
        (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:200])
    else:
        (broken / damage).write_text("[1]")
    options = ["--data-dir", str(finished.data_dir), "--method", "finetune", "--layer", "1", "--max-length", "24"]
    message = message_of(
        ["train", *options, "--model", str(broken), "--output-dir", str(tmp_path / "other")], monkeypatch
    )
    assert str(broken) in message
