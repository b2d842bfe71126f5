"""Reports of programs in ring 3: addresses are the program's own, and so are the hints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import GuestBusError, KvmmmError
from kvmmm.hostarch.addr import PAGE_BYTES, page_down
from kvmmm.vmm.stop_report import StopReporter

if TYPE_CHECKING:
    from kvmmm.errors import GuestFaultError
    from kvmmm.vmm.user_vm import UserVM

# Source: Linux arch/x86/kernel/traps.c.
_SIGNALS = {
    0: "SIGFPE", 1: "SIGTRAP", 3: "SIGTRAP", 6: "SIGILL", 16: "SIGFPE", 17: "SIGBUS", 19: "SIGFPE",
}  # fmt: skip


class UserStopReporter(StopReporter):
    """The reporter of a `UserVM`: what it says is about the process that ran last."""

    def __init__(self, vm: UserVM) -> None:
        super().__init__(vm)
        self._user_vm = vm

    def _read(self, gva: int, length_bytes: int) -> bytes:
        # Page by page; and looking must not allocate: what has no frame has no bytes yet.
        mm = self._vm.mm
        data = b""
        while len(data) < length_bytes:
            addr = gva + len(data)
            n_bytes = min(gva + length_bytes, page_down(addr) + PAGE_BYTES) - addr
            if mm.pmas.find(addr) is None:
                break
            try:
                data += mm.read(addr, n_bytes, ignore_permissions=True)
            except KvmmmError:
                break
        return data

    def _resolve(self, addr: int) -> str | None:
        image = self._user_vm.image
        return super()._resolve(addr - image.bias) if image is not None else None

    def _fault_hint(self, error: GuestFaultError) -> str:
        if isinstance(error, GuestBusError):
            return "the file that is mapped there ends before: a process would get SIGBUS"
        if error.mapped:
            return (
                "mmap, mprotect or the segment's program header gave that page its permissions: a "
                "process would get SIGSEGV"
            )
        if error.addr < PAGE_BYTES:
            return "a null pointer: page 0 is never mapped"
        if error.addr >= self._vm.mm.max_addr:
            return f"a program's addresses end at {self._vm.mm.max_addr:#x}"
        return "nothing is mapped there, or no more: check the pointer"

    def _exception_hint(self, vector: int) -> str:
        if vector == 14:
            return "the memory is there: the page tables forbid it all the same, a defect of kvmmm"
        name = _SIGNALS.get(vector, "SIGSEGV")
        return f"a process would get {name}; there are no signals here, so this is its end"
