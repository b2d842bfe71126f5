"""Counts and times of a VM, and the sums that must come out even."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.platform.kvm.abi import EXIT_NAMES

if TYPE_CHECKING:
    from kvmmm.arena import ArenaStatistics
    from kvmmm.mm.manager import Counters


class RunStatistics:
    """What a VM has done since it was made.

    Attributes:
        exits: Exits to this process by reason, as text.
        mmio_faults, emulated_faults, page_faults: Faults by how they came: MMIO exits, pages of
            instructions that KVM could not emulate, #PFs by the default IDT.
        reads, writes, executes: The same faults by what the guest wanted.
        vma_lookups, pma_insertions, pma_hits, refused: The same by what the memory manager did.
        allocated_bytes: Frames reserved for the guest (not committed until touched).
        used_bytes, peak_bytes: The arena's, kvmmm's own pages included.
        n_slots: Memslots now.
        console_bytes, coalesced_bytes: What the guest printed, and how much of it without an exit.
        slot_violations: EPT violations that only registered a slot (`UserVM(lazy_slots=True)`).
        ignored_ports: Port accesses that nobody listens to.
        served_again: Of the MMIO exits, how many times one was served once more: there had been no
            memory for it.
        syscalls: System calls of programs in ring 3, unknown ones included.
        guest_ns, handler_ns: Time in KVM_RUN and in handlers; 0 unless `vcpu.timed` was set.
    """

    __slots__ = (
        "allocated_bytes", "coalesced_bytes", "console_bytes", "emulated_faults", "executes",
        "exits", "guest_ns", "handler_ns", "ignored_ports", "mmio_faults", "n_slots", "page_faults",
        "peak_bytes", "pma_hits", "pma_insertions", "reads", "refused", "served_again",
        "slot_violations", "syscalls", "used_bytes", "vma_lookups", "writes",
    )  # fmt: skip

    exits: dict[str, int]
    mmio_faults: int
    emulated_faults: int
    page_faults: int
    reads: int
    writes: int
    executes: int
    vma_lookups: int
    pma_insertions: int
    pma_hits: int
    refused: int
    allocated_bytes: int
    used_bytes: int
    peak_bytes: int
    n_slots: int
    console_bytes: int
    coalesced_bytes: int
    ignored_ports: int
    syscalls: int
    slot_violations: int
    served_again: int
    guest_ns: int
    handler_ns: int

    @classmethod
    def of(
        cls, vcpu: dict[str, Any], counters: Counters, arena: ArenaStatistics, *, n_slots: int,
        n_mmio: int, n_emulated_pages: int, n_page_faults: int, n_console_bytes: int,
        n_syscalls: int = 0, n_slot_violations: int = 0, n_served_again: int = 0,
    ) -> RunStatistics:  # fmt: skip
        """Gather them from where they are counted."""
        self = cls()
        self.exits = {EXIT_NAMES.get(r, f"reason {r}"): n for r, n in vcpu["exits"].items()}
        self.mmio_faults, self.emulated_faults = n_mmio, n_emulated_pages
        self.page_faults = n_page_faults
        self.reads, self.writes, self.executes = counters.reads, counters.writes, counters.executes
        self.vma_lookups, self.refused = counters.vma_lookups, counters.refused
        self.pma_insertions, self.pma_hits = counters.pma_insertions, counters.pma_hits
        self.allocated_bytes = counters.allocated_bytes
        self.used_bytes, self.peak_bytes = arena.used_bytes, arena.peak_used_bytes
        self.n_slots = n_slots
        self.console_bytes = n_console_bytes
        self.coalesced_bytes = vcpu["coalesced_bytes"]
        self.ignored_ports = vcpu["ignored_ports"]
        self.syscalls, self.slot_violations = n_syscalls, n_slot_violations
        self.served_again = n_served_again
        self.guest_ns, self.handler_ns = vcpu["guest_ns"], vcpu["handler_ns"]
        return self

    @property
    def ept_violations(self) -> int:
        """Accesses that found no (writable) memslot: MMIO exits and emulation failures."""
        return self.mmio_faults + self.emulated_faults

    @property
    def faults(self) -> int:
        """All faults, whichever way they came."""
        return self.ept_violations + self.page_faults

    @property
    def adds_up(self) -> bool:
        """Whether every fault was looked up once, and every look-up had one outcome."""
        return (
            self.faults == self.reads + self.writes + self.executes == self.vma_lookups
            and self.vma_lookups == self.pma_insertions + self.pma_hits + self.refused
            and (
                self.slot_violations > 0
                or self.mmio_faults == self.exits.get("mmio", 0) + self.served_again
            )
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        return {name: getattr(self, name) for name in self.__slots__} | {"adds_up": self.adds_up}
