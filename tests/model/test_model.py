"""Memory managers against a dict of pages: operations, CPUs, host copies, pins, files, forks.

20 000 steps in all, over three kinds of address space; the invariants after each. `long` does a
million over the fake one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvmmm.mm import debug
from tests.conftest import IS_SLOW_MACHINE
from tests.model.rules import RULES
from tests.model.start import COMMON, OPTIONS, start

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.model.rules import Rule
    from tests.model.world import World

N_STEPS = {"fake": 3_500, "page tables": 4_000, "memslots": 2_000}
N_FAKE = 4
"""So often over the fake one, from different seeds."""
STEPS_IN_A_RUN = 50
N_PARTS = 5
# Inside the emulated machine, and with every operation checked twice, a few of each.
MAX_RUNS = 3 if IS_SLOW_MACHINE else 30 if debug.ENABLED else 1_000_000


class Machine(RuleBasedStateMachine):
    """A world, and every rule a method."""

    kind: ClassVar[str]
    n_steps: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        world, self.world = self.world, None
        if world is None:
            return
        try:
            world.compare()
            if self.kind != "fake":
                for member in world.members:
                    world.compare_by_cpu(member)
        finally:
            world.close()


def _method(one: Rule) -> Callable[..., None]:
    def act(self: Machine, **arguments: Any) -> None:
        type(self).n_steps += 1
        assert self.world is not None
        one.act(self.world, **arguments)

    act.__name__ = one.name
    strategies = {name: domain.strategy() for name, domain in one.domains.items()}
    return precondition(lambda self: self.world is None or one.when(self.world))(
        rule(**strategies)(act)
    )


def machine(kind: str, number: int = 0) -> type[Machine]:
    """Return the machine for one kind of address space; the numbers' seeds differ."""

    def begin(self: Machine, **options: Any) -> None:
        self.world = start(kind, **options)

    domains = {**COMMON, **OPTIONS[kind]}
    namespace: dict[str, Any] = {
        "kind": kind,
        "n_steps": 0,
        "begin": initialize(**{name: d.strategy() for name, d in domains.items()})(begin),
    }
    for one in RULES:
        for n in range(one.weight):
            namespace[one.name if n == 0 else f"{one.name}_{n}"] = _method(one)
    return type(f"Memory{number}", (Machine,), namespace)


KVM = [pytest.mark.kvm, pytest.mark.npt]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "number"),
    [
        *(("fake", number) for number in range(N_FAKE)),
        pytest.param("page tables", 0, marks=KVM),
        pytest.param("memslots", 0, marks=KVM),
    ],
)
def test_memory_is_what_the_model_says(kind: str, number: int):
    n_steps = 0
    # A run may be cut short, when its choices are too many: then there are more of them.
    for part in range(N_PARTS):
        memory = machine(kind, number + part * N_FAKE)
        n_runs = min((N_STEPS[kind] - n_steps) * 21 // (STEPS_IN_A_RUN * 20) + 1, MAX_RUNS)
        run_state_machine_as_test(
            memory,
            settings=settings(
                max_examples=n_runs, stateful_step_count=STEPS_IN_A_RUN, deadline=None
            ),
        )
        n_steps += memory.n_steps
        if n_runs == MAX_RUNS or n_steps >= N_STEPS[kind]:
            break
    print(f"{n_steps} steps over {kind}")  # noqa: T201
    assert n_steps >= (N_STEPS[kind] if n_runs < MAX_RUNS else 10)
