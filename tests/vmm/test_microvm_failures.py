"""Making a VM when a step fails: the error names it, and nothing is left behind."""

from __future__ import annotations

import errno
import gc
import os
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import IoctlError, RangeError
from kvmmm.platform.kvm import abi, memslot, trial, vcpu, vm
from kvmmm.platform.kvm.device import open_device
from kvmmm.vmm.microvm import MicroVM
from tests.conftest import wait_for_no_leak
from tests.vmm.guest_run import run_code
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from tests.conftest import Footprint

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(200)]

# The ioctls on the way to a VM, and the modules that call them; those of `trial` once a process.
STEPS = [
    (vm, "KVM_CREATE_VM"),
    (memslot, "KVM_SET_USER_MEMORY_REGION"),
    (vm, "KVM_CREATE_VCPU"),
    (vcpu, "KVM_SET_CPUID2"),
    (vcpu, "KVM_SET_XCRS"),
    (trial, "KVM_CREATE_VM"),
    (trial, "KVM_CREATE_VCPU"),
    (trial, "KVM_GET_SREGS"),
    (trial, "KVM_SET_USER_MEMORY_REGION"),
]


class TestFailingSteps:
    """Each ioctl on the way to a VM fails once: an error that names it, and nothing left behind."""

    @pytest.mark.parametrize(("module", "name"), STEPS)
    def test_nothing_leaks(
        self, module: Any, name: str, monkeypatch: pytest.MonkeyPatch, footprint: Footprint
    ):
        number = getattr(abi, name)
        device = open_device()
        if name == "KVM_SET_XCRS" and not device.trial.has_avx:
            pytest.skip("no AVX here")
        if module is trial:
            monkeypatch.delitem(vars(device), "trial", raising=False)
        real = module.ioctl

        def ioctl(fd: int, request: int, argument: int = 0) -> int:
            return -errno.ENOSPC if request == number else int(real(fd, request, argument))

        with monkeypatch.context() as patch:
            patch.setattr(module, "ioctl", ioctl)
            for _ in range(3):
                with pytest.raises(IoctlError) as caught:
                    MicroVM("4M")
                assert caught.value.ioctl == name
                assert caught.value.errno == errno.ENOSPC
                del caught
        leaks = wait_for_no_leak(footprint)
        assert not leaks, leaks
        assert run_code(Code().exit(5)).status == 5

    def test_a_descriptor_is_closed_once(self, monkeypatch: pytest.MonkeyPatch):
        """Closing it again would close what another thread has opened meanwhile."""
        number, real = abi.KVM_SET_CPUID2, vcpu.ioctl

        def ioctl(fd: int, request: int, argument: int = 0) -> int:
            return -errno.ENOSPC if request == number else int(real(fd, request, argument))

        with monkeypatch.context() as patch:
            patch.setattr(vcpu, "ioctl", ioctl)
            with pytest.raises(IoctlError) as caught:
                MicroVM("4M")
        taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(10)]
        del caught
        gc.collect()
        for fd in taken:
            os.close(fd)  # EBADF, had somebody closed it

    def test_an_arena_that_cannot_be(self, footprint: Footprint):
        with pytest.raises(RangeError, match="arena"):
            MicroVM("4M", arena=1 << 50)
        leaks = wait_for_no_leak(footprint)
        assert not leaks, leaks
