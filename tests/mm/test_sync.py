"""msync."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import MmError
from kvmmm.mm.vma import LOCK_LAZY
from tests.mm.conftest import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
TOP = 1 << 64


@pytest.fixture
def setup(make: Make) -> Setup:
    """Anonymous, shared file, private file, shared file; a hole; shared file."""
    setup = make()
    setup.memory = Recorder(setup.arena, 64 * PAGE)  # type: ignore[attr-defined]
    shared = {"mappable": setup.memory, "private": False}  # type: ignore[attr-defined]
    setup.map(0, 2 * PAGE)
    setup.map(2 * PAGE, 4 * PAGE, offset=8 * PAGE, **shared)
    setup.map(4 * PAGE, 5 * PAGE, mappable=shared["mappable"])
    setup.map(5 * PAGE, 6 * PAGE, 1, **shared)
    setup.map(7 * PAGE, 8 * PAGE, offset=PAGE, **shared)
    setup.memory.calls.clear()  # type: ignore[attr-defined]
    return setup


def synced(setup: Setup) -> list[tuple[int, int]]:
    calls = setup.memory.calls  # type: ignore[attr-defined]
    assert all(what == "msync" for what, *_ in calls)
    return [(start // PAGE, end // PAGE) for _, start, end in calls]


REFUSED: list[tuple[tuple[int, int], dict[str, Any], int]] = [
    ((0, PAGE), {"sync": True, "async_": True}, errno.EINVAL),
    ((1, 0), {"sync": True}, errno.EINVAL),
    ((-PAGE, PAGE), {"sync": True}, errno.EINVAL),
    ((0, TOP), {"sync": True}, errno.ENOMEM),
    ((PAGE, TOP - PAGE), {"async_": True}, errno.ENOMEM),
    ((0, -1), {}, errno.ENOMEM),
    ((6 * PAGE, PAGE), {"sync": True}, errno.ENOMEM),
    ((64 * PAGE, PAGE), {"sync": True}, errno.ENOMEM),
]


@pytest.mark.parametrize(("args", "how", "err"), REFUSED)
def test_refused(setup: Setup, args: tuple[int, int], how: dict[str, Any], err: int):
    setup.refuses(lambda: setup.mm.msync(*args, **how), err, "msync")
    assert synced(setup) == []


def test_of_nothing(setup: Setup):
    setup.mm.msync(64 * PAGE, 0, sync=True)
    assert synced(setup) == []


def test_shared_mappings_are_written_readable_or_not(setup: Setup):
    setup.mm.msync(PAGE, 5 * PAGE, sync=True)
    assert synced(setup) == [(8, 10), (0, 1)]


def test_only_what_is_asked_for(setup: Setup):
    setup.mm.msync(3 * PAGE, 1, sync=True)
    assert synced(setup) == [(9, 10)]


@pytest.mark.parametrize("how", [{}, {"async_": True}, {"invalidate": True}])
def test_otherwise_nothing_is_written(setup: Setup, how: dict[str, Any]):
    setup.mm.msync(0, 6 * PAGE, **how)
    assert synced(setup) == []


def test_a_hole_is_said_when_the_rest_is_written(setup: Setup):
    with pytest.raises(MmError) as caught:
        setup.mm.msync(5 * PAGE, 4 * PAGE, sync=True)
    assert (caught.value.errno, caught.value.addr) == (errno.ENOMEM, 6 * PAGE)
    assert synced(setup) == [(0, 1), (1, 2)]


def test_locked_memory_is_not_invalidated(setup: Setup):
    setup.mm.mlock(5 * PAGE, PAGE, LOCK_LAZY)
    with pytest.raises(MmError) as caught:
        setup.mm.msync(2 * PAGE, 4 * PAGE, sync=True, invalidate=True)
    assert (caught.value.errno, caught.value.addr) == (errno.EBUSY, 5 * PAGE)
    assert synced(setup) == [(8, 10)]


def test_no_lock_is_held_while_writing(setup: Setup):
    def meanwhile(_what: str) -> None:
        memory.before = lambda _what: None
        setup.mm.munmap(5 * PAGE, PAGE)

    memory = setup.memory  # type: ignore[attr-defined]
    memory.before = meanwhile
    with pytest.raises(MmError) as caught:
        setup.mm.msync(2 * PAGE, 4 * PAGE, sync=True)
    assert caught.value.errno == errno.ENOMEM  # what is gone now


def test_the_files_error_comes_out(setup: Setup):
    def fail(_what: str) -> None:
        raise OSError(errno.EIO, "disk")

    setup.memory.before = fail  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="disk"):
        setup.mm.msync(2 * PAGE, PAGE, sync=True)
    setup.memory.before = lambda _what: None  # type: ignore[attr-defined]
