"""`MicroVM`: one guest, from a file to its exit status."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Self

from kvmmm.arena import Arena
from kvmmm.errors import KvmmmError, RangeError, StateError
from kvmmm.hostarch.access import ANY_ACCESS, READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES, align_up
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.units import parse_bytes, parse_duration_ns
from kvmmm.mm import MemoryManager
from kvmmm.platform.kvm.address_space import MemslotAddressSpace
from kvmmm.platform.kvm.boot import RFLAGS_RESERVED
from kvmmm.platform.kvm.device import open_device
from kvmmm.platform.kvm.vm import Vm
from kvmmm.safemem.ffi import lib
from kvmmm.vmm.console import Console
from kvmmm.vmm.exit_handler import ExitHandler
from kvmmm.vmm.image import Image, read_image
from kvmmm.vmm.result import RunResult
from kvmmm.vmm.statistics import RunStatistics
from kvmmm.vmm.stop_report import StopReporter
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

DEFAULT_MEMORY = "64M"

HOLE = AddrRange(0xFEC0_0000, 1 << 32)
"""Never memory: the APIC pages, and on VMX KVM's private slots."""


class MicroVM:
    """A micro-VM with one vCPU.

    Example:
        with kvmmm.MicroVM(memory="64M") as vm:
            vm.load("guest.elf")
            result = vm.run(timeout=5.0)
            print(result.status, result.console)

    The vCPU runs on the thread that calls `run`. A timer makes it leave the guest 20 times a
    second, for Ctrl-C and whatever else Python's signal handlers do.

    Lifetime: `close`, or the end of a `with`. Not to be shared between threads, but for `stop` and
    copies through `mm`.

    Args:
        memory: Guest memory, as `64M` or in bytes; rounded up to 2 MiB. Costs nothing until
            touched.
        arena: Most that guest memory and kvmmm's own pages may take on the host; by default enough.
        console: Called with each chunk of guest output; None collects it in `RunResult.console`.
        console_input: File descriptor of the guest's console input; None is an empty one.
        max_memslots: Use no more memslots than that (for tests).

    Attributes:
        mm: The memory manager; its addresses are guest-physical.
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
        self._closers: list[Callable[[], None]] = []
        self._image: Image | None = None
        self._tables_generation = -1
        self._has_ended = False
        self._last_result: RunResult | None = None
        self.memory_bytes = align_up(parse_bytes(memory), HUGE_PAGE_BYTES)
        area_start = align_up(self.memory_bytes, HUGE_PAGE_BYTES)
        if HOLE.start <= area_start < HOLE.end:
            area_start = HOLE.end
        area_bytes = system_area_bytes(self.memory_bytes)
        device = open_device()
        if area_start + area_bytes > 1 << device.cpuid.physical_bits:
            raise RangeError(
                0, self.memory_bytes,
                f"this CPU addresses {device.cpuid.physical_bits} bits: ask for less --memory",
            )  # fmt: skip
        capacity = parse_bytes(arena) if arena is not None else self.memory_bytes + area_bytes
        try:
            # The system area first; then, where there is room for it, all of guest memory.
            has_room = capacity >= area_bytes + self.memory_bytes
            self.arena = Arena(
                max(capacity, area_bytes), used_bytes=area_bytes,
                reserved_bytes=self.memory_bytes if has_room else 0,
            )  # fmt: skip
            self._closers.append(self.arena.close)
            self.area = SystemArea(
                self.arena, self.arena.first, area_start, giant_pages=device.cpuid.has_giant_pages
            )
            self._closers.append(self.area.close)
            self.vm = Vm(device, max_memslots=max_memslots)
            self._closers.append(self.vm.close)
            self.vm.memslots.add(area_start, area_bytes, self.area.hva)
            self.address_space = MemslotAddressSpace(self.vm, self.memory_bytes)
            self.mm = MemoryManager(self.arena, self.address_space, self.arena.reservation)
            self.vcpu = self.vm.create_vcpu()
            self._wire(console, console_input)
        except BaseException:
            self.close()
            raise

    def _wire(self, sink: Callable[[bytes], object] | None, input_fd: int | None) -> None:
        hva = self.area.hva
        self.vcpu.set_console(hva, hva + OUTPUT_OFFSET, OUTPUT_BYTES)
        self._console = Console(self.vcpu, sink, input_fd)
        self._reporter = StopReporter(self)
        self._handler = ExitHandler(
            self.vm, self.vcpu, self.mm, self.address_space, self.area, self._console,
            self._reporter,
        )  # fmt: skip
        self._handler.attach()

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
        memory_map = _memory_map(ranges, self.memory_bytes)
        self.mm.mmap_all(memory_map)
        try:
            for start, end, perms, name in memory_map:
                if name == IMAGE_NAME and perms:
                    self.mm.populate(AddrRange(start, end))
            for segment in image.segments:
                self.mm.copy_out(segment.start, image.contents(segment), ignore_permissions=True)
            self._enter(image, memory_map, " ".join(args))
        except BaseException:
            self.mm.munmap(AddrRange(0, self.memory_bytes))
            raise
        self._image = image

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

    def run(self, timeout: float | str | None = None) -> RunResult:
        """Run the guest until it exits, fails, is stopped, or the deadline passes.

        Args:
            timeout: Deadline in seconds, or as `"250ms"`; None for none.

        Returns:
            What it came to. A deadline or a stop leaves the guest able to run on; anything else
            ends it.

        Raises:
            StateError: Nothing is loaded, it is running, or it has ended.
            KeyboardInterrupt: Ctrl-C, when this is the main thread; a note says where it was.
            Whatever a handler or the console's sink raises; that ends the guest.
            VcpuError: KVM gave up.
        """
        self._check_open()
        if self._image is None:
            raise StateError("nothing is loaded: call load() first")
        if self._has_ended:
            raise StateError("this guest has ended: make another MicroVM")
        if self.vcpu.thread_id:
            raise StateError("this VM is running already")
        timeout_ns = parse_duration_ns(timeout) if timeout is not None else 0
        self._settle()
        self._refresh_tables()
        self.mm.map_resident()
        self._reporter.begin_run()
        try:
            answer = self.vcpu.run(timeout_ns)
        except BaseException as e:
            # An exception out of a handler leaves an access half done; out of a tick it does not.
            self._has_ended = self.vcpu.handler_failed
            if isinstance(e, KeyboardInterrupt):
                self._console.drain()
                e.add_note(self._reporter.stopped("Ctrl-C").report)
            raise
        if answer == -lib.KVMMM_STOP_DEADLINE:
            result = self._reporter.deadline(timeout_ns)
        elif answer == -lib.KVMMM_STOP_REQUEST:
            result = self._reporter.stopped("stop()")
        elif isinstance(answer, RunResult):
            result = answer
            self._has_ended = True
        else:
            raise KvmmmError(f"a handler answered {answer!r}, which is no RunResult")
        self._console.drain()
        result.console = self._console.take_output()
        result.tests = self.area.test_report()
        result.defer_stats(self.statistics)
        self._last_result = result
        return result

    def _settle(self) -> None:
        """Have the last result's statistics taken, before anything changes them."""
        if self._last_result is not None:
            self._last_result.settle()
            self._last_result = None

    def _refresh_tables(self) -> None:
        """Build the boot tables from the vmas."""
        if self._tables_generation == self.mm.generation:
            return
        if self._tables_generation >= 0:
            raise StateError("guest memory was remapped after the first run: not supported yet")
        self.area.build_tables((start, end, vma.perms) for start, end, vma in self.mm.vmas)
        self.vcpu.load_boot_state(self.area.layout())
        self._tables_generation = self.mm.generation

    def stop(self) -> None:
        """End the run from any thread, within moments; `run` returns outcome `stopped`.

        A stop that comes while nothing runs ends the next run before its first instruction.
        """
        self.vcpu.stop()

    def on_out(
        self, port: int, handler: Callable[..., object] | None, *, value_only: bool = False
    ) -> None:
        """Have `handler` called when the guest uses an I/O port.

        Args:
            port: The port; ring 3 may use those of `boot.OPEN_PORTS`.
            handler: `handler(exit)` with an `IoExit`, or with `value_only` `handler(port, value)`,
                which is twice as fast. A `RunResult` it returns ends the run; None goes on. For IN,
                the first kind sets `exit.value`, the second returns the number (its `value` is
                None). No handler: nobody is at that port.
            value_only: Which of the two.
        """
        kind = lib.KVMMM_PORT_KIND_VALUE if value_only else lib.KVMMM_PORT_KIND_EXIT
        self.vcpu.set_port(port, kind if handler is not None else 0, handler)

    def statistics(self) -> RunStatistics:
        """Return counts and times since the VM was made."""
        return RunStatistics.of(
            self.vcpu.statistics(), self.mm.counters, self.arena.statistics(),
            n_slots=len(self.vm.memslots), n_mmio=self._handler.n_mmio,
            n_emulated_pages=self._handler.provider.n_pages,
            n_page_faults=self._handler.n_page_faults, n_console_bytes=self._console.n_bytes,
        )  # fmt: skip

    def _check_open(self) -> None:
        if not self._closers:
            raise StateError("this VM is closed")

    def close(self) -> None:
        """Release everything, vCPU first, arena last. Idempotent; also after an error in between.

        Raises:
            StateError: The guest is running.
            BufferError: A memoryview of guest memory is still held.
        """
        if self._closers:
            self._settle()
        while self._closers:
            self._closers[-1]()
            self._closers.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_closers"):
            self.close()


@lru_cache(maxsize=16)
def _memory_map(
    image_ranges: tuple[tuple[int, int, int], ...], memory_bytes: int
) -> tuple[tuple[int, int, int, str], ...]:
    """Return (start, end, perms, name) of all guest memory: the image, and RAM wherever else.

    Page 0 is nobody's, nor is `HOLE`.
    """
    taken = [*image_ranges, (HOLE.start, HOLE.end, 0)]
    found = []
    addr = PAGE_BYTES
    for start, end, perms in sorted(taken):
        if addr < min(start, memory_bytes):
            found.append((addr, min(start, memory_bytes), READ_WRITE, MEMORY_NAME))
        if start != HOLE.start:
            found.append((start, end, perms, IMAGE_NAME))
        addr = max(addr, end)
    if addr < memory_bytes:
        found.append((addr, memory_bytes, READ_WRITE, MEMORY_NAME))
    return tuple(found)
