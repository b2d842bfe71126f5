"""Instructions that KVM must emulate and cannot: restarted with all present, or reported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvmmm.vmm.emulation import EmulationError, Provider
from kvmmm.vmm.microvm import MicroVM
from tests.vmm.elf_builder import Elf, Phdr, R, W, X
from tests.vmm.guest_run import TIMEOUT, describe, load_code, run_code
from tests.vmm.machine_code import BASE, Code

pytestmark = pytest.mark.timeout(100)

WINDOW = 2 << 20
EDGE = 5 * WINDOW


@pytest.mark.kvm
@pytest.mark.npt
class TestRestarts:
    """In ring 3, where every KVM executes these natively once the memory is there."""

    def test_x87_across_a_window_edge(self):
        code = Code().ring3().mov("rbx", EDGE - 4).raw("d9 eb dd 1b").exit(0)  # fldpi; fstp [rbx]
        with load_code(code) as vm:
            result = vm.run(timeout=TIMEOUT)
            assert result.ok, describe(result)
            assert vm.mm.read(EDGE - 4, 8) == bytes.fromhex("182d4454fb210940")
            assert result.stats is not None
            assert result.stats.adds_up
            assert result.stats.ept_violations >= 2

    def test_a_load_and_a_store_of_one_instruction(self):
        """Push [rbx] reads one window and writes another."""
        code = Code().ring3().mov("rbx", EDGE).mov("rsp", 7 * WINDOW).raw("ff 33").exit(0)
        with load_code(code) as vm:
            vm.mm.copy_out(EDGE, b"original")
            result = vm.run(timeout=TIMEOUT)
            assert result.ok, describe(result)
            assert vm.mm.read(7 * WINDOW - 8, 8) == b"original"

    def test_fxsave(self):
        code = Code().ring3().mov("rbx", EDGE - 256).raw("0f ae 03").exit(0)
        with load_code(code) as vm:
            result = vm.run(timeout=TIMEOUT)
            assert result.ok, describe(result)
            assert vm.mm.read(EDGE - 256 + 24, 4) == bytes.fromhex("801f0000")  # MXCSR as at reset

    def test_code_at_the_end_of_its_mapping(self):
        """What follows its last page is neither executable nor touched: nobody's fault."""
        body = Code().ring3().mov("rbx", EDGE).raw("dd 03").exit(0).bytes
        image = Elf(
            phdrs=[Phdr(flags=R | X, vaddr=BASE, offset=0x1000, filesz=0x1000)],
            entry=BASE + 0x1000 - len(body),
            contents={0x1000 + 0x1000 - len(body): body},
        )
        with MicroVM("64M") as vm:
            vm.load(image.build())
            result = vm.run(timeout=TIMEOUT)
        assert result.ok, describe(result)
        assert result.stats is not None
        assert result.stats.adds_up, result.stats.as_dict()

    def test_code_in_pages_that_nobody_has_touched(self):
        """A large executable segment of zeros; the guest writes code into it and jumps there."""
        target = 8 * WINDOW
        there = Code().exit(9).bytes
        body = Code().ring3().mov("rbx", target - 1)
        body.mov("rcx", int.from_bytes(b"\x90" + there, "little")).store("rbx", "rcx")
        # 0x90 lies in the page before: the jump there begins in one window and goes on in the next.
        code = body.jump("rbx").bytes
        image = Elf(
            phdrs=[
                Phdr(flags=R | X, vaddr=BASE, offset=0x1000, filesz=len(code)),
                Phdr(flags=R | W | X, vaddr=6 * WINDOW, offset=0x1000, filesz=0, memsz=4 * WINDOW),
            ],
            entry=BASE,
            contents={0x1000: code},
        )
        with MicroVM("64M") as vm:
            vm.load(image.build())
            result = vm.run(timeout=TIMEOUT)
        assert (result.outcome, result.status) == ("exited", 9), describe(result)


@pytest.mark.kvm
class TestRefused:
    @pytest.mark.parametrize("ring", [0, 3])
    def test_an_operand_that_is_gone(self, ring: int):
        def prepare(vm: MicroVM) -> None:
            vm.on_out(0xB0, lambda _p, _v: vm.mm.munmap(EDGE, 4096), value_only=True)

        code = Code().ring(ring).out32(0xB0).mov("rbx", EDGE - 4)
        at = BASE + code.here
        result = run_code(code.raw("dd 1b").spin(), prepare)  # fstp [rbx]
        assert (result.outcome, result.addr) == ("fault", EDGE), describe(result)
        assert f"where  at {at:#x}, ring {ring}" in result.report
        assert result.stats is not None
        assert result.stats.adds_up, result.stats.as_dict()

    def test_the_arena_is_exhausted_by_it(self):
        code = Code().ring3().mov("rbx", EDGE)
        loop = code.here
        code.raw("d9 eb dd 1b").add("rbx", 4096).jump_back(loop)
        result = run_code(code, memory="64M", arena="12M")
        assert result.outcome == "memory", describe(result)
        assert result.stats is not None
        assert result.stats.adds_up, result.stats.as_dict()

    def test_what_kvm_cannot_run_at_all_is_said(self):
        """Paddd in ring 0: a KVM that emulates ring 0 does not know it, others just run it."""
        code = Code().mov("rbx", EDGE).raw("66 0f fe 03").exit(0)
        result = run_code(code, lambda vm: vm.mm.populate(EDGE, 4096))
        if result.outcome == "exited":
            assert result.status == 0
            return
        assert result.outcome == "emulation", describe(result)
        assert result.exit_code == 76
        assert result.report.startswith("KVM cannot run this instruction here: paddd xmm0, ")
        assert "66 0f fe 03" in result.report
        assert result.stats is not None
        assert result.stats.adds_up


class FakeSpace:
    """Pages that have slots."""

    def __init__(self, pages: set[int], max_addr: int = 1 << 30) -> None:
        self.pages = pages
        self.max_addr = max_addr

    def is_mapped(self, addr: int, _access: int) -> bool:
        return addr & ~0xFFF in self.pages


class FakeMemory:
    """A memory manager that makes present what it is asked for, and remembers."""

    def __init__(self, space: FakeSpace, content: dict[int, bytes]) -> None:
        self.space = space
        self.content = content
        self.faults: list[tuple[int, int]] = []

    def handle_user_fault(self, addr: int, access: int) -> None:
        self.faults.append((addr, access))
        self.space.pages.add(addr & ~0xFFF)

    def read(self, addr: int, n_bytes: int, *, ignore_permissions: bool) -> bytes:
        assert ignore_permissions
        page = self.content.get(addr & ~0xFFF, bytes(4096))
        return page[addr & 0xFFF :][:n_bytes]


class FakeCpu:
    """Registers, and tables that map some pages to themselves."""

    def __init__(self, mapped: set[int], **registers: int) -> None:
        names = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"
        self.regs = SimpleNamespace(**(dict.fromkeys(names.split(), 0) | registers))
        self.trial = SimpleNamespace(has_avx=True)
        self.mapped = mapped

    def translate(self, gva: int) -> int | None:
        return gva if gva & ~0xFFF in self.mapped else None

    def get_sregs(self) -> Any:
        return SimpleNamespace(fs=SimpleNamespace(base=0), gs=SimpleNamespace(base=0))


def make(code: bytes, present: set[int], mapped: set[int] | None = None, **registers: int):
    everything = set(range(0, 1 << 20, 4096))
    rip = registers["rip"]
    page = bytes(rip & 0xFFF) + code
    content = {rip & ~0xFFF: page[:4096].ljust(4096, b"\0")}
    if len(page) > 4096:
        content[(rip & ~0xFFF) + 4096] = page[4096:].ljust(4096, b"\0")
    space = FakeSpace(present)
    memory = FakeMemory(space, content)
    cpu: Any = FakeCpu(everything if mapped is None else mapped, **registers)
    return Provider(cpu, memory, space), memory  # type: ignore[arg-type]


FLD = bytes.fromhex("dd 03")  # fld qword [rbx]
R_, W_, X_ = 1, 2, 4


class TestProvider:
    def test_what_is_missing_is_asked_for_page_by_page(self):
        provider, memory = make(FLD, {0x1000}, rip=0x1100, rbx=0x5FFC)
        provider.restart(b"", 0)
        assert memory.faults == [(0x5FFC, R_), (0x6000, R_)]
        assert provider.n_pages == 2

    def test_a_store_asks_for_write(self):
        provider, memory = make(bytes.fromhex("dd 1b"), {0x1000}, rip=0x1100, rbx=0x5000)
        provider.restart(b"", 0)
        assert memory.faults == [(0x5000, W_)]

    def test_the_instructions_own_pages(self):
        provider, memory = make(FLD, {0x5000}, rip=0x1FFF, rbx=0x5000)
        provider.restart(b"", 0)
        assert memory.faults == [(0x1FFF, X_), (0x200D, X_)]

    def test_what_the_guests_tables_do_not_map_is_the_guests_affair(self):
        mapped = {0x1000, 0x5000}
        provider, memory = make(FLD, {0x1000}, mapped, rip=0x1100, rbx=0x5FFC)
        provider.restart(b"", 0)
        assert memory.faults == [(0x5FFC, R_)]

    def test_nothing_missing_is_an_error_the_second_time(self):
        """Once more, for KVM may have read an operand by MMIO exits before it gave up."""
        provider, _ = make(FLD, {0x1000, 0x5000}, rip=0x1100, rbx=0x5000)
        provider.restart(b"", 7)
        with pytest.raises(EmulationError) as caught:
            provider.restart(b"", 7)
        assert caught.value.instruction[:2] == FLD

    def test_an_mmio_exit_in_between_is_progress(self):
        provider, _ = make(FLD, {0x1000, 0x5000}, rip=0x1100, rbx=0x5000)
        for n_mmio in range(5):
            provider.restart(b"", n_mmio)

    def test_bytes_that_are_no_instruction(self):
        provider, _ = make(bytes.fromhex("06"), {0x1000}, rip=0x1100)
        provider.restart(b"", 0)
        with pytest.raises(EmulationError):
            provider.restart(b"", 0)

    def test_reading_ends_at_the_first_byte_that_is_not_there(self):
        provider, _ = make(FLD * 10, {0x1000}, rip=0x1FFB, rbx=0)
        assert provider.read(0x1FFB, 15) == (FLD * 10)[:5]
        assert provider.read(0x9000, 4) == b""
