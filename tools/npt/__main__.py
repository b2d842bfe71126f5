"""Run the tests on mainline KVM with nested paging, inside QEMU; no /dev/kvm is needed here."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import NoReturn

from host import Host, MissingError
from image import BUILD, REPOSITORY, build
from machine import EXIT_BROKEN, Machine

EXIT_MISSING = 3

_EPILOG = f"""\
QEMU's TCG emulates an AMD processor with SVM and nested page tables. In it boots Debian's cloud
kernel, whose kvm.ko and kvm-amd.ko then run kvmmm's virtual machines as an ordinary host does. The
image holds this interpreter, the packages of its environment (no compilers, linters, installers)
and this repository, each under the path it has here. Python is some 16 times slower there.

examples:
  python tools/npt check                               what is missing, and what brings it
  python tools/npt run -- -m npt                       the quick selection of `make test-npt`
  python tools/npt run -- tests/mm -k straddle -x -v   any arguments of pytest
  python tools/npt run --npt 0 -- -m kvm               mainline shadow paging
  python tools/npt run --shell-command 'kvmmm doctor'  any command instead of pytest
  python tools/npt run --shell-command 'python -m pytest -m npt; s=$?; dmesg | tail -50; exit $s'

in the machine:
  KVMMM_TEST_KVM=require   a test that needs /dev/kvm fails without it
  KVMMM_TEST_NPT=1         says that the tests run here (0 with --npt 0)
  PYTEST_TIMEOUT=900       in place of pyproject.toml's, as is faulthandler_timeout
  KVMMM_*, HYPOTHESIS_*, PYTEST_ADDOPTS, CI, COLUMNS and TERM are those of this process.

exit status of run: the command's own, exactly; 124 when --timeout ended it; 125 when the machine
could not be built, did not boot or has no KVM. Of check: {EXIT_MISSING} when something is missing.
Standard output is the command's, messages of this tool go to standard error. Images are kept in
{BUILD.relative_to(REPOSITORY)} and made anew when what they hold has changed.
"""
_PASSED_ON = re.compile(r"(KVMMM|HYPOTHESIS)_.*|PYTEST_ADDOPTS|CI|COLORTERM")


def main(argv: list[str]) -> int:
    """Do what the command line says and return the exit status."""
    own, rest = argv, None
    if "--" in argv:
        own, rest = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    options = _parser().parse_args(own)
    if options.verb != "run" and rest:
        _parser().error("arguments after -- belong to `run`")
    signal.signal(signal.SIGTERM, _end)
    try:
        host = Host.find(options.kernel)
        if options.verb == "check":
            print(f"npt: ready, Linux {host.release}")
            return 0
        layers = build(host)
        if options.verb == "build":
            return 0
        command = options.shell_command or _pytest_command(rest or [])
        machine = Machine(host, options.npt == 1, options.memory, options.timeout)
        return machine.run(layers, _script(command, options.npt))
    except MissingError as error:
        for part in error.parts:
            print(f"npt: {part}", file=sys.stderr)
        return EXIT_MISSING if options.verb == "check" else EXIT_BROKEN
    except KeyboardInterrupt:
        print("npt: interrupted, qemu has ended", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tools/npt",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kernel",
        type=Path,
        metavar="VMLINUZ",
        help="default: the newest /boot/vmlinuz-*-cloud-amd64",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="check|build|run")
    verbs.add_parser("check", help="is everything here that the machine is made of?")
    verbs.add_parser("build", help="bring the image up to date (`run` does it too)")
    run = verbs.add_parser("run", help="boot it and run pytest with the arguments after --")
    run.add_argument(
        "--timeout", type=float, default=1800.0, metavar="SECONDS", help="default: %(default)g"
    )
    run.add_argument(
        "--npt", type=int, choices=(0, 1), default=1, help="1: nested paging (default); 0: shadow"
    )
    run.add_argument("--memory", default="4G", metavar="SIZE", help="default: %(default)s")
    run.add_argument("--shell-command", metavar="CMD", help="run this, not pytest")
    return parser


def _pytest_command(arguments: list[str]) -> str:
    # Plugins are named one by one: when pytest looks for them it also rewrites all their modules,
    # which takes 20 seconds there.
    plugins = [f"-p{plugin.name}" for plugin in importlib.metadata.entry_points(group="pytest11")]
    words = [
        sys.executable, "-m", "pytest", "--disable-plugin-autoload", *plugins,
        "-pno:cacheprovider", "-ofaulthandler_timeout=900", *arguments,
    ]  # fmt: skip
    return shlex.join(words)


def _script(command: str, npt: int) -> str:
    # Where the output goes to a file or pipe here, it goes to a pipe there.
    folders = dict.fromkeys([os.path.dirname(sys.executable), "/npt/bin", "/usr/bin", "/bin"])  # noqa: PTH120
    environment = {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTEST_TIMEOUT": "900",
        "TERM": os.environ.get("TERM", "dumb") if sys.stdout.isatty() else "dumb",
        "PY_COLORS": str(int(sys.stdout.isatty())),
        "COLUMNS": str(shutil.get_terminal_size().columns),
        "PATH": ":".join(folders),
        "PYTHONDONTWRITEBYTECODE": "1",
        "KVMMM_TEST_KVM": "require",
        "KVMMM_TEST_NPT": str(npt),
    }
    passed_on = {name: text for name, text in os.environ.items() if _PASSED_ON.fullmatch(name)}
    lines = [
        f"export {name}={shlex.quote(text)}" for name, text in (passed_on | environment).items()
    ]
    lines.append(f"cd {shlex.quote(str(REPOSITORY))}")
    if sys.stdout.isatty():
        lines.append(command)
    else:
        lines += ["set -o pipefail", "{", command, "} 2>&1 | cat"]
    return "\n".join([*lines, ""])


def _end(number: int, _frame: object) -> NoReturn:
    # SIGTERM unwinds like Ctrl-C: no qemu stays behind.
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
