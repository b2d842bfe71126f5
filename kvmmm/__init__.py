"""KVM micro-VMs in Python, with a memory manager that can be read.

    import kvmmm

    with kvmmm.MicroVM(memory="64M") as vm:
        vm.load("guest.elf")
        result = vm.run(timeout=5.0)
        print(result.status, result.console)

The names below are the library; everything else is reached through its own package. They are
imported when first used (PEP 562), so that `import kvmmm` costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing `typing` takes longer than everything else here
if TYPE_CHECKING:
    from kvmmm.arena import Arena
    from kvmmm.errors import (
        EXIT_CODES,
        ArenaExhaustedError,
        GuestBusError,
        GuestConsoleError,
        GuestFaultError,
        HostBufferError,
        ImageError,
        IoctlError,
        KvmmmError,
        KvmUnavailableError,
        RangeError,
        StateError,
        VcpuError,
    )
    from kvmmm.hostarch.access import ANY_ACCESS, EXECUTE, READ, READ_EXECUTE, READ_WRITE, WRITE
    from kvmmm.hostarch.ranges import AddrRange, FileRange
    from kvmmm.hostarch.ranges_seq import AddrRangeSeq
    from kvmmm.mm import IOOpts, MemoryManager, Policy
    from kvmmm.safemem.block import BlockSeq
    from kvmmm.safemem.stream import Reader, Writer
    from kvmmm.vmm.image import Image, read_image
    from kvmmm.vmm.image_file import ImageNotFoundError
    from kvmmm.vmm.microvm import MicroVM
    from kvmmm.vmm.result import RunResult
    from kvmmm.vmm.statistics import RunStatistics
    from kvmmm.vmm.user_vm import UserVM

    __version__: str

__all__ = [
    "ANY_ACCESS",
    "EXECUTE",
    "EXIT_CODES",
    "READ",
    "READ_EXECUTE",
    "READ_WRITE",
    "WRITE",
    "AddrRange",
    "AddrRangeSeq",
    "Arena",
    "ArenaExhaustedError",
    "BlockSeq",
    "FileRange",
    "GuestBusError",
    "GuestConsoleError",
    "GuestFaultError",
    "HostBufferError",
    "IOOpts",
    "Image",
    "ImageError",
    "ImageNotFoundError",
    "IoctlError",
    "KvmUnavailableError",
    "KvmmmError",
    "MemoryManager",
    "MicroVM",
    "Policy",
    "RangeError",
    "Reader",
    "RunResult",
    "RunStatistics",
    "StateError",
    "UserVM",
    "VcpuError",
    "Writer",
    "read_image",
]

# Which module each name comes from. The type checker reads the imports above; a test compares.
_HOMES = {
    "kvmmm.arena": ("Arena",),
    "kvmmm.errors": (
        *("EXIT_CODES", "ArenaExhaustedError", "GuestBusError", "GuestConsoleError"),
        *("GuestFaultError", "HostBufferError", "ImageError", "IoctlError"),
        *("KvmUnavailableError", "KvmmmError", "RangeError", "StateError", "VcpuError"),
    ),
    "kvmmm.hostarch.access": (
        *("ANY_ACCESS", "EXECUTE", "READ", "READ_EXECUTE", "READ_WRITE", "WRITE"),
    ),
    "kvmmm.hostarch.ranges": ("AddrRange", "FileRange"),
    "kvmmm.hostarch.ranges_seq": ("AddrRangeSeq",),
    "kvmmm.mm": ("IOOpts", "MemoryManager", "Policy"),
    "kvmmm.safemem.block": ("BlockSeq",),
    "kvmmm.safemem.stream": ("Reader", "Writer"),
    "kvmmm.vmm.image": ("Image", "read_image"),
    "kvmmm.vmm.image_file": ("ImageNotFoundError",),
    "kvmmm.vmm.microvm": ("MicroVM",),
    "kvmmm.vmm.result": ("RunResult",),
    "kvmmm.vmm.statistics": ("RunStatistics",),
    "kvmmm.vmm.user_vm": ("UserVM",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _version()
    elif name in _HOME_OF:
        import importlib

        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module 'kvmmm' has no attribute {name!r}")
    globals()[name] = value  # found without us the next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib import metadata  # takes longer than all the rest of this file

    try:
        return metadata.version("kvmmm")
    except metadata.PackageNotFoundError:
        return "0+unknown"
