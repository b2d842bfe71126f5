"""Random layouts, random copies, all mechanisms: `python -m tests.copies.driver`.

What happens depends on the kind of address space, the seed and the layout's number alone. A
disagreement is told with the steps that lead to it, after as many as possible have been left out.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.copies.catalogue import OPERATIONS, a_copy, a_step
from tests.copies.draw import Draw
from tests.copies.layouts import a_layout
from tests.copies.world import MIXED, World
from tests.model.backends import FakeBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.copies.world import Step
    from tests.model.backends import Backend

MECHANISMS = {
    "fake": ("internal", "mirror", MIXED),
    "page tables": ("internal", "walk", "mirror", MIXED),
    "huge leaves": ("internal", "walk", "mirror", MIXED),
    "memslots": ("internal", "mirror", MIXED),
}
"""By kind of address space. By themselves, page tables use the leaves that do best on a host."""
NUMBERS: dict[str, tuple[int, ...]] = {
    "release_bytes": (64 << 10, 64 << 10, 0, 512, 40_000),
    "bounce_max_bytes": (512, 512, 100_000),
    "mirror_reuses": (1, 3, 30),
    "mirror_min_run_pages": (1, 16),
    "mirror_vmas": (0, 0, 400),
}
"""Of policies: all of them must come to the same."""
STEPS_IN_A_LAYOUT = 400
COMPARE_EVERY = 200
FILLING_COPIES = 12
SHRINK_SECONDS = 20.0
FAILED = 1


def backend_of(kind: str) -> Backend:
    """Return a new one."""
    if kind == "fake":
        return FakeBackend()
    from tests.model.machines import MemslotBackend, PageTableBackend

    if kind == "memslots":
        return MemslotBackend()
    return PageTableBackend(max_leaf_pages=512 if kind == "huge leaves" else 0)


class Layout:
    """One layout and what is done over it; `run` raises the disagreement.

    Attributes:
        numbers: The policy's.
        steps: What has been done.
        n_copies: How many of these were copies.
    """

    def __init__(self, backend: Backend, kind: str, seed: int, number: int) -> None:
        self._backend = backend
        self._kind = kind
        self._rng = random.Random(f"{kind}/{seed}/{number}")
        self.numbers = {name: self._rng.choice(values) for name, values in NUMBERS.items()}
        self.steps: list[Step] = []
        self.n_copies = 0

    def run(self, n_steps: int, before: Callable[[Step], None] | None = None) -> None:
        world = World(self._backend, MECHANISMS[self._kind], self.numbers)
        try:
            d = Draw(self._rng, world)
            for step in a_layout(d):
                self._do(world, step, before)
            for n in range(n_steps):
                # First something is put there, whatever permissions say.
                step = a_copy(d, ignore=True) if n < FILLING_COPIES else a_step(d)
                self._do(world, step, before)
                if n % COMPARE_EVERY == COMPARE_EVERY - 1 and n < n_steps - 1:
                    world.compare()
            world.compare()
            world.check()
        except BaseException:
            _close_anyhow(world)
            raise
        world.close()

    def _do(self, world: World, step: Step, before: Callable[[Step], None] | None) -> None:
        self.steps.append(step)
        if before is not None:
            before(step)
        world.do(step)
        self.n_copies += step.name in OPERATIONS


def _close_anyhow(world: World) -> None:
    try:
        world.close()
    except Exception as e:  # noqa: BLE001 - there is a better one on its way
        print(f"and closing fails: {e!r}")


def replay(kind: str, numbers: dict[str, int], steps: list[Step]) -> Exception | None:
    """Do these steps in a world of their own; what was wrong."""
    backend = backend_of(kind)
    world = World(backend, MECHANISMS[kind], numbers)
    found: Exception | None = None
    try:
        for step in steps:
            world.do(step)
        world.compare()
        world.check()
    except Exception as e:  # noqa: BLE001 - whatever it is, it is what is looked for
        found = e
    try:
        world.close()
        backend.close()
    except Exception as e:  # noqa: BLE001
        found = found or e
    return found


def shrink(kind: str, numbers: dict[str, int], steps: list[Step], error: Exception) -> list[Step]:
    """Leave out what can be left out while it fails with the same kind of error."""
    deadline = time.monotonic() + SHRINK_SECONDS
    piece = max(len(steps) // 2, 1)
    while piece and time.monotonic() < deadline:
        at = 0
        while at < len(steps) and time.monotonic() < deadline:
            fewer = steps[:at] + steps[at + piece :]
            if type(replay(kind, numbers, fewer)) is type(error):
                steps = fewer
            else:
                at += piece
        piece //= 2
    return steps


def as_code(kind: str, numbers: dict[str, int], steps: list[Step]) -> str:
    """Steps, to be pasted."""
    lines = [
        "from tests.copies.driver import replay",
        "from tests.copies.world import Step",
        f"print(replay({kind!r}, {numbers!r}, [",
        *(f"    {step!r}," for step in steps),
        "]))",
    ]
    return "\n".join(lines)


def explain(kind: str, seed: int, number: int, layout: Layout, error: Exception) -> str:
    """What there is to say about a failure."""
    numbers, steps = layout.numbers, layout.steps
    text = (
        f"{error}\n{kind}, seed {seed}, layout {number}, step {len(steps)}: {steps[-1]!r}\n"
        f"again: python -m tests.copies.driver --kind '{kind}' --seed {seed} --layout {number}\n"
    )
    if replay(kind, numbers, steps) is None:
        return text + "(it does not happen in a world of its own)"
    steps = shrink(kind, numbers, steps, error)
    code = as_code(kind, numbers, steps)
    return f"{text}{len(steps)} steps are enough:\n{code}\n{replay(kind, numbers, steps)!r}"


def run(
    kind: str, seed: int, n_copies: int, *, first: int = 0, n_steps: int = STEPS_IN_A_LAYOUT,
    before: Callable[[Step], None] | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Do layouts until so many copies have been compared.

    Returns:
        (copies, layouts).

    Raises:
        AssertionError: There is a disagreement: see `explain`.
    """
    backend = backend_of(kind)
    done = 0
    number = first
    while done < n_copies:
        layout = Layout(backend, kind, seed, number)
        try:
            layout.run(n_steps, before)
        except Exception as e:
            raise AssertionError(explain(kind, seed, number, layout, e)) from e
        done += layout.n_copies
        number += 1
    backend.close()
    return done, number - first


def main(arguments: list[str] | None = None) -> int:
    """Parse, and do it."""
    parser = argparse.ArgumentParser(prog="python -m tests.copies.driver", description=__doc__)
    parser.add_argument("--kind", choices=list(MECHANISMS), default="fake")
    parser.add_argument("--copies", type=int, default=10_000)
    parser.add_argument("--seed", type=int, help="default: any")
    parser.add_argument("--layout", type=int, help="do only this one")
    parser.add_argument("--trace", type=Path, help="write each step there before it is done")
    chosen = parser.parse_args(arguments)
    seed = chosen.seed
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32)
    begin = time.monotonic()
    n_copies = 1 if chosen.layout is not None else chosen.copies
    print(f"{chosen.kind}, seed {seed}", flush=True)
    before = None
    if chosen.trace is not None:
        trace = chosen.trace.open("w", buffering=1, encoding="utf-8")
        before = lambda step: trace.write(f"{step!r}\n")  # noqa: E731
    try:
        done, n_layouts = run(chosen.kind, seed, n_copies, first=chosen.layout or 0, before=before)
    except AssertionError as e:
        print(e)
        return FAILED
    taken = time.monotonic() - begin
    print(f"{done} copies over {n_layouts} layouts, {done / taken:.0f} a second, no difference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
