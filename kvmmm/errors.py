"""Everything that kvmmm raises, and the facts each error carries.

Every error is a `KvmmmError` and also the builtin that Python people expect, so both
`except kvmmm.KvmmmError` and `except OSError` work. Facts stand in attributes; the message says
what happened, where, and what to do. `exit_code` is what the command line ends with (see `kvmmm run
--help`).
"""

from __future__ import annotations

import errno as _errno
import os

EXIT_USAGE = 64
EXIT_IMAGE = 65
EXIT_NO_INPUT = 66
EXIT_FAULT = 67
EXIT_EXCEPTION = 68
EXIT_NO_KVM = 69
EXIT_INTERNAL = 70
EXIT_OS = 71
EXIT_MEMORY = 72
EXIT_DEADLINE = 73
EXIT_CONSOLE = 74
EXIT_STOPPED = 75
EXIT_EMULATION = 76
EXIT_PERMISSION = 77
EXIT_SHUTDOWN = 78

EXIT_CODES: dict[int, str] = {
    EXIT_USAGE: "the command line is wrong",
    EXIT_IMAGE: "the image was rejected, before any VM existed",
    EXIT_NO_INPUT: "the image cannot be read",
    EXIT_FAULT: "the guest touched memory that it may not",
    EXIT_EXCEPTION: "the guest raised an exception that it does not handle",
    EXIT_NO_KVM: "there is no usable /dev/kvm",
    EXIT_INTERNAL: "a defect in kvmmm itself",
    EXIT_OS: "the host refused a system call or an ioctl",
    EXIT_MEMORY: "guest memory is exhausted",
    EXIT_DEADLINE: "the deadline (--timeout) passed",
    EXIT_CONSOLE: "the console could not be written or read",
    EXIT_STOPPED: "stopped from outside: Ctrl-C, SIGTERM or vm.stop()",
    EXIT_EMULATION: "KVM cannot run an instruction of the guest",
    EXIT_PERMISSION: "this user may not open /dev/kvm",
    EXIT_SHUTDOWN: "the guest triple-faulted",
}


class KvmmmError(Exception):
    """Base of all errors of kvmmm."""

    exit_code = EXIT_INTERNAL


class IoctlError(KvmmmError, OSError):
    """An ioctl on a KVM file descriptor failed.

    Attributes:
        ioctl: Its name, as in <linux/kvm.h>.
        arguments: What it was given, as text.
        errno: The kernel's answer.
    """

    exit_code = EXIT_OS

    def __init__(self, ioctl: str, arguments: str, err: int, hint: str = "") -> None:
        self.ioctl = ioctl
        self.arguments = arguments
        name = _errno.errorcode.get(err, str(err))
        text = f"{ioctl}({arguments}) failed: {name}, {os.strerror(err)}"
        super().__init__(err, f"{text}; {hint}" if hint else text)

    def __str__(self) -> str:
        return str(self.strerror)


class SyscallError(KvmmmError, OSError):
    """A system call other than an ioctl failed.

    Attributes:
        errno: The kernel's answer.
    """

    exit_code = EXIT_OS

    def __init__(self, err: int, what: str) -> None:
        super().__init__(err, f"{what}: {os.strerror(err)}")

    def __str__(self) -> str:
        return str(self.strerror)


class KvmUnavailableError(KvmmmError, OSError):
    """/dev/kvm is missing, closed to this user, or not a KVM that we can use.

    Attributes:
        errno: Why it could not be opened.
        remedy: What to type.
    """

    exit_code = EXIT_NO_KVM

    def __init__(self, err: int, what: str, remedy: str) -> None:
        self.remedy = remedy
        if err in (_errno.EACCES, _errno.EPERM):
            self.exit_code = EXIT_PERMISSION
        super().__init__(err, f"{what}\n{remedy}")

    def __str__(self) -> str:
        return str(self.strerror)


class GuestFaultError(KvmmmError, OSError):
    """An access to guest memory cannot be served.

    Attributes:
        addr: First guest address that could not be accessed.
        access: What was wanted there (`kvmmm.hostarch.access` bits).
        done: Bytes done before it.
        mapped: Whether a vma covers `addr` (it forbids the access), or none does.
        prefix: What `read_string` had read before it; otherwise empty.
        errno: EFAULT.
    """

    exit_code = EXIT_FAULT
    prefix = b""

    def __init__(self, addr: int, access: int, *, mapped: bool, done: int = 0) -> None:
        self.addr = addr
        self.access = access
        self.mapped = mapped
        self.done = done
        verbs = [v for b, v in ((1, "read"), (2, "write"), (4, "execute")) if access & b]
        why = "its mapping forbids it" if mapped else "nothing is mapped there"
        text = f"cannot {'/'.join(verbs) or 'access'} guest address {addr:#x}: {why}"
        super().__init__(_errno.EFAULT, f"{text} ({done} bytes done)" if done else text)

    def __str__(self) -> str:
        return str(self.strerror)


class GuestBusError(GuestFaultError):
    """The page is mapped, but its file has no bytes there: it ends before, or was cut off.

    The bus-error kind (SIGBUS), where `GuestFaultError` itself is the segmentation kind (SIGSEGV).

    Attributes: those of `GuestFaultError`; `mapped` is true.
    """

    def __init__(self, addr: int, access: int, *, done: int = 0) -> None:
        super().__init__(addr, access, mapped=True, done=done)
        text = f"cannot access guest address {addr:#x}: its file ends before it"
        self.strerror = f"{text} ({done} bytes done)" if done else text


class GuestAlignmentError(GuestFaultError):
    """An atomic access to a word that is not aligned; nothing was touched.

    Attributes: those of `GuestFaultError`; `done` is 0.
    """

    def __init__(self, addr: int, access: int, alignment_bytes: int = 4) -> None:
        super().__init__(addr, access, mapped=True)
        self.strerror = (
            f"cannot access guest address {addr:#x} atomically: it is not a multiple of "
            f"{alignment_bytes}"
        )


class NoProgressError(GuestFaultError):
    """A fault was served again and again, and the access failed as before.

    Something takes the page away as fast as it comes, or serves another one than it was asked for.

    Attributes: those of `GuestFaultError`, and
        n_tries: How often it was served.
    """

    def __init__(self, addr: int, access: int, n_tries: int, *, done: int = 0) -> None:
        self.n_tries = n_tries
        super().__init__(addr, access, mapped=True, done=done)
        self.strerror = (
            f"guest address {addr:#x} cannot be accessed although its fault was served "
            f"{n_tries} times ({done} bytes done)"
        )


class HostBufferError(KvmmmError, OSError):
    """The caller's own buffer faulted: a mapping of a file that was cut short, say.

    Attributes:
        offset: Of the first byte of the buffer that cannot be accessed.
        done: Bytes done before it.
        errno: EFAULT.
    """

    exit_code = EXIT_OS

    def __init__(self, offset: int, done: int) -> None:
        self.offset = offset
        self.done = done
        super().__init__(
            _errno.EFAULT,
            f"the host's buffer cannot be accessed at byte {offset}: is it a mapping of a file "
            f"that was cut short? ({done} bytes done)",
        )

    def __str__(self) -> str:
        return str(self.strerror)


class StringTooLongError(KvmmmError, OSError):
    """No NUL was found in as many bytes as a string may have.

    Attributes:
        addr: Guest address where the string begins.
        prefix: What was read, without an end.
        errno: ENAMETOOLONG.
    """

    exit_code = EXIT_FAULT

    def __init__(self, addr: int, prefix: bytes) -> None:
        self.addr = addr
        self.prefix = prefix
        super().__init__(
            _errno.ENAMETOOLONG,
            f"the string at guest address {addr:#x} has no end within {len(prefix)} bytes",
        )

    def __str__(self) -> str:
        return str(self.strerror)


class AddressSpaceIOUnavailableError(KvmmmError, RuntimeError):
    """This copy cannot go through the address space now; internal mappings still serve it.

    Never leaves the memory manager. Source: gVisor platform.AddressSpaceIOUnavailable.
    """


class PolicyError(KvmmmError, ValueError):
    """A number of the copies' policy is unknown or malformed, or a calibration is not usable here.

    Attributes:
        source: Where it came from: a path, a variable, an argument.
    """

    exit_code = EXIT_USAGE

    def __init__(self, source: str, why: str) -> None:
        self.source = source
        super().__init__(f"{source}: {why}")


class MmError(KvmmmError, OSError):
    """An operation of the memory manager was refused: mmap, mprotect, brk and the like.

    Attributes:
        errno: As Linux says it: EINVAL, ENOMEM, EEXIST, EACCES, EPERM, EAGAIN, EFAULT and so on.
        operation: Which one, by the system call's name.
        addr: Guest address that it is about.
    """

    exit_code = EXIT_USAGE

    def __init__(self, err: int, operation: str, addr: int, why: str) -> None:
        self.operation = operation
        self.addr = addr
        name = _errno.errorcode.get(err, str(err))
        super().__init__(err, f"{operation} at {addr:#x}: {why} ({name})")

    def __str__(self) -> str:
        return str(self.strerror)


class ArenaExhaustedError(KvmmmError, OSError):
    """The arena has no room for an allocation.

    Attributes:
        wanted_bytes: What was asked for.
        free_bytes: What is left, perhaps in smaller pieces.
        capacity_bytes: The arena's size.
        errno: ENOMEM.
    """

    exit_code = EXIT_MEMORY

    def __init__(self, wanted_bytes: int, free_bytes: int, capacity_bytes: int) -> None:
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes
        self.capacity_bytes = capacity_bytes
        super().__init__(
            _errno.ENOMEM,
            f"the arena is exhausted: {wanted_bytes >> 10} KiB wanted, {free_bytes >> 10} KiB of "
            f"{capacity_bytes >> 10} KiB free; give it more with --arena (MicroVM(arena=...))",
        )

    def __str__(self) -> str:
        return str(self.strerror)


class ImageError(KvmmmError, ValueError):
    """A guest image was rejected; no VM was made.

    Attributes:
        path: The image, as the caller named it.
        reason: What is wrong with it, one sentence.
        remedy: What to do about it; may be empty.
    """

    exit_code = EXIT_IMAGE

    def __init__(self, path: str, reason: str, remedy: str = "") -> None:
        self.path = path
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"{path}: {reason}" + (f"\n{remedy}" if remedy else ""))


class RangeError(KvmmmError, ValueError):
    """A range or address is malformed: unaligned, empty, wrapping, or outside the address space.

    Attributes:
        start: First address of the range.
        end: One past its last address.
    """

    exit_code = EXIT_USAGE

    def __init__(self, start: int, end: int, why: str) -> None:
        self.start = start
        self.end = end
        super().__init__(f"[{start:#x}, {end:#x}): {why}")


class GuestConsoleError(KvmmmError, OSError):
    """The guest broke the console's protocol, or its console cannot be served.

    Attributes:
        errno: EPROTO.
    """

    exit_code = EXIT_CONSOLE

    def __init__(self, what: str) -> None:
        super().__init__(_errno.EPROTO, what)

    def __str__(self) -> str:
        return str(self.strerror)


class VcpuError(KvmmmError, RuntimeError):
    """KVM_RUN ended in a way that says nothing about the guest's program.

    Attributes:
        reason: KVM's reason as text.
    """

    exit_code = EXIT_OS

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"KVM_RUN: {reason}")


class StateError(KvmmmError, RuntimeError):
    """A call came at a time when it cannot be served: closed, running, or not yet loaded."""

    exit_code = EXIT_USAGE
