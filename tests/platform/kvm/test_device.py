"""/dev/kvm: what is said when it cannot be used, and what is asked once."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmmm import errors
from kvmmm.errors import KvmUnavailableError
from kvmmm.platform.kvm import abi, device
from kvmmm.platform.kvm.device import Device, open_device

if TYPE_CHECKING:
    from collections.abc import Callable


def open_fds() -> list[str]:
    return sorted(fd.name for fd in Path("/proc/self/fd").iterdir())


def test_missing(tmp_path: Path):
    path = str(tmp_path / "kvm")
    with pytest.raises(KvmUnavailableError) as caught:
        Device(path)
    error = caught.value
    assert error.errno == errno.ENOENT
    assert str(error).startswith(f"{path} is missing\n")
    assert "modprobe" in error.remedy
    assert "--device=/dev/kvm" in error.remedy
    assert error.exit_code == errors.EXIT_NO_KVM


def test_open_device_does_not_remember_a_failure(tmp_path: Path):
    path = tmp_path / "kvm"
    for _ in range(2):
        with pytest.raises(KvmUnavailableError, match="is missing"):
            open_device(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_closed_to_this_user(tmp_path: Path):
    path = tmp_path / "kvm"
    path.touch(0o600)
    tmp_path.chmod(0o755)
    # Imports first: another user may not be able to read the environment.
    script = f"""
import os
from kvmmm.errors import KvmUnavailableError
from kvmmm.platform.kvm.device import Device
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    Device({str(path)!r})
except KvmUnavailableError as e:
    print(e.errno, e.exit_code)
    print(e)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    first, second, *_ = run.stdout.splitlines()
    assert first == f"{errno.EACCES} {errors.EXIT_PERMISSION}"
    assert second == f"{path} is closed to you"
    assert "usermod -aG kvm" in run.stdout
    assert "udevadm" in run.stdout


def test_something_else_than_kvm():
    before = open_fds()
    with pytest.raises(KvmUnavailableError, match="/dev/null is no KVM device"):
        Device("/dev/null")
    assert open_fds() == before


def answering(answers: dict[tuple[int, int], int]) -> Callable[[int, int, int], int]:
    """An ioctl that says what a device would, but for some."""

    def ioctl(_fd: int, request: int, argument: int = 0) -> int:
        usual = {abi.KVM_GET_API_VERSION: 12, abi.KVM_GET_VCPU_MMAP_SIZE: 12288}.get(request, 1)
        return answers.get((request, argument), usual)

    return ioctl


def test_wrong_api_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "ioctl", answering({(abi.KVM_GET_API_VERSION, 0): 11}))
    before = open_fds()
    with pytest.raises(KvmUnavailableError, match="API version 11, not 12") as caught:
        Device("/dev/null")
    assert "update the kernel" in caught.value.remedy
    assert open_fds() == before


@pytest.mark.parametrize(
    "name", ["KVM_CAP_SYNC_REGS", "KVM_CAP_IMMEDIATE_EXIT", "KVM_CAP_READONLY_MEM"]
)
def test_a_capability_that_is_needed_is_missing(monkeypatch: pytest.MonkeyPatch, name: str):
    number = getattr(abi, name)
    monkeypatch.setattr(device, "ioctl", answering({(abi.KVM_CHECK_EXTENSION, number): 0}))
    before = open_fds()
    with pytest.raises(KvmUnavailableError, match=name) as caught:
        Device("/dev/null")
    assert "update the kernel" in caught.value.remedy
    assert open_fds() == before


def test_capabilities_are_asked_once(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[int, int]] = []
    answer = answering({})

    def ioctl(fd: int, request: int, argument: int = 0) -> int:
        asked.append((request, argument))
        return answer(fd, request, argument)

    monkeypatch.setattr(device, "ioctl", ioctl)
    one = Device("/dev/null")
    try:
        asked.clear()
        assert [one.capability(77) for _ in range(3)] == [1, 1, 1]
        assert asked == [(abi.KVM_CHECK_EXTENSION, 77)]
    finally:
        os.close(one.fd)


def test_memslots_are_32_where_the_kernel_does_not_say(monkeypatch: pytest.MonkeyPatch):
    answers = {(abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_NR_MEMSLOTS): 0}
    monkeypatch.setattr(device, "ioctl", answering(answers))
    one = Device("/dev/null")
    try:
        assert one.max_memslots == 32
    finally:
        os.close(one.fd)


def test_guests_are_offered_no_virtualisation(monkeypatch: pytest.MonkeyPatch):
    entries = [(0x1, 0, 0, 7, 8, (1 << 32) - 1, 9), (0x8000_0001, 0, 0, 1, 2, 0x104, 3)]

    def ioctl(_fd: int, _request: int, hva: int) -> int:
        table = device.ffi.buffer(device.ffi.cast("uint8_t *", hva), 8 + 2 * 40)
        table[:] = struct.pack("<II", 2, 0) + b"".join(
            struct.pack("<10I", *entry, 0, 0, 0) for entry in entries
        )
        return 0

    monkeypatch.setattr(device, "ioctl", ioctl)
    cpuid = device.Cpuid(-1)
    assert cpuid.entries == [
        (0x1, 0, 0, 7, 8, (1 << 32) - 1 - 0x20, 9, 0, 0, 0),
        (0x8000_0001, 0, 0, 1, 2, 0x100, 3, 0, 0, 0),
    ]
    raw = bytes(device.ffi.buffer(cpuid.table))[8:88]
    assert raw == b"".join(struct.pack("<10I", *entry) for entry in cpuid.entries)


@pytest.mark.kvm
@pytest.mark.npt
def test_the_real_one_is_opened_once():
    found: list[Device] = []
    threads = [threading.Thread(target=lambda: found.append(open_device())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(one) for one in found}) == 1
    one = found[0]
    assert os.get_inheritable(one.fd) is False
    assert one.vcpu_mmap_bytes >= 4096
    assert 36 <= one.cpuid.physical_bits <= 52
    assert one.cpuid is one.cpuid
    assert one.max_memslots >= 32
    assert one.capability(12345) == 0
