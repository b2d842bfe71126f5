"""`UserVM`: Linux programs in ring 3, without a kernel between them and us.

    run ──► vCPU ──► exit
             ▲         #PF ──────────► mm.handle_user_fault ──► page-table entry
             │         SYSCALL ──────► Syscalls.serve ────────► the mm, the console, a fork, an end
             │         other vectors ► report, and the end of the run
             └── registers ◄──┘

Processes take turns on the one vCPU: `user_scheduler`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.arena import Arena
from kvmmm.errors import (
    ArenaExhaustedError,
    GuestBusError,
    GuestFaultError,
    RangeError,
    StateError,
)
from kvmmm.hostarch.access import READ, WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, align_up
from kvmmm.hostarch.units import parse_bytes
from kvmmm.mm import MemoryManager
from kvmmm.mm.layout import Layout
from kvmmm.platform.kvm import exits
from kvmmm.platform.kvm.device import open_device
from kvmmm.platform.kvm.guest_physical import GuestPhysical
from kvmmm.platform.kvm.kernel_half import KernelHalf
from kvmmm.platform.kvm.page_table_space import PageTableAddressSpace
from kvmmm.platform.kvm.vm import Vm
from kvmmm.safemem.ffi import ffi, lib
from kvmmm.vmm.console import Console
from kvmmm.vmm.emulation import EmulationError
from kvmmm.vmm.exit_handler import HAS_ERROR_CODE, PF, end_of
from kvmmm.vmm.machine import Machine
from kvmmm.vmm.statistics import RunStatistics
from kvmmm.vmm.user_image import MAX_ADDR, MIN_ADDR, UserImage, read_user_image
from kvmmm.vmm.user_process import Process, load_image, load_stack
from kvmmm.vmm.user_report import UserStopReporter
from kvmmm.vmm.user_scheduler import Scheduler
from kvmmm.vmm.user_slots import LazySlots
from kvmmm.vmm.user_syscall import Syscalls

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from kvmmm.memmap.file import Mappable
    from kvmmm.safemem.ffi import MmioExit
    from kvmmm.vmm.result import RunResult

DEFAULT_MEMORY = "64M"


class UserVM(Machine):
    """A micro-VM that runs a Linux program in ring 3: static, under Linux's x86-64 system calls.

    Example:
        with kvmmm.UserVM(memory="64M") as vm:
            vm.load("program", argv=["program", "--fast"], env={"HOME": "/"})
            result = vm.run(timeout=5.0)
            print(result.status, result.console)

    It serves exit, exit_group, write (to the console), mmap, munmap, mprotect, mremap, brk,
    madvise, fork, getpid, sched_yield and arch_prctl, and ENOSYS to everything else; `on_syscall`
    adds more. There are no threads and no signals: what would be a signal ends the run, with a
    report. The run ends when all processes have ended; its status is the first one's. When memory
    is exhausted (outcome `memory`), it can run on after the host has freed some.

    Lifetime, threads and signals: see `Machine`.

    Args:
        memory: What its processes may use, as `64M` or in bytes, rounded up to 2 MiB; page tables
            come on top. Costs nothing until touched.
        vcpus: How many vCPUs; one, for now.
        console: Called with each chunk of output; None collects it in `RunResult.console`.
        max_memslots: Use no more memslots than that (for tests).
        lazy_slots: Register memslots only when a CPU gets there (for tests).

    Attributes:
        vcpu: The vCPU.
        scheduler: The processes, and who runs.

    Raises:
        KvmUnavailableError: No usable /dev/kvm.
        RangeError: More than one vCPU.
    """

    def __init__(
        self, memory: int | str = DEFAULT_MEMORY, *, vcpus: int = 1,
        console: Callable[[bytes], object] | None = None, max_memslots: int | None = None,
        lazy_slots: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if vcpus != 1:
            raise RangeError(vcpus, vcpus, "processes take turns on one vCPU: vcpus=1")
        self.memory_bytes = align_up(parse_bytes(memory), HUGE_PAGE_BYTES)
        device = open_device()
        try:
            self.arena = Arena(self.memory_bytes + _own_bytes(self.memory_bytes))
            self._closers.append(self.arena.close)
            self.vm = Vm(device, max_memslots=max_memslots)
            self._closers.append(self.vm.close)
            # What the VM's CPUs walk goes after it, but before the arena.
            self.physical = GuestPhysical(self.vm, self.arena, lazy_slots=lazy_slots)
            self._closers.insert(1, self.physical.close)
            self._kernel = KernelHalf(self.physical, vcpus)
            self._closers.insert(2, self._kernel.close)
            self.vcpu = self.vm.create_vcpu()
            self.scheduler = Scheduler(self.vcpu, self._new_space)
            self._closers.append(self.scheduler.close)
            self._wire(console)
        except BaseException:
            self.close()
            raise

    def _wire(self, sink: Callable[[bytes], object] | None) -> None:
        self._console = Console(self.vcpu, sink, None)
        self._reporter = UserStopReporter(self)
        self._syscalls = Syscalls(self)
        self._slots = LazySlots(self.physical, self.vcpu)
        vcpu = self.vcpu
        # on_fault is the memory manager's own handler, of whoever runs.
        vcpu.on_refused = self._on_refused
        vcpu.on_repeated = self._on_repeated
        vcpu.on_trap = self._on_trap
        vcpu.on_syscall = self._syscalls.serve
        vcpu.on_mmio = self._on_mmio
        vcpu.on_cold = self._on_cold

    # ---- loading ----

    @property
    def process(self) -> Process:
        """The process that runs, or ran last."""
        process = self.scheduler.running
        if process is None:
            raise StateError("nothing is loaded: call load() first")
        return process

    @property
    def processes(self) -> list[Process]:
        """All that live, the running one first."""
        running = self.scheduler.running
        alive = [running] if running is not None and running.status is None else []
        return [*alive, *self.scheduler.waiting]

    @property
    def mm(self) -> MemoryManager:
        """The memory of the process that runs, or ran last; addresses are guest-virtual."""
        return self.process.mm

    @property
    def image(self) -> UserImage | None:
        """The program of the process that runs, or ran last."""
        process = self.scheduler.running
        return process.image if process is not None else None

    def load(
        self, image: str | bytes | os.PathLike[str] | UserImage, *,
        argv: Sequence[str] | None = None, env: Mapping[str, str] | None = None,
        files: Mapping[int, Mappable] | None = None,
    ) -> None:  # fmt: skip
        """Load a program: a static ELF64, ET_EXEC or static-pie.

        Args:
            image: A path, the bytes themselves, or what `read_user_image` returned.
            argv: Its words, its name first; None is the name alone.
            env: Its environment; None is an empty one.
            files: What its descriptors can map (`kvmmm.memmap`), by number; it cannot open any.

        Raises:
            ImageError: The program is rejected (`.reason`), nothing was loaded.
            StateError: Something was loaded already.
        """
        self._check_open()
        if self._is_loaded:
            raise StateError("this VM has a program: make another UserVM for another one")
        if not isinstance(image, UserImage):
            image = read_user_image(image)
        process = self._new_process(image, files=files)
        try:
            load_image(process.mm, image)
            rsp = load_stack(
                process.mm, image, [image.path] if argv is None else argv, env or {},
                has_fsgsbase=self.vcpu.trial.has_fsgsbase,
            )  # fmt: skip
            self._kernel.load(self.vcpu, process.space.root_gpa, rip=image.entry_addr, rsp=rsp)
            self.scheduler.begin(process)
        except BaseException:
            process.close()
            raise
        self._is_loaded = True

    def _new_process(
        self, image: UserImage, *, files: Mapping[int, Mappable] | None = None
    ) -> Process:
        space = self._new_space()
        try:
            layout = Layout(
                MIN_ADDR,
                min(MAX_ADDR, space.max_addr),
                top_down=True,
                bottom_up_base=image.brk_start,
            )
            mm = MemoryManager(self.arena, space, layout=layout)
        except BaseException:
            space.release()
            raise
        return Process(self.scheduler.take_pid(), mm, space, image, files=files)

    def _new_space(self) -> PageTableAddressSpace:
        return PageTableAddressSpace(self.physical, self._kernel.fixed, max_addr=MAX_ADDR)

    # ---- running ----

    def on_syscall(
        self, number: int, call: Callable[[Process, tuple[int, ...]], int] | None
    ) -> None:
        """Have `call` serve a system call, instead of whoever does.

        Args:
            number: Its number, 32 bits.
            call: `call(process, args)` with six unsigned 64-bit arguments; returns what the program
                finds in rax. What the memory manager and its files raise (MmError, GuestFaultError,
                ArenaExhaustedError, SyscallError) becomes -errno; a `RunResult` ends the run. None
                has it fail with ENOSYS.
        """
        self._syscalls.set(number, call)

    def _prepare(self) -> None:
        pass

    def _managers(self) -> list[MemoryManager]:
        return [process.mm for process in self.processes]

    def _run_vcpu(self, timeout_ns: int) -> object:
        return self.scheduler.run(timeout_ns)

    def _is_broken(self) -> bool:
        return super()._is_broken() or self.scheduler.is_broken

    # ---- for system calls ----

    def write_console(self, chunk: bytes) -> None:
        """Hand on what a process has printed."""
        self._console.accept(chunk)

    def segment_base(self, name: str) -> int:
        """Return the base of `fs` or `gs` of the process that runs."""
        return int(getattr(self.vcpu.get_sregs(), name).base)

    def set_segment_base(self, name: str, base: int) -> None:
        """Set the base of `fs` or `gs` of the process that runs."""
        vcpu = self.vcpu
        vcpu.fetch_sregs()
        sregs = lib.kvmmm_sync_sregs(ffi.cast("struct kvm_run *", vcpu.run_hva))
        getattr(sregs, name).base = base
        vcpu.sregs_written(False)

    # ---- exits ----

    def _on_refused(self, error: OSError, addr: int) -> RunResult:
        if isinstance(error, GuestFaultError):
            return self._reporter.fault(error, is_past_store=False)
        if isinstance(error, ArenaExhaustedError):
            return self._reporter.memory(error, addr)
        raise error

    def _on_repeated(self, addr: int, access: int) -> RunResult | None:
        # So many times in a row, and the tables allow it: something else forbids the access.
        process = self.process
        with process.mm.active_lock:  # tables are walked
            is_mapped = process.space.is_mapped(addr, access)
        if is_mapped:
            return self._reporter.exception_at(PF, None, addr)
        try:
            process.mm.handle_user_fault(addr, access)
        except OSError as e:
            return self._on_refused(e, addr)
        return None

    def _on_mmio(self, exit_: MmioExit) -> RunResult | None:
        # The CPU has found an entry, and no slot. Whoever takes entries away comes after the
        # access, and waits, or has come first.
        mm, access = self.mm, WRITE if exit_.is_write else READ
        with mm.active_lock:
            addr, is_allowed = self._place_of(exit_.gpa, access)
            is_ours = is_allowed or self.physical.window_at(exit_.gpa) is None
            if is_ours and self._slots.on_mmio(exit_):
                return None
        if addr is not None and is_allowed:
            # Its file was cut short between the #PF, which found a page there, and the access.
            error = GuestBusError(addr, access)
            return self._reporter.fault(error, is_past_store=exit_.is_write)
        if addr is None:
            # The frame was given up meanwhile: as if the access had come just before.
            if not exit_.is_write:
                exit_.value = 0
            return None
        try:
            if exit_.is_write:
                mm.copy_out(addr, exit_.data)
            else:
                exit_.value = int.from_bytes(mm.read(addr, exit_.size_bytes), "little")
        except GuestFaultError as e:
            return self._reporter.fault(e, is_past_store=exit_.is_write)
        return None

    def _place_of(self, gpa: int, access: int) -> tuple[int | None, bool]:
        """Return where the process that runs has a frame, and whether it may access it there."""
        place = None
        for start, end, pma in self.mm.pmas:
            base = self.physical.bases.get(pma.file)
            if base is not None and start <= gpa - base - pma.delta < end:
                place = gpa - base - pma.delta
                if not access & ~pma.effective_perms:
                    return place, True
        return place, False

    def _on_trap(self, vector: int, error_code: int) -> RunResult:
        code = error_code if vector in HAS_ERROR_CODE else None
        return self._reporter.exception_at(vector, code, None)

    def _on_cold(self, reason: int) -> RunResult | None:
        exit_ = exits.decode(self.vcpu, reason)
        if not (isinstance(exit_, exits.InternalErrorExit) and exit_.is_emulation_failure):
            return end_of(exit_, self._reporter)
        try:
            with self.mm.active_lock:  # what it translates and what it finds there belong together
                self._slots.restart(exit_.instruction)
        except EmulationError as e:
            return self._reporter.emulation(e)
        return None

    # ---- the end ----

    def statistics(self) -> RunStatistics:
        """Return counts and times since the VM was made, over all processes."""
        return RunStatistics.of(
            self.vcpu.statistics(), self.scheduler.counters(), self.arena.statistics(),
            n_slots=len(self.vm.memslots), n_mmio=0, n_emulated_pages=0,
            n_slot_violations=self._slots.n_violations, n_page_faults=self.vcpu.n_faults,
            n_console_bytes=self._console.n_bytes, n_syscalls=self._syscalls.n_served,
        )  # fmt: skip


def _own_bytes(memory_bytes: int) -> int:
    """How much comes on top for tables: those of a full memory, several times over."""
    return align_up((1 << 20) + (memory_bytes >> 6), HUGE_PAGE_BYTES)
