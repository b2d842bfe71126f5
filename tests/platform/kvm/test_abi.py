"""Numbers of <linux/kvm.h>: ours against the compiler's, and against the header itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmmm.platform.kvm import abi
from kvmmm.safemem.ffi import ffi, lib

# abi.py's names of other kinds than ioctls.
_OTHER = ("KVM_CAP_", "KVM_EXIT_", "KVM_MEM_", "KVM_SYNC_", "KVM_INTERNAL_", "KVM_API_")
NAMES = [name for name in vars(abi) if name.startswith("KVM_")]
IOCTLS = [name for name in NAMES if not name.startswith(_OTHER)]
HEADER = Path("/usr/include/linux/kvm.h")


@pytest.mark.parametrize("name", IOCTLS)
def test_ioctl_number_is_the_compilers(name: str):
    assert getattr(abi, name) == getattr(lib, name)


def test_no_ioctl_is_missing_on_either_side():
    compiled = {
        name
        for name in dir(lib)
        if name.startswith("KVM_") and not name.startswith(_OTHER) and name != "KVMIO"
    }
    assert set(IOCTLS) == compiled
    assert len(IOCTLS) > 20


def compiled_values(names: list[str]) -> dict[str, int]:
    """What the C preprocessor and compiler make of the names: each as an array's size."""
    source = "#include <linux/kvm.h>\n" + "".join(f"#define ask_{n} {n}\n" for n in names)
    lines = "".join(f'"= {n}" ask_{n}\n' for n in names)
    run = subprocess.run(
        ["gcc", "-E", "-P", "-x", "c", "-"],
        input=source + lines, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    values = {}
    for name, text in re.findall(r'^"= (\w+)" (.+)$', run.stdout, re.MULTILINE):
        expression = re.sub(r"(?<=[0-9a-fA-F])[uUlL]+\b", "", text)
        if re.fullmatch(r"[0-9a-fA-Fx()<>|+\- ]+", expression):
            values[name] = eval(expression, {"__builtins__": {}})  # noqa: S307 - digits and operators
    return values


@pytest.mark.skipif(not shutil.which("gcc") or not HEADER.exists(), reason="needs gcc and headers")
def test_constants_are_the_headers():
    names = [name for name in NAMES if name not in IOCTLS]
    values = compiled_values(names)
    # A header older than a capability does not know it; most must be there.
    assert len(values) > len(names) * 3 // 4
    assert {name: getattr(abi, name) for name in values} == values


@pytest.mark.parametrize(
    ("name", "size_bytes"),
    [
        ("struct kvm_regs", 144),
        ("struct kvm_sregs", 312),
        ("struct kvm_segment", 24),
        ("struct kvm_userspace_memory_region", 32),
        ("struct kvm_translation", 24),
        ("struct kvm_enable_cap", 104),
        ("struct kvm_coalesced_mmio_zone", 16),
    ],
)
def test_structs_have_the_size_that_the_kernel_has(name: str, size_bytes: int):
    assert ffi.sizeof(name) == size_bytes


def test_exit_names():
    assert abi.EXIT_NAMES[6] == "mmio"
    assert abi.EXIT_NAMES[17] == "internal_error"
    assert len(set(abi.EXIT_NAMES.values())) == len(abi.EXIT_NAMES)
