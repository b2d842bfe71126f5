"""Registers as an instruction sees them: those of a vCPU, and a copy that can be wound back."""

from __future__ import annotations

from typing import Protocol

GPR_NAMES = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *(f"r{n}" for n in range(8, 16)),
)
_RFLAGS_DF = 1 << 10
_MASK64 = (1 << 64) - 1


class Registers(Protocol):
    """What is read of a vCPU: 64-bit values as plain ints, vector registers on demand."""

    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rbp: int
    rsp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int

    @property
    def fs_base(self) -> int:
        """Base of fs; asked for only where an instruction uses it, so it may cost an ioctl."""
        ...

    @property
    def gs_base(self) -> int:
        """Base of gs; like `fs_base`."""
        ...

    def vector(self, number: int) -> bytes | None:
        """Return vector register `number`, lowest byte first; asked for by VSIB and vmaskmov only.

        16 bytes (xmm), 32 (ymm) or 64 (zmm): at least as wide as the guest uses. None where the
        state cannot be had; a gather then has no operands that anyone could name.
        """
        ...

    def mask(self, number: int) -> int | None:
        """Return AVX-512 opmask register k`number`; None where unknown: every element counts."""
        ...


class RegisterFile:
    """General registers by name, which can be changed in a copy; the rest is asked of `regs`."""

    __slots__ = ("gpr", "regs")

    def __init__(self, gpr: dict[str, int], regs: Registers) -> None:
        self.gpr = gpr
        self.regs = regs

    @classmethod
    def of(cls, regs: Registers) -> RegisterFile:
        """Return the registers of `regs`."""
        return cls({name: getattr(regs, name) for name in (*GPR_NAMES, "rflags")}, regs)

    def changed(self, **gpr: int) -> RegisterFile:
        """Return a copy with other values in some general registers."""
        wrapped = {name: value & _MASK64 for name, value in gpr.items()}
        return RegisterFile(self.gpr | wrapped, self.regs)

    def segment_base(self, segment: str) -> int:
        """Return the base of a segment register; in 64-bit mode only fs and gs have one."""
        if segment == "fs":
            return self.regs.fs_base
        return self.regs.gs_base if segment == "gs" else 0

    @property
    def step(self) -> int:
        """+1 or -1: where string instructions go, by rflags.DF."""
        return -1 if self.gpr["rflags"] & _RFLAGS_DF else 1
