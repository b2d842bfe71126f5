"""`Program`: small programs for ring 3, assembled in place and wrapped into an ELF."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from kvmmm.vmm.user_vm import UserVM
from tests.vmm.elf_builder import Elf, Phdr, R, W, X
from tests.vmm.guest_run import TIMEOUT
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from kvmmm.vmm.result import RunResult

PROGRAM = 0x400000
"""Where code lies, read and execute."""
DATA = 0x500000
"""A page of zeros behind it, read and write; one more that is not in the file."""
DATA_BYTES = 0x2000

EXIT, WRITE, MMAP, MPROTECT, MUNMAP, BRK, MADVISE, YIELD, GETPID, FORK = (
    60, 1, 9, 10, 11, 12, 28, 24, 39, 57,
)  # fmt: skip
EXIT_GROUP = 231
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")


class Program(Code):
    """Machine code for ring 3."""

    def syscall(self, number: int, *args: int | None) -> Self:
        """Make a system call; None leaves an argument's register as it is."""
        for register, value in zip(_ARGUMENTS, args, strict=False):
            if value is not None:
                self.mov(register, value)
        return self.mov("rax", number).raw("0f 05")

    def exit(self, status: int | None = 0) -> Self:
        """End the process; None for the low bits of rdi."""
        return self.syscall(EXIT_GROUP, status)

    def print(self, text: str) -> Self:
        """Write a text to standard output; the text stands in the code."""
        # call over it, which pushes its address; pop rsi
        data = text.encode()
        self.raw(b"\xe8" + len(data).to_bytes(4, "little") + data + b"\x5e")
        return self.syscall(WRITE, 1, None, len(data))

    def fork(self, child: Program) -> Self:
        """Fork; the child does `child`, the parent goes on."""
        self.syscall(FORK)
        # test rax, rax; jnz over the child's code
        return self.raw(b"\x48\x85\xc0\x0f\x85" + len(child.bytes).to_bytes(4, "little")).raw(
            child.bytes
        )

    def exit_with(self, register: str) -> Self:
        """End the process with the low bits of a register."""
        # mov rdi, register
        number = (
            *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
        ).index(register)
        high, low = number >> 3, number & 7
        return self.raw(bytes([0x48 | high << 2, 0x89, 0xC0 | low << 3 | 7])).exit(None)

    def elf(self, **fields: Any) -> bytes:
        """Return it as a static executable with a page of data; fields are those of `Elf`."""
        return Elf(
            **{
                "phdrs": [
                    Phdr(flags=R | X, offset=0x1000, vaddr=PROGRAM, filesz=len(self.bytes)),
                    Phdr(flags=R | W, offset=0, vaddr=DATA, filesz=0, memsz=DATA_BYTES),
                ],
                "entry": PROGRAM,
                "contents": {0x1000: self.bytes},
                **fields,
            }
        ).build()


def load_program(program: Program, **options: Any) -> UserVM:
    """Return a VM with `program` loaded; options are those of UserVM."""
    vm = UserVM(**options)
    try:
        vm.load(program.elf())
    except BaseException:
        vm.close()
        raise
    return vm


def run_program(program: Program, **options: Any) -> RunResult:
    """Load and run; the VM is closed afterwards."""
    with load_program(program, **options) as vm:
        return vm.run(timeout=TIMEOUT)
