"""What the kernels must do in the interpreter; ``test_kernels.py`` runs it on them, ``mutants.py`` on broken copies."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from support.cases import Case, attention_case, lengths_mask, pooled_case, qk_case
from support.rules import check_case, check_pairs_without_upstream, check_strides_and_forms

from ptx.compiler import Compiler
from ptx.machine import run
from ptx.memory import Extent, GlobalMemory

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, F16, F32)
ARCHITECTURES = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Check:
    """``run`` raises where the kernels that stand for the CPU's are wrong."""

    name: str
    architecture: str
    run: Callable[[], None]
    core: bool  # runs with every change

    def __str__(self) -> str:
        return f"{self.name}-{self.architecture}"


def qk(queries: int, keys: int, dim: int, **options: object) -> Case:
    return qk_case(queries, keys, dim, **{"pairs": 1, "heads": 1, "reduction": "sum", **options})  # type: ignore[arg-type]


def right(case: Case, dtype: torch.dtype) -> Callable[[], None]:
    """The error rule. One rounded score spreads over a whole row, so the errors of so few rows do not average out."""
    return lambda: check_case(case, dtype, "cpu", slack=2.0)


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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention_checks() -> list[tuple[str, Callable[[], None], bool]]:
    """(name, check, whether it is of the core) for either architecture."""
    made: list[tuple[str, Callable[[], None], bool]] = []

    def add(name: str, check: Callable[[], None], core: bool = False) -> None:
        made.append((f"qk {name}", check, core))

    for dtype in DTYPES:
        named = _short(dtype)
        for dim in (1, 17, 32, 40, 64, 80, 96, 128, 160):
            add(
                f"{named} dim {dim}", right(qk(18, 21, dim), dtype), (dtype, dim) in ((F16, 64), (F32, 32), (BF16, 128))
            )
        for queries, keys in ((1, 1), (1, 130), (64, 64), (65, 128), (70, 129), (3, 200), (130, 2)):
            core = dtype is BF16 and keys in (1, 128, 129)
            add(f"{named} lengths {queries} {keys}", right(qk(queries, keys, 64), dtype), core)
        core = dtype is not F16
        add(f"{named} short rows, masks", right(masked_case(70, 100, 64), dtype), core)
        add(f"{named} long rows, masks", right(masked_case(70, 200, 64), dtype), core)
        add(f"{named} chunks, masks", right(masked_case(40, 150, 160), dtype))
        add(f"{named} chunks of 32", right(qk(66, 70, 33, layout="slices"), dtype), dtype is BF16)
        grouped = {"heads": 4, "key_heads": 2, "reduction": "none"}
        add(f"{named} grouped queries", right(masked_case(30, 40, 32, **grouped), dtype), dtype is F32)
        for views in (1, 2):
            options = {"biases": bias(1, 1, 20, 140, views), "is_causal": views == 2}
            case = qk(20, 140, 64, biases=options["biases"], options={"is_causal": options["is_causal"]})
            add(f"{named} {views} biases", right(case, dtype), dtype is BF16 and views == 2)
        for queries, keys in ((70, 150), (150, 70), (40, 40)):
            for is_causal, window in ((True, None), (False, 1), (False, 20), (True, 20)):
                structure = {"is_causal": is_causal, "window": window}
                core = dtype is BF16 and (queries, is_causal, window) in ((70, True, 20), (150, False, 20))
                name = f"{named} {queries} {keys} causal {is_causal} window {window}"
                add(name, right(qk(queries, keys, 64, options=structure), dtype), core)
        for side, keys in (("left", 40), ("left", 140), ("right", 140)):
            core = (dtype is BF16 and side == "left") or (dtype is F32 and keys == 40)
            add(f"{named} NaN in padding {side} {keys}", padding_is_never_touched(keys, dtype, side), core)
        for dim in (64, 160):
            needs = ((True, False, False, False), (False, False, False, True), (False, True, True, False))
            add(f"{named} some gradients {dim}", only_some_gradients(dim, dtype, needs), dtype is F32 and dim == 64)
        for layout in ("length_first", "slices", "every_second", "expanded"):
            case = masked_case(20, 33, 64, heads=2)
            add(
                f"{named} {layout}",
                strides(case, layout, dtype),
                (dtype, layout) in ((BF16, "slices"), (F32, "every_second")),
            )
        close = qk(40, 40, 64, pairs=2, reduction="none")
        add(
            f"{named} a pair without upstream",
            lambda case=close, of=dtype: check_pairs_without_upstream(case, of, "cpu"),
        )
    return made


def _other_checks() -> list[tuple[str, Callable[[], None], bool]]:
    made: list[tuple[str, Callable[[], None], bool]] = []
    for dtype in DTYPES:
        named = _short(dtype)
        for keys in (1, 13, 16, 200):
            lengths = ([keys, keys // 2], [keys, 0])
            counted = lengths_mask([90, 80], 90)
            masks = {"query_mask": counted, "query_mask_aug": counted}
            case = attention_case(90, keys, lengths=lengths, masks=masks, reduction="none")
            made.append((f"attention {named} keys {keys}", right(case, dtype), True))
        case = attention_case(24, 32, pairs=2, reduction="sum")
        made.append((f"attention {named} no masks", right(case, dtype), True))
        made.append((f"attention {named} slices", strides(case, "slices", dtype), dtype is BF16))
        for length, features in ((1, 1), (31, 24), (130, 100), (300, 64)):
            lengths = ([length, int(0.3 * length), 0], [length, int(0.6 * length), length])
            case = pooled_case(length, features, lengths=lengths, offset=5.0, reduction="none")
            made.append((f"pooled {named} {length} {features}", right(case, dtype), True))
        case = pooled_case(24, 32, pairs=2, reduction="sum")
        made.append((f"pooled {named} no masks", right(case, dtype), True))
        made.append((f"pooled {named} slices", strides(case, "slices", dtype), dtype is BF16))
    return made


def checks() -> list[Check]:
    """All of them. Those of the core run on one architecture, by turns."""
    made = []
    for number, (name, check, core) in enumerate([*_attention_checks(), *_other_checks()]):
        for turn, architecture in enumerate(ARCHITECTURES):
            made.append(Check(name, architecture, check, core and number % 2 == turn))
    return made


# --- conversions, every bit -----------------------------------------------------------------------------------------


def conversions(compiler: Compiler) -> None:
    """The functions of ``primitives.cuh`` round as it says."""
    generator = np.random.default_rng(0)
    powers = generator.integers(-20, 17, (256, 2))
    numbers = (generator.standard_normal((256, 2)) * np.exp2(powers)).astype(np.float32)
    bits = numbers.view(np.uint32)
    bits[:64] &= np.uint32(0xFFFFE000)  # exact in tf32 ...
    bits[:32] |= np.uint32(0x1000)  # ... or half way between two of its numbers
    bits[64:96] = bits[64:96] & np.uint32(0xFFFF0000) | np.uint32(0x8000)  # half way in bfloat16
    bits[96:128] = bits[96:128] & np.uint32(0xFFFFE000) | np.uint32(0x1000)  # half way in float16
    numbers[128:132, 0] = np.inf, -np.inf, 0.0, -0.0
    made = _converted(compiler, numbers)
    first, second = torch.from_numpy(numbers).unbind(1)
    wide = first.double()
    unit = torch.exp2(torch.floor(torch.log2(wide.abs())) - 10)  # of the last place of tf32
    tf32 = torch.where(
        wide.isinf() | (wide == 0), wide, wide.sign() * torch.floor(wide.abs() / unit + 0.5) * unit
    ).float()
    assert np.array_equal(made[:, 0], tf32.numpy().view(np.uint32)), (
        "round_to_tf32: not to nearest, ties away from zero"
    )
    powers_of_two = torch.exp2(wide).float()
    powers_of_two[powers_of_two < torch.finfo(torch.float32).tiny] = 0
    assert np.allclose(made[:, 1].view(np.float32), powers_of_two, rtol=3e-7, atol=0), "exp2_fast: not 2^x"
    for column, dtype in ((2, BF16), (3, F16)):
        halves = torch.stack([first, second], 1).to(dtype).view(torch.uint16).numpy().copy().view(np.uint32)[:, 0]
        assert np.array_equal(made[:, column], halves), f"pack_two: not two {dtype}, the first in the lower half"
        single = first.to(dtype).view(torch.uint16).numpy()
        assert np.array_equal(made[:, column + 2], single), f"round_to: not to the nearest {dtype}, ties to even"


def _converted(compiler: Compiler, numbers: np.ndarray) -> np.ndarray:
    made = np.empty((len(numbers), 6), np.uint32)
    memory = GlobalMemory(
        [Extent(numbers.ctypes.data, numbers.nbytes, False), Extent(made.ctypes.data, made.nbytes, True)]
    )
    (program,) = compiler.programs(Path(__file__).with_name("primitives.cu"))
    parameters = struct.pack("<QQ", numbers.ctypes.data, made.ctypes.data)
    run(program, parameters, memory, grid=1, threads=len(numbers), shared_bytes=0)
    memory.check_complete()
    memory.give_back()
    return made
