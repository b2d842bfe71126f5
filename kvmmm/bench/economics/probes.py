"""How it is measured: the guests of `bench faults` and `bench exits`, one figure at a time."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING, Self

from kvmmm.bench.economics.plan import (
    BEFOREHAND,
    EXIT,
    EXITS,
    FAULT,
    FAULTS,
    FLOOR,
    MAP,
    PAGE,
    WRITE,
    again,
)
from kvmmm.bench.exit_guests import kernel_guest, user_guest
from kvmmm.bench.exit_kinds import DEADLINE, EVENT_KIND, KERNEL_KINDS, USER_KINDS
from kvmmm.bench.fault_answer import LAZY, PF, SLOT
from kvmmm.bench.fault_grounds import Ground, SlotGround
from kvmmm.bench.fault_table_grounds import LazySlotGround, PageFaultGround
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.bench.crossover.planted import Planted
    from kvmmm.bench.crossover.record import Cell

_N_APART = 16
_PAGES_MIN, _WINDOWS_MIN = 64, 4
_LENGTH = _N_APART * HUGE_PAGE_BYTES
_TURNS = 5


class Touches:
    """First touches by one way, of one access, in windows of one size.

    Args:
        ground: The memory.
        window_bytes: What a fault maps.
        write: Whether the guest writes.
        in_order: Whether whole windows are touched as well.
    """

    def __init__(
        self, ground: Ground, window_bytes: int, *, write: bool, in_order: bool = True
    ) -> None:
        self._ground = ground
        self._window = window_bytes
        self._write = write
        names = (PAGE, BEFOREHAND, FAULT, MAP) if in_order else (FAULT, MAP)
        self.variants = [one for name in names for one in (name, again(name))]
        self._n_pages = max(_PAGES_MIN, _WINDOWS_MIN * window_bytes // PAGE_BYTES)
        self._round = -1
        self._beside: dict[str, float] = {}

    def sample(self, variant: str, shared_seed: int, _own_seed: int) -> float:
        """Return ns a page, a fault, or a window.

        Args:
            variant: One of `variants`.
            shared_seed: Tells one round from another.
        """
        name = variant.removesuffix("2")
        if name == PAGE:
            return self._in_order()
        if name == BEFOREHAND:
            return self._mapped_beforehand()
        # Fault and map come of one measurement, which is made when the first of them is asked for.
        if shared_seed != self._round:
            self._round, self._beside = shared_seed, {}
        if variant not in self._beside:
            suffix = variant.removeprefix(name)
            fault_ns, map_ns = self._apart()
            self._beside |= {FAULT + suffix: fault_ns, MAP + suffix: map_ns}
        return self._beside.pop(variant)

    def _begin(self) -> None:
        self._ground.forget()
        self._ground.set_window(self._window)

    def _touch(self, n: int, stride_bytes: int, n_faults: int) -> int:
        ground = self._ground
        return ground.touch(ground.start, n, stride_bytes, write=self._write, n_faults=n_faults)

    def _serve(self, n_windows: int) -> int:
        start, window, serve = self._ground.start, self._window, self._ground.serve
        start_ns = perf_counter_ns()
        for addr in range(start, start + n_windows * window, window):
            serve(addr)
        return perf_counter_ns() - start_ns

    def _in_order(self) -> float:
        self._begin()
        n = self._n_pages
        return self._touch(n, PAGE_BYTES, n * PAGE_BYTES // self._window) / n

    def _mapped_beforehand(self) -> float:
        self._begin()
        n = self._n_pages
        map_ns = self._serve(n * PAGE_BYTES // self._window)
        return (map_ns + self._touch(n, PAGE_BYTES, 0)) / n

    def _apart(self) -> tuple[float, float]:
        self._begin()
        lazy_ns = self._touch(_N_APART, self._window, _N_APART)
        self._ground.forget()
        map_ns = self._serve(_N_APART)
        there_ns = self._touch(_N_APART, self._window, 0)
        return (lazy_ns - there_ns) / _N_APART, map_ns / _N_APART


class Exits:
    """Exits of one kind.

    Args:
        product: Makes some under kvmmm; returns ns an exit.
        floor: The same in C; None where there is no such thing.
        n_turns: The median of how many is a sample.
    """

    def __init__(
        self, product: Callable[[], float], floor: Callable[[], float] | None, n_turns: int = _TURNS
    ) -> None:
        self._measures = {EXIT: product} if floor is None else {EXIT: product, FLOOR: floor}
        self._n_turns = n_turns
        self.variants = [one for name in self._measures for one in (name, again(name))]

    def sample(self, variant: str, _shared_seed: int, _own_seed: int) -> float:
        """Return ns an exit."""
        measure = self._measures[variant.removesuffix("2")]
        return median(measure() for _ in range(self._n_turns))


class Guests:
    """All guests of the process, made when they are first needed. A context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._grounds: dict[str, Ground] = {}
        self._exits: dict[str, Exits] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def probe(self, cell: Cell, _planted: Planted | None = None) -> Touches | Exits:
        """Return what measures a cell.

        Raises:
            KvmmmError: It cannot be measured here.
        """
        if cell.order == EXITS:
            self._exits = self._exits or self._make_exits()
            return self._exits[cell.layout]
        if cell.layout not in self._grounds:
            self._grounds[cell.layout] = self._make_ground(cell.layout)
        ground = self._grounds[cell.layout]
        is_write = cell.operation == WRITE
        return Touches(ground, cell.bytes, write=is_write, in_order=cell.order == FAULTS)

    def _make_ground(self, name: str) -> Ground:
        kinds: dict[str, Callable[[ExitStack, int], Ground]] = {
            SLOT: SlotGround, LAZY: LazySlotGround, PF: PageFaultGround,
        }  # fmt: skip
        if name in kinds:
            return kinds[name](self._stack, _LENGTH)
        return SlotGround(self._stack, _LENGTH, n_slots=int(name))

    def _make_exits(self) -> dict[str, Exits]:
        user = user_guest(self._stack, (*USER_KINDS, EVENT_KIND))
        kernel = kernel_guest(self._stack, KERNEL_KINDS)
        exits = {
            EVENT_KIND.name: Exits(partial(user.product, EVENT_KIND), None, 1),
            DEADLINE: Exits(user.kick, user.kick_floor, _TURNS),
        }
        for guest, kinds in ((user, USER_KINDS), (kernel, KERNEL_KINDS)):
            for kind in kinds:
                product, floor = partial(guest.product, kind), partial(guest.floor, kind)
                exits[kind.name] = Exits(product, floor)
        return exits
