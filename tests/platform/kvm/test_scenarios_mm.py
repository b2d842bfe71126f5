"""Scenarios of gVisor's kvm_test.go that take a memory manager: a program in ring 3 over files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import GuestBusError
from kvmmm.hostarch.access import NO_ACCESS, READ, READ_WRITE
from kvmmm.memmap.host_file import HostFile
from kvmmm.mm import MemoryManager
from kvmmm.mm.layout import Layout
from kvmmm.safemem.ffi import lib
from tests.platform.kvm.user_rig import DATA, PAGE, SECOND, UserRig, step_loop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.kvm, pytest.mark.npt, pytest.mark.timeout(100)]


class Guest:
    """A program that loads the word at rsi, step by step, under a memory manager."""

    def __init__(self) -> None:
        self.rig = UserRig()
        layout = Layout(0, self.rig.space.max_addr, bottom_up_base=DATA)
        self.mm = MemoryManager(self.rig.arena, self.rig.space, layout=layout)
        self.vcpu: Any = self.rig.load(step_loop(), rsi=DATA)
        self.vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_EXIT, lambda _exit: "step")
        self.vcpu.on_fault = self._on_fault
        assert self.vcpu.run(10 * SECOND) == "step"

    def _on_fault(self, addr: int, access: int) -> GuestBusError | None:
        try:
            self.mm.handle_user_fault(addr, access)
        except GuestBusError as e:
            return e
        return None

    def load(self, addr: int) -> int | GuestBusError:
        self.vcpu.regs.rsi = addr
        answer = self.vcpu.run(10 * SECOND)
        if isinstance(answer, GuestBusError):
            return answer
        assert answer == "step"
        return int(self.vcpu.regs.rbx)

    def close(self) -> None:
        self.mm.close()
        self.rig.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.mark.parametrize("private", [True, False])
def test_safecopy_sigbus(guest: Guest, tmp_path: Path, private: bool):
    """A file that is a page shorter than its mapping, ten times over: that very address."""
    n_pages = 16
    path = tmp_path / "file"
    path.write_bytes(b"file".ljust(8, b".") + bytes((n_pages - 1) * PAGE - 8))
    with HostFile.open(path) as file:
        for _ in range(10):
            start = guest.mm.mmap(n_pages * PAGE, READ, mappable=file, private=private).start
            missing = start + (n_pages - 1) * PAGE
            with pytest.raises(GuestBusError) as caught:
                guest.mm.copy_in(missing - 8, bytearray(16))
            assert (caught.value.addr, caught.value.done) == (missing, 8)
            error = guest.load(missing + 24)
            assert isinstance(error, GuestBusError)
            assert (error.addr, error.access) == (missing + 24, READ)
            # Nothing has come of it: what is there is there, and the program goes on.
            assert guest.load(start) == int.from_bytes(b"file....", "little")
            assert guest.mm.read(start, 4) == b"file"
            guest.mm.check_invariants()
        guest.mm.munmap(DATA, 10 * (n_pages + 512) * PAGE)
        guest.rig.physical.forget(file)


def test_safecopy(guest: Guest):
    """Words just before the end of a mapping, ten times over, by the host and by the program."""
    for n in range(10):
        start = guest.mm.mmap(2 * PAGE, READ_WRITE).start
        last = start + 2 * PAGE - 8
        assert guest.mm.read(last, 4) == bytes(4)
        assert guest.mm.copy_out(last, n.to_bytes(4, "little")) == 4
        assert guest.load(last) == n
        assert guest.mm.read(last, 8) == n.to_bytes(8, "little")


def maps(guest: Guest) -> dict[int, tuple[int, str]]:
    """Start -> (end, permissions) of each line."""
    found = {}
    for line in guest.mm.maps().splitlines():
        match = re.match(r"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][ps])", line)
        if match:
            found[int(match[1], 16)] = int(match[2], 16), match[3]
    return found


def test_parse_maps(guest: Guest):
    guest.mm.mmap(PAGE, READ, addr=0, fixed=True)
    assert maps(guest) == {0: (PAGE, "r--p")}
    start = guest.mm.mmap(PAGE, READ_WRITE, name="new").start
    assert guest.load(start) == 0
    assert maps(guest)[start] == (start + PAGE, "rw-p")
    guest.mm.mmap(PAGE, NO_ACCESS, addr=start, fixed=True, replace=True, name="new")
    assert maps(guest)[start] == (start + PAGE, "---p")
    assert len(maps(guest)) == 2
