"""Files of the host, mapped: what is written goes to the file, or stays here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import GuestBusError, GuestFaultError
from kvmmm.hostarch.access import READ
from kvmmm.memmap.host_file import HostFile
from tests.mm.family import HUGE, PAGE, Family

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START = 8 * HUGE
CONTENT = b"".join(bytes([65 + i]) * PAGE for i in range(8))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "file"
    made.write_bytes(CONTENT)
    return made


@pytest.fixture
def file(path: Path) -> Iterator[HostFile]:
    with HostFile.open(path, writable=True) as made:
        yield made


@pytest.fixture(params=[False, True], ids=["tables", "memslots"])
def family(request: pytest.FixtureRequest, file: HostFile) -> Iterator[Family]:
    del file  # it is closed after the mappings
    with Family(Arena(64 << 20), walks_frames=request.param) as made:
        yield made


def test_shared(family: Family, file: HostFile, path: Path):
    one = family.first
    one.map(START, START + 4 * PAGE, mappable=file, offset=PAGE, private=False)
    assert one.load(START, 2) == b"BB"
    one.store(START + PAGE - 1, b"xy")
    one.mm.copy_out(START + 2 * PAGE, b"host")
    file.msync(0, 8 * PAGE)
    now = path.read_bytes()
    assert now[2 * PAGE - 1 : 2 * PAGE + 1] == b"xy"
    assert now[3 * PAGE : 3 * PAGE + 4] == b"host"
    assert one.mm.read(START + 2 * PAGE, 6) == b"hostDD"
    child = family.fork(one)
    child.store(START, b"child")
    assert one.load(START, 5) == b"child"


def test_private(family: Family, file: HostFile, path: Path):
    one = family.first
    one.map(START, START + 4 * PAGE, mappable=file, offset=PAGE)
    assert one.load(START, 2) == b"BB"
    child = family.fork(one)
    one.store(START + 1, b"x")
    child.mm.copy_out(START + 2, b"y")
    assert (one.load(START, 4), child.load(START, 4)) == (b"BxBB", b"BByB")
    grandchild = family.fork(child)
    grandchild.store(START, b"z")
    assert (child.load(START, 4), grandchild.load(START, 4)) == (b"BByB", b"zByB")
    assert path.read_bytes() == CONTENT


def test_cut_short(family: Family, file: HostFile):
    one = family.first
    one.map(START, START + 8 * PAGE, mappable=file)
    one.map(START + HUGE, START + HUGE + 8 * PAGE, mappable=file, private=False)
    one.store(START + 6 * PAGE, b"mine")
    assert one.load(START + HUGE + 6 * PAGE, 4) == b"GGGG"
    child = family.fork(one)
    file.truncate(3 * PAGE + 5)
    for process in (one, child):
        for base in (START, START + HUGE):
            assert process.load(base + 3 * PAGE, 5) == b"DDDDD"
            with pytest.raises(GuestBusError):
                process.load(base + 6 * PAGE, 1)
            with pytest.raises(GuestBusError) as caught:
                process.mm.read(base + 2 * PAGE, 4 * PAGE)
            assert (caught.value.addr, caught.value.done) == (base + 4 * PAGE, 2 * PAGE)
    file.truncate(8 * PAGE)
    assert one.load(START + 6 * PAGE, 4) == bytes(4)


def test_cut_short_by_somebody_else(family: Family, file: HostFile, path: Path):
    """Nobody told us: copies find out, and copies on write."""
    one = family.first
    one.map(START, START + 8 * PAGE, mappable=file)
    assert one.load(START, 8 * PAGE) == CONTENT
    with path.open("r+b") as other:
        other.truncate(2 * PAGE)
    assert one.mm.read(START, 2 * PAGE) == CONTENT[: 2 * PAGE]
    with pytest.raises(GuestBusError) as caught:
        one.mm.read(START, 8 * PAGE)
    assert caught.value.addr >= START + 2 * PAGE
    with pytest.raises(GuestBusError):
        one.store(START + 5 * PAGE, b"x")
    one.store(START + PAGE, b"x")
    assert one.load(START + PAGE, 2) == b"xB"


def test_a_file_that_may_only_be_read(path: Path):
    with HostFile.open(path) as file, Family(Arena(64 << 20)) as family:
        one = family.first
        one.map(START, START + 4 * PAGE, READ, mappable=file, private=False)
        assert one.load(START, 1) == b"A"
        for ignore in (False, True):
            with pytest.raises(GuestFaultError):
                one.mm.copy_out(START, b"x", ignore_permissions=ignore)
        one.map(START + HUGE, START + HUGE + 4 * PAGE, mappable=file)
        one.store(START + HUGE, b"x")
        assert one.load(START + HUGE, 2) == b"xA"


def test_pins_of_a_file(family: Family, file: HostFile):
    one = family.first
    one.map(START, START + 4 * PAGE, mappable=file, private=False)
    with one.mm.pin_frames(START + PAGE, PAGE, READ) as pin:
        one.mm.munmap(START, 4 * PAGE)
        _, held, fr = pin.ranges[0]
        part = bytearray(2)
        assert held.read_into(fr.start, memoryview(part)) == 2
        assert part == b"BB"
