"""What README.md shows in Python runs, and prints what its comments say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmmm.vmm import bundled

README = Path(__file__).parents[1] / "README.md"


def run_example(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.kvm
def test_the_example_runs_and_prints_what_it_says():
    lines = run_example(examples()[0])
    assert lines[0] == "exited 42"
    assert lines[1] == repr((42).to_bytes(4, "little"))
    assert lines[2].startswith("1 EPT violation")
    assert any("[image]" in line for line in lines)


COPIES_PRELUDE = """
import io, socket as sockets, struct, kvmmm
vm = kvmmm.MicroVM(memory="64M")
addr, buffer, old, new = 0x500000, bytearray(16), 1, 2
vm.load(bytes.fromhex("f4"), base=0x200000)
vm.mm.copy_out(addr, b"string" + bytes(100))
ranges = kvmmm.AddrRange(addr + 64, addr + 72)
socket, peer = sockets.socketpair()
file = io.BytesIO(b"12345678")
"""

COPIES_CODA = """
assert mm.read(addr + 64, 8) == peer.recv(100) == b"12345678"
assert mm.read_string(addr) == b"...ing"
socket.close(), peer.close()
vm.close()
print("done")
"""


@pytest.mark.kvm
def test_the_example_of_copies_runs():
    _kernel, copies, _program = examples()
    assert run_example(COPIES_PRELUDE + copies + COPIES_CODA) == ["done"]


@pytest.mark.kvm
def test_the_example_of_a_program_runs():
    kernel, _copies, program = examples()
    assert kernel.startswith("import kvmmm\n")
    path = str(bundled.directory() / "user_hello.elf")
    code = "import kvmmm\n" + program.replace('"program"', repr(path), 1)
    lines = run_example(
        code + "    print(result.outcome, result.status)\n    print(result.console)"
    )
    assert lines[-1].startswith("exited 0 ") or lines[0].startswith("exited 0")
    assert "--fast" in "".join(lines)
    assert "HOME=/" in "".join(lines)
