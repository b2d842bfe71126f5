"""The sealed memfd: seals hold, it is sparse, and old kernels get one too."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from kvmmm.arena import memfd

MIB = 1 << 20


@pytest.fixture
def fd():
    fd = memfd.create_sealed("kvmmm-test", 2 * MIB)
    yield fd
    os.close(fd)


def test_size_cannot_be_changed(fd: int):
    for size in (0, MIB, 4 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 2 * MIB)
    assert os.fstat(fd).st_size == 2 * MIB


def test_no_seal_can_be_added(fd: int):
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    want = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    assert seals & want == want
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_closed_on_exec_and_named(fd: int):
    assert not os.get_inheritable(fd)
    assert str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("/memfd:kvmmm-test")


def test_not_executable_where_the_kernel_can(fd: int):
    if memfd._flags & memfd._MFD_NOEXEC_SEAL:
        assert not os.fstat(fd).st_mode & 0o111
        with pytest.raises(PermissionError):
            os.fchmod(fd, 0o755)


def test_sparse():
    fd = memfd.create_sealed("kvmmm-test", 1 << 40)
    try:
        assert os.fstat(fd).st_blocks == 0
        os.pwrite(fd, b"x", 1 << 39)
        assert os.fstat(fd).st_blocks * 512 == 4096
    finally:
        os.close(fd)


def test_falls_back_on_kernels_without_noexec_seal(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []

    def old_kernel(name: str, flags: int) -> int:
        calls.append(flags)
        if flags & memfd._MFD_NOEXEC_SEAL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return memfd_create(name, flags)

    memfd_create = os.memfd_create
    monkeypatch.setattr(memfd, "_flags", memfd._FLAGS_OLD | memfd._MFD_NOEXEC_SEAL)
    monkeypatch.setattr(os, "memfd_create", old_kernel)
    for _ in range(2):
        os.close(memfd.create_sealed("kvmmm-test", MIB))
    assert calls == [memfd._FLAGS_OLD | memfd._MFD_NOEXEC_SEAL] + 2 * [memfd._FLAGS_OLD]


def test_other_refusals_are_not_asked_twice(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []

    def no_descriptor_left(_name: str, flags: int) -> int:
        calls.append(flags)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", no_descriptor_left)
    with pytest.raises(OSError, match="sealed memfd of 1 MiB: Too many open files") as e:
        memfd.create_sealed("kvmmm-test", MIB)
    assert e.value.errno == errno.EMFILE
    assert len(calls) == 1


def test_refused_size_leaks_nothing(monkeypatch: pytest.MonkeyPatch):
    made: list[int] = []

    def refuse(fd: int, _length_bytes: int) -> None:
        made.append(fd)
        raise OSError(errno.EFBIG, "File too large")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", refuse)
        with pytest.raises(OSError, match="sealed memfd of 1 MiB: File too large"):
            memfd.create_sealed("kvmmm-test", MIB)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(made[0])
