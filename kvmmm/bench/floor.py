"""The C floors (`_native/floor.h`), typed. Times in ns, taken in C."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from kvmmm.bench.guest import BenchmarkError
from kvmmm.platform.kvm import abi, boot
from kvmmm.safemem.ffi import address_of, ffi, lib

if TYPE_CHECKING:
    from kvmmm.vmm.microvm import MicroVM

_C = cast("Any", lib)
_TIMEOUT_NS = 20_000_000_000
_PAGE = 4096

STEPS = ("arena", "vm", "image", "fill", "memslot", "vcpu", "cpuid", "run")
"""enum kvmmm_floor_step, in order."""


def _checked(what: str, answer: int) -> int:
    if answer < 0:
        raise BenchmarkError(f"{what}: {os.strerror(-answer)}")
    return answer


def run_exits(vm: MicroVM, port: int, mark_port: int, n_marks: int) -> tuple[list[int], int]:
    """Run a guest from its start mark over `n_marks` more: (ns from mark to mark, exits)."""
    mark_ns = ffi.new("int64_t[]", n_marks)
    n_exits = _C.kvmmm_floor_exits(
        vm.vcpu.fd, _run_of(vm), port, mark_port, mark_ns, n_marks, _TIMEOUT_NS
    )
    return list(mark_ns), _checked("kvmmm_floor_exits", n_exits)


def run_bulk(vm: MicroVM, port: int, dst: Any, shared_hva: int, length_bytes: int) -> int:  # noqa: ANN401
    """Run a guest from its start mark to an `out`, copy what it left; returns ns."""
    shared = ffi.cast("uint8_t *", shared_hva)
    run = _run_of(vm)
    taken_ns = _C.kvmmm_floor_bulk(vm.vcpu.fd, run, port, dst, shared, length_bytes, _TIMEOUT_NS)
    return _checked("kvmmm_floor_bulk", taken_ns)


def _run_of(vm: MicroVM) -> Any:  # noqa: ANN401 - a cffi pointer
    return ffi.cast("struct kvm_run *", vm.vcpu.run_hva)


class MachineFloor:
    """Makes the same VM as one that ran before, in C, as often as one likes.

    The same ioctls with the same arguments; bytes of the system area are taken from the model and
    put where they belong, so that the guest finds the same tables and boot information.

    Args:
        model: A MicroVM that has run the guest at `path` to its end; needed no longer afterwards.
        path: The guest's ELF file.
        last_port: The port of its first `out`.
    """

    def __init__(self, model: MicroVM, path: str, last_port: int) -> None:
        self._keep: list[object] = []
        self._recipe = recipe = ffi.new("struct kvmmm_floor_recipe *")
        device = model.vm.device
        recipe.kvm_fd = device.fd
        recipe.run_bytes = device.vcpu_mmap_bytes
        recipe.exits_on_emulation_failure = bool(
            device.capability(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        )
        recipe.arena_bytes = model.arena.capacity_bytes
        recipe.cpuid = device.cpuid.table_hva
        recipe.xcrs = model.vcpu.trial.xcrs_hva if model.vcpu.trial.has_avx else 0
        recipe.path = self._kept(ffi.new("char[]", path.encode()))
        recipe.last_port = last_port
        self._take_registers(model)
        self._take_memory(model)
        self._machine = ffi.new("struct kvmmm_floor_machine *")

    def _kept(self, cdata: Any) -> Any:  # noqa: ANN401 - cffi
        self._keep.append(cdata)
        return cdata

    def _take_registers(self, model: MicroVM) -> None:
        sregs = self._kept(ffi.new("struct kvm_sregs *"))
        # What load_boot_state left in kvm_run: special registers do not come back from the guest.
        ffi.memmove(sregs, _C.kvmmm_sync_sregs(_run_of(model)), ffi.sizeof("struct kvm_sregs"))
        regs = self._kept(ffi.new("struct kvm_regs *"))
        image = model.image
        assert image is not None  # noqa: S101 - the model has run
        regs.rip, regs.rsp, regs.rdi = image.entry, model.vcpu.regs.rsp, model.area.boot_info_gpa
        regs.rflags = boot.RFLAGS_RESERVED
        self._recipe.sregs, self._recipe.regs = address_of(sregs), address_of(regs)

    def _take_memory(self, model: MicroVM) -> None:
        recipe, arena = self._recipe, model.arena
        home = model.mm.home
        if home is None:
            raise BenchmarkError("the model VM has no home in its arena")
        recipe.image_offset = home.delta
        slots = [slot for _, _, slot in model.vm.memslots.by_gpa]
        recipe.n_slots = len(slots)
        for number, slot in enumerate(slots):
            to = recipe.slots[number]
            to.gpa, to.n_bytes, to.flags = slot.gpa, slot.length_bytes, slot.flags
            to.offset = slot.hva - arena.hva
        pieces = _pieces(model)
        recipe.n_pieces = len(pieces)
        for number, (offset, content) in enumerate(pieces):
            piece = recipe.pieces[number]
            piece.offset, piece.n_bytes = offset, len(content)
            piece.hva = address_of(self._kept(ffi.new("uint8_t[]", content)))

    def start(self) -> int:
        """Make the VM, run it to its first `out`; returns ns. `close` it after each time."""
        answer = _C.kvmmm_floor_start(self._recipe, self._machine, _TIMEOUT_NS)
        if answer < 0:
            _C.kvmmm_floor_close(self._machine)
        return _checked("kvmmm_floor_start", answer)

    def steps(self) -> dict[str, int]:
        """Return ns by step of the last start."""
        return dict(zip(STEPS, map(int, self._machine.step_ns), strict=True))

    def close(self) -> int:
        """Release the VM; returns ns."""
        return _checked("kvmmm_floor_close", _C.kvmmm_floor_close(self._machine))


def _pieces(model: MicroVM) -> list[tuple[int, bytes]]:
    """Return the runs of pages of the system area that are not zero: (arena offset, bytes)."""
    area = model.area
    content = area.read(area.start, area.end - area.start)
    pieces: list[tuple[int, bytes]] = []
    start: int | None = None
    for at in range(0, len(content) + _PAGE, _PAGE):
        is_used = any(content[at : at + _PAGE])
        if is_used and start is None:
            start = at
        elif not is_used and start is not None:
            pieces.append((area.file_range.start + start, content[start:at]))
            start = None
    return pieces
