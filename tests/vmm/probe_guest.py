"""`Probe`: a guest that makes one access at a time, as the test says, and stops after each.

next: out 0xb0   the host stops it, or tells it by rbx, rcx and rdx what to do
      jmp *rdx   ─► one of OPS, which ends with a jump to `next`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.vmm.microvm import MicroVM
from kvmmm.vmm.result import PAUSED, RunResult
from tests.vmm.guest_run import TIMEOUT, describe
from tests.vmm.machine_code import BASE, Code

if TYPE_CHECKING:
    from typing import Self

PORT = 0xB0
OPS = {
    "load": "48 8b 03",  # mov (%rbx), %rax
    "load32": "8b 03",
    "store": "48 89 0b",  # mov %rcx, (%rbx)
    "store8": "88 0b",
    "store16": "66 89 0b",
    "store32": "89 0b",
    "add": "48 01 0b",
    "xadd": "48 89 c8 f0 48 0f c1 03",  # mov %rcx, %rax; lock xadd %rax, (%rbx)
    "xchg": "48 89 c8 48 87 03",
    "fill": "48 89 df 48 89 c8 b9 2c 01 00 00 f3 aa",  # 300 bytes of cl, by rep stosb
    "avx": (
        # Eight bytes of rcx, four times, by one store of ymm0.
        "c4 e1 f9 6e c1 c5 f9 6c c0 c4 e3 7d 18 c0 01 c5 fe 7f 03 c5 f8 77"
    ),
    "sse": "66 48 0f 6e c1 66 0f 6c c0 f3 0f 7f 03",  # twice, by one movdqu
    "call": "ff d3",
    "pop": "58",  # nothing but that the stack is there
}
WRITES = ("store8", "store16", "store32", "store", "add", "xadd", "xchg", "fill", "sse", "avx")
RING_3_ONLY = frozenset(("avx", "sse"))
"""A KVM that emulates ring 0 does not know these."""
RET = 0xC3


def pause(_port: int, _value: int) -> RunResult:
    """Answer an `out`: the guest can run on, later."""
    return RunResult(PAUSED)


def _guest(ring: int) -> tuple[bytes, dict[str, int]]:
    code = Code().ring(ring)
    first = code.here
    code.out32(PORT).jump("rdx")
    at = {}
    for name, op in OPS.items():
        at[name] = BASE + code.here
        code.raw(op).jump_back(first)
    return code.bytes, at


def apply(memory: bytearray, op: str, at: int, value: int) -> None:
    """Do to `memory` what the guest's op does to its own."""
    old = int.from_bytes(memory[at : at + 8], "little")
    sizes = {"store8": 1, "store16": 2, "store32": 4}
    if op in {"add", "xadd"}:
        new = ((old + value) % (1 << 64)).to_bytes(8, "little")
    elif op == "fill":
        new = bytes([value & 0xFF]) * 300
    else:
        times = {"avx": 4, "sse": 2}.get(op, 1)
        new = value.to_bytes(8, "little")[: sizes.get(op, 8)] * times
    memory[at : at + len(new)] = new


class Probe:
    """A VM with such a guest. A context manager.

    Args:
        ring: Where it runs.
        vm: One whose guest is such a probe at `next` already (a fork); otherwise one is made, and
            the options are those of MicroVM.
    """

    def __init__(self, ring: int = 3, vm: MicroVM | None = None, **options: Any) -> None:
        self.ring = ring
        code, self._at = _guest(ring)
        self.vm = MicroVM(**options) if vm is None else vm
        self.vm.on_out(PORT, pause, value_only=True)
        if vm is None:
            self.vm.load(code, base=BASE)
            result = self.vm.run(timeout=TIMEOUT)
            assert result.outcome == PAUSED, describe(result)

    def do(self, op: str, addr: int, value: int = 0) -> RunResult:
        """Make one access; the result is `paused` if it succeeded."""
        regs = self.vm.vcpu.regs
        regs.rbx, regs.rcx, regs.rdx = addr, value, self._at[op]
        return self.vm.run(timeout=TIMEOUT)

    def load(self, addr: int) -> int:
        """Return 8 bytes as the guest reads them; it must be able to."""
        result = self.do("load", addr)
        assert result.outcome == PAUSED, describe(result)
        return self.vm.vcpu.regs.rax

    def store(self, addr: int, value: int) -> None:
        """Have the guest write 8 bytes; it must be able to."""
        result = self.do("store", addr, value)
        assert result.outcome == PAUSED, describe(result)

    def fork(self) -> Probe:
        """Fork the VM, and control the child, too."""
        return Probe(self.ring, self.vm.fork())

    def ends_with(self, op: str, addr: int, value: int = 0) -> RunResult:
        """Return what an access comes to that ends a guest: a fork makes it, so this one lives."""
        with self.fork() as child:
            return child.do(op, addr, value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.vm.close()
