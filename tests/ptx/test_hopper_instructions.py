"""Barriers, copies of tiles and products of warp groups do what the PTX ISA says; mistakes with them are reported."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from ptx.asynchronous import swizzled
from ptx.faults import Fault
from ptx.machine import run
from ptx.memory import GlobalMemory, extent_of
from ptx.parser import SHARED_BASE, parse
from ptx.program import Program

THREADS, ROWS, FEATURES = 160, 60, 48  # four warps and one more; a tensor that is smaller than its box
SUMS = ", ".join(f"%f{i}" for i in range(32))
STORES = "; ".join(f"st.global.f32 [%rd4+{4 * i}], %f{i}" for i in range(32))
KERNEL = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 block_shared[];
.visible .entry kernel(
	.param .align 128 .b8 kernel_param_0[384]
)
{
	.reg .pred %p<9>;
	.reg .b32 %r<99>;
	.reg .f32 %f<32>;
	.reg .b64 %rd<19>;
	ld.param.u64 %rd1, [kernel_param_0+256];  // float32 [128, 32], the sums of each thread
	mov.u64 %rd2, kernel_param_0;             // the left tensor; the right one follows
	add.s64 %rd5, %rd2, 128;
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd3, %r1, 128;
	add.s64 %rd4, %rd1, %rd3;
	mov.u32 %r2, block_shared;                // barriers: full, and one that counts 4 arrivals
	add.s32 %r3, %r2, 8;
	add.s32 %r4, %r2, 1024;                   // tiles
	add.s32 %r5, %r2, 9216;
	setp.eq.s32 %p1, %r1, 128;                // the thread that copies
	setp.ge.s32 %p2, %r1, 128;
	and.b32 %r6, %r1, 31;
	setp.ne.s32 %p3, %r6, 0;
	// descriptors: 128 bytes of swizzle, 1024 bytes from eight rows to the next
	shr.u32 %r7, %r4, 4;
	cvt.u64.u32 %rd6, %r7;
	or.b64 %rd6, %rd6, FIELDS;
	add.s64 %rd7, %rd6, 512;
	BODY
	ret;
}
"""
WAIT = "mbarrier.try_wait.parity.shared::cta.b64 %p4, [{}], {}; @!%p4 bra {}"
COPY = "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [{}, {{0, 0, 0, 0}}], [%r2]"
COPIES = "; ".join(COPY.format(*places) for places in (("%r4", "%rd2"), ("%r5", "%rd5")))
FIELDS = str(1 << 62 | 1024 >> 4 << 32 | 1 << 16)


def product(step: int) -> str:
    """Of 16 features."""
    factors = f"add.s64 %rd8, %rd6, {2 * step}; add.s64 %rd9, %rd7, {2 * step}"
    name = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"
    return f"{factors}; setp.ne.s32 %p5, {step}, 0; {name} {{{SUMS}}}, %rd8, %rd9, %p5, 1, 1, 0, 0"


STEPS = {
    "init": "@!%p1 bra $MADE; mbarrier.init.shared::cta.b64 [%r2], 1; mbarrier.init.shared::cta.b64 [%r3], 4",
    "publish": "fence.mbarrier_init.release.cluster",
    "made": "$MADE:",
    "sync": "bar.sync 0",
    "part": "@!%p2 bra $WORK; @!%p1 bra $DONE",
    "expect": "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 16384",
    "copy": COPIES,
    "again": f"$AGAIN:; {WAIT.format('%r3', 0, '$AGAIN')}",
    "copy again": f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 8192; {COPY.format('%r4', '%rd2')}; bra $DONE",
    "work": "$WORK:",
    "wait": WAIT.format("%r2", 0, "$WORK"),
    "fence": "wgmma.fence.sync.aligned",
    "products": "; ".join(map(product, range(3))),
    "commit": "wgmma.commit_group.sync.aligned",
    "wait for products": "wgmma.wait_group.sync.aligned 0",
    "arrive": "@%p3 bra $LAST; mbarrier.arrive.shared::cta.b64 _, [%r3]",
    "last": f"$LAST:; {WAIT.format('%r2', 1, '$LAST')}",
    "store": STORES,
    "done": "$DONE:",
}


def tensor_map(tensor: np.ndarray) -> bytes:
    """As tests/cuda_on_host/hopper.h writes it, with a box of 64 rows."""
    rows, features = tensor.shape
    numbers = (tensor.ctypes.data, features, rows, 1, 1, 2 * features, 2 * tensor.size, 2 * tensor.size, 64)
    return struct.pack("<9Q", *numbers).ljust(128, b"\0")


def results(steps: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """What the threads hold of ``left @ right.T``, and the product."""
    generator = np.random.default_rng(0)
    left, right = (generator.integers(-8, 9, (ROWS, FEATURES)).astype(np.float32) for _ in range(2))
    tensors = [(numbers.view(np.uint32) >> 16).astype(np.uint16) for numbers in (left, right)]
    made = np.full((128, 32), np.nan, np.float32)
    extents = [*(extent_of(tensor, written=False) for tensor in tensors), extent_of(made, written=True)]
    memory = GlobalMemory(extents)
    statements = [statement.strip() for step in steps.values() for statement in step.split(";")]
    body = "\n".join(statement if statement.endswith(":") else f"{statement};" for statement in statements)
    program = Program(parse(KERNEL.replace("BODY", body).replace("FIELDS", FIELDS))["kernel"])
    parameters = b"".join(map(tensor_map, tensors)) + struct.pack("<Q", made.ctypes.data).ljust(128, b"\0")
    run(program, parameters, memory, grid=1, threads=THREADS, shared_bytes=17408)
    memory.check_complete()
    memory.give_back()
    product = np.zeros((64, 64), np.float32)
    product[:ROWS, :ROWS] = left @ right.T
    return made, product


def test_a_product_of_copied_tiles() -> None:
    """The figure of the ISA: a thread holds rows g and g + 8 of its warp's 16, two columns of every eight."""
    made, product = results(STEPS)
    for thread in range(128):
        g, t = thread % 32 // 4, thread % 4
        for i in range(32):
            row = 16 * (thread // 32) + g + 8 * (i // 2 % 2)
            assert made[thread, i] == product[row, 8 * (i // 4) + 2 * t + i % 2]


def test_rows_of_a_tile_are_swizzled() -> None:
    rows, places = np.meshgrid(np.arange(16), np.arange(8), indexing="ij")
    plain = SHARED_BASE + 128 * rows + 16 * places
    assert np.array_equal(swizzled(plain), SHARED_BASE + 128 * rows + 16 * (places ^ rows % 8))


MISTAKES = {
    "no barrier was made here": {"init": ""},
    "nothing orders the making of a barrier": {"sync": ""},
    "a barrier that no fence has shown": {"publish": ""},
    "the end of a phase that never comes": {"expect": "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 9000"},
    "phase that never comes: `mbarrier.try_wait.parity.shared::cta.b64 %p4, \\[%r3": {"arrive": "$LAST:", "last": ""},
    "one arrival too many": {"expect": STEPS["expect"] + "; mbarrier.arrive.shared::cta.b64 _, [%r2]" * 2},
    "a product of what a copy is still bringing": {"wait": ""},
    "a product of what no copy brought": {
        "copy": COPY.format("%r4", "%rd2"), "expect": STEPS["expect"].replace("16384", "8192")
    },
    "no wgmma.fence orders": {"fence": ""},
    "a copy over what another is still bringing": {
        "again": "", "copy again": f"{COPY.format('%r4', '%rd2')}; bra $DONE"
    },
    "a race of this copy with a product .*thread 128": {
        "wait for products": "", "last": "$LAST:; wgmma.wait_group.sync.aligned 0"
    },
    "a product that nobody waits for": {"wait for products": "", "again": "bra $DONE", "last": "$LAST:"},
    "a copy is still on its way": {"last": "$LAST:"},
    "a read of a barrier or tile": {"store": f"ld.shared.u32 %r9, [%r4]; {STORES}"},
    "a write to a barrier or tile": {"store": f"st.shared.u32 [%r2], %r9; {STORES}"},
    "rows do not begin at a multiple of 1024": {"fence": "add.s64 %rd6, %rd6, 8; wgmma.fence.sync.aligned"},
    "a tile that does not begin at": {"copy": f"add.s32 %r4, %r4, 16; {STEPS['copy']}"},
    "a copy of a head or batch": {"copy": STEPS["copy"].replace("0, 0, 0, 0", "0, 0, 0, 1")},
    "a factor differs": {"fence": "mul.wide.u32 %rd10, %r6, 64; add.s64 %rd6, %rd6, %rd10; wgmma.fence.sync.aligned"},
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_reported(message: str) -> None:
    with pytest.raises(Fault, match=message):
        results({name: text for name, text in (STEPS | MISTAKES[message]).items() if text})
