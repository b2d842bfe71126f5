"""`MicroVM`: one guest, from a file to its exit status."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError, RangeError, StateError
from kvmmm.hostarch.access import ANY_ACCESS
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES, align_up
from kvmmm.hostarch.units import parse_bytes
from kvmmm.mm import MemoryManager
from kvmmm.mm.layout import Layout
from kvmmm.platform.kvm.address_space import MemslotAddressSpace
from kvmmm.platform.kvm.boot import RFLAGS_RESERVED
from kvmmm.platform.kvm.device import open_device
from kvmmm.platform.kvm.vm import Vm
from kvmmm.vmm.boot_tables import BootTables
from kvmmm.vmm.console import Console
from kvmmm.vmm.exit_handler import ExitHandler
from kvmmm.vmm.guest_memory import HOLE, make_arena, memory_map_of
from kvmmm.vmm.image import Image, read_image
from kvmmm.vmm.machine import Machine
from kvmmm.vmm.result import DEADLINE, MEMORY, STOPPED
from kvmmm.vmm.statistics import RunStatistics
from kvmmm.vmm.stop_report import KernelStopReporter
from kvmmm.vmm.system_area import (
    IMAGE_NAME,
    MEMORY_NAME,
    OUTPUT_BYTES,
    OUTPUT_OFFSET,
    SystemArea,
    cpu_features,
    system_area_bytes,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from kvmmm.platform.kvm.device import Device
    from kvmmm.platform.kvm.vcpu_state import VcpuState
    from kvmmm.vmm.result import RunResult

DEFAULT_MEMORY = "64M"


class MicroVM(Machine):
    """A micro-VM with one vCPU.

    Example:
        with kvmmm.MicroVM(memory="64M") as vm:
            vm.load("guest.elf")
            result = vm.run(timeout=5.0)
            print(result.status, result.console)

    Lifetime, threads and signals: see `Machine`.

    Args:
        memory: Guest memory, as `64M` or in bytes; rounded up to 2 MiB. Costs nothing until
            touched.
        arena: Most that guest memory and kvmmm's own pages may take on the host, those of forks
            included; by default enough for seven forks that touch everything, and for many more
            that do not.
        console: Called with each chunk of guest output; None collects it in `RunResult.console`.
        console_input: File descriptor of the guest's console input; None is an empty one.
        max_memslots: Use no more memslots than that (for tests).

    Attributes:
        mm: The memory manager; its addresses are guest-physical. Memory may be mapped, unmapped and
            protected at any time, also while the guest runs (see `refresh_tables`).
        vcpu: The vCPU, for registers and for handlers of one's own (`on_out`).

    Raises:
        KvmUnavailableError: No usable /dev/kvm.
        RangeError: More memory than the CPU can address.
    """

    def __init__(
        self, memory: int | str = DEFAULT_MEMORY, *, arena: int | str | None = None,
        console: Callable[[bytes], object] | None = None, console_input: int | None = None,
        max_memslots: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._image: Image | None = None
        self._early_result: RunResult | None = None
        self.memory_bytes = align_up(parse_bytes(memory), HUGE_PAGE_BYTES)
        area_start = HOLE.end if HOLE.start <= self.memory_bytes < HOLE.end else self.memory_bytes
        area_bytes = system_area_bytes(self.memory_bytes)
        device = open_device()
        if area_start + area_bytes > 1 << device.cpuid.physical_bits:
            raise RangeError(
                0, self.memory_bytes,
                f"this CPU addresses {device.cpuid.physical_bits} bits: ask for less --memory",
            )  # fmt: skip
        try:
            self.arena = make_arena(
                area_bytes, self.memory_bytes, parse_bytes(arena) if arena is not None else None
            )
            self._closers.append(self.arena.close)
            self.area = SystemArea(
                self.arena, self.arena.first, area_start, giant_pages=device.cpuid.has_giant_pages
            )
            self._closers.append(self.area.close)
            self._add_vm(device, max_memslots)
            self.mm = MemoryManager(
                self.arena, self.address_space, self.arena.reservation,
                layout=Layout(PAGE_BYTES, self.memory_bytes, hole=HOLE),
            )  # fmt: skip
            self._wire(console, console_input)
        except BaseException:
            self.close()
            raise

    def _add_vm(self, device: Device, max_memslots: int | None) -> None:
        self._closers.append(self._give_memory_back)
        self.vm = Vm(device, max_memslots=max_memslots)
        self._closers.append(self.vm.close)
        area = self.area
        self.vm.memslots.add(area.start, area.end - area.start, area.hva)
        self.address_space = MemslotAddressSpace(self.vm, self.memory_bytes)
        self.vcpu = self.vm.create_vcpu()

    def _wire(
        self, sink: Callable[[bytes], object] | None, input_fd: int | None, *, n_taken: int = 0
    ) -> None:
        hva = self.area.hva
        self.vcpu.set_console(hva, hva + OUTPUT_OFFSET, OUTPUT_BYTES, n_taken)
        self.boot_tables = BootTables(self.vm, self.mm, self.area)
        self._console = Console(self.vcpu, sink, input_fd)
        self._reporter = KernelStopReporter(self)
        self._handler = ExitHandler(
            self.vm, self.vcpu, self.mm, self.address_space, self.area, self.boot_tables,
            self._console, self._reporter,
        )  # fmt: skip
        self._handler.attach()

    def _give_memory_back(self) -> None:
        """Once the VM is gone: to whoever else uses the arena, or to the files that were mapped."""
        mm: MemoryManager | None = getattr(self, "mm", None)
        is_shared = self.arena.is_shared
        if mm is not None and (is_shared or any(vma.mappable for _, _, vma in mm.vmas)):
            self.vm.memslots.by_gpa.clear()  # they went with the VM
            mm.close()
        if is_shared:
            self.arena.dec_ref(self.area.file_range)

    # ---- loading ----

    @property
    def image(self) -> Image | None:
        """The guest image, once loaded."""
        return self._image

    def load(
        self, image: str | bytes | os.PathLike[str] | Image, *, base: int | None = None,
        rwx: bool = False, args: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Load a guest: a static ELF64 file, or with `base` a flat binary.

        Each segment becomes private memory with its own permissions; what is left of guest memory
        is one read-write mapping. Page 0 is never mapped.

        Args:
            image: A path, the bytes themselves, or what `read_image` returned.
            base: Guest address of a flat binary's first byte; its entry.
            rwx: Give every segment all permissions, as a boot loader would.
            args: Joined by blanks into the guest's command line.

        Raises:
            ImageError: The image is rejected (`.reason`), nothing was loaded.
            StateError: Something was loaded already.
        """
        self._check_open()
        if self._image is not None:
            raise StateError("this VM has a guest: make another MicroVM for another image")
        if not isinstance(image, Image):
            image = read_image(image, memory_bytes=self.memory_bytes, base=base, rwx=rwx)
        ranges = image.page_ranges()
        if rwx:
            ranges = tuple((start, end, ANY_ACCESS) for start, end, _ in ranges)
        memory_map = memory_map_of(ranges, self.memory_bytes)
        self.mm.mmap_all(memory_map)
        try:
            for start, end, perms, name in memory_map:
                if name == IMAGE_NAME and perms:
                    self.mm.populate(start, end - start)
            for segment in image.segments:
                self.mm.copy_out(segment.start, image.contents(segment), ignore_permissions=True)
            self._enter(image, memory_map, " ".join(args))
        except BaseException:
            self.mm.munmap(0, self.memory_bytes)
            raise
        self._image = image
        self._is_loaded = True

    def _enter(
        self, image: Image, memory_map: tuple[tuple[int, int, int, str], ...], command_line: str
    ) -> None:
        ram_ends = [end for _, end, _, name in memory_map if name == MEMORY_NAME]
        stack_top = ram_ends[-1] if ram_ends else memory_map[-1][1]
        trial = self.vcpu.trial
        self.area.write_head(
            memory_map, command_line, self.memory_bytes, stack_top,
            cpu_features(trial, giant_pages=self.vm.device.cpuid.has_giant_pages), trial.tsc_hz,
        )  # fmt: skip
        regs = self.vcpu.regs
        regs.rip = image.entry
        regs.rsp = stack_top
        regs.rdi = self.area.boot_info_gpa
        regs.rflags = RFLAGS_RESERVED

    # ---- running ----

    def _prepare(self) -> None:
        if self.boot_tables.generation != self.mm.generation:
            is_new = self.area.image is None
            self.boot_tables.refresh()
            if is_new:
                self.vcpu.load_boot_state(self.area.layout())
        self.mm.map_resident()

    def _managers(self) -> tuple[MemoryManager, ...]:
        return (self.mm,)

    def _run_vcpu(self, timeout_ns: int) -> object:
        answer = self._handler.serve_unserved()
        return super()._run_vcpu(timeout_ns) if answer is None else answer

    def refresh_tables(self) -> None:
        """Bring the boot tables up to date with `mm`, from any thread, the guest running or not.

        Every run begins with it, and so does whatever the host does about an access to memory
        that the guest cannot reach: so what was taken away is never used again. What was granted
        while the guest ran it finds by then, or by a #PF through the default IDT. Only a guest with
        an IDT of its own would see that #PF itself: for that one call this after `mm.mprotect` or
        `mm.mmap`.

        Raises:
            StateError: So many tables have no room.
        """
        self._check_open()
        if self.area.image is not None:
            self.boot_tables.refresh()

    # ---- a second one ----

    def fork(
        self, *, console: Callable[[bytes], object] | None = None,
        console_input: int | None = None,
    ) -> MicroVM:  # fmt: skip
        """Return a second VM in the state of this one; from then on neither sees the other change.

        The guest must not be running, and not have ended: before its first run, after a deadline
        or a stop, where a handler of one's own has answered `RunResult("paused")`, or when memory
        was exhausted and there is some now. An access that is half done is completed first, and a
        breakpoint that is on its way may take some microseconds more of the guest's program; both
        with the handlers, as in a run. Then the two can run at the same time, in two threads, and
        be forked again; they have one arena, and can be closed in any order.

        Private memory is copied now, as much of it as is resident: a guest's tables and stacks
        cannot be told from its data. Mappings with `pure_data`, and private ones of files, are
        shared until one side writes. Shared mappings stay shared. Output that has not been handed
        on yet is this VM's; input that the guest has not read yet is in both.

        Args:
            console: The child's, as for the class.
            console_input: The child's; None is an empty one.

        Returns:
            The child. Handlers of one's own (`on_out`) are not part of it.

        Raises:
            StateError: Nothing is loaded, it is running, or has ended; also if that comes out only
                when an access is completed.
            ArenaExhaustedError: The arena has no room for it, or for an access that is half done;
                nothing has changed, and the guest can run on.
        """
        from kvmmm.vmm import fork

        self._check_runnable()
        self._settle()
        self._prepare()
        self._has_ended = True  # until what was half done has been served
        try:
            fork.complete(self.vcpu, self._handler)
        except ArenaExhaustedError:
            self._has_ended = False
            raise
        self._has_ended = False
        if self._early_result is None:
            state = fork.settle(self.vcpu, self._run_on, self._handler)
            if self._has_ended:
                raise StateError("this guest has ended, just now: run() says how")
        else:
            state = self.vcpu.save_state()
        child = MicroVM.__new__(MicroVM)
        child._become_copy(self, state, console, console_input)  # noqa: SLF001 - one of our own
        return child

    def run(self, timeout: float | str | None = None) -> RunResult:
        """See `Machine.run`."""
        self._check_open()
        early, self._early_result = self._early_result, None
        return super().run(timeout) if early is None else early

    def _run_on(self, timeout: float) -> RunResult:
        result = super().run(timeout)
        if result.outcome in {DEADLINE, STOPPED, MEMORY}:
            # Nobody sees this result; its output belongs to the next one.
            self._console.output[:0] = result.console
        else:
            self._early_result = result  # whoever calls for the next run gets it
        if result.outcome == MEMORY:
            raise ArenaExhaustedError(*self._handler.shortage)
        return result

    def _become_copy(
        self, parent: MicroVM, state: VcpuState, sink: Callable[[bytes], object] | None,
        input_fd: int | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.memory_bytes = parent.memory_bytes
        self._image = parent.image
        self._early_result = None
        self._is_loaded = True
        try:
            self.arena = parent.arena.share()
            self._closers.append(self.arena.close)
            self._copy_area(parent.area)
            self._add_vm(parent.vm.device, parent.vm.memslots.limit)
            self._fork_memory(parent.mm)
            if input_fd is not None:
                self.area.reopen_input()
            self._wire(sink, input_fd, n_taken=self.area.output_head)
            self.vcpu.load_state(state)
        except BaseException:
            self.close()
            raise

    def _copy_area(self, area: SystemArea) -> None:
        frames = self.arena.allocate(area.end - area.start, align_bytes=HUGE_PAGE_BYTES)
        try:
            self.area = area.copy_to(frames)
        except BaseException:
            self.arena.dec_ref(frames)
            raise
        self._closers.append(self.area.close)

    def _fork_memory(self, mm: MemoryManager) -> None:
        # A place for all of guest memory, as the first VM has, while there is plenty: it makes few
        # slots of many, but nobody else can use what of it is not used.
        reservation = None
        if self.arena.statistics().free_bytes >= 2 * self.memory_bytes:
            reservation = self.arena.reserve(self.memory_bytes, align_bytes=HUGE_PAGE_BYTES)
        try:
            self.mm = mm.fork(self.address_space, reservation)
        except BaseException:
            if reservation is not None:
                self.arena.unreserve(reservation)
            raise

    def _count_tests(self) -> tuple[int, int]:
        return self.area.test_report()

    def statistics(self) -> RunStatistics:
        """Return counts and times since the VM was made."""
        return RunStatistics.of(
            self.vcpu.statistics(), self.mm.counters, self.arena.statistics(),
            n_slots=len(self.vm.memslots), n_mmio=self._handler.n_mmio,
            n_emulated_pages=self._handler.provider.n_pages,
            n_page_faults=self._handler.n_page_faults, n_console_bytes=self._console.n_bytes,
            n_served_again=self._handler.n_served_again,
        )  # fmt: skip
