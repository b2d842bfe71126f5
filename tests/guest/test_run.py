"""Every bundled guest, run as its entry in the manifest says, ends as it says."""

from __future__ import annotations

import os
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kvmmm.vmm.microvm import MicroVM

pytestmark = pytest.mark.kvm
VERBS = {"read": "read", "write": "write", "execute": "jump to"}  # as the report has them

CORE = find_spec("kvmmm._core")
FOLDER = Path(CORE.origin).parent / "_guests" if CORE is not None and CORE.origin else Path()
MANIFEST = tomllib.loads(
    (Path(__file__).parents[2] / "guest" / "manifest.toml").read_text(encoding="utf-8")
)
CASES = [
    pytest.param({**guest, **case}, id=f"{guest['name']}-{n}")
    for guest in MANIFEST["guest"]
    for n, case in enumerate([{}, *guest.get("case", ())])
]


def feed(text: str) -> int:
    """A file descriptor with `text` to read: a pipe, which holds 64 KiB."""
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    return reader


@pytest.mark.parametrize("case", CASES)
def test_guest_ends_as_the_manifest_says(case: dict[str, Any]) -> None:
    expect = case["expect"]
    stdin = feed(case.get("input", ""))
    try:
        with MicroVM(case["memory"], arena=case.get("arena"), console_input=stdin) as vm:
            vm.load(FOLDER / f"{case['name']}.elf", args=case["cmdline"].split())
            result = vm.run(timeout=case["timeout"])
    finally:
        os.close(stdin)
    console = result.console.decode()
    told = f"{result!r}\n{result.report}\n{console}"
    assert result.outcome == expect["outcome"], told
    assert result.status == expect.get("status"), told
    if "access" in expect:
        assert VERBS[expect["access"]] in result.report, told
    if "address" in expect:
        assert result.addr == expect["address"], told
    assert case.get("console", "") in console, told
    assert "FAIL" not in console, told
    passed, failed = result.tests
    assert failed == 0
    assert (passed > 0) == case.get("reports", False)


def test_echo_gives_back_all_of_a_long_input(tmp_path: Path) -> None:
    text = "".join(f"line {n} {'x' * (n % 9000)}\n" for n in range(0, 40_000, 97)) + "and an end"
    (tmp_path / "input").write_text(text, encoding="utf-8")
    with (tmp_path / "input").open("rb") as stdin, MicroVM(console_input=stdin.fileno()) as vm:
        vm.load(FOLDER / "echo.elf")
        result = vm.run(timeout="60s")
    assert (result.outcome, result.status) == ("exited", 0)
    assert result.console.decode() == text
