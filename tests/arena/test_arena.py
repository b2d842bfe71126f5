"""Arena: bytes, bounds, refusals, and the order in which it ends."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvmmm.arena import Arena
from kvmmm.arena import arena as arena_module
from kvmmm.arena import frames as frames_module
from kvmmm.errors import ArenaExhaustedError, RangeError, StateError
from kvmmm.hostarch.ranges import FileRange

PAGE = 4096
HUGE = 1 << 21


@pytest.fixture
def arena():
    with Arena(4 * HUGE, debug=False) as arena:
        yield arena
        arena._usage.check_invariants()


@pytest.fixture
def debug_arena():
    with Arena(4 * HUGE, debug=True) as arena:
        yield arena
        arena._usage.check_invariants()


def resident_bytes(arena: Arena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


def mappings() -> int:
    return Path("/proc/self/maps").read_text(encoding="ascii").count("kvmmm-arena")


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def test_capacity_is_rounded_up_and_aligned():
    for wanted, got in ((1, HUGE), (HUGE, HUGE), (HUGE + 1, 2 * HUGE)):
        with Arena(wanted) as arena:
            assert arena.capacity_bytes == got == len(arena.view)
            assert arena.hva % HUGE == 0
            assert arena.view.format == "B"
            assert not arena.view.readonly


@pytest.mark.parametrize("capacity", [0, -1, (1 << 46) + 1])
def test_impossible_capacity(capacity: int):
    with pytest.raises(RangeError):
        Arena(capacity)


def test_sealed_and_sparse(arena: Arena):
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, HUGE)
    assert resident_bytes(arena) == 0
    fr = arena.allocate(HUGE)
    assert resident_bytes(arena) == 0
    arena.view[fr.start] = 1
    assert resident_bytes(arena) == PAGE


def test_file_mapping_and_views_are_the_same_bytes(arena: Arena):
    fr = arena.allocate(2 * PAGE, at=HUGE + 3 * PAGE)
    with arena.view_of(fr) as view:
        assert len(view) == 2 * PAGE
        view[:5] = b"hello"
    assert arena.view[fr.start : fr.start + 5] == b"hello"
    assert os.pread(arena.fd, 5, fr.start) == b"hello"


def test_phase(arena: Arena):
    gpa = 0x7_1234_5000
    fr = arena.allocate(PAGE, align_bytes=HUGE, phase_bytes=gpa)
    assert (fr.start - gpa) % HUGE == 0


def test_freed_pages_are_punched_and_come_back_zero(arena: Arena):
    fr = arena.allocate(4 * PAGE)
    arena.view[fr.start : fr.end] = b"\xff" * fr.length_bytes
    arena.inc_ref(FileRange(fr.start, fr.start + PAGE))
    arena.dec_ref(fr)
    assert resident_bytes(arena) == PAGE
    assert arena.ref_count(fr.start) == 1
    again = arena.allocate(3 * PAGE)
    assert again == FileRange(fr.start + PAGE, fr.end)
    assert bytes(arena.view[again.start : again.end]) == bytes(3 * PAGE)
    assert arena.view[fr.start] == 0xFF


def test_debug_shows_a_use_after_free(debug_arena: Arena):
    fr = debug_arena.allocate(2 * PAGE)
    debug_arena.view[fr.start] = 1
    debug_arena.dec_ref(fr)
    assert bytes(debug_arena.view[fr.start : fr.end]) == b"\xdb" * 2 * PAGE
    assert debug_arena.statistics().punched_bytes == 0
    again = debug_arena.allocate(PAGE, at=fr.start)
    assert bytes(debug_arena.view[again.start : again.end]) == bytes(PAGE)
    assert debug_arena.view[again.end] == 0xDB
    assert debug_arena.statistics().punched_bytes == PAGE


@pytest.mark.parametrize(("value", "filled"), [("1", True), ("0", False), ("", False)])
def test_environment_turns_debugging_on(value: str, filled: bool):
    program = (
        "from kvmmm.arena import Arena\n"
        "with Arena(1) as a:\n"
        "    a.dec_ref(a.allocate(4096))\n"
        "    raise SystemExit(a.view[0] != 0xdb)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "KVMMM_DEBUG": value},
        timeout=60,
        check=False,
    )
    assert (ran.returncode == 0) == filled


def test_exhausted(arena: Arena):
    arena.allocate(3 * HUGE)
    with pytest.raises(ArenaExhaustedError) as e:
        arena.allocate(2 * HUGE)
    facts = (e.value.wanted_bytes, e.value.free_bytes, e.value.capacity_bytes)
    assert facts == (2 * HUGE, HUGE, 4 * HUGE)
    assert e.value.errno == errno.ENOMEM
    with pytest.raises(ArenaExhaustedError):
        arena.allocate(PAGE, at=PAGE)
    assert arena.statistics().used_bytes == 3 * HUGE


def test_reserved_pages_are_nobody_elses(arena: Arena):
    reservation = arena.reserve(3 * HUGE, align_bytes=HUGE)
    assert reservation is not None
    assert arena.reserve(2 * HUGE) is None
    arena.allocate(HUGE)
    for at in (None, reservation.start):
        with pytest.raises(ArenaExhaustedError):
            arena.allocate(PAGE, at=at)
    fr = arena.allocate(PAGE, at=reservation.start + PAGE, reservation=reservation)
    with pytest.raises(ArenaExhaustedError):
        arena.allocate(2 * PAGE, at=reservation.start, reservation=reservation)
    assert arena.statistics().reserved_bytes == 3 * HUGE - PAGE
    arena.dec_ref(fr)
    assert arena.statistics().reserved_bytes == 3 * HUGE
    arena.unreserve(reservation)
    assert arena.statistics().free_bytes == 3 * HUGE


def test_reservation_of_another_arena(arena: Arena):
    with Arena(HUGE) as other:
        reservation = other.reserve(PAGE)
        assert reservation is not None
        with pytest.raises(StateError, match="no reservation of this arena"):
            arena.allocate(PAGE, at=0, reservation=reservation)
        with pytest.raises(StateError, match="no reservation of this arena"):
            arena.unreserve(reservation)


@pytest.mark.parametrize(
    "arguments",
    [
        {"length_bytes": 0},
        {"length_bytes": -PAGE},
        {"length_bytes": 100},
        {"length_bytes": PAGE, "align_bytes": 3 * PAGE},
        {"length_bytes": PAGE, "align_bytes": 1024},
        {"length_bytes": PAGE, "phase_bytes": 7},
        {"length_bytes": PAGE, "at": 5},
        {"length_bytes": PAGE, "at": -PAGE},
        {"length_bytes": PAGE, "at": 4 * HUGE},
        {"length_bytes": 2 * PAGE, "at": 4 * HUGE - PAGE},
        {"length_bytes": PAGE, "at": PAGE, "align_bytes": HUGE},
    ],
)
def test_malformed_requests_change_nothing(arena: Arena, arguments: dict[str, int]):
    with pytest.raises(RangeError):
        arena.allocate(**arguments)
    statistics = arena.statistics()
    assert (statistics.free_bytes, statistics.allocation_count) == (4 * HUGE, 0)


def test_reservation_needs_a_place(arena: Arena):
    reservation = arena.reserve(HUGE)
    with pytest.raises(RangeError, match="at="):
        arena.allocate(PAGE, reservation=reservation)


@pytest.mark.parametrize(
    ("fr", "error"),
    [
        (FileRange(0, 0), RangeError),
        (FileRange(0, 100), RangeError),
        (FileRange(100, PAGE), RangeError),
        (FileRange(4 * HUGE, 4 * HUGE + PAGE), RangeError),
        (FileRange(0, 1 << 64), RangeError),
        (FileRange(PAGE, 3 * PAGE), StateError),
        (FileRange(HUGE, HUGE + PAGE), StateError),
    ],
)
def test_malformed_references_change_nothing(arena: Arena, fr: FileRange, error: type[Exception]):
    arena.view[PAGE] = 9
    arena.allocate(2 * PAGE)
    for change in (arena.inc_ref, arena.dec_ref):
        with pytest.raises(error):
            change(fr)
    assert (arena.ref_count(0), arena.ref_count(PAGE), arena.ref_count(2 * PAGE)) == (1, 1, 0)
    assert arena.view[PAGE] == 9


def test_freed_twice(arena: Arena):
    fr = arena.allocate(PAGE)
    arena.dec_ref(fr)
    with pytest.raises(StateError, match="freed twice"):
        arena.dec_ref(fr)


def test_failed_punch_keeps_the_reference(arena: Arena, monkeypatch: pytest.MonkeyPatch):
    def refuse(_fd: int, _offset: int, _length_bytes: int) -> None:
        raise OSError(errno.EINTR, "Interrupted system call")

    fr = arena.allocate(PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(frames_module, "punch_hole", refuse)
        with pytest.raises(InterruptedError):
            arena.dec_ref(fr)
    assert arena.ref_count(fr.start) == 1
    arena.dec_ref(fr)
    assert arena.ref_count(fr.start) == 0


def test_statistics(arena: Arena):
    first = arena.allocate(3 * PAGE)
    arena.allocate(PAGE)
    arena.reserve(HUGE, align_bytes=HUGE)
    arena.dec_ref(first)
    statistics = arena.statistics()
    assert statistics.used_bytes == PAGE
    assert statistics.reserved_bytes == HUGE
    assert statistics.free_bytes == 3 * HUGE - PAGE
    assert statistics.capacity_bytes == 4 * HUGE
    assert statistics.peak_used_bytes == 4 * PAGE
    assert statistics.largest_free_bytes == 2 * HUGE
    assert statistics.allocation_count == 2
    assert statistics.free_count == 1
    assert statistics.punched_bytes == 3 * PAGE
    assert "used_bytes=4096" in repr(statistics)


# The end.


def test_close_is_final_and_idempotent():
    arena = Arena(HUGE)
    fr = arena.allocate(PAGE)
    fd, view = arena.fd, arena.view
    assert repr(arena).startswith(f"<Arena fd={fd} hva=0x")
    arena.close()
    arena.close()
    assert (arena.fd, arena.hva, repr(arena)) == (-1, 0, "<Arena closed>")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(ValueError, match="released"):
        view[0]
    calls = [
        lambda: arena.allocate(PAGE),
        lambda: arena.reserve(PAGE),
        lambda: arena.inc_ref(fr),
        lambda: arena.dec_ref(fr),
        lambda: arena.view_of(fr),
    ]
    for call in calls:
        with pytest.raises(StateError, match="closed"):
            call()
    assert arena.statistics().used_bytes == PAGE


def test_close_refuses_while_a_view_is_held():
    arena = Arena(HUGE)
    fr = arena.allocate(PAGE)
    held = arena.view_of(fr)
    piece = arena.view[:10]
    with pytest.raises(StateError, match="2 memoryview") as e:
        arena.close()
    assert isinstance(e.value.__cause__, BufferError)
    held[0] = 5  # still mapped, still open
    assert arena.view[fr.start] == 5
    arena.dec_ref(arena.allocate(PAGE))
    held.release()
    with pytest.raises(StateError, match="1 memoryview"):
        arena.close()
    piece.release()
    arena.close()
    assert arena.fd == -1


def test_close_refuses_while_a_buffer_of_the_view_is_held():
    arena = Arena(HUGE)
    held = memoryview(arena.view)
    with pytest.raises(StateError, match="stays open"):
        arena.close()
    arena.view[0] = 1
    assert held[0] == 1
    held.release()
    arena.close()


def test_forgotten_arena_goes_but_its_views_stay():
    arena = Arena(HUGE)
    fd = arena.fd
    view = arena.view_of(FileRange(0, PAGE))
    view[0] = 3
    before = mappings()
    del arena
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert view[0] == 3
    view.release()
    del view
    assert mappings() == before - 1


def test_view_outside_the_arena(arena: Arena):
    with pytest.raises(RangeError, match="ends at 0x800000"):
        arena.view_of(FileRange(0, 4 * HUGE + PAGE))


def test_no_leaks():
    fds, maps = descriptors(), mappings()
    for i in range(200):
        arena = Arena(64 * HUGE)
        arena.dec_ref(arena.allocate(HUGE))
        with arena.view_of(arena.allocate(PAGE)) as view:
            view[0] = 1
        if i % 2:
            arena.close()
        del arena
    assert (descriptors(), mappings()) == (fds, maps)


def test_refused_mapping_leaks_nothing(monkeypatch: pytest.MonkeyPatch):
    def refuse(_fd: int, _length_bytes: int, _align_bytes: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(arena_module, "HostMapping", refuse)
    before = descriptors()
    with pytest.raises(OSError, match=r"cannot map an arena of 2 MiB .*: Cannot allocate memory"):
        Arena(HUGE)
    assert descriptors() == before


def test_threads_get_different_pages(arena: Arena):
    got: list[list[FileRange]] = [[] for _ in range(4)]

    def work(mine: list[FileRange], tag: int) -> None:
        for i in range(100):
            fr = arena.allocate(PAGE)
            assert arena.view[fr.start] == 0
            arena.view[fr.start] = tag
            mine.append(fr)
            if i % 3 == 0:
                arena.dec_ref(mine.pop(0))

    threads = [threading.Thread(target=work, args=(mine, i + 1)) for i, mine in enumerate(got)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    starts = [fr.start for mine in got for fr in mine]
    assert len(set(starts)) == len(starts) == arena.statistics().used_bytes // PAGE == 4 * 66
    for tag, mine in enumerate(got):
        assert all(arena.view[fr.start] == tag + 1 for fr in mine)
