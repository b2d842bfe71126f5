"""EPT violations: what happens when a guest touches memory that has no memslot.

Only bytes decide. Which exit it was is told, and differs between kernels: newer ones emulate more.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from kvmmm.doctor.code import LOAD, STEP, STORE, UNTOUCHED, mov_eax, mov_rax, u32
from kvmmm.doctor.finding import Check, Finding, missing, ok
from kvmmm.doctor.lab import Lab, ProbeError
from kvmmm.hostarch.access import ANY_ACCESS, READ, READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.pagetables.pte import flags_of
from kvmmm.vmm import result

if TYPE_CHECKING:
    from kvmmm.doctor.lab import Script

_VALUE = 0x1122_3344_5566_7788
_VALUE_BYTES = struct.pack("<Q", _VALUE)
_EDGE = UNTOUCHED + HUGE_PAGE_BYTES - 4
"""Eight bytes from here lie in two windows."""
_CODE = UNTOUCHED + 2 * HUGE_PAGE_BYTES
"""Two windows that are executable as well."""
_CONSTANT = UNTOUCHED + 4 * HUGE_PAGE_BYTES
_NEEDS_RESTART = (
    "KVM must say that it could not emulate an instruction, and let it be run again: that is "
    "KVM_CAP_EXIT_ON_EMULATION_FAILURE, in Linux 5.14 and later"
)


class _Case:
    """An access, and the bytes that it must find or leave.

    Attributes:
        code: The instructions.
        addr: What they touch first.
        planted: What the host puts there, without a slot, before they run.
        rax: What must be in rax afterwards; None if that does not matter.
        left: What must be in memory at `addr` afterwards; empty if that does not matter.
    """

    __slots__ = ("addr", "code", "left", "planted", "rax")

    def __init__(
        self, code: bytes, *, addr: int = UNTOUCHED, planted: bytes = b"", rax: int | None = None,
        left: bytes = b"",
    ) -> None:  # fmt: skip
        self.code = code
        self.addr = addr
        self.planted = planted
        self.rax = rax
        self.left = left


_READ = _Case(LOAD + u32(UNTOUCHED), planted=_VALUE_BYTES, rax=_VALUE)
_STRADDLE = _Case(LOAD + u32(_EDGE), addr=_EDGE, planted=_VALUE_BYTES, rax=_VALUE)
_WRITE = _Case(mov_rax(_VALUE) + STORE + u32(UNTOUCHED), left=_VALUE_BYTES)
_RMW = _Case(
    mov_eax(2) + b"\xf0\x48\x0f\xc1\x04\x25" + u32(UNTOUCHED),  # lock xadd %rax, disp32
    planted=struct.pack("<Q", 40), rax=40, left=struct.pack("<Q", 42),
)  # fmt: skip
_FETCH = _Case(
    mov_eax(_CODE) + b"\xff\xd0",  # call *%rax
    addr=_CODE, planted=mov_eax(42) + b"\xc3", rax=42,
)  # fmt: skip
_PUSH = _Case(
    b"\x48\xc7\xc4" + u32(UNTOUCHED + 8)  # mov $disp32, %rsp
    + mov_rax(_VALUE) + b"\x50",  # push %rax
    left=_VALUE_BYTES,
)  # fmt: skip
_CMPXCHG16B = _Case(
    b"\x31\xc0\x31\xd2\x48\xbb" + _VALUE_BYTES  # xor %eax, %eax; xor %edx, %edx; mov $VALUE, %rbx
    + b"\xb9" + u32(7)  # mov $7, %ecx
    + b"\xf0\x48\x0f\xc7\x0c\x25" + u32(UNTOUCHED),  # lock cmpxchg16b disp32
    planted=bytes(16), left=_VALUE_BYTES + struct.pack("<Q", 7),
)  # fmt: skip
_AVX = _Case(
    b"\xc5\xfe\x6f\x04\x25" + u32(UNTOUCHED)  # vmovdqu disp32, %ymm0
    + b"\xc4\xe3\x7d\x19\xc1\x01"  # vextractf128 $1, %ymm0, %xmm1
    + b"\xc4\xe1\xf9\x7e\xc8",  # vmovq %xmm1, %rax
    planted=bytes(16) + _VALUE_BYTES * 2, rax=_VALUE,
)  # fmt: skip


def _serve(case: _Case) -> Finding:
    def script(lab: Lab) -> Script:
        # A frame without a slot: what the host wrote must be what the guest finds.
        lab.vm.mm.copy_out(case.addr, case.planted, ignore_permissions=True)
        rax = yield
        left = lab.vm.mm.read(case.addr, len(case.left), ignore_permissions=True)
        return rax, left, _how(lab)

    with Lab(STEP + case.code + STEP) as lab:
        lab.vm.mm.mmap(
            HUGE_PAGE_BYTES, ANY_ACCESS, addr=_CODE, fixed=True, replace=True, name="code"
        )
        rax, left, how = lab.play(script(lab))
    if case.rax is not None and rax != case.rax:
        return missing(f"rax is {rax:#x}, not {case.rax:#x}: {how}")
    if left != case.left:
        return missing(f"memory holds {left.hex()}, not {case.left.hex()}: {how}")
    return ok(f"bytes right: {how}")


def _how(lab: Lab) -> str:
    stats = lab.vm.statistics()
    kinds = (
        (stats.mmio_faults, "MMIO exit", "MMIO exits"),
        (stats.emulated_faults, "page, restarted", "pages, restarted"),
    )  # fmt: skip
    return ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in kinds if n) or "no exit"


def _restart(case: _Case) -> Finding:
    try:
        return _serve(case)
    except ProbeError as e:
        return missing(str(e), _NEEDS_RESTART)


def _avx() -> Finding:
    with Lab(STEP) as lab:
        if not lab.vm.vcpu.trial.has_avx:
            return missing("no AVX here")
    return _restart(_AVX)


def _readonly() -> Finding:
    def script(lab: Lab) -> Script:
        tables: Any = lab.vm.area.tables
        # The page tables permit the write, so that only the slot can stop it.
        tables.map(_CONSTANT, PAGE_BYTES, _CONSTANT, flags_of(READ_WRITE, user=True))
        yield
        return None

    code = STEP + LOAD + u32(_CONSTANT) + mov_eax(1) + STORE + u32(_CONSTANT) + STEP
    with Lab(code) as lab:
        lab.vm.mm.mmap(
            HUGE_PAGE_BYTES, READ, addr=_CONSTANT, fixed=True, replace=True, name="constant"
        )
        lab.vm.mm.copy_out(_CONSTANT, _VALUE_BYTES, ignore_permissions=True)
        run_result = lab.run_raw(script(lab))
        left = lab.vm.mm.read(_CONSTANT, 8)
    if run_result.outcome != result.FAULT or run_result.addr != _CONSTANT:
        return missing(f"a write went through, or ended otherwise: {run_result.outcome}")
    if left != _VALUE_BYTES:
        return missing(f"a write exits, but memory changed to {left.hex()}")
    return ok("a write exits, memory is unchanged")


def _check(key: str, name: str, case: _Case) -> Check:
    return Check(key, name, lambda: _serve(case))


CHECKS = (
    _check("ept_read", "read", _READ),
    _check("ept_write", "write", _WRITE),
    _check("ept_rmw", "lock xadd", _RMW),
    _check("ept_push", "push", _PUSH),
    _check("ept_straddle", "read across two windows", _STRADDLE),
    _check("ept_fetch", "instruction fetch", _FETCH),
    Check(
        "ept_cmpxchg16b", "cmpxchg16b", lambda: _restart(_CMPXCHG16B),
        is_needed=False,
    ),
    Check("ept_avx", "AVX load", _avx, is_needed=False),
    Check("readonly", "write to a READONLY slot", _readonly),
)  # fmt: skip
