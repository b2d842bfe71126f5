"""An address space as text: the kernel's own formats, and figures that add up."""

from __future__ import annotations

import os
import random
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.hostarch.access import (
    EXECUTE,
    NO_ACCESS,
    READ,
    READ_EXECUTE,
    READ_WRITE,
    WRITE,
    parse_access,
)
from kvmmm.memmap.host_file import HostFile
from kvmmm.mm.maps import maps_line
from kvmmm.mm.sight import FILE, OWN, RELATIVE, SHARED, look
from kvmmm.mm.vma import LOCK_EAGER, LOCK_LAZY, Vma
from tests.mm.family import HUGE, PAGE, Family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmmm.mm import MemoryManager
    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

START = 8 * HUGE


@pytest.fixture
def family() -> Iterator[Family]:
    with Family(Arena(64 << 20)) as made:
        yield made


@pytest.fixture
def file(tmp_path: Path) -> Iterator[HostFile]:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * PAGE))
    with HostFile.open(path, writable=True) as made:
        yield made


def fields_of(text: str) -> dict[str, int]:
    """What smaps or status say of one mapping, in KiB."""
    return {name: int(n) for name, n in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def smaps_of(mm: MemoryManager) -> dict[int, dict[str, int]]:
    """Fields by where a mapping starts."""
    parts = re.split(r"^(?=[0-9a-f]+-)", mm.smaps(), flags=re.MULTILINE)[1:]
    return {int(part.partition("-")[0], 16): fields_of(part) for part in parts}


class TestMaps:
    def test_what_it_looks_like(self, make: Make):
        setup = make()
        setup.map(0x1000, 0x400000, READ_WRITE, "[memory]")
        setup.map(0x100000, 0x103000, READ_EXECUTE, "[image]")
        setup.map(0x300000, 0x301000, NO_ACCESS, private=False)
        setup.map(0x301000, 0x302000, NO_ACCESS)
        head = "{} {} 00000000 00:00 0 "
        assert setup.mm.maps().splitlines() == [
            f"{head.format('00001000-00100000', 'rw-p'):73}[memory]",
            f"{head.format('00100000-00103000', 'r-xp'):73}[image]",
            f"{head.format('00103000-00300000', 'rw-p'):73}[memory]",
            f"{head.format('00300000-00301000', '---s'):73}/dev/zero (deleted)",
            head.format("00301000-00302000", "---p"),
            f"{head.format('00302000-00400000', 'rw-p'):73}[memory]",
        ]

    def test_of_nothing(self, make: Make):
        assert make().mm.maps() == make().mm.smaps() == ""

    def test_as_the_host_writes_its_own(self):
        # Each line of ours, of a vma like the host's, is the host's line.
        class Identified:
            def __init__(self, device: str, inode: int) -> None:
                major, minor = (int(n, 16) for n in device.split(":"))
                self.identity = os.makedev(major, minor), inode

        lines = Path("/proc/self/maps").read_text().splitlines()
        assert len(lines) > 10
        for line in lines:
            ar, perms, offset, device, inode, *names = line.split(maxsplit=5)
            start, end = (int(n, 16) for n in ar.split("-"))
            vma = Vma(
                parse_access(perms[:3]), *names, private=perms[3] == "p",
                mappable=Identified(device, int(inode)), delta=int(offset, 16) - start,
            )  # fmt: skip
            assert maps_line(start, end, vma) == line

    def test_of_a_file(self, make: Make, file: HostFile):
        setup = make()
        setup.map(0x1000, 0x5000, READ_WRITE, mappable=file, offset=2 * PAGE, private=False)
        setup.mm.mprotect(0x3000, PAGE, READ)
        status = os.fstat(file.fd)
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        lines = [line.split() for line in setup.mm.maps().splitlines()]
        assert [line[1:3] for line in lines] == [
            ["rw-s", "00002000"], ["r--s", "00004000"], ["rw-s", "00005000"],
        ]  # fmt: skip
        assert {tuple(line[3:]) for line in lines} == {(device, str(status.st_ino), file.name)}
        setup.mm.munmap(0, 0x5000)

    def test_a_name_stays_on_its_line(self, make: Make):
        setup = make()
        setup.map(0, PAGE, name="two\nlines")
        assert setup.mm.maps().endswith("two\\012lines\n")
        assert setup.mm.maps().count("\n") == 1


class TestSmaps:
    def test_its_fields_are_the_hosts(self, make: Make):
        setup = make()
        setup.map(0, 123 * PAGE)
        ours = setup.mm.smaps().splitlines()[1:]
        host = Path("/proc/self/smaps").read_text().splitlines()
        known = [line.partition(":")[0] for line in host[1 : host.index(_next(host))]]
        names = [line.partition(":")[0] for line in ours]
        assert [name for name in known if name in names] == names
        size = next(line for line in host if line.startswith("Size:"))
        assert len(ours[0]) == len(size)
        assert ours[0] == "Size:                492 kB"

    def test_figures_of_ones_own(self, make: Make):
        setup = make()
        setup.map(0, 16 * PAGE)
        setup.mm.populate(0, 4 * PAGE)
        own = smaps_of(setup.mm)[0]
        assert own == {
            "Size": 64, "KernelPageSize": 4, "MMUPageSize": 4, "Rss": 16, "Pss": 16,
            "Shared_Clean": 0, "Shared_Dirty": 0, "Private_Clean": 0, "Private_Dirty": 16,
            "Referenced": 16, "Anonymous": 16, "Locked": 0,
        }  # fmt: skip
        setup.mm.mprotect(0, 16 * PAGE, READ)
        clean = smaps_of(setup.mm)[0]
        assert (clean["Private_Clean"], clean["Private_Dirty"]) == (16, 0)

    def test_what_a_fork_shares(self, family: Family):
        parent = family.first
        parent.map(START, START + HUGE)
        parent.map(START + HUGE, START + 2 * HUGE, READ_EXECUTE)  # copied page by page
        for addr in range(START, START + 2 * HUGE, PAGE):
            parent.mm.handle_user_fault(addr, READ)
        child = family.fork(parent)
        other = family.fork(parent)
        for one in (parent, child, other):
            shared = smaps_of(one.mm)[START]
            assert (shared["Rss"], shared["Pss"], shared["Shared_Dirty"]) == (2048, 682, 2048)
            assert look(one.mm).by_kind == [0, 2 * HUGE, 0, 0]
        child.mm.copy_out(START + HUGE + PAGE, b"x", ignore_permissions=True)
        family.check()
        sight = look(child.mm)
        assert sight.by_kind[OWN] == PAGE
        assert sight.by_kind[RELATIVE] == 2 * HUGE - PAGE
        code = smaps_of(parent.mm)[START + HUGE]
        assert code["Pss"] == (HUGE - PAGE) // 3 + PAGE // 2 >> 10
        family.end(child)
        family.end(other)
        # What nobody else has any more is private again, if not yet writable.
        alone = smaps_of(parent.mm)[START]
        assert (alone["Pss"], alone["Private_Dirty"], alone["Shared_Dirty"]) == (2048, 2048, 0)
        assert look(parent.mm).by_kind == [2 * HUGE, 0, 0, 0]

    def test_shared_memory(self, family: Family):
        parent = family.first
        parent.map(START, START + HUGE, private=False)
        parent.store(START, b"x")
        fields = smaps_of(parent.mm)[START]
        assert (fields["Pss"], fields["Private_Dirty"], fields["Anonymous"]) == (2048, 2048, 0)
        child = family.fork(parent)
        child.load(START, 1)
        for one in (parent, child):
            fields = smaps_of(one.mm)[START]
            assert (fields["Pss"], fields["Shared_Dirty"]) == (1024, 2048)
            assert look(one.mm).by_kind[SHARED] == HUGE
            assert fields_of(one.mm.status())["RssShmem"] == 2048

    def test_a_file_mapped_privately(self, family: Family, file: HostFile):
        one = family.first
        one.map(START, START + 8 * PAGE, READ_WRITE | EXECUTE, mappable=file)
        one.load(START, 8 * PAGE)
        sight = look(one.mm)
        assert sight.by_kind[FILE] == 8 * PAGE
        fields = smaps_of(one.mm)[START]
        assert (fields["Private_Clean"], fields["Private_Dirty"]) == (32, 0)
        one.store(START + PAGE, b"x")
        assert look(one.mm).by_kind == [PAGE, 0, 7 * PAGE, 0]
        fields = smaps_of(one.mm)[START]
        assert (fields["Private_Clean"], fields["Private_Dirty"]) == (28, 4)
        assert fields["Anonymous"] == 4
        status = fields_of(one.mm.status())
        assert (status["RssAnon"], status["RssFile"], status["RssShmem"]) == (4, 28, 0)
        # Mapped once more, it is shared by two mappings of one mm, as the kernel has it.
        one.map(START + HUGE, START + HUGE + PAGE, READ, mappable=file)
        one.load(START + HUGE, 1)
        assert smaps_of(one.mm)[START]["Shared_Clean"] == 4
        assert smaps_of(one.mm)[START]["Pss"] == 30
        one.mm.munmap(START, 2 * HUGE)

    def test_flags(self, family: Family, file: HostFile):
        mm = family.first.mm
        mm.mmap(PAGE, READ_WRITE, addr=START, fixed=True)
        mm.mmap(PAGE, READ, addr=START + HUGE, fixed=True, private=False, mappable=file)
        mm.mmap(PAGE, addr=START + 2 * HUGE, fixed=True, grows_down=True, stack=True)
        mm.mmap(PAGE, READ_EXECUTE, addr=START + 3 * HUGE, fixed=True, max_perms=READ_EXECUTE)
        mm.mmap(PAGE, WRITE, addr=START + 4 * HUGE, fixed=True, lock_mode=LOCK_LAZY)
        mm.madvise(START, PAGE, 10)  # MADV_DONTFORK
        flags = re.findall(r"^VmFlags: (.*)$", mm.smaps(), re.MULTILINE)
        assert flags == [
            "rd wr mr mw me dc ac", "rd sh mr mw me ms", "rd wr mr mw me gd ac", "rd ex mr me",
            "wr mr mw me lo ac",
        ]  # fmt: skip
        mm.munmap(START, 5 * HUGE)


class TestStatus:
    def test_sums(self, make: Make):
        setup = make()
        setup.map(0, 16 * PAGE)
        setup.map(HUGE, HUGE + 8 * PAGE, READ, lock_mode=LOCK_EAGER)
        setup.map(2 * HUGE, 2 * HUGE + 4 * PAGE, grows_down=True, stack=True)
        setup.mm.populate(0, 16 * PAGE)
        setup.mm.munmap(0, 4 * PAGE)
        with setup.mm.pin_frames(4 * PAGE, 3 * PAGE, WRITE):
            status = fields_of(setup.mm.status())
        assert status == {
            "VmSize": 96, "VmLck": 32, "VmPin": 12, "VmHWM": 96, "VmRSS": 80, "RssAnon": 80,
            "RssFile": 0, "RssShmem": 0, "VmData": 48, "VmStk": 16,
        }  # fmt: skip
        assert smaps_of(setup.mm)[HUGE]["Locked"] == 32

    def test_it_is_written_as_the_host_writes_its_own(self, make: Make):
        host = Path("/proc/self/status").read_text()
        for line in make().mm.status().splitlines():
            name = line.partition(":")[0]
            found = re.search(rf"^{name}:\t.*$", host, re.MULTILINE)
            assert found is not None, f"the host has no {name}"
            assert len(line) == len(found[0])


@pytest.mark.parametrize("seed", range(8))
def test_a_family_shares_every_frame_out_exactly(family: Family, seed: int):
    # Proportional shares of all members together are the frames in use.
    rng = random.Random(seed)
    family.first.map(START, START + 8 * HUGE, READ_WRITE)
    family.first.map(START + 2 * HUGE, START + 4 * HUGE, READ_WRITE | EXECUTE)
    family.first.map(START + 6 * HUGE, START + 7 * HUGE, private=False)
    for _ in range(60):
        one = rng.choice(family.members)
        addr = START + rng.randrange(8 * HUGE) & -PAGE
        match rng.randrange(8):
            case 0 if len(family.members) < 4:
                family.fork(one)
            case 1:
                one.mm.madvise(addr, min(4 * PAGE, START + 8 * HUGE - addr), 4)  # MADV_DONTNEED
            case _:
                one.mm.handle_user_fault(addr, rng.choice((READ, WRITE)))
    sights = [look(one.mm) for one in family.members]
    pss = sum(mapping.pss_bytes for sight in sights for mapping in sight.mappings)
    # What is shared and not mapped by anybody just now is nobody's share.
    kept = {(p.start, p.end) for s in sights for m in s.mappings for p in m.pieces}
    used = family.arena.statistics().used_bytes
    shared_start = START + 6 * HUGE
    (memory,) = {
        vma.mappable for one in family.members for _, _, vma in one.mm.vmas if vma.mappable
    }
    mapped: set[int] = set()
    for start, end in kept:
        lower, upper = max(start, shared_start), min(end, shared_start + HUGE)
        mapped.update(range(lower, upper, PAGE))
    unmapped = memory.resident_bytes - len(mapped) * PAGE
    assert 0 <= used - unmapped - pss < PAGE
    for one, sight in zip(family.members, sights, strict=True):
        assert sum(sight.by_kind) == sight.rss_bytes == one.mm.rss_bytes
        fields = smaps_of(one.mm).values()
        assert sum(part["Rss"] for part in fields) * 1024 == one.mm.rss_bytes
        for part in fields:
            kinds = ("Shared_Clean", "Shared_Dirty", "Private_Clean", "Private_Dirty")
            assert sum(part[kind] for kind in kinds) == part["Rss"] >= part["Pss"]


def test_while_it_changes(family: Family):
    # The guest runs, maps and forks: what is seen is whole all the same.
    parent = family.first
    parent.map(START, START + HUGE)
    is_over = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        rng = random.Random(1)
        try:
            while not is_over.is_set():
                parent.map(START, START + HUGE, rng.choice((READ_WRITE, READ)))
                for _ in range(20):
                    parent.mm.handle_user_fault(START + rng.randrange(HUGE), READ)
                child = family.fork(parent)
                child.mm.copy_out(START + PAGE, b"x", ignore_permissions=True)
                family.end(child)
        except BaseException as e:  # noqa: BLE001 - for the other thread to raise
            failed.append(e)

    guest = threading.Thread(target=run)
    guest.start()
    try:
        for _ in range(200):
            sight = look(parent.mm)
            assert sum(sight.by_kind) == sight.rss_bytes
            assert sum(m.size_bytes for m in sight.mappings) == sight.usage_bytes
            parent.mm.smaps()
            parent.mm.maps()
    finally:
        is_over.set()
        guest.join(60)
    assert not failed, failed


def _next(host: list[str]) -> str:
    # The second mapping's first line.
    return next(line for line in host[1:] if re.match(r"[0-9a-f]+-", line))
