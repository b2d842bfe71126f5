"""The mirror's VMAs: the budget, who gives way, and what happens where the host refuses."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kvmmm.platform.mirror as mirror_module
from kvmmm.errors import AddressSpaceIOUnavailableError
from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.platform.mirror import Mirror
from kvmmm.safemem.ffi import MirrorWindow
from tests.platform.mirror_rig import (
    BASE,
    GIB,
    MAX_ADDR,
    PAGE,
    at,
    check_windows,
    hva_of,
    peek,
    stamp,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.platform.mirror_rig import NewMirror


# ---- what it may use --------------------------------------------------------------------------


def test_the_oldest_runs_give_way(new_mirror: NewMirror, mirrored_fd: int):
    drains = []

    def drain() -> None:
        # No copy finds it any more, and those that did are not disturbed yet.
        assert mirror.find(BASE, 1, READ) is None
        drains.append(peek(hva_of(mirror, BASE)))

    mirror = new_mirror(budget_vmas=20, drain=drain)
    for i in range(40):
        addr = BASE + i * 64 * PAGE
        mirror.map_run(addr, addr + PAGE, mirrored_fd, i * PAGE, READ, (addr, addr + 1))
        assert mirror.n_vmas <= 20
        assert peek(at(mirror, addr)) == stamp(i)
        check_windows(mirror)
        drains[1:] = []
    assert drains == [stamp(0)]
    resident = [i for i in range(40) if mirror.find(BASE + i * 64 * PAGE, 1, READ)]
    assert resident == list(range(resident[0], 40))
    assert len(resident) >= 6
    assert peek(hva_of(mirror, BASE)) == signal.SIGSEGV


def test_pieces_of_a_block_go_together(new_mirror: NewMirror, mirrored_fd: int):
    mirror = new_mirror(budget_vmas=60)
    for i in range(0, 56, 2):
        addr = BASE + i * PAGE
        mirror.map_run(addr, addr + PAGE, mirrored_fd, i * PAGE, READ, (addr, addr + 1))
    assert mirror.n_evictions == 0
    far = BASE + 640 * PAGE
    for i in range(0, 6, 2):
        addr = far + i * PAGE
        mirror.map_run(addr, addr + PAGE, mirrored_fd, i * PAGE, READ, (addr, addr + 1))
    assert mirror.n_evictions == mirror.n_clears == 1
    assert mirror.n_resident_pages == 3


def test_what_is_left_of_a_replaced_run_is_evicted_as_well(new_mirror: NewMirror, mirrored_fd: int):
    mirror = new_mirror(budget_vmas=12)
    for i in range(4):
        addr = BASE + i * 64 * PAGE
        wanted = (addr, addr + 1)
        mirror.map_run(addr, addr + 4 * PAGE, mirrored_fd, 0, READ, wanted)
        mirror.unmap(addr, addr + PAGE)  # no beginning is known of the rest
    for i in range(4, 20):
        addr = BASE + i * 64 * PAGE
        mirror.map_run(addr, addr + PAGE, mirrored_fd, 0, READ, (addr, addr + 1))
    assert mirror.n_resident_pages <= 5
    assert mirror.find(BASE + PAGE, 1, READ) is None


def test_a_run_taken_away_piece_by_piece_keeps_to_the_budget(
    new_mirror: NewMirror, mirrored_fd: int
):
    mirror = new_mirror(budget_vmas=40)
    mirror.map_run(BASE, BASE + 128 * PAGE, mirrored_fd, 0, READ, (BASE, BASE + 1))
    for i in range(1, 128, 2):
        addr = BASE + i * PAGE
        mirror.unmap(addr, addr + PAGE)
        assert mirror.n_vmas <= 40


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_no_budget_no_mirror(new_mirror: NewMirror, mirrored_fd: int, budget: int):
    mirror = new_mirror(budget_vmas=budget)
    with pytest.raises(AddressSpaceIOUnavailableError, match="VMAs"):
        mirror.map_run(BASE, BASE + PAGE, mirrored_fd, 0, READ, (BASE, BASE + 1))
    assert mirror.n_vmas == 0


def test_mirrors_share_the_budget_of_the_process(
    new_mirror: NewMirror, mirrored_fd: int, monkeypatch: pytest.MonkeyPatch
):
    first = new_mirror(budget_vmas=None)
    monkeypatch.setattr(mirror_module, "_process_budget", first.n_vmas_of_process + 10)
    second = new_mirror(budget_vmas=None)
    for i in range(3):
        addr = BASE + i * 64 * PAGE
        first.map_run(addr, addr + PAGE, mirrored_fd, 0, READ, (addr, addr + 1))
    with pytest.raises(AddressSpaceIOUnavailableError):
        second.map_run(BASE, BASE + PAGE, mirrored_fd, 0, READ, (BASE, BASE + 1))
    assert first.n_vmas == 8
    first.release()
    second.map_run(BASE, BASE + PAGE, mirrored_fd, 0, READ, (BASE, BASE + 1))


def test_the_budget_is_a_quarter_of_what_the_process_may_have():
    limit = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
    assert mirror_module.process_budget_vmas() == min(16384, limit // 4)


def test_runs_that_are_gone_are_not_kept_in_mind(new_mirror: NewMirror, mirrored_fd: int):
    mirror = new_mirror()
    for i in range(5000):
        addr = BASE + i * PAGE
        mirror.map_run(addr, addr + PAGE, mirrored_fd, 0, READ, (addr, addr + 1))
        mirror.unmap(addr, addr + PAGE)
    assert len(mirror._runs) <= 1024


# ---- what goes wrong --------------------------------------------------------------------------


def test_what_the_host_refuses_is_not_available(new_mirror: NewMirror, mirrored_fd: int):
    readable = os.open(f"/proc/self/fd/{mirrored_fd}", os.O_RDONLY)
    mirror = new_mirror()
    wanted = (BASE, BASE + 1)
    mirror.map_run(BASE, BASE + 2 * PAGE, mirrored_fd, 0, READ, wanted)
    with pytest.raises(AddressSpaceIOUnavailableError, match="Permission denied"):
        mirror.map_run(BASE, BASE + PAGE, readable, 0, READ_WRITE, wanted)
    os.close(readable)
    with pytest.raises(AddressSpaceIOUnavailableError, match="Bad file descriptor"):
        mirror.map_run(BASE, BASE + PAGE, 999_999, 0, READ, wanted)
    assert mirror.find(BASE, 1, READ) is None
    assert peek(hva_of(mirror, BASE)) == stamp(0)  # replaced by nothing: no hole
    assert peek(at(mirror, BASE + PAGE)) == stamp(1)


class Refusing(Mirror):
    """A mirror whose kernel says ENOMEM."""

    __slots__ = ("refusals",)

    def map(self, start: int, end: int, fd: int, fo: int, perms: int, /) -> None:
        if self.refusals.pop(0):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        super().map(start, end, fd, fo, perms)

    def clear(self, start: int, end: int, /) -> None:
        if self.refusals.pop(0):
            self.forget(start, end)
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        super().clear(start, end)


@pytest.fixture
def refusing(mirrored_fd: int) -> Iterator[Refusing]:
    mirror = Refusing(MAX_ADDR, lambda: None, budget_vmas=200)
    mirror.refusals = [False] * 60
    for i in range(60):
        addr = BASE + i * 64 * PAGE
        mirror.map_run(addr, addr + PAGE, mirrored_fd, i * PAGE, READ, (addr, addr + 1))
    yield mirror
    check_windows(mirror)
    mirror.release()


def test_without_vmas_a_quarter_gives_way_and_stays_away(refusing: Refusing, mirrored_fd: int):
    refusing.refusals = [True, *[False] * 30]
    n_before = refusing.n_vmas
    refusing.map_run(BASE - PAGE, BASE, mirrored_fd, 70 * PAGE, READ, (BASE - PAGE, BASE))
    assert peek(at(refusing, BASE - PAGE)) == stamp(70)
    assert refusing.find(BASE, 1, READ) is None
    assert refusing._budget_vmas == n_before - n_before // 4
    assert refusing.n_vmas <= refusing._budget_vmas


def test_a_few_vmas_are_never_given_up(refusing: Refusing, mirrored_fd: int):
    for _attempt in range(20):
        refusing.refusals = [True, *[False] * 60]
        refusing.map_run(BASE - PAGE, BASE, mirrored_fd, 0, READ, (BASE - PAGE, BASE))
    assert refusing._budget_vmas == 64


def test_when_nothing_helps_it_is_unavailable(refusing: Refusing, mirrored_fd: int):
    class Never(list[bool]):
        def pop(self, _index: int = 0) -> bool:
            return True

    refusing.refusals = Never()
    with pytest.raises(AddressSpaceIOUnavailableError, match="Cannot allocate memory"):
        refusing.map_run(BASE, BASE + PAGE, mirrored_fd, 0, READ, (BASE, BASE + 1))
    assert refusing.n_resident_pages == 0


def test_an_unmap_that_fails_empties_the_window(refusing: Refusing):
    refusing.refusals = [True]
    refusing.unmap(BASE, BASE + PAGE)
    assert refusing.n_resident_pages == 0
    assert refusing.n_vmas == 2
    assert refusing.n_stuck == 0
    assert peek(hva_of(refusing, BASE)) == signal.SIGSEGV


@pytest.mark.parametrize(
    ("start", "end", "fo", "perms"),
    [
        (BASE, BASE, 0, READ),
        (BASE + 1, BASE + PAGE, 0, READ),
        (BASE, BASE + 1, 0, READ),
        (BASE + PAGE, BASE, 0, READ),
        (BASE, BASE + PAGE, 1, READ),
        (BASE, BASE + PAGE, 0, 0),
        (BASE, BASE + PAGE, 0, 8),
        (6 * GIB - PAGE, 6 * GIB + PAGE, 0, READ),
        (MAX_ADDR, MAX_ADDR + PAGE, 0, READ),
        (BASE, BASE + PAGE, 1 << 63, READ),
    ],
)
def test_what_is_no_run_is_refused(mirrored_fd: int, start: int, end: int, fo: int, perms: int):
    window = MirrorWindow(MAX_ADDR)
    with pytest.raises(ValueError, match=r"run|range"):
        window.map(start, end, mirrored_fd, fo, perms)
    assert window.n_vmas == 0


def test_arguments_of_another_kind():
    window = MirrorWindow(MAX_ADDR)
    with pytest.raises(TypeError):
        window.map(0, PAGE)
    with pytest.raises(TypeError):
        window.forget("0", PAGE)
    with pytest.raises(OverflowError):
        window.forget(-PAGE, PAGE)
    for max_addr in (0, 1, (1 << 57) + PAGE):
        with pytest.raises(ValueError, match="max_addr"):
            MirrorWindow(max_addr)
    with pytest.raises(ValueError, match="max_addr"):
        window.__init__(MAX_ADDR)
