"""All mechanisms are one: whatever a copy goes through, it comes to the same, and to the model's.

More than 100 000 copies over random layouts, each done by every mechanism there is: the value, the
error with its address and count, the caller's buffer and the guest's memory agree. What each layout
does depends on its seed: fixed where CI is set, any other elsewhere, and told in a failure.
"""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

import pytest

from kvmmm.mm import debug, io
from kvmmm.mm.manager import MemoryManager
from tests.conftest import IS_SLOW_MACHINE
from tests.copies import driver
from tests.copies.catalogue import OPERATIONS
from tests.copies.world import DisagreementError, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.copies.memory import Outcome

CASES = {"fake": 15_000, "page tables": 15_000, "huge leaves": 15_000, "memslots": 12_000}
PARTS = {"fake": 3, "page tables": 2, "huge leaves": 1, "memslots": 1}
KVM = pytest.mark.kvm


def n_cases(kind: str) -> int:
    # Inside the emulated machine, and with every operation checked, a few of each.
    return 300 if IS_SLOW_MACHINE or debug.ENABLED else CASES[kind]


def test_there_are_enough():
    assert sum(CASES[kind] * parts for kind, parts in PARTS.items()) >= 100_000


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "part"),
    [
        pytest.param(kind, part, marks=() if kind == "fake" else KVM)
        for kind, parts in PARTS.items()
        for part in range(parts)
    ],
)
def test_equivalence(kind: str, part: int):
    seed = part if "CI" in os.environ else random.SystemRandom().randrange(1 << 32)
    begin = time.process_time()
    n_copies, n_layouts = driver.run(kind, seed, n_cases(kind))
    rate = n_copies / (time.process_time() - begin)
    print(f"{n_copies} copies, {n_layouts} layouts over {kind}, {rate:.0f} a second")  # noqa: T201


# ---- that it would find something ----


def sabotaged(monkeypatch: pytest.MonkeyPatch, n_copies: int = 6_000) -> str:
    """What it says of the fake space, without looking for the shortest way there."""
    monkeypatch.setattr(driver, "explain", lambda *args: f"{args[-1]}")
    with pytest.raises(AssertionError) as caught:
        driver.run("fake", 1, n_copies)
    return str(caught.value)


def test_it_finds_frames_that_are_not_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MemoryManager, "forget", lambda *_: None)
    assert sabotaged(monkeypatch)


def test_it_finds_too_much_permission(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(io, "_FRAME_BITS", ((15,) * 8,) * 8)
    assert sabotaged(monkeypatch)


def test_it_finds_a_wrong_count(monkeypatch: pytest.MonkeyPatch):
    right = io._after

    def wrong(error: Exception, done: int) -> Exception:
        return right(error, done + (done > 4096))  # type: ignore[arg-type]

    monkeypatch.setattr(io, "_after", wrong)
    assert sabotaged(monkeypatch)


@pytest.mark.parametrize(
    "twist",
    [
        lambda o: o._replace(buffer=o.buffer[:-1] + b"?") if len(o.buffer) > 9000 else o,
        lambda o: o._replace(value=o.value + 1) if o.value == 4097 else o,
    ],
    ids=["a byte behind", "a count"],
)
def test_it_finds_what_one_of_them_does(
    monkeypatch: pytest.MonkeyPatch, twist: Callable[[Outcome], Outcome]
):
    perform = OPERATIONS["copy_in"].perform

    def twisted(mm: MemoryManager, how: dict[str, object], **arguments: object) -> Outcome:
        outcome = perform(mm, how, **arguments)
        return twist(outcome) if "mirror" in repr(how) else outcome

    monkeypatch.setattr(OPERATIONS["copy_in"], "perform", staticmethod(twisted))
    assert sabotaged(monkeypatch).startswith("mi")


# ---- what it says ----


def a_story() -> list[Step]:
    where = {"who": 0, "page": 16}
    return [
        Step("maps", {**where, "n": 8, "perms": 3, "name": "", "private": True, "index": 0,
                      "stack": False}),
        Step("copy_out", {"who": 0, "ignore": False, "addr": 65536, "n": 9, "seed": 1, "kind": 0}),
        Step("protects", {**where, "n": 8, "perms": 1}),
        Step("read", {"who": 0, "ignore": False, "addr": 65530, "n": 4}),
        Step("copy_out", {"who": 0, "ignore": False, "addr": 65536, "n": 9, "seed": 2, "kind": 0}),
    ]  # fmt: skip


def test_a_story_is_told_again():
    numbers = dict.fromkeys(driver.NUMBERS, 64)
    assert driver.replay("fake", numbers, a_story()) is None


def test_a_failure_is_told_in_few_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MemoryManager, "forget", lambda *_: None)
    numbers = dict.fromkeys(driver.NUMBERS, 64)
    steps = a_story()
    error = driver.replay("fake", numbers, steps)
    assert isinstance(error, DisagreementError)
    fewer = driver.shrink("fake", numbers, steps, error)
    assert fewer == [steps[0], steps[1], steps[2], steps[4]]
    assert "Step(name='protects'" in driver.as_code("fake", numbers, fewer)


def test_a_file_is_not_cut_behind_a_copy_that_lost_its_page():
    # One write copies the window of 2 MiB around it; the page that was written then goes, and the
    # copies of its neighbours stay, whatever becomes of the file.
    where = {"who": 0, "private": True, "stack": False}
    steps = [
        Step("maps", {**where, "page": 1022, "n": 33, "perms": 1, "name": "/brief", "index": 7}),
        Step("copy_out", {"who": 0, "ignore": True, "addr": 1027 << 12, "n": 8192, "seed": 1,
                          "kind": 2}),
        Step("maps", {**where, "page": 1021, "n": 33, "perms": 4, "name": "", "index": 0}),
        Step("cuts_brief", {"size_bytes": 0}),
        Step("copy_out", {"who": 0, "ignore": True, "addr": 1054 << 12, "n": 4, "seed": 2,
                          "kind": 0}),
    ]  # fmt: skip
    numbers = dict.fromkeys(driver.NUMBERS, 64)
    assert driver.replay("fake", numbers, steps) is None


def test_layouts_are_repeated():
    steps = []
    for _ in range(2):
        backend = driver.backend_of("fake")
        layout = driver.Layout(backend, "fake", 7, 3)
        layout.run(60)
        backend.close()
        steps.append(layout.steps)
    assert steps[0] == steps[1]


def test_main(capsys: pytest.CaptureFixture[str]):
    assert driver.main(["--copies", "50", "--seed", "3"]) == 0
    assert "no difference" in capsys.readouterr().out
