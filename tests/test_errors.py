"""Every error is a KvmmmError and a builtin, carries its facts, and ends with a documented code."""

from __future__ import annotations

import ast
import errno
import inspect

import pytest

from kvmmm import errors
from kvmmm.errors import (
    AddressSpaceIOUnavailableError,
    ArenaExhaustedError,
    GuestAlignmentError,
    GuestBusError,
    GuestConsoleError,
    GuestFaultError,
    HostBufferError,
    ImageError,
    IoctlError,
    KvmmmError,
    KvmUnavailableError,
    MmError,
    NoProgressError,
    PolicyError,
    RangeError,
    StateError,
    StringTooLongError,
    SyscallError,
    VcpuError,
)
from kvmmm.hostarch.access import EXECUTE, NO_ACCESS, READ, WRITE

CLASSES = [
    c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__
]

# Class, an instance, the builtin that people expect, exit code, what the message must hold.
CASES = [
    (
        IoctlError("KVM_CREATE_VM", "0", errno.EBUSY, "close another VM"),
        OSError,
        errors.EXIT_OS,
        ["KVM_CREATE_VM(0)", "EBUSY", "Device or resource busy", "close another VM"],
    ),
    (
        KvmUnavailableError(errno.ENOENT, "there is no /dev/kvm", "load the kvm module"),
        OSError,
        errors.EXIT_NO_KVM,
        ["there is no /dev/kvm", "load the kvm module"],
    ),
    (
        GuestFaultError(0x5000, READ | WRITE, mapped=False, done=12),
        OSError,
        errors.EXIT_FAULT,
        ["0x5000", "read/write", "nothing is mapped", "12 bytes done"],
    ),
    (
        ArenaExhaustedError(8 << 20, 1 << 20, 64 << 20),
        OSError,
        errors.EXIT_MEMORY,
        ["8192 KiB", "1024 KiB", "65536 KiB", "--arena"],
    ),
    (
        ImageError("a.elf", "it is truncated", "copy it again"),
        ValueError,
        errors.EXIT_IMAGE,
        ["a.elf", "it is truncated", "copy it again"],
    ),
    (
        RangeError(0x1000, 0x2000, "not aligned"),
        ValueError,
        errors.EXIT_USAGE,
        ["[0x1000, 0x2000)", "not aligned"],
    ),
    (
        GuestConsoleError("the ring's head ran past its tail"),
        OSError,
        errors.EXIT_CONSOLE,
        ["the ring's head ran past its tail"],
    ),
    (
        SyscallError(errno.EMFILE, "cannot make a sealed memfd"),
        OSError,
        errors.EXIT_OS,
        ["cannot make a sealed memfd", "Too many open files"],
    ),
    (
        GuestBusError(0x7000, 1, done=12),
        OSError,
        errors.EXIT_FAULT,
        ["0x7000", "its file ends before it", "12 bytes done"],
    ),
    (
        GuestAlignmentError(0x7002, WRITE),
        OSError,
        errors.EXIT_FAULT,
        ["0x7002", "atomically", "not a multiple of 4"],
    ),
    (
        NoProgressError(0x7123, READ, 100, done=12),
        OSError,
        errors.EXIT_FAULT,
        ["0x7123", "served 100 times", "12 bytes done"],
    ),
    (
        HostBufferError(4096, 4000),
        OSError,
        errors.EXIT_OS,
        ["buffer", "at byte 4096", "cut short", "4000 bytes done"],
    ),
    (
        StringTooLongError(0x7000, b"abc"),
        OSError,
        errors.EXIT_FAULT,
        ["0x7000", "no end within 3 bytes"],
    ),
    (
        AddressSpaceIOUnavailableError("no VMAs are left"),
        RuntimeError,
        errors.EXIT_INTERNAL,
        ["no VMAs are left"],
    ),
    (
        PolicyError("KVMMM_POLICY", "there is no 'speed'"),
        ValueError,
        errors.EXIT_USAGE,
        ["KVMMM_POLICY: there is no 'speed'"],
    ),
    (
        MmError(errno.EEXIST, "mmap", 0x20_0000, "something is mapped there"),
        OSError,
        errors.EXIT_USAGE,
        ["mmap at 0x200000", "something is mapped there", "EEXIST"],
    ),
    (VcpuError("FAIL_ENTRY"), RuntimeError, errors.EXIT_OS, ["KVM_RUN", "FAIL_ENTRY"]),
    (StateError("the VM is closed"), RuntimeError, errors.EXIT_USAGE, ["the VM is closed"]),
]


def test_codes_are_documented_exactly_once():
    names = {name: code for name, code in vars(errors).items() if name.startswith("EXIT_")}
    documented = names.pop("EXIT_CODES")
    assert len(set(names.values())) == len(names)
    assert set(documented) == set(names.values())
    # A key that stands twice in a dict display is lost before it can be seen.
    displays = [
        n for n in ast.walk(ast.parse(inspect.getsource(errors))) if isinstance(n, ast.Dict)
    ]
    keys = [k.id for d in displays for k in d.keys if isinstance(k, ast.Name)]
    assert sorted(keys) == sorted(names)
    assert len(set(documented.values())) == len(documented)


def test_codes_are_within_sysexits():
    for code, cause in errors.EXIT_CODES.items():
        assert 64 <= code <= 78
        assert cause
        assert cause == cause.strip()


@pytest.mark.parametrize("error_class", CLASSES)
def test_classes(error_class: type[KvmmmError]):
    assert issubclass(error_class, KvmmmError)
    assert error_class.exit_code in errors.EXIT_CODES
    assert error_class.__doc__


def test_every_class_has_a_case():
    cases = {type(error) for error, *_ in CASES}
    assert cases | {KvmmmError} >= {c for c in CLASSES if not c.__subclasses__()}


@pytest.mark.parametrize(
    ("error", "builtin", "code", "facts"), CASES, ids=[type(error).__name__ for error, *_ in CASES]
)
def test_error(error: KvmmmError, builtin: type[Exception], code: int, facts: list[str]):
    assert isinstance(error, KvmmmError)
    assert isinstance(error, builtin)
    assert error.exit_code == code
    for fact in facts:
        assert fact in str(error)
    if isinstance(error, OSError):
        assert error.errno in errno.errorcode
        assert error.strerror == str(error)


def test_ioctl_error():
    e = IoctlError("KVM_RUN", "", errno.EINTR)
    assert (e.ioctl, e.arguments, e.errno) == ("KVM_RUN", "", errno.EINTR)
    assert str(e) == "KVM_RUN() failed: EINTR, Interrupted system call"
    assert "failed: 9999" in str(IoctlError("KVM_RUN", "", 9999))


@pytest.mark.parametrize(
    ("err", "code"),
    [
        (errno.EACCES, errors.EXIT_PERMISSION),
        (errno.EPERM, errors.EXIT_PERMISSION),
        (errno.ENOENT, errors.EXIT_NO_KVM),
        (errno.ENODEV, errors.EXIT_NO_KVM),
    ],
)
def test_kvm_unavailable(err: int, code: int):
    e = KvmUnavailableError(err, "cannot open /dev/kvm", "join the group kvm")
    assert (e.errno, e.remedy, e.exit_code) == (err, "join the group kvm", code)
    assert KvmUnavailableError.exit_code == errors.EXIT_NO_KVM  # of the class: untouched


@pytest.mark.parametrize(
    ("access", "verb"),
    [
        (READ, "cannot read guest"),
        (WRITE, "cannot write guest"),
        (EXECUTE, "cannot execute guest"),
        (NO_ACCESS, "cannot access guest"),
    ],
)
def test_guest_fault(access: int, verb: str):
    e = GuestFaultError(0x1234, access, mapped=True)
    assert (e.addr, e.access, e.mapped, e.done, e.errno) == (0x1234, access, True, 0, errno.EFAULT)
    assert verb in str(e)
    assert "its mapping forbids it" in str(e)
    assert "bytes done" not in str(e)


@pytest.mark.parametrize(
    ("error", "done", "mapped"),
    [
        (GuestFaultError(0x5000, WRITE, mapped=False, done=7), 7, False),
        (GuestBusError(0x5000, WRITE, done=7), 7, True),
        (GuestAlignmentError(0x5000, WRITE), 0, True),
        (NoProgressError(0x5000, WRITE, 3, done=7), 7, True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds_of_guest_faults(error: GuestFaultError, done: int, mapped: bool):
    """Whoever catches a fault has the same facts, whichever it is."""
    assert isinstance(error, GuestFaultError)
    assert (error.addr, error.access, error.done, error.mapped) == (0x5000, WRITE, done, mapped)
    assert (error.errno, error.prefix) == (errno.EFAULT, b"")


def test_no_progress():
    assert NoProgressError(0, READ, 3).n_tries == 3
    assert "(0 bytes done)" in str(NoProgressError(0, READ, 3))


def test_alignment():
    assert "a multiple of 8" in str(GuestAlignmentError(1, READ, 8))


def test_host_buffer():
    """It is nobody's guest memory that failed."""
    e = HostBufferError(4096, 4000)
    assert (e.offset, e.done, e.errno) == (4096, 4000, errno.EFAULT)
    assert not isinstance(e, GuestFaultError)


def test_string_too_long():
    e = StringTooLongError(0x1234, b"prefix")
    assert (e.addr, e.prefix, e.errno) == (0x1234, b"prefix", errno.ENAMETOOLONG)
    assert not isinstance(e, GuestFaultError)


def test_policy():
    e = PolicyError("a file", "it is old")
    assert (e.source, str(e)) == ("a file", "a file: it is old")


def test_arena_exhausted():
    e = ArenaExhaustedError(3, 2, 1)
    assert (e.wanted_bytes, e.free_bytes, e.capacity_bytes, e.errno) == (3, 2, 1, errno.ENOMEM)


def test_image_error():
    assert str(ImageError("x", "not an ELF")) == "x: not an ELF"
    e = ImageError("x", "not an ELF", "build it")
    assert (e.path, e.reason, e.remedy) == ("x", "not an ELF", "build it")


def test_range_error():
    e = RangeError(1, 2, "why")
    assert (e.start, e.end) == (1, 2)
