"""`CpuState`: all registers of a stopped vCPU, fetched when asked for.

General registers stand in kvm_run; segment bases and control registers cost one ioctl, vector
registers another. A fault needs the first, a report the second, a gather the third.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmmm.platform.kvm.vcpu import Vcpu

GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip

# XSAVE area, standard format (SDM Vol. 1 13.4): xmm registers, the header's bitmap, upper ymm
# halves.
_XMM_OFFSET, _XSTATE_BV_OFFSET, _YMMH_OFFSET = 160, 512, 576
_XSTATE_AVX = 1 << 2


class CpuState:
    """Registers of `vcpu` as they were at its last exit; a copy, so it survives the next one.

    Offers what `kvmmm.vmm.register_file.Registers` asks for: general registers, `fs_base`,
    `gs_base`, `vector`, `mask`; and `values`, the general ones with cr2, cr3, cs and ss, for a
    report.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._sregs: Any = None
        self._xsave = b""
        regs = vcpu.regs
        self.general = {name: getattr(regs, name) for name in GENERAL}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a register
        try:
            return self.general[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def sregs(self) -> Any:  # noqa: ANN401 - a cffi struct
        """Struct kvm_sregs, fetched once."""
        if self._sregs is None:
            self._sregs = self._vcpu.get_sregs()
        return self._sregs

    @property
    def fs_base(self) -> int:
        """Base of fs."""
        return int(self.sregs.fs.base)

    @property
    def gs_base(self) -> int:
        """Base of gs."""
        return int(self.sregs.gs.base)

    def vector(self, number: int) -> bytes | None:
        """Return ymm`number`, 32 bytes, lowest first; None above 15 (AVX-512 is not offered)."""
        if number > 15:
            return None
        if not self._xsave:
            self._xsave = self._vcpu.get_xsave()
        area = self._xsave
        low = area[_XMM_OFFSET + 16 * number :][:16]
        has_high = struct.unpack_from("<Q", area, _XSTATE_BV_OFFSET)[0] & _XSTATE_AVX
        return low + (area[_YMMH_OFFSET + 16 * number :][:16] if has_high else bytes(16))

    def mask(self, number: int) -> int | None:  # noqa: ARG002
        """Return None: AVX-512 masks are unknown."""
        return None

    @property
    def values(self) -> dict[str, int]:
        """General registers, and cr2, cr3, cs, ss."""
        sregs = self.sregs
        return self.general | {
            "cr2": int(sregs.cr2),
            "cr3": int(sregs.cr3),
            "cs": int(sregs.cs.selector),
            "ss": int(sregs.ss.selector),
        }
