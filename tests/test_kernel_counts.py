"""Test the gate on the CUDA kernels' instruction counts: the listing, the machine, the issue model, the comparison."""

from __future__ import annotations

import json

import check_build
import pytest
from sass import counts, issue, machine
from sass.listing import parse
from sass.machine import DATA, Block, Launch, NotUnderstood, Program, Region

# Each lane loads from x[32 * block + lane], adds what it finds n times, and stores. Lanes from 16 on add once more.
# This is what nvdisasm prints: an instruction, then both words of its encoding.
BODY = """
    S2R R0, SR_TID.X
    S2R R3, SR_CTAID.X
    IMAD R0, R3, 0x20, R0
    ULDC UR4, c[0x0][0x218]
    IMAD.WIDE R2, R0, 0x4, c[0x0][0x210]
    LDG.E R4, [R2.64]
    MOV R5, RZ
    MOV R6, RZ
.L_loop:
    FADD R5, R5, R4
    IADD3 R6, R6, 0x1, RZ
    ISETP.GE.AND P0, PT, R6, UR4, PT
@!P0 BRA `(.L_loop)
    LOP3.LUT R7, R0, 0x1f, RZ, 0xc0, !PT
    ISETP.GE.U32.AND P1, PT, R7, 0x10, PT
    BSSY B0, `(.L_meet)
@!P1 BRA `(.L_skip)
    FADD R5, R5, R4
.L_skip:
    BSYNC B0
.L_meet:
    BAR.SYNC.DEFER_BLOCKING 0x0
@P2 LDG.E R4, [R2.64]
    STG.E [R2.64], R5
    EXIT
"""
STALL_4 = "0x000fe80000000000"  # waits for nothing, sets no scoreboard


def listing(body: str, argument_bytes: int = 12, control: dict[str, str] | None = None) -> str:
    """Text as nvdisasm prints it, out of one instruction a line."""
    lines, place = [".text.kernel:"], 0
    for line in body.strip().splitlines():
        if line.startswith(".L"):
            lines.append(line)
            continue
        word = next((word for name, word in (control or {}).items() if name in line), STALL_4)
        lines.append(f"        /*{place:04x}*/     {line.strip()} ;    /* 0x0000000000000000 */")
        lines.append(f"                            /* {word} */")
        place += 16
    lines += ["//--------------------- .nv.constant0.kernel ---", ".nv.constant0.kernel:"]
    return "\n".join([*lines, f"\t.zero\t\t{0x210 + argument_bytes}"])


def run(body: str, arguments: bytes, blocks: int = 2, index: int = 1, bytes_of_x: int = 384) -> list[list[str]]:
    """The names of the instructions that the two warps of a block execute; "-" for those that no lane does."""
    kernel = parse(listing(body, len(arguments)))["kernel"]
    launch = Launch("kernel", blocks, 64, 0, arguments, (Region("x", 1 << 32, bytes_of_x),))
    traces = Block(Program(kernel, "90"), launch, index).run()
    return [
        [("-" if entry < 0 else "") + kernel.instructions[max(entry, ~entry)].name for entry in trace]
        for trace in traces
    ]


def arguments(times: int) -> bytes:
    return (1 << 32).to_bytes(8, "little") + times.to_bytes(4, "little")


def test_a_listing_gives_text_guards_control_words_and_labels() -> None:
    kernel = parse(listing(BODY, control={"LDG.E R4": "0x004ee2000c1e1900"}))["kernel"]
    load = kernel.instructions[5]
    assert (load.name, load.opcode, load.operands, load.guard) == ("LDG", "LDG.E", ("R4", "[R2.64]"), "")
    assert (load.stall, load.sets_on_write, load.sets_on_read, load.waits_for) == (1, 3, 7, 4)
    branch = kernel.instructions[11]
    assert (branch.guard, branch.name, kernel.labels[".L_loop"]) == ("!P0", "BRA", 8)
    assert kernel.constant_bytes == 0x210 + 12


@pytest.mark.parametrize("times", [1, 3, 100])
def test_a_loop_runs_as_often_as_its_arguments_say(times: int) -> None:
    for names in run(BODY, arguments(times)):
        assert names.count("IADD3") == times
        assert names.count("FADD") == times + 1  # the branch by lane was followed both ways
        assert names.count("-LDG") == 1  # no lane does it, but the warp issues it
        assert names[-5:] == ["BSYNC", "BAR", "-LDG", "STG", "EXIT"]  # once: all lanes have met again


def test_an_address_outside_of_the_tensors_is_an_error() -> None:
    run(BODY, arguments(1), bytes_of_x=384)
    with pytest.raises(NotUnderstood, match="outside of the memory of the call"):
        run(BODY, arguments(1), bytes_of_x=380)


def test_what_the_machine_does_not_know_is_named() -> None:
    with pytest.raises(NotUnderstood, match=r"WGMMA\.X R1, R2.*has no meaning"):
        run("WGMMA.X R1, R2\nEXIT", arguments(1))
    with pytest.raises(NotUnderstood, match="12 bytes of arguments, not 8"):
        kernel = parse(listing(BODY))["kernel"]
        Block(Program(kernel, "90"), Launch("kernel", 1, 32, 0, bytes(8)), 0)


# Every instruction computes R9. The operands are 0x89abcdef and 7, R4 and R5; lanes differ in R0. P0 holds.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("IADD3 R9, R4, -R5, 0x10", (0x89ABCDEF - 7 + 16) & 0xFFFFFFFF),
        ("IMAD R9, R4, R5, R5", (0x89ABCDEF * 7 + 7) & 0xFFFFFFFF),
        ("IMAD.HI.U32 R9, R4, R4, RZ", 0x89ABCDEF**2 >> 32),
        ("IMAD.SHL.U32 R9, R5, 0x8, RZ", 56),
        ("LEA R9, R5, R4, 0x4", 0x89ABCDEF + 112),
        ("LEA.HI R9, R4, R5, RZ, 0x4", 8 + 7),
        ("LEA.HI.SX32 R9, R4, R5, 0x4", (-8 + 7) & 0xFFFFFFFF),
        ("LOP3.LUT R9, R4, 0xff00, R5, 0xea, !PT", 0x89ABCDEF & 0xFF00 | 7),
        ("SHF.R.S32.HI R9, RZ, 0x1c, R4", 0xFFFFFFF8),
        ("SHF.R.U32.HI R9, RZ, 0x1c, R4", 8),
        ("SHF.L.U32 R9, R4, 0x4, RZ", 0x9ABCDEF0),
        ("SHF.L.U64.HI R9, R4, 0x4, R5", 7 << 4 | 8),
        ("PRMT R9, R4, 0x7610, R5", 0x0000CDEF),
        ("SEL R9, R4, R5, !P0", 7),
        ("IABS R9, R4", 0x100000000 - 0x89ABCDEF),
        ("VIMNMX R9, R4, R5, PT", 0x89ABCDEF),
        ("VIMNMX3 R9, R5, R4, R5, PT", 0x89ABCDEF),
        ("VIMNMX3.U32 R9, R5, R4, R5, !PT", 0x89ABCDEF),
        ("IMNMX.U32 R9, R4, R5, PT", 7),
        ("VOTE.ANY R9, PT, P0", 0xFFFFFFFF),
        ("P2R R9, PR, RZ, 0x1", 1),
        ("FADD R9, R4, 1", 0x3F800000),  # the operand is a tiny negative number
        ("FSEL R9, -R5, R4, P0", 0x80000007),
        ("MUFU.EX2 R9, RZ", 0x3F800000),
        ("I2F.U32.RP R9, R4", 0x4F09ABCE),
        ("F2FP.BF16.F32.PACK_AB R9, R4, R5", 0x89AB0000),
        ("HFMA2 R9, -RZ, RZ, 0, 5.9604644775390625e-08", 1),
        ("LDC R9, c[0x0][0x218]", 3),
        ("SHFL.BFLY PT, R9, R5, 0x1, 0x1f", 7),
        ("POPC R9, R5", 3),
    ],
)
def test_an_instruction_computes(text: str, expected: int) -> None:
    body = f"MOV R4, 0x89abcdef\nMOV R5, 0x7\nISETP.EQ.AND P0, PT, R5, 0x7, PT\n{text}\nEXIT"
    kernel = parse(listing(body))["kernel"]
    block = Block(Program(kernel, "90"), Launch("kernel", 1, 32, 0, arguments(3)), 0)
    block.run()
    assert block.warps[0].registers[9] == expected


@pytest.mark.parametrize(("dividend", "divisor"), [(7, 3), (12345678, 12), (0xFFFFFFFF, 0xFFFF), (5, 0x80000001)])
def test_the_division_that_nvcc_writes_is_exact(dividend: int, divisor: int) -> None:
    body = f"""
        MOV R12, {dividend:#x}
        MOV R5, {divisor:#x}
        I2F.U32.RP R0, R5
        MUFU.RCP R0, R0
        IADD3 R2, R0, 0xffffffe, RZ
        F2I.FTZ.U32.TRUNC.NTZ R3, R2
        MOV R2, RZ
        IADD3 R6, RZ, -R5, RZ
        IMAD R6, R6, R3, RZ
        IMAD.HI.U32 R3, R3, R6, R2
        IMAD.HI.U32 R2, R3, R12, RZ
        IADD3 R3, -R2, RZ, RZ
        IMAD R3, R3, R5, R12
        ISETP.GE.U32.AND P0, PT, R3, R5, PT
    @P0 IADD3 R3, R3, -R5, RZ
    @P0 IADD3 R2, R2, 0x1, RZ
        ISETP.GE.U32.AND P1, PT, R3, R5, PT
    @P1 IADD3 R2, R2, 0x1, RZ
        EXIT"""
    kernel = parse(listing(body))["kernel"]
    block = Block(Program(kernel, "90"), Launch("kernel", 1, 32, 0, arguments(3)), 0)
    block.run()
    assert block.warps[0].registers[2] == dividend // divisor


def test_carries_go_from_the_lower_to_the_upper_word() -> None:
    body = """
        MOV R4, 0x0
        MOV R5, 0x1
        IADD3 R8, P0, R4, -0x1, RZ
        IADD3.X R9, R5, -0x1, RZ, P0, !PT
        IADD3 R6, P1, R4, -R4, RZ
        IADD3.X R7, R5, ~R5, RZ, P1, !PT
        ISETP.LT.U32.AND P2, PT, R8, R4, PT
        ISETP.LT.AND.EX P3, PT, R9, R5, PT, P2
        EXIT"""
    kernel = parse(listing(body))["kernel"]
    block = Block(Program(kernel, "90"), Launch("kernel", 1, 32, 0, arguments(3)), 0)
    block.run()
    warp = block.warps[0]
    assert (warp.registers[8], warp.registers[9]) == (0xFFFFFFFF, 0)  # 2^32 - 1
    assert (warp.registers[6], warp.registers[7]) == (0, 0)  # x - x
    assert warp.predicates[3] == machine.FULL  # 2^32 - 1 < 2^32


def test_warps_of_a_block_share_memory_after_a_barrier() -> None:
    body = """
        S2R R0, SR_TID.X
        ISETP.NE.AND P0, PT, R0, RZ, PT
    @!P0 STS [0x400], R0
        BAR.SYNC.DEFER_BLOCKING 0x0
        LDS R1, [0x400]
        LDS R2, [0x404]
        EXIT"""
    kernel = parse(listing(body))["kernel"]
    block = Block(Program(kernel, "90"), Launch("kernel", 1, 64, 8, arguments(3)), 0)
    block.run()
    assert [(warp.registers[1], warp.registers[2]) for warp in block.warps] == [(0, DATA)] * 2


def test_the_issue_model_waits_for_stalls_scoreboards_units_and_branches() -> None:
    body = "FADD R0, R1, R1\nMUFU.EX2 R2, R0\nFADD R3, R2, R2\nBRA `(.L_end)\nNOP\n.L_end:\nEXIT"
    control = {
        "R0, R1": "0x000fe80000000000",  # 4 cycles
        "MUFU": "0x000e220000000000",  # 1 cycle, sets scoreboard 0
        "R3, R2": "0x001fe20000000000",  # waits for it
        "BRA": "0x000fea0000000000",  # 5 cycles
    }
    kernel = parse(listing(body, control=control))["kernel"]
    device, trace = issue.DEVICES["90"], [0, 1, 2, 3, 5]
    alone = 4 + issue.LATENCY["MUFU"] + 1 + 16  # the branch is taken
    assert issue.cycles(kernel, [trace], device, issue.WORST) == alone + 1
    assert issue.cycles(kernel, [trace], device, issue.BEST) == alone - 16 + 5 + 1
    # Two warps share the cycles; the second one waits until the unit of functions is free.
    assert issue.cycles(kernel, [trace] * 2, device, issue.WORST) == alone + 1 + 8
    # An instruction that no lane does sets its scoreboard free at once.
    assert issue.cycles(kernel, [[0, ~1, 2, 3, 5]], device, issue.WORST) == alone + 1 - issue.LATENCY["MUFU"] + 12


def test_products_of_a_warp_group_go_on_until_somebody_waits_for_them() -> None:
    body = """
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        EXIT
    """
    kernel = parse(listing(body))["kernel"]
    held = 4 * 64 // 8  # cycles, as eight products of 16 x 8 x 16
    waits = held + held + issue.LATENCY["HGMMA"] + 4 + 1
    assert issue.cycles(kernel, [[0, 1, 2, 3]], issue.DEVICES["90a"], issue.BEST) == waits
    assert issue.cycles(kernel, [[0, 1, 3]], issue.DEVICES["90a"], issue.BEST) == held + 4 + 1


def test_blocks_that_fit_are_limited_by_registers_and_shared_memory() -> None:
    device = issue.DEVICES["90"]
    assert issue.resident_blocks(217, 128, 55296, device) == 2
    assert issue.resident_blocks(168, 128, 55296, device) == 3
    assert issue.resident_blocks(32, 128, 110 * 1024, device) == 2
    assert issue.resident_blocks(255, 512, 0, device) == 0


ROW = {"kernels": ["forward"], "instructions": 1000.0, "best_cycles": 100.0, "worst_cycles": 200.0, "kinds": {}}
NAME, FILE = "qk_float_64.cu, sm_90, forward 128 plain", "qk_float_64.cu"


def gate(measured: dict[str, object], version: str = "13.0.88", files: tuple[str, ...] = (FILE,)) -> list[str]:
    recorded = {"ptxas": "13.0.88", "rows": {NAME: ROW, "qk_float_32.cu, sm_90, forward 128 plain": ROW}}
    return check_build.gate(recorded, version, measured, list(files))[1]


@pytest.mark.parametrize("key", counts.GATED)
def test_three_percent_more_fail(key: str) -> None:
    assert gate({NAME: ROW}) == []
    assert gate({NAME: {**ROW, key: 1.029 * ROW[key]}}) == []  # type: ignore[operator]
    (complaint,) = gate({NAME: {**ROW, key: 1.031 * ROW[key]}})  # type: ignore[operator]
    assert NAME in complaint and key in complaint
    assert gate({NAME: {**ROW, key: 0.5 * ROW[key]}}) == []  # type: ignore[operator]


def test_a_call_that_is_missing_or_new_fails() -> None:
    assert "was not counted" in gate({NAME.replace("plain", "causal"): ROW})[0]
    assert "not written down" in gate({NAME: ROW, NAME.replace("plain", "causal"): ROW})[0]
    assert gate({NAME: ROW}, files=(FILE,)) == []  # files that were not compiled do not count as missing
    assert "was not counted" in gate({NAME: ROW}, files=(FILE, "qk_float_32.cu"))[0]


def test_another_ptxas_is_not_run() -> None:
    recorded = {"ptxas": "13.0.88", "rows": {NAME: ROW}}
    said, complaints = check_build.gate(recorded, "12.4.1", {NAME: {**ROW, "instructions": 9000.0}}, [FILE])
    assert said.startswith("NOT RUN") and "13.0.88" in said and "12.4.1" in said
    assert complaints == []


def test_nothing_counted_is_not_run() -> None:
    assert check_build.gate({"ptxas": "13.0.88", "rows": {NAME: ROW}}, "13.0.88", {}, [FILE])[0].startswith("NOT RUN")


def test_the_recorded_counts_are_of_the_core_set() -> None:
    rows = json.loads(check_build.RECORD.read_text())["rows"]
    sources = [check_build.HERE / source for source in check_build.CORE if source.startswith("instances/")]
    expected = {
        f"{source.name}, sm_{architecture}, {name}"
        for source in sources
        for architecture in check_build.ARCHITECTURES
        for _, name, _ in check_build.cases_of(source)
    }
    assert expected <= rows.keys()
