"""The console's rings without a guest: the test plays guest and kernel."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.errors import IoctlError
from kvmmm.safemem.ffi import HostMapping, VcpuCore, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHARED, RING, RING_BYTES = 0, 4096, 256
RUN_PAGES = 3
COALESCED_PAGE = 2


class FakeCpu:
    """A VcpuCore over a memfd in place of KVM's: the test plays guest and kernel.

    Attributes:
        core: The object under test.
    """

    def __init__(self) -> None:
        self.run_fd = os.memfd_create("kvm_run")
        os.truncate(self.run_fd, RUN_PAGES * 4096)
        self.run = memoryview(HostMapping(self.run_fd, RUN_PAGES * 4096, 4096))
        guest_fd = os.memfd_create("guest")
        os.truncate(guest_fd, 8192)
        mapping = HostMapping(guest_fd, 8192, 4096)
        os.close(guest_fd)
        self.guest = memoryview(mapping)
        self.core = VcpuCore(os.dup(self.run_fd), RUN_PAGES * 4096)
        self.core.set_console(mapping.hva + SHARED, mapping.hva + RING, RING_BYTES)
        self.shared = ffi.cast("struct kvmmm_console *", mapping.hva + SHARED)

    def print(self, text: bytes) -> bytes:
        """As much of `text` into the ring as it has room for; returns the rest."""
        head, tail = int(self.shared.out_head), int(self.shared.out_tail)
        room = RING_BYTES - (head - tail)
        for i, byte in enumerate(text[:room]):
            self.guest[RING + (head + i) % RING_BYTES] = byte
        self.shared.out_head = head + len(text[:room])
        return text[room:]

    def close(self) -> None:
        self.core.close()
        self.run.release()
        self.guest.release()
        os.close(self.run_fd)


@pytest.fixture
def cpu() -> Iterator[FakeCpu]:
    cpu = FakeCpu()
    yield cpu
    cpu.close()


class TestRing:
    @given(pieces=st.lists(st.tuples(st.binary(max_size=300), st.booleans()), max_size=40))
    def test_every_byte_comes_once_and_in_order(self, pieces: list[tuple[bytes, bool]]):
        cpu = FakeCpu()
        printed = taken = b""
        for text, takes in pieces:
            rest = cpu.print(text)
            printed += text[: len(text) - len(rest)]
            if takes:
                taken += cpu.core.console_take()
                assert taken == printed
                assert cpu.shared.out_tail == len(taken)
        taken += cpu.core.console_take()
        assert taken == printed
        assert cpu.core.console_take() == b""
        cpu.close()

    def test_around_the_ring_many_times(self, cpu: FakeCpu):
        for _ in range(600):
            assert cpu.print(b"0123456789") == b""
            assert cpu.core.console_take() == b"0123456789"

    def test_full_to_the_last_byte(self, cpu: FakeCpu):
        cpu.print(b"x" * 100)
        cpu.core.console_take()
        text = bytes(range(256))
        assert cpu.print(text) == b""
        assert cpu.print(b"more") == b"more"
        assert cpu.core.console_take() == text

    @pytest.mark.parametrize("head", [-1, RING_BYTES + 1, 1 << 63, -RING_BYTES])
    def test_a_head_that_cannot_be_is_an_error(self, cpu: FakeCpu, head: int):
        cpu.print(b"abc")
        cpu.core.console_take()
        cpu.shared.out_head = (3 + head) % (1 << 64)
        with pytest.raises(OSError, match="Protocol error"):
            cpu.core.console_take()

    def test_the_guests_tail_is_not_believed(self, cpu: FakeCpu):
        cpu.print(b"abc")
        cpu.shared.out_tail = 999
        assert cpu.core.console_take() == b"abc"
        assert cpu.shared.out_tail == 3


class TestCoalesced:
    """The ring that KVM keeps: struct kvm_coalesced_mmio_ring { u32 first, last; entries }."""

    @pytest.fixture
    def ring(self, cpu: FakeCpu) -> Callable[..., None]:
        cpu.core.set_coalesced(COALESCED_PAGE)
        n_entries = (4096 - 8) // 24

        def queue(port: int, data: bytes) -> None:
            at = COALESCED_PAGE * 4096
            last = struct.unpack_from("<I", cpu.run, at + 4)[0]
            entry = struct.pack("<QII8s", port, len(data), 1, data)
            cpu.run[at + 8 + 24 * last : at + 32 + 24 * last] = entry
            struct.pack_into("<I", cpu.run, at + 4, (last + 1) % n_entries)

        return queue

    def test_entries_are_taken_once_and_in_order(self, cpu: FakeCpu, ring: Callable[..., None]):
        expected = b""
        for n in range(1000):  # around the ring, and more
            piece = bytes([n & 0xFF] * (1 + n % 4))
            ring(lib.KVMMM_PORT_DEBUGCON, piece)
            expected += piece
            if n % 100 == 99:
                assert cpu.core.console_take() == expected
                expected = b""
        assert cpu.core.statistics()["coalesced_bytes"] == cpu.core.statistics()["legacy_bytes"]

    def test_they_come_before_the_shared_ring(self, cpu: FakeCpu, ring: Callable[..., None]):
        ring(lib.KVMMM_PORT_DEBUGCON, b"port ")
        cpu.print(b"ring")
        assert cpu.core.console_take() == b"port ring"

    def test_a_length_that_cannot_be_is_cut(self, cpu: FakeCpu, ring: Callable[..., None]):
        ring(lib.KVMMM_PORT_DEBUGCON, b"12345678")
        struct.pack_into("<I", cpu.run, COALESCED_PAGE * 4096 + 8 + 8, 5000)
        assert cpu.core.console_take() == b"12345678"

    def test_a_page_outside_the_mapping_is_refused(self, cpu: FakeCpu):
        with pytest.raises(OSError, match="Invalid argument"):
            cpu.core.set_coalesced(RUN_PAGES)


def test_a_vcpu_that_is_none_says_which_ioctl_failed(cpu: FakeCpu):
    assert lib.kvmmm_kick_init() > 0
    with pytest.raises(IoctlError) as caught:
        cpu.core.run(10**9)
    assert caught.value.ioctl == "KVM_RUN"
    assert not cpu.core.handler_failed
