"""Every bundled guest, run as its entry in the manifest says, ends as it says."""

from __future__ import annotations

import os
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kvmmm.hostarch.units import parse_duration_ns
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
    if guest["group"] != "user"  # tests/vmm/test_user_guests.py
    for n, case in enumerate([{}, *guest.get("case", ())])
]


# The nested-paging test machine: its CPU is emulated, slow, and not exact in everything.
ON_TCG = "KVMMM_TEST_NPT" in os.environ


def command_line(case: dict[str, Any]) -> str:
    cmdline: str = case["cmdline"]
    return f"{cmdline} {case.get('cmdline_on_tcg', '')}" if ON_TCG else cmdline


def feed(text: str) -> int:
    """A file descriptor with `text` to read: a pipe, which holds 64 KiB."""
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    return reader


@pytest.mark.parametrize("case", CASES)
def test_guest_ends_as_the_manifest_says(case: dict[str, Any]) -> None:
    expect = case["expect"]
    endless = expect["outcome"] == "deadline"
    stdin = feed(case.get("input", ""))
    try:
        with MicroVM(case["memory"], arena=case.get("arena"), console_input=stdin) as vm:
            vm.load(FOLDER / f"{case['name']}.elf", args=command_line(case).split())
            timeout_ns = parse_duration_ns(case["timeout"])
            result = vm.run(timeout=timeout_ns / 1e9 * (10 if ON_TCG and not endless else 1))
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
