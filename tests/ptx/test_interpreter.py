"""Every check of the interpreter reports its mistake, and instructions do what the PTX ISA says. No nvcc is needed."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from ptx import tensor_core
from ptx.faults import Fault, UnknownInstruction
from ptx.machine import run
from ptx.memory import GlobalMemory, extent_of
from ptx.parser import parse
from ptx.program import Program

THREADS = 64
KERNEL = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 block_shared[];
.visible .entry kernel(
	.param .align 8 .b8 kernel_param_0[16]
)
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<99>;
	.reg .f32 %f<99>;
	.reg .b64 %rd<9>;
	ld.param.u64 %rd1, [kernel_param_0];     // float32 [64], read
	ld.param.u64 %rd2, [kernel_param_0+8];   // float32 [64], written
	mov.u32 %r1, %tid.x;
	shl.b32 %r2, %r1, 2;
	cvt.u64.u32 %rd3, %r2;
	add.s64 %rd4, %rd1, %rd3;                // this thread's number
	add.s64 %rd5, %rd2, %rd3;                // and its result
	mov.u32 %r3, block_shared;
	add.s32 %r4, %r3, %r2;                   // its place in shared memory
	xor.b32 %r5, %r4, 4;                     // that of its neighbour
	xor.b32 %r6, %r4, 128;                   // that of the same lane in the other warp
	setp.eq.s32 %p1, %r1, 5;
	BODY
	ret;
}
"""
WRITE = "ld.global.f32 %f1, [%rd4]; st.shared.f32 [%r4], %f1;"
COPY = "cp.async.ca.shared.global [%r4], [%rd4], 4, 4; cp.async.commit_group;"


def results(body: str, threads: int = THREADS, blocks: int = 1) -> np.ndarray:
    """What 64 threads make of the numbers 0 to 63."""
    numbers, made = np.arange(64, dtype=np.float32), np.full(64, np.nan, np.float32)
    memory = GlobalMemory([extent_of(numbers, written=False), extent_of(made, written=True)])
    text = KERNEL.replace("BODY", "\n".join(statement + ";" for statement in body.split(";") if statement.strip()))
    program = Program(parse(text)["kernel"])
    parameters = struct.pack("<QQ", numbers.ctypes.data, made.ctypes.data)
    run(program, parameters, memory, grid=blocks, threads=threads, shared_bytes=4 * THREADS)
    memory.check_complete()
    memory.give_back()
    return made


def read_as_result(address: str) -> str:
    return f"ld.shared.f32 %f2, [{address}]; st.global.f32 [%rd5], %f2;"


def test_a_kernel_without_a_mistake() -> None:
    assert np.array_equal(results(WRITE + "bar.sync 0;" + read_as_result("%r6")), np.arange(64) ^ 32)
    assert np.array_equal(results(WRITE + "bar.warp.sync -1;" + read_as_result("%r5")), np.arange(64) ^ 1)
    waited = "cp.async.wait_group 0;"
    assert np.array_equal(results(COPY + waited + read_as_result("%r4")), np.arange(64))
    assert np.array_equal(results(COPY + waited + "bar.sync 0;" + read_as_result("%r6")), np.arange(64) ^ 32)


READ_AND_WRITE = "ld.shared.f32 %f2, [%r4]; st.shared.f32 [{}], %f1"  # its own place, and another
MISTAKES = {
    "global memory: a read of 4 bytes .* outside .* thread 63": "ld.global.f32 %f1, [%rd4+4]",
    "global memory: a write of 4 bytes .* outside .* thread 63": "st.global.f32 [%rd5+4], %f1",
    "global memory: an access of 4 bytes .* is not aligned": "ld.global.f32 %f1, [%rd1+2]",
    "global memory: an access of 16 bytes .* is not aligned": "ld.global.v4.f32 {%f1,%f2,%f3,%f4}, [%rd1+4]",
    "global memory: a write to an input": "st.global.f32 [%rd4], %f1",
    "global memory: a result is read before it is written": "ld.global.f32 %f1, [%rd5]",
    "a result is written a second time": "st.global.f32 [%rd5], %f1; st.global.f32 [%rd5], %f1",
    "a second time: `st.global.f32 \\[%rd2": "st.global.f32 [%rd2], %f1",
    "global memory: 4 of 256 bytes of a result were never written": "@!%p1 st.global.f32 [%rd5], %f1",
    "shared memory: an access of 4 bytes at offset 256 of 256.* thread 63": "st.shared.f32 [%r4+4], %f1",
    "shared memory: an access of 4 bytes at offset -4": "st.shared.f32 [%r4+-4], %f1",
    "shared memory: an access of 4 bytes .* is not aligned": "st.shared.f32 [%r3+2], %f1",
    "shared memory: a read of what nobody wrote": "ld.shared.f32 %f1, [%r4]",
    "shared memory: a read of what a copy is still bringing": COPY + "ld.shared.f32 %f1, [%r4]",
    "still bringing: `ld.shared": COPY + "cp.async.wait_group 1; ld.shared.f32 %f1, [%r4]",
    "still bringing: `ld.shared.b32": COPY.partition(";")[0] + "; cp.async.wait_group 0; ld.shared.b32 %r9, [%r4]",
    "shared memory: a write over what a copy is still bringing": COPY + "st.shared.f32 [%r4], %f1",
    # between warps: no barrier, one of the warp alone
    "a race of this read with a write: `ld.shared.f32 %f2, \\[%r6": WRITE + read_as_result("%r6"),
    "a race of this read with a write: `ld.shared.f32 %f3": WRITE + "bar.warp.sync -1; ld.shared.f32 %f3, [%r6]",
    "a race of this read with a write: `ld.shared.f32 %f4": COPY + "cp.async.wait_group 0; ld.shared.f32 %f4, [%r6]",
    "a race of this write with a read: `st.shared.f32 \\[%r6": WRITE + "bar.sync 0;" + READ_AND_WRITE.format("%r6"),
    "a race of this write with a read: `cp.async": WRITE + "bar.sync 0; ld.shared.f32 %f2, [%r6];" + COPY,
    "a race of this write with another: `st.shared.f32 \\[%r6": WRITE + "st.shared.f32 [%r6], %f1",
    "a race of two writes in one instruction": "st.shared.f32 [%r3], %f1",
    # all read one number, and then one thread writes it
    "a race of this write with a read: `@%p1 st.shared": (
        WRITE + "bar.sync 0; ld.shared.f32 %f2, [%r3]; @%p1 st.shared.f32 [%r3], %f1"
    ),
    # between the threads of a warp: nothing, or something that does not order memory
    "a race of this read with a write: `ld.shared.f32 %f2, \\[%r5": WRITE + read_as_result("%r5"),
    "a race of this read with a write: `ld.shared.f32 %f5": (
        WRITE + "vote.sync.ballot.b32 %r9, %p1, -1; ld.shared.f32 %f5, [%r5]"
    ),
    "a race of this write with a read: `st.shared.f32 \\[%r5": WRITE + "bar.sync 0;" + READ_AND_WRITE.format("%r5"),
    "not every thread of the warp comes .*`@%p1 vote": "@%p1 vote.sync.ballot.b32 %r9, %p1, -1",
    "not every thread of the warp comes .*`@%p1 bar.warp": "@%p1 bar.warp.sync -1",
    "not every thread of the block comes .*`@%p1 bar.sync": "@%p1 bar.sync 0",
    "not every thread of the block comes .*`bar.sync": "@%p1 ret; bar.sync 0",
    "a mask that does not name all threads": "vote.sync.ballot.b32 %r9, %p1, 1",
    "expected all 4 bytes or none": "cp.async.ca.shared.global [%r4], [%rd4], 4, 2",
    "arguments: a read outside": "ld.param.u32 %r9, [kernel_param_0+16]",
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_reported(message: str) -> None:
    with pytest.raises(Fault, match=message):
        results(MISTAKES[message])


def test_a_warp_meets_again_after_a_branch() -> None:
    body = "@%p1 bra $THERE; mov.f32 %f1, 0f3F800000; bra.uni $MEET; $THERE:\nmov.f32 %f1, 0f40000000; $MEET:\n"
    body += "shfl.sync.bfly.b32 %f2|%p2, %f1, 1, 31, -1; st.global.f32 [%rd5], %f2"
    assert np.array_equal(results(body), np.where(np.arange(64) == 4, 2, 1))


@pytest.mark.parametrize(
    "unknown",
    ["sin.approx.f32 %f1, %f2", "add.sat.s32 %r1, %r2, %r3", "mma.sync.aligned.m8n8k4.row.col.f32 {%f1}, {%f2}"],
)
def test_an_instruction_that_is_not_known_is_named(unknown: str) -> None:
    """Reached or not."""
    with pytest.raises(UnknownInstruction, match=unknown.split()[0]):
        results(f"bra.uni $OVER; {unknown}; $OVER:\n")


ARITHMETIC: dict[str, Any] = {
    "sub.s32 %r9, 3, %r1": 3 - np.arange(64),
    "div.s32 %r9, -7, 2": -3,
    "rem.s32 %r9, -7, 2": -1,
    "shr.s32 %r9, -7, 1": -4,
    "shr.u32 %r9, -1, 40": 0,
    "shl.b32 %r9, %r1, 33": 0,
    "mad.lo.s32 %r9, %r1, %r1, -1": np.arange(64) ** 2 - 1,
    "mul.hi.s32 %r9, %r1, -5": np.where(np.arange(64) > 0, -1, 0),
    "mul.hi.u32 %r9, -1, -1": -2,
    "mul.wide.s32 %rd6, %r1, -5; shr.s64 %rd6, %rd6, 32; cvt.u32.u64 %r9, %rd6": np.where(np.arange(64) > 0, -1, 0),
    "mov.u16 %rs1, 65535; cvt.s32.s16 %r9, %rs1": -1,
    "setp.ltu.f32 %p2, 0f7FC00000, 0f00000000; selp.b32 %r9, 1, 0, %p2": 1,
    "setp.lt.f32 %p2, 0f7FC00000, 0f00000000; selp.b32 %r9, 1, 0, %p2": 0,
    "max.f32 %f3, 0f7FC00000, 0f3F800000; mov.b32 %r9, %f3": 0x3F800000,
    "mov.b32 {%rs1, %rs2}, 65538; cvt.u32.u16 %r9, %rs2": 1,
    "mov.u16 %rs1, 3; mov.b32 %r9, {%rs1, %rs1}": 3 * 65537,
    "cvt.rn.bf16x2.f32 %r9, 0f3F800000, 0f40000000": 0x3F804000,
    "cvt.rn.bf16.f32 %rs1, 0f3F808000; cvt.u32.u16 %r9, %rs1": 0x3F80,  # half way: to even
    "ex2.approx.ftz.f32 %f3, 0fC2FE0000; mov.b32 %r9, %f3": 0,  # 2^-127 is subnormal
    "lg2.approx.ftz.f32 %f3, 0f41000000; mov.b32 %r9, %f3": 0x40400000,
    "lg2.approx.ftz.f32 %f3, 0f00400000; mov.b32 %r9, %f3": -0x800000,  # of a subnormal number: -infinity
    "rcp.approx.ftz.f32 %f3, 0fC0000000; mov.b32 %r9, %f3": -0x41000000,
    "rcp.approx.ftz.f32 %f3, 0f00400000; mov.b32 %r9, %f3": 0x7F800000,
}


@pytest.mark.parametrize("body", ARITHMETIC)
def test_arithmetic(body: str) -> None:
    made = results(f"{body}; st.global.u32 [%rd5], %r9").view(np.int32)
    assert np.array_equal(made, np.broadcast_to(ARITHMETIC[body], 64))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_the_matrix_product_is_a_matrix_product(kind: str) -> None:
    """The fragments are filled by the figures of the ISA, register by register."""
    generator = np.random.default_rng(0)
    left, right, start = (generator.integers(-8, 9, shape) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b = np.zeros((32, 8)), np.zeros((32, 4))
    c, expected = np.zeros((32, 4), np.float32), np.zeros((32, 4))
    for lane in range(32):
        g, t = divmod(lane, 4)
        for half in range(2):
            k = 2 * t + half
            far = k + 8
            for register, (row, column) in enumerate([(g, k), (g + 8, k), (g, far), (g + 8, far)]):
                a[lane, 2 * register + half] = left[row, column]
            for register, row in enumerate([k, far]):
                b[lane, 2 * register + half] = right[row, g]
        for register, place in enumerate([(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]):
            c[lane, register], expected[lane, register] = start[place], (left @ right + start)[place]

    def registers(numbers: np.ndarray) -> np.ndarray:
        if kind == "bf16":
            numbers = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return numbers.astype({"bf16": np.uint16, "f16": np.float16}[kind]).view(np.uint32)[None]

    assert np.array_equal(tensor_core.multiply_add(kind, registers(a), registers(b), c[None])[0], expected)


def test_matrices_are_loaded_row_by_row_or_transposed() -> None:
    values = np.arange(4 * 64, dtype=np.uint16).reshape(1, 4, 8, 8)
    rows = values.view(np.uint8).reshape(1, 32, 16)
    for transpose, matrices in ((False, values), (True, values.swapaxes(2, 3))):
        registers = tensor_core.load_matrices(rows, transpose)[0]
        for lane in range(32):
            for matrix in range(4):
                low, high = matrices[0, matrix, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
                assert registers[lane, matrix] == int(low) | int(high) << 16
