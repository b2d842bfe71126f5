"""The one-screen report of a guest that was stopped: what, where, with which registers, which map.

Plain text, at most 32 lines of 100 columns; the command line prints it as it is. The run loop fills
in facts; nothing here asks KVM or the memory manager for anything. Warnings, which the caller finds
(tables in read-only memory, say), stand directly under the headline, since they explain the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.access import EXECUTE, READ, WRITE, access_str, allows
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.vmm.insn import disassemble, disassemble_around
from kvmmm.vmm.register_file import GPR_NAMES
from kvmmm.vmm.vector import trap_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from kvmmm.vmm.insn import Read

    Vma = tuple[int, int, int, str]
    """(start, end, permissions as access bits, name); guest addresses, half-open."""

DEADLINE = "deadline"
INTERRUPT = "interrupt"
STOP = "stop"
SHUTDOWN = "shutdown"
EMULATION = "emulation"
ARENA = "arena"
EXCEPTION = "exception"
"""Causes of a stop that is no memory fault, for `StopFacts`."""

_SAYS_WHERE = frozenset({DEADLINE, INTERRUPT, STOP, EXCEPTION})  # their headline does

MAX_COLUMNS = 100
_MAX_WARNINGS = 3
_NEIGHBOURS = 3
_LIKELY_STACK_BYTES = 256

# From bit 0 up; bit 1 is always set, 12 and 13 are the I/O privilege level.
_RFLAGS = (
    *("CF", "", "PF", "", "AF", "", "ZF", "SF", "TF", "IF", "DF", "OF"),
    *("", "", "NT", "", "RF", "VM", "AC", "VIF", "VIP", "ID"),
)

_HINTS = {
    DEADLINE: "give it longer with --timeout, or find out why it does not end",
    SHUTDOWN: "an exception came whose handler, stack or tables could not be used: check what "
    "lidt, lgdt and ltr loaded, and the stack; kvmmm's own tables report every exception",
    EMULATION: "all the memory that it touches is present, so it is the instruction: KVM emulates "
    "here, and knows few; build that code with -mgeneral-regs-only, or run it in ring 3",
    ARENA: "give it more with --arena (MicroVM(arena=...)), or let the guest touch less memory",
    EXCEPTION: "the default IDT ends the run; a guest that loads its own handles it itself",
}


class GuestState:
    """Where a guest stood.

    Attributes:
        regs: Values by name: the 16 general registers, rip, rflags, cs and ss (selectors); where
            known cr2, cr3 and cpl (else the low bits of cs). Others are ignored.
        read: Reads guest-virtual memory, for the instructions; may give fewer bytes.
        symbols: Gives `name+0x12` for a guest-virtual address, or None.
        vmas: The map, in any order.
    """

    __slots__ = ("read", "regs", "symbols", "vmas")

    def __init__(
        self,
        regs: Mapping[str, int],
        *,
        read: Read | None = None,
        symbols: Callable[[int], str | None] | None = None,
        vmas: Iterable[Vma] = (),
    ) -> None:
        self.regs = regs
        self.read: Read = read or (lambda _gva, _n_bytes: b"")
        self.symbols = symbols or (lambda _addr: None)
        self.vmas = sorted(vmas)

    @property
    def ring(self) -> int:
        """Current privilege level."""
        return self.regs.get("cpl", self.regs.get("cs", 0) & 3)

    def name_of(self, addr: int) -> str:
        """Return `0x1234 (main+0x4)`, or the bare address."""
        symbol = self.symbols(addr)
        return f"{addr:#x} ({_clipped(symbol, 40)})" if symbol else f"{addr:#x}"

    def vma_at(self, addr: int) -> Vma | None:
        """Return the vma that covers `addr`."""
        return next((vma for vma in self.vmas if vma[0] <= addr < vma[1]), None)


class FaultFacts:
    """An access to guest memory that cannot be served.

    Attributes:
        state: The guest at the exit.
        addr: First address that could not be accessed, in the map's address space.
        access: What was wanted there (`kvmmm.hostarch.access` bits).
        is_past: Whether rip is already past the instruction, as at a KVM_EXIT_MMIO for a write.
        store: Then, what `store_ending_at` found.
        vector: Where it came by an exception, its number.
        error_code: That exception's error code.
        warnings: What the caller found suspicious, one line each.
        hint: What to do; empty for the usual one.
    """

    __slots__ = (
        *("access", "addr", "error_code", "hint", "is_past", "state", "store", "vector"),
        "warnings",
    )

    def __init__(
        self,
        state: GuestState,
        addr: int,
        access: int,
        *,
        is_past: bool = False,
        store: tuple[int, str] | None = None,
        vector: int | None = None,
        error_code: int | None = None,
        warnings: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        self.state = state
        self.addr = addr
        self.access = access
        self.is_past = is_past
        self.store = store
        self.vector = vector
        self.error_code = error_code
        self.warnings = warnings
        self.hint = hint


class StopFacts:
    """A stop for another reason than memory.

    Attributes:
        cause: One of the constants of this module.
        state: The guest; None where it is lost (SVM resets a vCPU that triple-faults).
        elapsed_ns: How long it had run.
        detail: What the cause adds, one sentence: the arena's figures, who stopped it.
        code: For `EMULATION`, the instruction's bytes as KVM gave them.
        vector: For `EXCEPTION`, its number.
        error_code: For `EXCEPTION`, its error code, if that vector has one.
        warnings: What the caller found suspicious, one line each.
        hint: What to do; empty for the usual one.
    """

    __slots__ = (
        *("cause", "code", "detail", "elapsed_ns", "error_code", "hint", "state", "vector"),
        "warnings",
    )

    def __init__(
        self,
        cause: str,
        state: GuestState | None = None,
        *,
        elapsed_ns: int | None = None,
        detail: str = "",
        code: bytes = b"",
        vector: int | None = None,
        error_code: int | None = None,
        warnings: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        self.cause = cause
        self.state = state
        self.elapsed_ns = elapsed_ns
        self.detail = detail
        self.code = code
        self.vector = vector
        self.error_code = error_code
        self.warnings = warnings
        self.hint = hint


def render_fault(facts: FaultFacts) -> str:
    """Return the report of a memory fault."""
    state = facts.state
    verb = _verb(facts.access)
    lines = [f"guest fault: {verb} {facts.addr:#x}, {_why(facts)}", *_warnings(facts.warnings)]
    rip = state.regs["rip"]
    at = rip if not facts.is_past else facts.store[0] if facts.store else None
    where = f"before {state.name_of(rip)}" if at is None else f"at {state.name_of(at)}"
    lines.append(f"  where  {where}, ring {state.ring}")
    if facts.vector is not None:
        lines.append(f"  trap   {trap_name(facts.vector, facts.error_code)}")
    if facts.access & EXECUTE:
        lines += _caller(state)
    lines += [*_code(state, at), *_registers(state), *_map(state, facts.addr)]
    return _screen([*lines, *_wrapped("  hint", facts.hint or _fault_hint(facts))])


def render_stop(facts: StopFacts) -> str:
    """Return the report of any other stop; one line and a hint where no more is known."""
    state = facts.state
    lines = [_stop_headline(facts), *_warnings(facts.warnings)]
    if facts.vector is not None and facts.error_code is not None:
        lines.append(f"  trap   {trap_name(facts.vector, facts.error_code)}")
    if facts.detail:
        lines += _wrapped("  why", facts.detail)
    if facts.code:
        lines.append(f"  bytes  {facts.code[:15].hex(' ')}")
    if state is not None:
        if facts.cause not in _SAYS_WHERE:
            lines.append(f"  where  at {state.name_of(state.regs['rip'])}, ring {state.ring}")
        lines += [*_code(state, state.regs["rip"]), *_registers(state)]
    hint = facts.hint or _HINTS.get(facts.cause, "")
    return _screen([*lines, *(_wrapped("  hint", hint) if hint else ())])


def _stop_headline(facts: StopFacts) -> str:
    after = "" if facts.elapsed_ns is None else f" after {facts.elapsed_ns / 1e9:.1f} s"
    where, insn = "", ""
    if facts.state is not None:
        rip = facts.state.regs["rip"]
        code = facts.code or facts.state.read(rip, 15)
        where = f" at {facts.state.name_of(rip)}, ring {facts.state.ring}"
        insn = f": {text}" if (text := disassemble(code, rip)) else ""
    if facts.cause == EMULATION:
        return f"KVM cannot run this instruction here{insn}"
    if facts.cause == SHUTDOWN:
        return f"the guest triple-faulted{after}: an exception could not be delivered"
    if facts.cause == ARENA:
        return f"guest memory is exhausted{after}"
    if facts.cause == EXCEPTION:
        name = "" if facts.vector is None else f" {trap_name(facts.vector)}"
        return f"guest exception{name}{where}{insn}"
    what = {
        DEADLINE: f"stopped{after}, the deadline",
        INTERRUPT: f"interrupted{after}",
    }.get(facts.cause, f"stopped{after}")
    return f"{what},{where}{insn}" if where else what


def _why(facts: FaultFacts) -> str:
    vma = facts.state.vma_at(facts.addr)
    if vma is None:
        return "where nothing is mapped"
    start, end, perms, name = vma
    shown = f"({access_str(perms)} {_quoted(name)}[{start:#x}, {end:#x}))"
    if allows(perms, facts.access):
        return f"which the map allows {shown}"
    lacking = facts.access & ~perms
    if lacking & WRITE:
        return f"which is {'read-only' if perms & READ else 'not writable'} {shown}"
    return f"which is not {'executable' if lacking & EXECUTE else 'readable'} {shown}"


def _fault_hint(facts: FaultFacts) -> str:
    state, addr = facts.state, facts.addr
    vma = state.vma_at(addr)
    if vma is not None and allows(vma[2], facts.access):
        return (
            "the memory is there: the guest's own page tables forbid it (U, W, NX or a stale entry)"
        )
    if vma is not None:
        return (
            "a segment's permissions are those of its ELF program header; --rwx gives all of them "
            "to all segments, as a boot loader would"
        )
    if addr < PAGE_BYTES:
        return "a null pointer: page 0 is never mapped"
    if 0 <= state.regs["rsp"] - addr <= _LIKELY_STACK_BYTES and facts.access & WRITE:
        return "rsp points there: the stack overflowed, or was never set up"
    if state.vmas and addr >= state.vmas[-1][1]:
        end = state.vmas[-1][1]
        return f"memory ends at {end:#x}; --memory gives the guest more, if the address is meant"
    return "check the pointer; map or load something there if it is right"


def _verb(access: int) -> str:
    if access & EXECUTE:
        return "jump to"
    return {READ: "read from", WRITE: "write to"}.get(access & (READ | WRITE), "read and write of")


def _warnings(warnings: Sequence[str]) -> Iterator[str]:
    shown = warnings if len(warnings) <= _MAX_WARNINGS else warnings[: _MAX_WARNINGS - 1]
    for warning in shown:
        yield from _wrapped("warning: ", warning, max_lines=2)
    if len(warnings) > len(shown):
        yield f"warning: and {len(warnings) - len(shown)} more"


def _caller(state: GuestState) -> Iterator[str]:
    # A wild jump leaves no trace but, if it was a call, its return address.
    top = state.read(state.regs["rsp"], 8)
    if len(top) == 8:
        addr = int.from_bytes(top, "little")
        yield f"  stack  {state.name_of(addr)} on top: the return address, if this was a call"


def _code(state: GuestState, at: int | None) -> Iterator[str]:
    rip = state.regs["rip"]
    lines = disassemble_around(state.read, rip if at is None else at)
    for n, (addr, text) in enumerate(lines):
        marker = "=>" if n == 0 and at is not None else "  "
        yield f"  {marker} {addr:#x}  {text}{'   <-- rip' if addr == rip != at else ''}"


def _registers(state: GuestState) -> Iterator[str]:
    regs = state.regs
    cells = [f"{name:3} {regs.get(name, 0):#018x}" for name in GPR_NAMES]
    for row in range(0, len(cells), 4):
        yield f"  {'  '.join(cells[row : row + 4])}"
    rflags = regs.get("rflags", 0)
    flags = " ".join(f for bit, f in enumerate(_RFLAGS) if f and rflags >> bit & 1)
    iopl = f" IOPL={rflags >> 12 & 3}" if rflags >> 12 & 3 else ""
    yield f"  rip {regs['rip']:#018x}  rflags {rflags:#x} [{flags}{iopl}]"
    control = [f"{name} {regs[name]:#018x}" for name in ("cr2", "cr3") if name in regs]
    selectors = [f"{name} {regs[name]:#04x}" for name in ("cs", "ss") if name in regs]
    yield f"  {'  '.join([*control, *selectors, f'ring {state.ring}'])}"


def _map(state: GuestState, addr: int) -> Iterator[str]:
    below = [vma for vma in state.vmas if vma[1] <= addr][-_NEIGHBOURS:]
    above = [vma for vma in state.vmas if vma[0] > addr][:_NEIGHBOURS]
    at = state.vma_at(addr)
    yield from (f"  {_vma_line(vma)}" for vma in below)
    here = "(nothing is mapped here)" if at is None else _vma_line(at)
    yield f"  {here}   <-- {addr:#x}"
    yield from (f"  {_vma_line(vma)}" for vma in above)


def _vma_line(vma: Vma) -> str:
    start, end, perms, name = vma
    return f"{access_str(perms)} [{start:#x}, {end:#x}) {_clipped(name, 24)}".rstrip()


def _quoted(name: str) -> str:
    return f'"{_clipped(name, 24)}" ' if name else ""


def _clipped(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _wrapped(label: str, text: str, max_lines: int = 3) -> list[str]:
    import textwrap  # wanted once, at the end of a run

    return textwrap.wrap(
        text,
        MAX_COLUMNS,
        initial_indent=f"{label:9}",
        subsequent_indent=" " * 9,
        max_lines=max_lines,
        placeholder=" ...",
    )


def _screen(lines: list[str]) -> str:
    return "\n".join(_clipped(line.rstrip(), MAX_COLUMNS) for line in lines) + "\n"
