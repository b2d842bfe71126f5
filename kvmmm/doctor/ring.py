"""Rings, `out` from each, exceptions, and the ways from ring 3 to ring 0."""

from __future__ import annotations

from kvmmm.doctor.code import (
    BASE,
    CS_TO_EAX,
    END,
    ENTER_RING3,
    INT3,
    LOAD,
    PORT_CLOSED,
    SPIN,
    STORE,
    SYSCALL,
    UD2,
    UNTOUCHED,
    mov_eax,
    u32,
    wrmsr,
)
from kvmmm.doctor.finding import Check, Finding, differs, missing, ok
from kvmmm.doctor.lab import Lab, ProbeError, Trap
from kvmmm.safemem.ffi import lib
from kvmmm.vmm.system_area import IDT_OFFSET
from kvmmm.vmm.vector import trap_name

_UD, _GP, _PF = 6, 13, 14
_MSR_STAR, _MSR_LSTAR, _MSR_SFMASK = 0xC000_0081, 0xC000_0082, 0xC000_0084
_STAR = lib.KVMMM_KERNEL_CS << 32 | lib.KVMMM_USER32_CS << 48
_SFMASK = 0x4_4700  # AC, NT, DF, IF, TF


def _ring0() -> Finding:
    with Lab(CS_TO_EAX + END, ring=0) as lab:
        cs = lab.run()["rax"]
    return (
        ok("64-bit, by the boot tables") if cs == lib.KVMMM_KERNEL_CS else missing(f"CS is {cs:#x}")
    )


def _ring3() -> Finding:
    with Lab(CS_TO_EAX + END) as lab:
        cs = lab.run()["rax"]
    return ok("by iretq, 64-bit") if cs == lib.KVMMM_USER_CS else missing(f"CS is {cs:#x}")


def _out() -> Finding:
    # Reaching END from ring 3 is the proof; a second guest asks for what it may not.
    with Lab(END) as lab:
        lab.run()
    with Lab(bytes((0xE6, PORT_CLOSED)) + END, skips=(2,)) as lab:
        lab.run(expects_trap=True)
        trap = lab.traps[0].frame
    if (trap.vector, trap.error_code) != (_GP, 0):
        return missing(f"a closed port gave {trap_name(trap.vector, trap.error_code)}, not #GP(0)")
    return ok("by the TSS's I/O bitmap; a closed port gives #GP")


def _ud() -> Finding:
    with Lab(UD2) as lab:
        lab.run(expects_trap=True)
        frame = lab.traps[0].frame
        at = frame.rip - lab.start
    if frame.vector != _UD or at:
        return missing(f"ud2 gave {trap_name(frame.vector)} at code byte {at}")
    return ok("ud2 is reported, rip on it")


_BEYOND = 0x7000_0000  # far above guest memory
# Each reads or writes; where, and the error code that the SDM (Vol. 3A 4.7) gives for it.
_PAGE_FAULTS = (
    (LOAD + u32(0x10), 0x10, 0x4),
    (STORE + u32(0x18), 0x18, 0x6),
    (STORE + u32(_BEYOND), _BEYOND, 0x6),
)


def _pf() -> Finding:
    code = b"".join(insn for insn, _, _ in _PAGE_FAULTS)
    with Lab(code + END, skips=[len(insn) for insn, _, _ in _PAGE_FAULTS]) as lab:
        lab.run(expects_trap=True)
        traps = lab.traps
    for trap, (_, addr, error_code) in zip(traps, _PAGE_FAULTS, strict=False):
        if not _is_page_fault(trap, addr, error_code):
            return missing(f"at {addr:#x} came {_shown(trap)}, not error code {error_code:#x}")
    if len(traps) != len(_PAGE_FAULTS):
        return missing(f"right, but then came {_shown(traps[-1])}")
    return ok("cr2 and error code exact, for reads and writes")


def _nx() -> Finding:
    # Memory that nobody has touched, mapped without execute permission.
    with Lab(mov_eax(UNTOUCHED) + b"\xff\xe0") as lab:  # jmp *%rax
        lab.run(expects_trap=True)
        trap = lab.traps[0]
    if not _is_page_fault(trap, UNTOUCHED, 0x15):
        return missing(f"a jump to data gave {_shown(trap)}")
    return ok("a jump to data gives #PF, fetch")


def _is_page_fault(trap: Trap, addr: int, error_code: int) -> bool:
    frame = trap.frame
    return (frame.vector, frame.error_code, trap.cr2) == (_PF, error_code, addr)


def _shown(trap: Trap) -> str:
    return f"{trap_name(trap.frame.vector, trap.frame.error_code)}, cr2 {trap.cr2:#x}"


def _int3() -> Finding:
    with Lab(INT3) as lab:
        lab.run(expects_trap=True)
        frame = lab.traps[0].frame
        at = frame.rip - lab.start
    if frame.vector != 3 or at != 1:
        return missing(f"int3 gave {trap_name(frame.vector, frame.error_code)} at code byte {at}")
    return ok("through its DPL 3 gate, rip past it")


def _syscall() -> Finding:
    def code(target: int) -> bytes:
        setup = wrmsr(_MSR_STAR, _STAR) + wrmsr(_MSR_LSTAR, target) + wrmsr(_MSR_SFMASK, _SFMASK)
        return setup + ENTER_RING3 + SYSCALL + SPIN

    length = len(code(0))
    with Lab(code(BASE + length) + CS_TO_EAX + END, ring=0) as lab:
        regs = lab.run()
    if regs["rcx"] != BASE + length - len(SPIN):
        raise ProbeError(f"rcx is {regs['rcx']:#x} at LSTAR, not the address after syscall")
    if regs["rax"] & 3:
        return differs(
            "reaches LSTAR and stays in ring 3",
            "an entry works that minds no ring: on a user page, no stack, no swapgs",
            value="ring 3",
        )
    return ok("enters ring 0 at LSTAR", value="ring 0")


def _int_n() -> Finding:
    with Lab(b"\xcd\x80") as lab:  # int $0x80
        lab.write_area(IDT_OFFSET + 0x80 * 16 + 5, b"\xee")  # the gate's DPL: 3
        lab.run(expects_trap=True)
        frame = lab.traps[0].frame
    if frame.vector == 0x80:
        return ok("int $0x80 goes through its DPL 3 gate", value=True)
    return differs(
        f"int $0x80 gives {trap_name(frame.vector)}",
        "guests ask by `out` or syscall, which work on every KVM",
        value=False,
    )


CHECKS = (
    Check("ring0", "ring 0", _ring0),
    Check("ring3", "ring 3", _ring3),
    Check("out", "out from ring 3", _out),
    Check("ud", "#UD by the default IDT", _ud),
    Check("pf", "#PF by the default IDT", _pf),
    Check("nx", "no-execute", _nx),
    Check("int3", "int3 from ring 3", _int3),
    Check("syscall", "syscall", _syscall, is_needed=False),
    Check("int_n", "int n from ring 3", _int_n, is_needed=False),
)
