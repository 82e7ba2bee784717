"""What the kernels must do in the interpreter; ``test_kernels.py`` runs it on them, ``mutants.py`` on broken copies."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ptx.compiler import Compiler
from ptx.machine import run
from ptx.memory import GlobalMemory, extent_of
from ptx.program import Program
from support import words
from support.cases import Case, attention_case, lengths_mask, mean_case, pooled_case, qk_case
from support.rules import check_case, check_pairs_without_upstream, check_strides_and_forms, peak_error

HERE = Path(__file__).parent
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, F16, F32)
ARCHITECTURES = ("sm_80", "sm_90")
VALUE_BOUND = 2e-6  # relative, of the largest


@dataclass(frozen=True)
class Check:
    """``run`` raises where the kernels that stand for the CPU's are wrong."""

    name: str
    run: Callable[[], None]
    core: bool = False  # runs with every change, for one architecture
    core_architecture: str | None = None  # which; None: they take turns
    architectures: tuple[str, ...] = ARCHITECTURES


def qk(queries: int, keys: int, dim: int, **options: object) -> Case:
    return qk_case(queries, keys, dim, **{"pairs": 1, "heads": 1, "reduction": "sum", **options})  # type: ignore[arg-type]


def right(case: Case, dtype: torch.dtype) -> Callable[[], None]:
    """The error rule, and a value as exact as sums in float32 of exact products are."""
    # One rounded score spreads over a whole row of gradients, so the errors of so few rows do not average out.
    return partial(check_case, case, dtype, "cpu", slack=2.0, value_bound=VALUE_BOUND)


def padding_is_never_touched(keys: int, dtype: torch.dtype, side: str, dim: int = 64) -> Callable[[], None]:
    """Padded queries and keys hold NaN, the first of all among them; nothing of it shows."""
    mask = lengths_mask([keys - 5], keys, side)
    masks = {name: mask for name in ("attention_mask", "attention_mask_aug", "query_mask", "query_mask_aug")}
    case = qk(keys, keys, dim, masks=masks).to(dtype)

    def check() -> None:
        clean, clean_gradients = case.run("cpu")
        padded = mask[0] == 0
        views = [tuple(tensor.clone() for tensor in view) for view in (case.x, case.x_aug)]
        for tensor in (*views[0], *views[1]):
            tensor[:, :, padded] = torch.nan
        value, gradients = replace(case, x=views[0], x_aug=views[1]).run("cpu")
        assert torch.equal(value, clean), "the value depends on padding"
        for gradient, expected in zip(gradients, clean_gradients, strict=True):
            assert gradient is not None and expected is not None
            assert torch.equal(gradient, expected), "a gradient depends on padding"

    return check


def the_gradient_of_a_single_key_is_zero(dtype: torch.dtype) -> None:
    """The backward subtracts what the forward has summed: with rows and columns swapped it must be the same bits."""
    _, gradients = qk(130, 1, 64).to(dtype).run("cpu")
    assert all(gradient is not None and not gradient.any() for gradient in gradients), "a gradient is not zero"


def only_some_gradients(dim: int, dtype: torch.dtype, all_needs: Sequence[tuple[bool, ...]]) -> Callable[[], None]:
    """Those that are asked for are the same bits as among all."""
    case = qk(20, 70, dim, heads=2, key_heads=1).to(dtype)

    def check() -> None:
        _, expected = case.run("cpu")
        for needs in all_needs:
            _, gradients = case.run("cpu", needs=needs)
            for needed, gradient, among_all in zip(needs, gradients, expected, strict=True):
                assert (gradient is not None) == needed
                assert gradient is None or (among_all is not None and torch.equal(gradient, among_all))

    return check


def strides(case: Case, layout: str, dtype: torch.dtype) -> Callable[[], None]:
    return lambda: check_strides_and_forms(case, layout, stacked=False, dtype=dtype, device="cpu")


def bias(pairs: int, heads: int, queries: int, keys: int, views: int) -> dict[str, torch.Tensor]:
    """Normal numbers, of which some are -inf."""
    generator = torch.Generator().manual_seed(0)
    names = ("attn_bias", "attn_bias_aug")[:views]
    drawn = {name: torch.randn(pairs, heads, queries, keys, generator=generator, dtype=torch.float64) for name in names}
    return {name: numbers.masked_fill(numbers > 1, -torch.inf) for name, numbers in drawn.items()}


def masked_case(queries: int, keys: int, dim: int, **options: object) -> Case:
    """Two pairs, with ragged keys and queries that do not count."""
    lengths = ([keys, keys // 2], [keys - 3, keys])
    query_mask = lengths_mask([queries, max(1, queries - 9)], queries)
    both = {"query_mask": query_mask, "query_mask_aug": query_mask}
    padding = qk_case(1, keys, dim, lengths=lengths).masks
    return qk(queries, keys, dim, pairs=2, masks={**padding, **both}, **options)


def attention_checks(dtype: torch.dtype) -> Iterator[Check]:
    """Of qk_attention_mse. The core takes the instances of 64 features."""
    brain, single = dtype is BF16, dtype is F32
    for dim in (1, 17, 32, 40, 64, 80, 96, 128, 160):
        core = (dtype, dim) == (F16, 64)
        yield Check(f"dim {dim}", right(qk(18, 21, dim), dtype), core)
    for queries, keys in ((1, 1), (1, 130), (64, 64), (65, 128), (70, 129), (3, 200), (130, 2)):
        core = brain and keys in (1, 128, 129)
        yield Check(f"{queries} queries, {keys} keys", right(qk(queries, keys, 64), dtype), core)
    for dim in (32, 96, 128):
        yield Check(f"long rows, dim {dim}", right(qk(20, 140, dim), dtype))
    yield Check("one key", partial(the_gradient_of_a_single_key_is_zero, dtype), single)
    yield Check("short rows, masks", right(masked_case(70, 100, 64), dtype), brain or single)
    yield Check("long rows, masks", right(masked_case(70, 200, 64), dtype), brain or single)
    yield Check("chunks, masks", right(masked_case(40, 150, 160), dtype))
    yield Check("dim 96, masks", right(masked_case(70, 100, 96), dtype))
    for dim in (32, 96, 128):
        yield Check(f"causal, dim {dim}", right(qk(70, 140, dim, options={"is_causal": True}), dtype))
    for dim in (32, 128):
        yield Check(f"short rows, dim {dim}", right(qk(66, 70, dim), dtype))
    yield Check("odd rows", right(qk(66, 70, 33, layout="slices"), dtype), brain)
    grouped = masked_case(30, 40, 64, heads=4, key_heads=2, reduction="none")
    yield Check("grouped queries", right(grouped, dtype), single)
    for views in (1, 2):
        biased = qk(20, 140, 64, biases=bias(1, 1, 20, 140, views), options={"is_causal": views == 2})
        yield Check(f"bias of {views} views", right(biased, dtype), brain and views == 2)
    for queries, keys in ((70, 150), (150, 70), (40, 40)):
        for is_causal, window in ((True, None), (False, 1), (False, 20), (True, 20)):
            structured = qk(queries, keys, 64, options={"is_causal": is_causal, "window": window})
            core = brain and (queries, is_causal, window) in ((70, True, 20), (150, False, 20))
            yield Check(f"{queries} x {keys}, causal {is_causal}, window {window}", right(structured, dtype), core)
    for side, keys in (("left", 40), ("left", 140), ("right", 140)):
        core = side == "left" and (brain or (single and keys == 40))
        yield Check(f"NaN in {keys} keys padded {side}", padding_is_never_touched(keys, dtype, side), core)
    for dim in (64, 160):
        needs = ((True, False, False, False), (False, False, False, True), (False, True, True, False))
        yield Check(f"some gradients, dim {dim}", only_some_gradients(dim, dtype, needs), single and dim == 64)
    for layout in ("length_first", "slices", "every_second", "expanded"):
        core = (dtype, layout) in ((BF16, "slices"), (F32, "every_second"))
        yield Check(layout, strides(masked_case(20, 33, 64, heads=2), layout, dtype), core)
    unused = partial(check_pairs_without_upstream, qk(40, 40, 64, pairs=2), dtype, "cpu")
    yield Check("a pair without upstream", unused)


def hopper_checks(dtype: torch.dtype) -> Iterator[Check]:
    """Of the kernels that EAR_OPS_CUDA_HOPPER=1 asks for. None takes float32."""
    brain = dtype is BF16
    masked = masked_case(200, 330, 64)
    cases = {
        "long rows": (qk(70, 129, 64), True),
        "more tiles than stages": (qk(20, 450, 64), False),
        "several blocks": (qk(200, 140, 64), False),
        "masks": (masked, brain),
        "grouped queries": (masked_case(30, 140, 64, heads=4, key_heads=2, reduction="none"), False),
        "grouped queries without masks": (qk(70, 140, 64, pairs=2, heads=4, key_heads=2, reduction="none"), False),
        "backward": (qk(330, 390, 64), brain),
        "dim 40": (qk(20, 140, 40), False),
        "dim 128, masks": (masked_case(140, 330, 128), False),
        "dim 104": (qk(20, 140, 104), False),
        "a negative scale": (qk(20, 140, 64, options={"scale": -0.3}), False),
    }
    forwards = {"forward": qk(200, 450, 64), "forward, masks": masked, "forward, dim 128": qk(140, 330, 128)}
    for name, (case, core) in cases.items() if dtype is not F32 else ():
        yield Check(name, on_hopper(right(case, dtype)), core)
    for name, case in forwards.items() if dtype is not F32 else ():
        yield Check(name, on_hopper(right_value(case, dtype)), not brain)
    if dtype is not F32:
        yield Check("strides", on_hopper(strides(masked_case(20, 133, 64, heads=2), "length_first", dtype)), False)
        yield Check("NaN in 140 keys padded left", on_hopper(padding_is_never_touched(140, dtype, "left")), brain)


COMPARISONS: dict[str, tuple[str, dict[str, object]]] = {
    "kl": ("qk_attention_kl", {}),
    "reverse kl": ("qk_attention_kl", {"direction": "reverse"}),
    "js": ("qk_attention_js", {}),
    "scores": ("qk_scores_mse", {}),
}


def divergence_checks(dtype: torch.dtype) -> Iterator[Check]:
    """Of the other operators that compare queries and keys. The core compiles one file, for one architecture."""
    for name, (op, options) in COMPARISONS.items():

        def compared(case: Case, op: str = op, options: dict[str, object] = options) -> Case:
            return replace(case, op=op, options={**case.options, **options})

        core = dtype is BF16 and name != "reverse kl"
        masks = {**masked_case(20, 70, 64).masks}
        masks["attention_mask_aug"] = masks["attention_mask"]
        both = masked_case(20, 70, 64, heads=2, key_heads=1, options={"is_causal": True}, reduction="none")
        yield Check(f"{name}, masks", right(compared(replace(both, masks=masks)), dtype), core, "sm_90")
        for dim in (32, 64, 96, 128, 160):
            yield Check(f"{name}, dim {dim}", right(compared(qk(20, 130, dim)), dtype))
        # Short rows: all queries and keys of a head in one block of threads, which has 64 of each or 128.
        for dim in (32, 64, 96, 128) if name != "reverse kl" else ():  # the kernels of kl, with views exchanged
            yield Check(f"{name}, few keys, dim {dim}", right(compared(qk(18, 21, dim)), dtype))
            yield Check(f"{name}, short rows, dim {dim}", right(compared(qk(66, 70, dim)), dtype))
        short = masked_case(40, 70, 64, reduction="none")
        short_masks = {**short.masks, "attention_mask_aug": short.masks["attention_mask"]}
        yield Check(
            f"{name}, short rows, masks", right(compared(replace(short, masks=short_masks)), dtype), core, "sm_90"
        )
        # A difference of scores keeps their rounding errors, so that it is less exact the smaller it is.
        near = compared(qk(9, 70, 64, closeness=0.1 if name == "scores" else 1e-2))
        yield Check(f"{name}, nearly equal", right(near, dtype) if dtype is F32 else right_value(near, dtype))


def mean_checks(dtype: torch.dtype) -> Iterator[Check]:
    """Of averages over heads. The core compiles one file, for one architecture. float16 has no kernels of its own."""
    if dtype is F16:
        return
    both = lengths_mask([70, 33], 70)
    masks = {**masked_case(20, 70, 64).masks, "attention_mask": both, "attention_mask_aug": both}
    for form in ("mse", "forward", "js"):
        # The average is that of the larger head dimension.
        small = mean_case(form, 20, 70, 16, heads=4, key_heads=2, masks=masks, reduction="none")
        yield Check(f"{form}, masks", right(small, dtype), dtype is BF16, "sm_90")
        large = mean_case(form, 70, 130, 40, pairs=1, options={"is_causal": True}, reduction="sum")
        yield Check(f"{form}, strips and chunks", right(large, dtype))
    near = mean_case("reverse", 20, 70, 32, closeness=1e-2, heads_aug=None, reduction="sum")
    yield Check("reverse, nearly equal", right(near, dtype) if dtype is F32 else right_value(near, dtype))


def right_value(case: Case, dtype: torch.dtype) -> Callable[[], None]:
    """The value alone, so that no kernel of a backward has to be compiled."""

    def check() -> None:
        rounded = case.to(dtype)
        exact = rounded.to(torch.float64)
        error = peak_error(rounded.call(rounded.inputs(), "cpu"), exact.call(exact.inputs(), "reference"))
        assert error <= VALUE_BOUND, f"value: error {error:.2e}, allowed {VALUE_BOUND:.2e}"

    return check


def on_hopper(check: Callable[[], None]) -> Callable[[], None]:
    def asked() -> None:
        os.environ["EAR_OPS_CUDA_HOPPER"] = "1"
        try:
            check()
        finally:
            del os.environ["EAR_OPS_CUDA_HOPPER"]

    return asked


def maps_checks(dtype: torch.dtype) -> Iterator[Check]:
    """Of attention_mse."""
    counted = lengths_mask([90, 80], 90)
    masks = {"query_mask": counted, "query_mask_aug": counted}
    for keys in (1, 13, 16, 200):
        lengths = ([keys, keys // 2], [keys, 0])
        case = attention_case(90, keys, lengths=lengths, masks=masks, reduction="none")
        yield Check(f"{keys} keys", right(case, dtype), core=True)
    case = attention_case(24, 32, pairs=2, reduction="sum")
    yield Check("no masks", right(case, dtype), core=True)
    yield Check("slices", strides(case, "slices", dtype), dtype is BF16)


def pooled_checks(dtype: torch.dtype) -> Iterator[Check]:
    """Of pooled_distance."""
    for length, features in ((1, 1), (31, 24), (130, 100), (300, 64)):
        lengths = ([length, int(0.3 * length), 0], [length, int(0.6 * length), length])
        case = pooled_case(length, features, lengths=lengths, offset=5.0, reduction="none")
        yield Check(f"{length} tokens, {features} features", right(case, dtype), core=True)
    case = pooled_case(24, 32, pairs=2, reduction="sum")
    yield Check("no masks", right(case, dtype), core=True)
    yield Check("slices", strides(case, "slices", dtype), dtype is BF16)


def word_checks(dtype: torch.dtype) -> Iterator[Check]:
    """Of the operators that compare attention between words."""
    few = words.words_of([1, 2, 1, 3, 1], [1, 2, 2, 1, 1], [2, 1, 1, 1, 2], [1, 1, 3, 1, 1], length=11, front=7)
    many = words.words_of([1, 2] * 20, [2, 1, 1] * 14, length=72)
    padding = {"attention_mask": (few >= 0).long()}
    groups = {"heads": 2, "key_heads": 1, "dim": 40}
    for divergence in ("mse", "kl", "js"):
        options = {**padding, "divergence": divergence, "is_causal": divergence == "mse"}
        # Plain PyTorch gives no finite KL in float16.
        if (divergence, dtype) != ("kl", F16):
            yield Check(
                f"{divergence}, padding",
                partial(words.check_words, few, groups, options, dtype),
                divergence == "mse",
                "sm_80",
            )
    one_head = {"heads": 1, "key_heads": 1}
    pieces = words.words_of([66, 2], [2, 3], length=70)  # more than a block of threads owns, in one view
    mask = {"attention_mask": (pieces >= 0).long()}
    yield Check("many pieces", partial(words.check_words, pieces, {**one_head, "dim": 16}, mask, dtype))
    yield Check("strips", partial(words.check_words, many, {**one_head, "dim": 64}, {}, dtype))
    yield Check("chunks", partial(words.check_words, few, {**one_head, "dim": 130}, {}, dtype))
    yield Check("NaN in padding", partial(padding_of_words_is_never_touched, few, dtype), dtype is BF16, "sm_80")


def padding_of_words_is_never_touched(ids: torch.Tensor, dtype: torch.dtype) -> None:
    found = []
    for value in (0.0, torch.nan):
        inputs = [view.masked_fill((ids < 0)[:, None, :, None], value).to(dtype) for view in words.views(ids, dim=16)]
        found.append(words.results(words.loss_of, inputs, ids, attention_mask=(ids >= 0).long(), backend="cpu"))
    assert all(map(torch.equal, *found)), "a result depends on padding"


def checks() -> list[Check]:
    """All of them, named ``operator dtype what``."""
    families = {
        "qk": attention_checks,
        "hopper": hopper_checks,
        "maps": maps_checks,
        "pooled": pooled_checks,
        "divergences": divergence_checks,
        "words": word_checks,
        "mean": mean_checks,
    }
    only = {"hopper": ("sm_90",)}
    return [
        replace(
            check,
            name=f"{family} {str(dtype).removeprefix('torch.')} {check.name}",
            architectures=only.get(family, ARCHITECTURES),
        )
        for family, family_checks in families.items()
        for dtype in DTYPES
        for check in family_checks(dtype)
    ]


# --- every bit of what primitives make -------------------------------------------------------------------------------


def primitives(compiler: Compiler) -> None:
    """The functions of ``primitives.cuh`` round and copy as it says."""
    programs = {program.kernel.name: program for program in compiler.programs(HERE / "primitives.cu")}
    convert, copy = (next(programs[name] for name in programs if part in name) for part in ("convert", "copy"))
    numbers = _numbers()
    _check_conversions(torch.from_numpy(numbers), _made(convert, numbers, 7))
    copied = np.where(np.arange(len(numbers))[:, None] % 2 == 0, numbers[:, [0, 1, 2, 3, 0]].view(np.uint32), 0)
    assert np.array_equal(_made(copy, numbers, 5), copied), "copy_async: not what is real, and zeros"


def _numbers() -> np.ndarray:
    """Random ones, and those on which roundings differ."""
    generator = np.random.default_rng(0)
    powers = generator.integers(-20, 17, (256, 4))
    numbers = (generator.standard_normal((256, 4)) * np.exp2(powers)).astype(np.float32)
    bits = numbers.view(np.uint32)
    bits[64:96] = bits[64:96] & np.uint32(0xFFFF0000) | np.uint32(0x8000)  # half way in bfloat16
    bits[96:128] = bits[96:128] & np.uint32(0xFFFFE000) | np.uint32(0x1000)  # half way in float16
    numbers[128:132, 0] = np.inf, -np.inf, 0.0, -0.0
    return numbers


def _check_conversions(numbers: torch.Tensor, made: np.ndarray) -> None:
    wide = numbers[:, 0].double()
    powers_of_two = torch.exp2(wide).float()
    powers_of_two[powers_of_two < torch.finfo(torch.float32).tiny] = 0
    made_powers = np.ascontiguousarray(made[:, 0]).view(np.float32)
    assert np.allclose(made_powers, powers_of_two, rtol=3e-7, atol=0), "exp2_fast: not 2^x"
    logarithms, inverses = np.ascontiguousarray(made[:, 5:].T).view(np.float32)
    exact_logarithms = wide.abs().log2().float()
    assert np.allclose(logarithms, exact_logarithms, rtol=3e-7, atol=3e-7), "log2_fast: not the logarithm"
    assert np.allclose(inverses, wide.reciprocal().float(), rtol=2e-7, atol=0), "reciprocal_fast: not 1 / x"
    for column, dtype in ((1, BF16), (2, F16)):
        halves = numbers[:, :2].to(dtype).contiguous().view(torch.uint16).numpy()
        pairs = np.ascontiguousarray(made[:, column]).view(np.uint16).reshape(-1, 2)
        assert np.array_equal(pairs, halves), f"pack_two: not two {dtype}, the first in the lower half"
        assert np.array_equal(made[:, column + 2], halves[:, 0]), f"round_to: not to the nearest {dtype}, ties to even"


def _made(program: Program, numbers: np.ndarray, columns: int) -> np.ndarray:
    made = np.empty((len(numbers), columns), np.uint32)
    memory = GlobalMemory([extent_of(numbers, written=False), extent_of(made, written=True)])
    parameters = struct.pack("<QQ", numbers.ctypes.data, made.ctypes.data)
    run(program, parameters, memory, grid=1, threads=len(numbers), shared_bytes=32 * len(numbers))
    memory.check_complete()
    memory.give_back()
    return made
