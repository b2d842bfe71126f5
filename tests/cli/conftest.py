"""Running the command line as a user does: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

TIMEOUT_SECONDS = 100
NO_KVM_PATH = "/nonexistent/kvm"
_WITHOUT_KVM = f"""
from kvmmm.platform.kvm import device
device.open_device.__defaults__ = ({NO_KVM_PATH!r},)
from kvmmm.cli import main
main()
"""


class Command:
    """`python -m kvmmm` with some arguments."""

    def __init__(self) -> None:
        self.prefix = [sys.executable, "-m", "kvmmm"]
        self.environment = dict(os.environ)

    def __call__(self, *args: str, **options: object) -> subprocess.CompletedProcess[bytes]:
        """Run it to its end."""
        given = {"stdin": subprocess.DEVNULL} if "input" not in options else {}
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            [*self.prefix, *args], capture_output=True, check=False, timeout=TIMEOUT_SECONDS,
            env=self.environment, **(given | options),
        )  # fmt: skip

    def begin(self, *args: str, **options: object) -> subprocess.Popen[bytes]:
        """Start it, with pipes for what it prints."""
        streams = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            [*self.prefix, *args], env=self.environment, **(streams | options)
        )


@pytest.fixture
def kvmmm() -> Command:
    """The command line."""
    return Command()


@pytest.fixture
def kvmmm_without_kvm(kvmmm: Command) -> Command:
    """The same where /dev/kvm is missing."""
    kvmmm.prefix = [sys.executable, "-c", _WITHOUT_KVM]
    return kvmmm


def last_line(stderr: bytes) -> str:
    """Return the last line that was printed."""
    return stderr.decode().strip().rpartition("\n")[2]
