"""`hammer`: rounds of operations under running vCPUs, with every check after each.

After an operation has returned

    - no frame that it dropped is written, and none is read: it is full of poison
    - no page that it protected or moved away is written
    - a child has the bytes of the moment of its fork, and the parent none of the child's
    - what is mapped anew reads as zero, or as what was stamped since
    - what a vCPU has stored is there, unless it was dropped
"""

from __future__ import annotations

import random
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from kvmmm.mm.debug import check_invariants
from tests.hammer.cells import N_CELLS, Cells
from tests.hammer.children import Children
from tests.hammer.disturber import Disturber
from tests.hammer.operations import Operations
from tests.hammer.watch import Violation

if TYPE_CHECKING:
    from collections.abc import Callable

_TURNS_EVERY, _INVARIANTS_EVERY = 16, 256
_AWAITED = 0.7
"""How often the next operation waits until the vCPUs are at work; half a round's time at most."""
_ENCOURAGED = 0.3
"""How often a vCPU tries again what was refused; in between it has time for the rest."""


class Hammer:
    """One machine under the hammer.

    Args:
        machine: A `UserMachine` or a `KernelMachine`.
        seed: Chooses operations, ranges and pauses; the vCPUs do as they like.
        round_s: When rounds take longer on the average, none waits for the vCPUs any more.
        can_fork: Whether its memory can be forked under running vCPUs.

    Attributes:
        history: What was done lately.
        counts: How often, by name.
        n_turns: Turns that the vCPUs have made.
        n_overlaps: Rounds that began with all vCPUs in the guest.
    """

    def __init__(
        self, machine: Any, seed: int, *, round_s: float = 0.006, can_fork: bool = True
    ) -> None:
        self.machine = machine
        self.seed = seed
        self.rng = random.Random(seed)
        self.cells = Cells(machine, self.rng)
        self.operations = Operations(self.cells)
        self.children = Children(self.cells)
        self.disturber = Disturber(machine, seed)
        self.history: deque[str] = deque(maxlen=20)
        self.counts: dict[str, int] = {}
        self.n_overlaps = 0
        self._round_s, self._started = round_s, 0.0
        ops, children = self.operations, self.children
        weighted: list[tuple[int, Callable[[], object]]] = [
            (8, ops.unmap), (10, ops.map), (6, ops.map_absent), (12, ops.protect), (3, ops.allow),
            (8, ops.forget), (6, ops.park), (6, ops.unpark), (2, ops.invalidate), (3, ops.zero),
            (2, ops.read), (2, ops.pin), (4, ops.truncate), (1, ops.revalidate), (1, ops.pause),
            (1, ops.stop), (3, ops.wait),
        ]  # fmt: skip
        if can_fork:
            weighted += [
                (6, children.fork), (3, children.check), (4, children.poison), (3, children.unmap),
                (2, children.protect), (3, children.close),
            ]  # fmt: skip
        if machine.hops:
            weighted.append((6, children.hop))
        self._weights = [weight for weight, _ in weighted]
        self._choices = [operation for _, operation in weighted]

    def run(self, n_rounds: int) -> None:
        """Hammer; raise `Violation` at the first thing that is wrong."""
        try:
            self.cells.map(0, N_CELLS)
            for stamper in self.machine.stampers:
                stamper.start()
            self._wait_for_turns()
            self.disturber.start()
            self._started = time.monotonic()
            for number in range(n_rounds):
                self._round(number)
            self._wait_for_turns()
            self.disturber.end()
            self.machine.stop()
            self.children.check()
            self.cells.check()
            self._check_guests(has_stopped=True)
            self._check_invariants()
        except Violation as e:
            raise Violation(self._report(e)) from None
        except Exception as e:
            raise AssertionError(self._report(e)) from e

    def close(self) -> None:
        """Stop, and let go of everything; no frame must be left. Nothing is checked any more."""
        self.disturber.end()
        self.machine.stop()
        self.operations.end()
        self.children.end()
        self.cells.end()
        self.machine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _round(self, number: int) -> None:
        if (
            self.rng.random() < _AWAITED
            and time.monotonic() < self._started + number * self._round_s
        ):
            self._wait_until_busy()
        operation = self.rng.choices(self._choices, self._weights)[0]
        name = f"{type(operation.__self__).__name__}.{operation.__name__}"  # type: ignore[attr-defined]
        self.history.append(f"{number}: {name}")
        done = operation()
        self.counts[name] = self.counts.get(name, 0) + 1
        self.history[-1] += f" {'' if done is None else done}"
        self.cells.check()
        self._check_guests()
        if self.rng.random() < _ENCOURAGED:
            for stamper in self.machine.stampers:
                stamper.encourage()
        if number % _TURNS_EVERY == 0:
            self._wait_for_turns()
        if number % _INVARIANTS_EVERY == 0:
            self._check_invariants()

    def _wait_until_busy(self) -> None:
        # All vCPUs have what they need, and turn: so that there is something to take away.
        deadline = time.monotonic() + self._round_s / 2
        for stamper in self.machine.stampers:
            turn = stamper.turn
            while stamper.turn < turn + 3 and time.monotonic() < deadline:
                time.sleep(0.00002)
        if all(stamper.is_in_guest for stamper in self.machine.stampers):
            self.n_overlaps += 1

    def _check_invariants(self) -> None:
        # References are counted, too: so we let go of ours.
        self.cells.thaw(0, N_CELLS)
        check_invariants(self.cells.mm, [child.mm for child in self.children.alive])
        self.cells.freeze_again(0, N_CELLS)

    def _wait_for_turns(self) -> None:
        for number, stamper in enumerate(self.machine.stampers):
            if not stamper.wait_for_turns(1):
                self._check_guests()
                raise Violation(f"vCPU {number} does not get on, in turn {stamper.turn}")

    def _check_guests(self, *, has_stopped: bool = False) -> None:
        if self.disturber.error is not None:
            raise Violation(f"the host's other thread: {self.disturber.error!r}")
        for number, stamper in enumerate(self.machine.stampers):
            if stamper.has_ended and not (has_stopped and isinstance(stamper.answer, int)):
                raise Violation(f"vCPU {number}: {stamper.last_words()}")

    @property
    def n_turns(self) -> int:
        return sum(stamper.turn for stamper in self.machine.stampers)

    def _report(self, e: BaseException) -> str:
        who = f"{len(self.machine.stampers)} vCPUs, seed {self.seed}"
        return "\n".join((f"{e!r}" if not str(e) else str(e), who, "lately:", *self.history))
