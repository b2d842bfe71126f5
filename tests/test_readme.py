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


@pytest.mark.kvm
def test_the_example_of_a_program_runs():
    kernel, program = examples()
    assert kernel.startswith("import kvmmm\n")
    path = str(bundled.directory() / "user_hello.elf")
    code = "import kvmmm\n" + program.replace('"program"', repr(path), 1)
    lines = run_example(
        code + "    print(result.outcome, result.status)\n    print(result.console)"
    )
    assert lines[-1].startswith("exited 0 ") or lines[0].startswith("exited 0")
    assert "--fast" in "".join(lines)
    assert "HOME=/" in "".join(lines)
