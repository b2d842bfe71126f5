"""One `kvmmm run`: image, VM, console, and what is said when it is over."""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING, Self

import click

from kvmmm.cli.terminal import ConsoleOutput, Interruption, input_descriptor, output_descriptor
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, align_up
from kvmmm.hostarch.units import parse_bytes
from kvmmm.vmm import bundled, result
from kvmmm.vmm.image import Image, read_image
from kvmmm.vmm.microvm import DEFAULT_MEMORY, MicroVM
from kvmmm.vmm.result import RunResult

if TYPE_CHECKING:
    from collections.abc import Sequence


class Session:
    """An image that was found good, and the VM that it asks for.

    Args:
        image: What will be loaded.
        memory_bytes: Guest memory.
        args: Its command line, in pieces.
        rwx: Whether every segment gets all permissions.
    """

    def __init__(self, image: Image, memory_bytes: int, args: Sequence[str], *, rwx: bool) -> None:
        self.image = image
        self.memory_bytes = memory_bytes
        self.args = args
        self.rwx = rwx

    @classmethod
    def prepare(
        cls, name: str, args: Sequence[str], *, memory: int | None, base: int | None, rwx: bool
    ) -> Self:
        """Find and check the image; no VM exists yet.

        Args:
            name: A path, or a bundled guest's name; a file wins.
            args: What the user gave for the guest; a bundled guest has its own for none.
            memory: Bytes, or None for the default.
            base: Where a flat binary goes.
            rwx: Give every segment all permissions.

        Raises:
            ImageError: Not found, or rejected.
        """
        path = name
        memory_bytes = memory if memory is not None else parse_bytes(DEFAULT_MEMORY)
        if not os.path.lexists(name) and os.sep not in name:
            guest = bundled.find(name)
            path = str(guest.path)
            args = args or [guest.command_line]
            memory_bytes = memory if memory is not None else parse_bytes(guest.memory)
        memory_bytes = align_up(memory_bytes, HUGE_PAGE_BYTES)
        image = read_image(path, memory_bytes=memory_bytes, base=base, rwx=rwx)
        return cls(image, memory_bytes, args, rwx=rwx)

    def run(
        self, *, arena: int | None, timeout_ns: int | None, has_input: bool, shows_stats: bool,
        json_file: IO[str] | None,
    ) -> int:  # fmt: skip
        """Run it, say how it went, and return the exit code."""
        output = ConsoleOutput(output_descriptor())
        console_input = input_descriptor() if has_input else None
        with MicroVM(
            self.memory_bytes, arena=arena, console=output, console_input=console_input
        ) as vm:
            vm.vcpu.timed = shows_stats or json_file is not None
            vm.load(self.image, rwx=self.rwx, args=self.args)
            with Interruption(vm.stop, output.give_up) as interruption:
                run_result = _run(vm, timeout_ns)
            if run_result.stats is None:  # after Ctrl-C
                run_result.defer_stats(vm.statistics)
                run_result.settle()
        if output.is_terminal and (output.is_mid_line or interruption.signal_name == "SIGINT"):
            click.echo(err=True)  # our first line must not continue the guest's last, or ^C
        if run_result.report:
            click.echo(run_result.report.rstrip("\n"), err=True)
        if shows_stats:
            from kvmmm.cli.summary import show_statistics

            show_statistics(run_result.stats or vm.statistics())
        if json_file is not None:
            _write_json(json_file, self, run_result)
        click.echo(f"{_name(run_result)} {verdict(run_result, interruption.signal_name)}", err=True)
        return run_result.exit_code


def _run(vm: MicroVM, timeout_ns: int | None) -> RunResult:
    try:
        return vm.run(timeout_ns / 1e9 if timeout_ns is not None else None)
    except KeyboardInterrupt as e:
        notes = "\n".join(getattr(e, "__notes__", ()))
        return RunResult(result.STOPPED, report=notes)


def verdict(run_result: RunResult, signal_name: str = "") -> str:
    """Return the last line of a run, without its head: whose the exit status is, and why."""
    code = run_result.exit_code
    passed, failed = run_result.tests
    tests = f"; its tests: {passed} passed, {failed} failed" if passed or failed else ""
    if run_result.outcome == result.EXITED:
        return f"the guest exited with status {code}{tests}"
    by = {"SIGINT": " by Ctrl-C", "": ""}.get(signal_name, f" by {signal_name}")
    what = f"stopped{by}" if run_result.outcome == result.STOPPED else _ENDS[run_result.outcome]
    return f"{what} (exit code {code}){tests}"


_ENDS = {
    result.FAULT: "guest fault",
    result.EXCEPTION: "guest exception",
    result.MEMORY: "guest memory is exhausted",
    result.EMULATION: "KVM cannot run an instruction of the guest",
    result.SHUTDOWN: "the guest triple-faulted",
    result.HALTED: "the guest halted",
    result.DEADLINE: "the deadline passed",
}


def _name(run_result: RunResult) -> str:
    return click.style("kvmmm:", fg="green" if run_result.exit_code == 0 else "red", bold=True)


def _write_json(file: IO[str], session: Session, run_result: RunResult) -> None:
    import json

    passed, failed = run_result.tests
    record = {
        "image": session.image.path,
        "memory_bytes": session.memory_bytes,
        "args": list(session.args),
        "outcome": run_result.outcome,
        "status": run_result.status,
        "exit_code": run_result.exit_code,
        "addr": run_result.addr,
        "tests": {"passed": passed, "failed": failed},
        "report": run_result.report,
        "stats": run_result.stats.as_dict() if run_result.stats is not None else None,
    }
    json.dump(record, file, indent=2)
    file.write("\n")
