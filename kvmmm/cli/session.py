"""One `kvmmm run`: image, VM, console, and what is said when it is over."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import IO, TYPE_CHECKING

import click

from kvmmm.cli.terminal import ConsoleOutput, Interruption, input_descriptor, output_descriptor
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, align_up
from kvmmm.hostarch.units import format_bytes, parse_bytes
from kvmmm.vmm import bundled, result
from kvmmm.vmm.image import Image, read_image
from kvmmm.vmm.microvm import DEFAULT_MEMORY, MicroVM
from kvmmm.vmm.result import RunResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmmm.cli.maps_file import MapsFile
    from kvmmm.vmm.machine import Machine
    from kvmmm.vmm.user_image import UserImage


class Session(ABC):
    """An image that was found good, and the VM that it asks for.

    Args:
        image: What will be loaded.
        memory_bytes: Guest memory.
        args: Its words, as the user gave them.
    """

    def __init__(self, image: Image, memory_bytes: int, args: Sequence[str]) -> None:
        self.image = image
        self.memory_bytes = memory_bytes
        self.args = args
        self.title = os.path.basename(image.path)  # noqa: PTH119 - a name, not a path

    @property
    @abstractmethod
    def about(self) -> str:
        """What it is, for whoever looks at its maps."""

    @abstractmethod
    def _make_vm(self, output: ConsoleOutput, *, has_input: bool) -> Machine:
        """Return the VM, loaded."""

    def run(
        self, *, timeout_ns: int | None, has_input: bool, shows_stats: bool,
        json_file: IO[str] | None, maps_file: MapsFile | None = None,
    ) -> int:  # fmt: skip
        """Run it, say how it went, and return the exit code."""
        output = ConsoleOutput(output_descriptor())
        with self._make_vm(output, has_input=has_input) as vm:
            vm.vcpu.timed = shows_stats or json_file is not None
            run_result, signal_name = self._run_watched(vm, output, timeout_ns, maps_file)
            if run_result.stats is None:  # after Ctrl-C
                run_result.defer_stats(vm.statistics)
                run_result.settle()
        if output.is_terminal and (output.is_mid_line or signal_name == "SIGINT"):
            click.echo(err=True)  # our first line must not continue the guest's last, or ^C
        if run_result.report:
            click.echo(run_result.report.rstrip("\n"), err=True)
        if shows_stats:
            from kvmmm.cli.summary import show_statistics

            show_statistics(run_result.stats or vm.statistics())
        if json_file is not None:
            _write_json(json_file, self, run_result)
        end = verdict(run_result, signal_name)
        if maps_file is not None:
            maps_file.write(self.title, self.about, end, is_good=run_result.exit_code == 0)
        click.echo(f"{_name(run_result)} {end}", err=True)
        return run_result.exit_code

    def _run_watched(
        self, vm: Machine, output: ConsoleOutput, timeout_ns: int | None, maps_file: MapsFile | None
    ) -> tuple[RunResult, str]:
        # What came of it, and which signal ended it.
        if maps_file is not None:
            maps_file.watch(vm)
        try:
            with Interruption(vm.stop, output.give_up) as interruption:
                run_result = _run(vm, timeout_ns)
        except Exception as e:
            if maps_file is not None:
                maps_file.write_after(e, vm, self.title, self.about)
            raise
        if maps_file is not None:
            maps_file.look(vm, run_result)
        return run_result, interruption.signal_name


class KernelSession(Session):
    """A guest kernel in a `MicroVM`.

    Args:
        image: What will be loaded.
        memory_bytes: Guest memory.
        args: Its command line, in pieces.
        arena: Most that it may take on the host; None is enough for all of it.
        rwx: Whether every segment gets all permissions.
    """

    def __init__(
        self, image: Image, memory_bytes: int, args: Sequence[str], *, arena: int | None, rwx: bool
    ) -> None:
        super().__init__(image, memory_bytes, args)
        self.arena = arena
        self.rwx = rwx

    @property
    def about(self) -> str:
        """See the base class."""
        memory = format_bytes(self.memory_bytes)
        return f"a guest kernel in {memory} of memory; addresses are guest-physical"

    def _make_vm(self, output: ConsoleOutput, *, has_input: bool) -> Machine:
        vm = MicroVM(
            self.memory_bytes, arena=self.arena, console=output,
            console_input=input_descriptor() if has_input else None,
        )  # fmt: skip
        try:
            vm.load(self.image, rwx=self.rwx, args=self.args)
        except BaseException:
            vm.close()
            raise
        return vm


class UserSession(Session):
    """A Linux program in a `UserVM`.

    Args:
        image: What will be loaded.
        memory_bytes: Most that it may use.
        args: Its words behind its name.
        name: Its name, argv[0].
        env: Its environment.
    """

    def __init__(
        self, image: UserImage, memory_bytes: int, args: Sequence[str], *, name: str,
        env: Mapping[str, str],
    ) -> None:  # fmt: skip
        super().__init__(image, memory_bytes, args)
        self.user_image = image
        self.name = name
        self.env = env

    @property
    def about(self) -> str:
        """See the base class."""
        memory = format_bytes(self.memory_bytes)
        return f"a program for Linux in ring 3, in at most {memory}; addresses are its own"

    def _make_vm(self, output: ConsoleOutput, *, has_input: bool) -> Machine:  # noqa: ARG002
        from kvmmm.vmm.user_vm import UserVM

        vm = UserVM(self.memory_bytes, console=output)
        try:
            vm.load(self.user_image, argv=[self.name, *self.args], env=self.env)
        except BaseException:
            vm.close()
            raise
        return vm


def prepare(
    name: str, args: Sequence[str], *, memory: int | None = None, arena: int | None = None,
    base: int | None = None, rwx: bool = False, user: bool | None = None,
    env: Mapping[str, str] | None = None,
) -> Session:  # fmt: skip
    """Find and check the image; no VM exists yet.

    Args:
        name: A path, or a bundled guest's name; a file wins.
        args: What the user gave for the guest; a bundled guest has its own for none.
        memory: Bytes, or None for the default.
        arena: Bytes, or None for the default; for kernels.
        base: Where a flat binary goes; for kernels.
        rwx: Give every segment all permissions; for kernels.
        user: Whether it is a program or a kernel; None for what the file says.
        env: The environment; for programs.

    Raises:
        ImageError: Not found, or rejected.
        click.UsageError: An option that does not go with what it is.
    """
    path = name
    memory_bytes = memory if memory is not None else parse_bytes(DEFAULT_MEMORY)
    is_user = user
    is_bundled = not os.path.lexists(name) and os.sep not in name
    if is_bundled:
        guest = bundled.find(name)
        path = str(guest.path)
        is_user = guest.is_user if user is None else user
        if not args:
            args = guest.command_line.split() if is_user else [guest.command_line]
        memory_bytes = memory if memory is not None else parse_bytes(guest.memory)
    memory_bytes = align_up(memory_bytes, HUGE_PAGE_BYTES)
    if is_user is None:
        is_user = base is None and _is_program(path)
    if is_user:
        from kvmmm.vmm.user_image import read_user_image

        _refuse("a program for Linux", {"--arena": arena, "--base": base, "--rwx": rwx or None})
        image = read_user_image(path)
        return UserSession(image, memory_bytes, args, name=name, env=env or {})
    _refuse("a guest kernel", {"--env": env or None})
    kernel = read_image(path, memory_bytes=memory_bytes, base=base, rwx=rwx)
    return KernelSession(kernel, memory_bytes, args, arena=arena, rwx=rwx)


def _is_program(path: str) -> bool:
    from kvmmm.vmm.image_file import FILE_LIMIT_BYTES, read_file
    from kvmmm.vmm.user_image import is_linux_program

    return is_linux_program(read_file(path, FILE_LIMIT_BYTES))


def _refuse(what: str, options: Mapping[str, object]) -> None:
    for option, value in options.items():
        if value is not None:
            raise click.UsageError(f"this is {what}, for which there is no {option}")


def _run(vm: Machine, timeout_ns: int | None) -> RunResult:
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
