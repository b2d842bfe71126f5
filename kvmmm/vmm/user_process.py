"""`Process`: one program in ring 3: its memory, its address space, its registers while it waits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvmmm.hostarch.access import EXECUTE
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.vmm import elf, user_stack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmmm.memmap.file import Mappable
    from kvmmm.mm import MemoryManager
    from kvmmm.platform.kvm.page_table_space import PageTableAddressSpace
    from kvmmm.platform.kvm.vcpu_state import VcpuState
    from kvmmm.vmm.user_image import UserImage

STREAMS = frozenset((1, 2))
"""Descriptors of the console: standard output and standard error."""

_USER_ID = 1000
_CLOCK_TICKS = 100


class Process:
    """A process. Made by `UserVM.load` and by fork; `close` frees its memory.

    Attributes:
        pid: Its number; the first process of a VM is 1.
        parent: The process that forked it; None for the first.
        image: What runs in it.
        mm: Its memory; addresses are guest-virtual.
        space: Its page tables.
        files: What its descriptors can map, by number.
        streams: Descriptors that are the console.
        status: Exit status; None while it lives.
    """

    __slots__ = (
        "files", "image", "mm", "parent", "pid", "space", "state", "status", "streams",
    )  # fmt: skip

    def __init__(
        self, pid: int, mm: MemoryManager, space: PageTableAddressSpace, image: UserImage, *,
        parent: Process | None = None, files: Mapping[int, Mappable] | None = None,
    ) -> None:  # fmt: skip
        self.pid = pid
        self.parent = parent
        self.image = image
        self.mm = mm
        self.space = space
        self.files = dict(files or {})
        self.streams = STREAMS
        self.status: int | None = None
        # Its registers, while another process runs; None while it does itself.
        self.state: VcpuState | None = None

    def close(self) -> None:
        """Drop its memory and its page tables. Idempotent.

        Preconditions:
            - No vCPU uses its address space.
        """
        self.mm.close()
        self.space.release()
        self.state = None

    def __repr__(self) -> str:
        return f"<Process {self.pid}{'' if self.status is None else f', status={self.status}'}>"


def load_image(mm: MemoryManager, image: UserImage) -> None:
    """Map a program's segments as private memory, with the bytes of its file.

    Args:
        mm: An address space in which nothing is mapped there.
        image: The program.

    Raises:
        MmError: There is no room for it.
        ArenaExhaustedError: No memory for its bytes.
    """
    name = elf.printable(os.path.basename(image.path))  # noqa: PTH119 - a name, not a path
    for start, end, perms in image.page_ranges():
        mm.mmap(end - start, perms, addr=start + image.bias, fixed=True, name=name)
    for segment in image.segments:
        contents = image.contents(segment)
        if contents:
            mm.copy_out(segment.start + image.bias, contents, ignore_permissions=True)
    mm.set_brk(image.brk_start)


def load_stack(
    mm: MemoryManager, image: UserImage, argv: Sequence[str], env: Mapping[str, str], *,
    has_fsgsbase: bool,
) -> int:  # fmt: skip
    """Map a stack and put on it what a program finds at its entry; returns its rsp.

    Args:
        mm: Where the program has been loaded.
        image: The program.
        argv: Its words, its name first.
        env: Its environment.
        has_fsgsbase: Whether ring 3 may use rdfsbase and its like.

    Raises:
        ImageError: Words and environment are too long.
    """
    stack = mm.map_stack()
    if image.stack_perms & EXECUTE:
        mm.mprotect(stack.start, stack.length_bytes, image.stack_perms)
    auxv = {
        user_stack.AT_HWCAP: 0,
        user_stack.AT_PAGESZ: PAGE_BYTES,
        user_stack.AT_CLKTCK: _CLOCK_TICKS,
        user_stack.AT_PHDR: image.phdr_addr,
        user_stack.AT_PHENT: elf.PHDR.size,
        user_stack.AT_PHNUM: image.n_phdrs,
        user_stack.AT_BASE: 0,
        user_stack.AT_FLAGS: 0,
        user_stack.AT_ENTRY: image.entry_addr,
        user_stack.AT_UID: _USER_ID,
        user_stack.AT_EUID: _USER_ID,
        user_stack.AT_GID: _USER_ID,
        user_stack.AT_EGID: _USER_ID,
        user_stack.AT_SECURE: 0,
        user_stack.AT_HWCAP2: user_stack.HWCAP2_FSGSBASE if has_fsgsbase else 0,
    }
    rsp, content = user_stack.build_stack(
        stack.end, [os.fsencode(word) for word in argv],
        [os.fsencode(f"{name}={value}") for name, value in env.items()], auxv,
        execfn=os.fsencode(image.path), random=os.urandom(16),
    )  # fmt: skip
    mm.copy_out(rsp, content)
    return rsp
