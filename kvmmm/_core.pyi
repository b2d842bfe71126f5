"""Typed face of the compiled core (kvmmm/_native). Import it through `kvmmm.safemem.ffi` only."""

from collections.abc import Callable
from typing import Any, Protocol

ffi: Any  # cffi.FFI; struct members have no static types

class _Lib(Protocol):
    def __getattr__(self, name: str) -> int:
        """A constant of <linux/kvm.h> or kvmmm_abi.h, by its own name."""
    def kvmmm_ioctl(self, fd: int, request: int, argument: int, /) -> int:
        """Call ioctl(2); -errno on failure."""
    def kvmmm_punch_hole(self, fd: int, offset: int, n_bytes: int, /) -> int:
        """Call fallocate(2) with FALLOC_FL_PUNCH_HOLE; -errno on failure."""
    def kvmmm_sync_sregs(self, run: Any, /) -> Any:
        """Struct kvm_sregs in kvm_run's synchronised area."""
    def kvmmm_now_ns(self) -> int:
        """CLOCK_MONOTONIC in ns."""
    def kvmmm_kick_init(self) -> int:
        """Install the kick signal's handler; its number, or -errno."""
    def kvmmm_kick_signal(self) -> int:
        """The kick signal's number, 0 before kvmmm_kick_init."""
    def memset(self, dst: object, byte: int, n_bytes: int, /) -> object:
        """Fill memory."""

lib: _Lib

class HostMapping:
    """A shared read-write mapping of a file, at a multiple of `align_bytes`.

    Offers the buffer protocol (format "B"). `close` unmaps, and raises BufferError while a buffer
    on it is held; the mapping also goes with its last reference.
    """

    def __init__(self, fd: int, length_bytes: int, align_bytes: int) -> None: ...
    @property
    def hva(self) -> int:
        """Host address of the first byte; 0 once closed."""
    @property
    def length_bytes(self) -> int: ...
    def close(self) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Registers:
    """General registers in kvm_run's synchronised area; a write marks them dirty."""

    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
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

class IoExit:
    """KVM_EXIT_IO. Valid until the vCPU goes on; afterwards `data` and `value` raise ValueError."""

    port: int
    size_bytes: int
    count: int
    is_write: bool
    @property
    def data(self) -> bytes: ...
    value: int

class MmioExit:
    """KVM_EXIT_MMIO, an EPT violation: no slot, or a write to a READONLY one."""

    gpa: int
    size_bytes: int
    is_write: bool
    @property
    def data(self) -> bytes: ...
    value: int
    def complete(self, hva: int, /) -> None:
        """Perform the access by hand: bytes from `hva` for a read, to it for a write."""

class VcpuCore:
    """A vCPU's descriptor, its kvm_run mapping, its ports and handlers; the KVM_RUN loop.

    Handlers run on the thread that runs the vCPU. One that answers anything but None ends the run,
    and the answer becomes the run's result.
    """

    regs: Registers
    on_mmio: Callable[[MmioExit], object] | None
    on_cold: Callable[[int], object] | None
    on_console: Callable[[], object] | None
    timed: bool
    handler_failed: bool
    def __init__(self, fd: int, run_bytes: int) -> None: ...
    @property
    def run_hva(self) -> int: ...
    @property
    def fd(self) -> int: ...
    @property
    def thread_id(self) -> int: ...
    @property
    def is_stopping(self) -> bool: ...
    @property
    def in_guest(self) -> bool: ...
    def close(self) -> None: ...
    def set_port(self, port: int, kind: int, handler: Callable[..., object] | None, /) -> None: ...
    def run(self, timeout_ns: int, /) -> object:
        """Run until a handler answers; a negative int is -enum kvmmm_stop."""
    def once(self, timeout_ns: int, /) -> object:
        """Run to the next exit: IoExit, MmioExit, an exit reason, or -enum kvmmm_stop."""
    def stop(self) -> None: ...
    def console_take(self) -> bytes: ...
    def set_console(self, shared_hva: int, ring_hva: int, ring_bytes: int, /) -> None: ...
    def set_coalesced(self, page: int, /) -> None: ...
    def statistics(self) -> dict[str, Any]: ...
