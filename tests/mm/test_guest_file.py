"""Guest memory as a file: against a BytesIO, and where memory ends before it does."""

from __future__ import annotations

import array
import errno
import io
import shutil
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmmm.errors import ArenaExhaustedError, GuestFaultError, MmError
from kvmmm.hostarch.access import NO_ACCESS, READ
from kvmmm.hostarch.ranges import AddrRange
from tests.mm.conftest import HUGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.mm.guest_file import GuestFile
    from tests.mm.conftest import Setup

PAGE = 4096
START = 0x100000
END = START + 4 * PAGE


@pytest.fixture
def setup(make: Callable[..., Setup]) -> Setup:
    setup = make()
    setup.map(START, END)
    return setup


def open_all(setup: Setup, **more: bool) -> GuestFile:
    return setup.mm.open(AddrRange(START, END), **more)


def test_what_it_says_of_itself(setup: Setup):
    file = setup.mm.open(AddrRange(START + 1, END), writable=False)
    assert isinstance(file, io.RawIOBase)
    assert (file.readable(), file.writable(), file.seekable()) == (True, False, True)
    assert (file.size_bytes, file.tell()) == (4 * PAGE - 1, 0)
    assert file.ar == AddrRange(START + 1, END)
    file.seek(16)
    assert repr(file) == "<GuestFile [0x100001, 0x104000) r at 0x10>"
    assert not file.isatty()
    with pytest.raises(OSError, match="fileno"):
        file.fileno()
    file.close()
    assert "closed" in repr(file)


def test_read_and_write(setup: Setup):
    with open_all(setup) as file:
        assert file.writable()
        assert file.write(b"0123456789") == 10
        assert file.tell() == 10
        assert file.seek(2) == 2
        assert file.read(3) == b"234"
        buffer = bytearray(2)
        assert file.readinto(buffer) == 2
        assert buffer == b"56"
        assert file.seek(-3, io.SEEK_CUR) == 4
        assert file.write(array.array("H", [0x4141, 0x4242])) == 4
    assert setup.mm.read(START, 10) == b"0123AABB89"


def test_its_end(setup: Setup):
    with open_all(setup) as file:
        assert file.seek(-2, io.SEEK_END) == 4 * PAGE - 2
        assert file.write(b"abcd") == 2
        with pytest.raises(MmError) as caught:
            file.write(b"cd")
        assert (caught.value.errno, caught.value.addr) == (errno.ENOSPC, END)
        assert file.write(b"") == 0
        assert file.read(10) == file.read() == b""
        assert file.readinto(bytearray(4)) == 0
        file.seek(4 * PAGE + 100)
        assert file.read(1) == b""
        file.seek(4 * PAGE - 2)
        assert file.read(100) == b"ab"
        file.seek(4 * PAGE - 1)
        words = array.array("I", [0])
        assert file.readinto(words) == 1
        assert words.tobytes() == b"b\0\0\0"


def test_what_it_refuses(setup: Setup):
    with open_all(setup, writable=False) as file:
        for call in (lambda: file.write(b"x"), lambda: file.truncate(0), file.truncate):
            with pytest.raises(io.UnsupportedOperation):
                call()
        for offset, whence in ((-1, 0), (-1, 1), (-4 * PAGE - 1, 2), (0, 3)):
            with pytest.raises(ValueError, match=r"before the start|whence"):
                file.seek(offset, whence)
        assert file.tell() == 0
        with pytest.raises(TypeError):
            file.readinto(b"const")  # type: ignore[arg-type]
    for call in (
        file.read, file.tell, file.readable, file.writable, file.seekable,
        lambda: file.read(1), lambda: file.seek(0), lambda: file.readinto(bytearray(1)),
        lambda: file.write(b""),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="closed"):
            call()


@pytest.mark.parametrize("forbidden", [False, True])
class TestAFaultInTheMiddle:
    """The last page cannot be accessed, and the position is 10 bytes before it."""

    STOP = END - PAGE

    @pytest.fixture
    def file(self, setup: Setup, forbidden: bool) -> GuestFile:
        setup.mm.copy_out(self.STOP - 10, b"0123456789")
        if forbidden:
            setup.mm.mprotect(self.STOP, PAGE, NO_ACCESS)
        else:
            setup.mm.munmap(self.STOP, PAGE)
        file = open_all(setup)
        file.seek(3 * PAGE - 10)
        return file

    def raises(self, call: Callable[[], object], forbidden: bool) -> None:
        with pytest.raises(GuestFaultError) as caught:
            call()
        error = caught.value
        assert (error.addr, error.done, error.mapped) == (self.STOP, 0, forbidden)

    def test_readinto(self, file: GuestFile, forbidden: bool):
        buffer = bytearray(b"." * 20)
        assert file.readinto(buffer) == 10
        assert buffer == b"0123456789.........."
        self.raises(lambda: file.readinto(buffer), forbidden)
        assert file.tell() == 3 * PAGE

    def test_read(self, file: GuestFile, forbidden: bool):
        assert file.read(20) == b"0123456789"
        self.raises(lambda: file.read(1), forbidden)

    def test_write(self, setup: Setup, file: GuestFile, forbidden: bool):
        assert file.write(b"x" * 20) == 10
        self.raises(lambda: file.write(b"x"), forbidden)
        assert setup.mm.read(self.STOP - 11, 11) == b"\0" + b"x" * 10

    @pytest.mark.usefixtures("forbidden")
    def test_all_or_nothing(self, file: GuestFile):
        with pytest.raises(GuestFaultError) as caught:
            file.read()
        assert (caught.value.addr, caught.value.done) == (self.STOP, 10)
        assert file.tell() == 3 * PAGE - 10

    def test_copyfileobj(self, file: GuestFile, forbidden: bool):
        target = io.BytesIO()
        self.raises(lambda: shutil.copyfileobj(file, target, 7), forbidden)
        assert target.getvalue() == b"0123456789"

    def test_buffered(self, file: GuestFile, forbidden: bool):
        buffered = io.BufferedReader(file, 4)
        assert buffered.read(10) == b"0123456789"
        self.raises(lambda: buffered.read(1), forbidden)

    def test_options_are_passed_on(self, setup: Setup, forbidden: bool, file: GuestFile):
        if not forbidden:
            return
        with setup.mm.open(file.ar, ignore_permissions=True) as debugger:
            debugger.seek(3 * PAGE)
            assert debugger.write(b"abc") == 3
            debugger.seek(3 * PAGE)
            assert debugger.read(3) == b"abc"
            assert len(debugger.read()) == PAGE - 3


def test_no_memory_left(make: Callable[..., Setup]):
    """Nothing says how much of it was moved: the position stays."""
    setup = make(HUGE)
    setup.map(8 * HUGE, 10 * HUGE)
    with setup.mm.open(AddrRange(8 * HUGE, 10 * HUGE)) as file:
        file.seek(HUGE)
        assert file.write(b"x") == 1
        file.seek(0)
        with pytest.raises(ArenaExhaustedError):
            file.write(b"y")
        assert file.tell() == 0


class TestUnderOthers:
    def test_text(self, setup: Setup):
        with io.TextIOWrapper(io.BufferedRandom(open_all(setup)), encoding="utf-8") as text:
            text.write("größe\nzwei\n")
            text.seek(0)
            assert [text.readline(), text.readline()] == ["größe\n", "zwei\n"]
        assert setup.mm.read_string(START, encoding="utf-8") == "größe\nzwei\n"

    def test_copyfileobj_both_ways(self, setup: Setup):
        data = bytes(i * 7 & 0xFF for i in range(4 * PAGE))
        with open_all(setup) as file:
            shutil.copyfileobj(io.BytesIO(data), file, 1000)
            assert file.tell() == len(data)
        assert setup.mm.read(START, 4 * PAGE) == data
        target = io.BytesIO()
        with open_all(setup, writable=False) as file:
            shutil.copyfileobj(file, target, 999)
        assert target.getvalue() == data

    def test_too_much_for_a_buffered_writer(self, setup: Setup):
        writer = io.BufferedWriter(open_all(setup))
        writer.seek(4 * PAGE - 2)
        writer.write(b"abcd")
        with pytest.raises(MmError) as caught:
            writer.flush()
        assert caught.value.errno == errno.ENOSPC
        raw = writer.detach
        with pytest.raises(MmError):
            raw()
        assert setup.mm.read(END - 2, 2) == b"ab"
        # Nothing can take what is left; memory for it, so that it can be closed.
        with pytest.raises(MmError):
            writer.close()

    def test_zip(self, setup: Setup):
        import zipfile

        with io.BufferedRandom(open_all(setup)) as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("name", b"content")
            n_bytes = file.tell()
        with (
            setup.mm.open(AddrRange(START, START + n_bytes), writable=False) as file,
            zipfile.ZipFile(file) as archive,
        ):
            assert archive.read("name") == b"content"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_as_a_bytesio_does(setup: Setup, data: st.DataObject):
    """Its size stays; everything else is the same, plain and buffered."""
    size = data.draw(st.sampled_from([1, 100, PAGE + 1, 2 * PAGE]))
    start = START + data.draw(st.integers(0, PAGE))
    setup.mm.zero_out(START, 4 * PAGE)
    model = io.BytesIO(bytes(size))
    raw = setup.mm.open(AddrRange(start, start + size))
    file: io.RawIOBase | io.BufferedRandom = raw
    if data.draw(st.booleans()):
        file = io.BufferedRandom(raw, data.draw(st.sampled_from([1, 16, 5000])))
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["read", "write", "seek", "all", "readinto"])):
            case "read":
                n = data.draw(st.integers(0, size + 5))
                assert file.read(n) == model.read(n)
            case "all":
                assert file.read() == model.read()
            case "readinto":
                mine, other = bytearray(7), bytearray(7)
                assert file.readinto(mine) == model.readinto(other)
                assert mine == other
            case "seek":
                at = data.draw(st.integers(0, size))
                whence = data.draw(st.sampled_from([0, 2]))
                offset = at if whence == 0 else at - size
                assert file.seek(offset, whence) == model.seek(offset, whence)
            case _:
                n = min(data.draw(st.integers(0, 50)), size - model.tell())
                content = data.draw(st.binary(min_size=n, max_size=n))
                assert file.write(content) == model.write(content)
        assert file.tell() == model.tell()
    file.close()
    assert setup.mm.read(start, size) == model.getvalue()
    assert not any(setup.mm.read(start + size, 10))


def test_it_finds_what_is_mapped_at_that_time(setup: Setup):
    with open_all(setup) as file:
        setup.mm.munmap(START, PAGE)
        with pytest.raises(GuestFaultError):
            file.read(1)
        setup.map(START, START + PAGE, READ)
        assert file.read(1) == b"\0"
        with pytest.raises(GuestFaultError):
            file.write(b"x")
