"""The kinds part of `bench exits`: each kind of exit, whole, and over a loop in C.

`exits/kind_NAME` is what one costs under kvmmm from exit to exit, with the least handler in Python;
`exits/over_NAME` is the same minus KVM_RUN in a loop that answers just so much in C. Of one
process; `bench exits --out DIR` is a sweep over several: `economics`.
"""

from __future__ import annotations

import random
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from kvmmm.bench.case import NS, Case, Group
from kvmmm.bench.exit_guests import EVENT_PORT, kernel_guest, user_guest
from kvmmm.bench.guest import MARK_END, MARK_START, WORK_PORT
from kvmmm.platform.kvm import abi
from kvmmm.safemem.ffi import lib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample


class Kind:
    """One kind of exit.

    Attributes:
        name: Of its cases.
        what: For a reader.
        code: The instruction that makes it.
        before: What comes once before them all, and `after`, after each.
        reason: KVM_EXIT_...
        port: For I/O.
        back: How a program goes on in the floor (`enum kvmmm_floor_back`).
        n: How many a sample has.
    """

    __slots__ = ("after", "back", "before", "code", "n", "name", "port", "reason", "what")

    def __init__(
        self, name: str, what: str, code: str, reason: int, *, port: int = 0, before: str = "",
        after: str = "", back: int = 0, n: int = 20,
    ) -> None:  # fmt: skip
        self.name = name
        self.what = what
        self.code, self.before, self.after = (bytes.fromhex(h) for h in (code, before, after))
        self.reason = reason
        self.port = port
        self.back = back
        self.n = n

    def piece(self) -> bytes:
        """Return the program: rdx times its instruction, at or from rsi."""
        # mov %rdx, %r12; before; out %al, $MARK_START
        head = bytes.fromhex("4989d4") + self.before + bytes((0xE6, MARK_START))
        body = self.code + self.after + bytes.fromhex("49ffcc")  # dec %r12
        body += bytes((0x75, 256 - len(body) - 2))  # jnz
        all_of_it = head + body + bytes((0xE6, MARK_END))
        return all_of_it + bytes((0xEB, 256 - len(all_of_it) - 2))  # and again


IO, HLT, MMIO = abi.KVM_EXIT_IO, abi.KVM_EXIT_HLT, abi.KVM_EXIT_MMIO
NOBODYS_PORT = 0xB6
_OUT, _IN = f"e6{WORK_PORT:02x}", f"e4{WORK_PORT:02x}"
_FRAME, _SYSCALL = lib.KVMMM_FLOOR_BACK_FRAME, lib.KVMMM_FLOOR_BACK_SYSCALL
USER_KINDS = (
    Kind("out", "OUT; handler(port, value)", _OUT, IO, port=WORK_PORT),
    Kind("in", "IN; handler(port, None) returns the number", _IN, IO, port=WORK_PORT),
    Kind("out_nobody", "OUT to a port without a handler: answered in C",
         f"e6{NOBODYS_PORT:02x}", IO, port=NOBODYS_PORT),
    Kind("mmio_read", "a load without a memslot; handler(exit) sets exit.value", "8b06", MMIO),
    Kind("mmio_write", "a store without a memslot; handler(exit) reads exit.value", "8906", MMIO),
    # A page on each time, as faults come: mov %rsi, %rbx; mov (%rbx), %al; add $4096, %rbx
    Kind("page_fault", "#PF through IDT and stub; handler(addr, access) steps over it", "8a03",
         IO, port=lib.KVMMM_PORT_TRAP, before="4889f3", after="4881c300100000", back=_FRAME),
    Kind("syscall", "SYSCALL through its stub; handler(number) returns rax", "0f05", IO,
         port=lib.KVMMM_PORT_SYSCALL, back=_SYSCALL),
)  # fmt: skip
KERNEL_KINDS = (
    Kind("out_ring0", "OUT; handler(port, value)", _OUT, IO, port=WORK_PORT),
    Kind("hlt", "HLT, no interrupt controller; handler(reason) goes on", "f4", HLT),
)
EVENT_KIND = Kind(
    "ioeventfd", "OUT that KVM turns into an eventfd, no exit to us; kvmmm uses none",
    f"e6{EVENT_PORT:02x}", IO, n=1000,
)  # fmt: skip
DEADLINE = "deadline"
ALL_NAMES = (*(kind.name for kind in (*USER_KINDS, *KERNEL_KINDS)), DEADLINE, EVENT_KIND.name)
"""Of everything that is measured, in the order in which it is told."""
_TURNS = 10


def _probe(product: Callable[[], float], floor: Callable[[], float]) -> Probe:
    def turns() -> Sample:
        # Neighbours are compared, turns shorter than a scheduler's tick: what differs is small, and
        # waves of load are not.
        pairs = []
        for _ in range(_TURNS):
            times = {}
            for measure in random.sample((product, floor), 2):
                times[measure] = measure()
            pairs.append((times[product], times[floor]))
        exit_ns = median(p for p, _ in pairs)
        return {"exit": exit_ns, "floor": exit_ns - median(p - f for p, f in pairs)}

    return turns


@contextmanager
def _probes() -> Iterator[Mapping[str, Probe]]:
    with ExitStack() as stack:
        user = user_guest(stack, (*USER_KINDS, EVENT_KIND))
        kernel = kernel_guest(stack, KERNEL_KINDS)
        probes: dict[str, Probe] = {
            EVENT_KIND.name: lambda: {"exit": user.product(EVENT_KIND)},
            DEADLINE: _probe(user.kick, user.kick_floor),
        }
        for guest, kinds in ((user, USER_KINDS), (kernel, KERNEL_KINDS)):
            for kind in kinds:
                probes[kind.name] = _probe(partial(guest.product, kind), partial(guest.floor, kind))
        yield probes


def _cases(name: str, note: str) -> Iterator[Case]:
    yield Case(f"exits/kind_{name}", unit=NS, goal=None, product=(name, "exit"), note=note)
    yield Case(
        f"exits/over_{name}", unit=NS, goal=None, product=(name, "exit"),
        floor=(name, "floor"), note="the same, minus a KVM_RUN loop in C",
    )  # fmt: skip


def _all_cases() -> Iterator[Case]:
    for ring, kinds in ((3, USER_KINDS), (0, KERNEL_KINDS)):
        for kind in kinds:
            yield from _cases(kind.name, f"ring {ring}: {kind.what}")
    yield from _cases(
        DEADLINE, "ring 3: by how much run(timeout) outlives its deadline: timer, kick, EINTR"
    )
    yield Case(
        f"exits/kind_{EVENT_KIND.name}", unit=NS, goal=None, product=(EVENT_KIND.name, "exit"),
        note=f"ring 3: {EVENT_KIND.what}",
    )  # fmt: skip


GROUPS = (
    Group("exits: each kind", tuple(_all_cases()), open=_probes, rounds=25, quick_rounds=5),
)  # fmt: skip
"""One group: every kind in one interleaving."""
