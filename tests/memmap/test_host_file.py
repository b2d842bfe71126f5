"""HostFile: files of the host, read-only ones, foreign memfds; whose size others may change."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import KvmmmError, RangeError, StateError, SyscallError
from kvmmm.hostarch.access import ANY_ACCESS, EXECUTE, READ, READ_EXECUTE, WRITE
from kvmmm.hostarch.ranges import AddrRange, FileRange
from kvmmm.memmap.host_file import HostFile
from tests.memmap.asking import PAGE, SIZE, content, read, translate
from tests.memmap.fake_space import FakeSpace

if TYPE_CHECKING:
    from kvmmm.memmap.file import File, Mappable

HUGE = 1 << 21


def opened() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


# What it is.


def test_is_a_file_and_a_mappable(file: HostFile, path: Path):
    as_file: File = file
    as_mappable: Mappable = file
    assert as_file.may_fault
    assert as_file.hva % HUGE == 0
    assert as_file.capacity_bytes == HUGE
    assert as_mappable.name == str(path)
    assert as_mappable.max_shared_perms == ANY_ACCESS
    status = path.stat()
    assert file.identity == (status.st_dev, status.st_ino)
    assert file.size_bytes == SIZE
    assert repr(file).startswith(f"<HostFile {path} rw hva=0x")


@pytest.mark.parametrize(
    ("size", "wanted", "capacity"),
    [(0, 0, HUGE), (HUGE, 0, HUGE), (HUGE + 1, 0, 2 * HUGE), (1, 3 * HUGE - 5, 3 * HUGE)],
)
def test_capacity(tmp_path: Path, size: int, wanted: int, capacity: int):
    path = tmp_path / "sized"
    path.touch()
    os.truncate(path, size)
    with HostFile.open(path, capacity_bytes=wanted) as file:
        assert file.capacity_bytes == capacity


def test_descriptor_is_our_own(path: Path):
    fd = os.open(path, os.O_RDWR)
    with HostFile(fd) as file:
        assert file.writable
        assert file.name == str(path)
        os.close(fd)
        assert read(file, 0, 10) == content()[:10]
        assert not os.get_inheritable(file.fd)


def test_read_only(path: Path):
    with HostFile.open(path) as file:
        assert not file.writable
        assert file.max_shared_perms == READ_EXECUTE
        page = FileRange(0, PAGE)
        with file.view_of(page) as view:
            assert view.readonly
            assert view[:5] == content()[:5]
        (found,), error = translate(file, page, page, EXECUTE)
        assert error is None
        assert found.perms == READ_EXECUTE
        found, error = translate(file, page, page, WRITE)
        assert found == []
        assert error is not None
        assert error.errno == errno.EACCES
        space = FakeSpace()
        with pytest.raises(SyscallError, match="reading only") as e:
            file.add_mapping(space, AddrRange(0, PAGE), 0, writable=True)
        assert e.value.errno == errno.EACCES
        file.add_mapping(space, AddrRange(0, PAGE), 0, writable=False)
        file.remove_mapping(space, AddrRange(0, PAGE), 0, writable=False)
        with pytest.raises(SyscallError):
            file.write_from(0, memoryview(b"x"))
        with pytest.raises(SyscallError):
            file.truncate(0)
        assert read(file, 1, 3) == content()[1:4]
        assert " ro " in repr(file)
    assert path.read_bytes() == content()


def test_read_only_on_request(path: Path):
    fd = os.open(path, os.O_RDWR)
    with HostFile(fd, writable=False, name="mine") as file:
        assert not file.writable
        assert file.name == "mine"
    os.close(fd)


def test_foreign_memfd():
    fd = os.memfd_create("theirs", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 3 * PAGE)
    with mmap.mmap(fd, 3 * PAGE) as theirs, HostFile(fd) as file:
        theirs[PAGE : PAGE + 5] = b"hello"
        assert file.name == "/memfd:theirs (deleted)"
        assert read(file, PAGE, 5) == b"hello"
        assert file.write_from(PAGE + 1, memoryview(b"ull")) == 3
        assert theirs[PAGE : PAGE + 5] == b"hullo"
        with file.view_of(FileRange(PAGE, 2 * PAGE)) as view:
            view[0] = ord("H")
        assert theirs[PAGE : PAGE + 5] == b"Hullo"
        file.msync(0, 3 * PAGE)
    os.close(fd)


def test_memfd_sealed_against_writing_is_read_only():
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x10)  # F_SEAL_FUTURE_WRITE
    with HostFile(fd) as file:
        assert not file.writable
    with pytest.raises(SyscallError, match="read-write"):
        HostFile(fd, writable=True)
    os.close(fd)


def test_refused_files_leak_nothing(path: Path, tmp_path: Path):
    before = opened()
    with pytest.raises(SyscallError, match="cannot open") as e:
        HostFile.open(tmp_path / "absent")
    assert e.value.errno == errno.ENOENT
    with pytest.raises(SyscallError, match="cannot map file descriptor -1") as e:
        HostFile(-1)
    assert e.value.errno == errno.EBADF
    reading, writing = os.pipe()
    with pytest.raises(SyscallError) as e:
        HostFile(reading)
    assert e.value.errno == errno.ENODEV
    only_written = os.open(path, os.O_WRONLY)
    with pytest.raises(SyscallError) as e:
        HostFile(only_written)
    assert e.value.errno == errno.EACCES
    for capacity in (-1, 1 << 47):
        with pytest.raises(RangeError):
            HostFile(only_written, capacity_bytes=capacity)
    for fd in (reading, writing, only_written):
        os.close(fd)
    assert opened() == before


# Moving bytes.


def test_bytes(file: HostFile, path: Path):
    assert read(file, 0, SIZE) == content()
    assert read(file, PAGE - 3, 6) == content()[PAGE - 3 : PAGE + 3]
    assert file.write_from(PAGE - 2, memoryview(b"abcd")) == 4
    assert path.read_bytes()[PAGE - 2 : PAGE + 2] == b"abcd"


def test_last_page_is_there_as_a_whole(file: HostFile, path: Path):
    assert read(file, SIZE - 4, 3 * PAGE) == content()[-4:] + bytes(6 * PAGE - SIZE)
    assert read(file, SIZE, 1) == b"\0"
    assert file.write_from(SIZE - 2, memoryview(b"x" * 2 * PAGE)) == 6 * PAGE - SIZE + 2
    assert path.stat().st_size == SIZE
    assert path.read_bytes()[-3:] == content()[-3:-2] + b"xx"
    assert file.write_from(SIZE + 1, memoryview(b"lost")) == 4


@pytest.mark.parametrize("fo", [6 * PAGE, HUGE - 1, HUGE, 10 * HUGE])
def test_nothing_is_behind_the_last_page(file: HostFile, fo: int):
    assert read(file, fo, 10) == b""
    assert file.write_from(fo, memoryview(b"x")) == 0
    assert file.size_bytes == SIZE


def test_nothing_is_behind_the_mapping(file: HostFile, path: Path):
    os.truncate(path, HUGE + PAGE)
    assert read(file, HUGE - 2, 10) == b"\0\0"
    assert file.write_from(HUGE - 2, memoryview(b"abcd")) == 2
    assert read(file, HUGE, 1) == b""
    page = FileRange(HUGE, HUGE + PAGE)
    found, error = translate(file, page, page)
    assert found == []
    assert "capacity_bytes" in str(error)


def test_offset_below_zero(file: HostFile):
    with pytest.raises(RangeError, match="no offset"):
        read(file, -1, 1)
    with pytest.raises(RangeError, match="no offset"):
        file.write_from(-1, memoryview(b"x"))


def test_buffers_of_other_formats(file: HostFile):
    wide = memoryview(bytearray(16)).cast("I")
    assert file.read_into(0, wide) == 16
    assert wide.cast("B") == content()[:16]
    assert file.write_from(32, wide) == 16
    assert read(file, 32, 16) == content()[:16]


def test_msync(file: HostFile, path: Path):
    with file.view_of(FileRange(0, PAGE)) as view:
        view[:4] = b"sync"
    file.msync(0, 6 * PAGE)
    file.msync(3, 10 * HUGE)
    file.msync(10 * HUGE, 11 * HUGE)
    assert path.read_bytes()[:4] == b"sync"


# Where bytes lie.


def test_translate(file: HostFile):
    required, optional = FileRange(2 * PAGE, 3 * PAGE), FileRange(PAGE, 4 * PAGE)
    (found,), error = translate(file, required, optional, WRITE)
    assert error is None
    assert (found.start, found.end, found.offset) == (PAGE, 4 * PAGE, PAGE)
    assert found.file is file
    assert found.perms == ANY_ACCESS


def test_translate_ends_with_the_page_of_the_end(file: HostFile):
    found, error = translate(file, FileRange(4 * PAGE, 8 * PAGE), FileRange(0, 9 * PAGE))
    assert [(t.start, t.end) for t in found] == [(0, 6 * PAGE)]
    assert error is not None
    assert error.errno == errno.EIO
    assert isinstance(error, KvmmmError)
    found, error = translate(file, FileRange(6 * PAGE, 7 * PAGE), FileRange(0, 9 * PAGE))
    assert found == []
    assert error is not None
    assert error.errno == errno.EIO


def test_growing_file(tmp_path: Path):
    path = tmp_path / "growing"
    path.touch()
    page = FileRange(0, PAGE)
    with HostFile.open(path, capacity_bytes=4 * HUGE) as file:
        assert translate(file, page, page)[0] == []
        path.write_bytes(b"x" * (3 * HUGE))
        last = FileRange(3 * HUGE - PAGE, 3 * HUGE)
        (found,), error = translate(file, last, FileRange(0, 4 * HUGE))
        assert error is None
        assert found.end == 3 * HUGE
        with file.view_of(last) as view:
            assert view[-1] == ord("x")


# References.


def test_references(file: HostFile):
    a, b = FileRange(0, 3 * PAGE), FileRange(2 * PAGE, 5 * PAGE)
    file.inc_ref(a)
    file.inc_ref(b)
    assert [file.ref_count(i * PAGE) for i in range(6)] == [1, 1, 2, 1, 1, 0]
    assert file.ref_counts(FileRange(PAGE, 6 * PAGE)) == [
        (PAGE, 2 * PAGE, 1), (2 * PAGE, 3 * PAGE, 2), (3 * PAGE, 5 * PAGE, 1),
    ]  # fmt: skip
    assert file.referenced_bytes == 5 * PAGE
    with pytest.raises(StateError, match="0x5000 has no reference"):
        file.dec_ref(FileRange(4 * PAGE, 6 * PAGE))
    assert file.ref_count(4 * PAGE) == 1
    with pytest.raises(StateError, match=r"20 KiB of .* still in use"):
        file.close()
    file.dec_ref(b)
    file.dec_ref(a)
    assert file.referenced_bytes == 0


@pytest.mark.parametrize(
    "fr", [FileRange(0, 0), FileRange(0, 5), FileRange(5, PAGE), FileRange(HUGE, HUGE + PAGE)]
)
def test_malformed_references(file: HostFile, fr: FileRange):
    for change in (file.inc_ref, file.dec_ref):
        with pytest.raises(RangeError):
            change(fr)
    assert file.referenced_bytes == 0


# The end.


def test_close_refuses_while_in_use(path: Path):
    before = opened()
    file = HostFile.open(path)
    space, ar = FakeSpace(), AddrRange(0, PAGE)
    file.add_mapping(space, ar, 0, writable=False)
    assert file.is_mapped
    with pytest.raises(StateError, match="still mapped"):
        file.close()
    file.copy_mapping(space, ar, AddrRange(HUGE, HUGE + PAGE), 0, writable=False)
    file.remove_mapping(space, ar, 0, writable=False)
    file.remove_mapping(space, AddrRange(HUGE, HUGE + PAGE), 0, writable=False)
    view = file.view_of(FileRange(0, PAGE))
    with pytest.raises(StateError, match="stays open"):
        file.close()
    view.release()
    file.close()
    file.close()
    assert (file.fd, file.hva) == (-1, 0)
    assert repr(file) == f"<HostFile {path} closed>"
    page = FileRange(0, PAGE)
    calls = [
        lambda: file.inc_ref(page),
        lambda: file.dec_ref(page),
        lambda: file.view_of(page),
        lambda: file.read_into(0, memoryview(bytearray(1))),
        lambda: file.write_from(0, memoryview(b"x")),
        lambda: file.translate(page, page, READ),
        lambda: file.add_mapping(space, ar, 0, writable=False),
        lambda: file.msync(0, PAGE),
        lambda: file.truncate(0),
        file.revalidate,
        lambda: file.size_bytes,
    ]
    for call in calls:
        with pytest.raises(StateError, match="closed"):
            call()
    assert opened() == before


def test_view_outside(file: HostFile):
    with pytest.raises(RangeError, match="mapped to 0x200000"):
        file.view_of(FileRange(HUGE, HUGE + PAGE))


def test_forgotten_file_goes(path: Path):
    before = opened()
    HostFile.open(path)
    assert opened() == before
