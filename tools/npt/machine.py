"""One run of the machine: a qemu whose console is standard output and whose result a status."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, BinaryIO

from image import BUILD, write_command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from host import Host

EXIT_TIMEOUT = 124
EXIT_BROKEN = 125

# Without "fast string" instructions the kernel and libc copy eight bytes at a time. TCG runs
# `rep movsb` byte by byte: boot and Python take twice as long.
_CPU = "max,-erms,-fsrm"
# Without address space randomisation the code that TCG made for one Python serves the next.
_KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet loglevel=3 panic=-1 random.trust_cpu=on mitigations=off norandmaps no5lvl "
    "tsc=reliable no_timer_check"
)
_LINGER_S = 10.0  # qemu has this long to end after the machine's last word


class Machine:
    """A machine that is to run one command.

    Attributes:
        nested_paging: Whether kvm-amd.ko is loaded with npt=1.
        memory: Size as qemu takes it, such as "4G".
        timeout_s: After so many seconds qemu is killed.
    """

    def __init__(self, host: Host, nested_paging: bool, memory: str, timeout_s: float) -> None:
        self._host = host
        self.nested_paging = nested_paging
        self.memory = memory
        self.timeout_s = timeout_s
        self._started = 0.0
        self._status: int | None = None

    def run(self, layers: list[Path], script: str) -> int:
        """Boot, run a shell script, and wait for its end.

        Args:
            layers: Archives of the root file system.
            script: What /init hands to the shell.

        Returns:
            The script's exit status, EXIT_TIMEOUT, or EXIT_BROKEN when the machine ended before it.
        """
        with (
            tempfile.TemporaryFile(dir=BUILD) as initrd,  # without a name: nothing stays behind
            tempfile.TemporaryFile("w+", dir=BUILD) as complaints,
        ):
            _lay_end_to_end(layers, script, initrd)
            size = initrd.tell() >> 20
            _say(f"booting Linux {self._host.release} in QEMU TCG, image of {size} MiB")
            self._started = time.monotonic()
            with self._qemu(initrd.fileno(), complaints.fileno()) as (console, control):
                timed_out = self._listen(console, control)
            complaints.seek(0)
            return self._verdict(timed_out, complaints.read())

    @contextlib.contextmanager
    def _qemu(self, initrd: int, complaints: int) -> Iterator[tuple[int, int]]:
        # Console and control pipe of a running qemu. It is a process group of its own: Ctrl-C
        # reaches this process alone, which ends the group. setpriv ends it should this be killed.
        control, guest_end = os.pipe()
        arguments = [
            self._host.qemu, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-accel", "tcg,thread=single", "-cpu", _CPU, "-smp", "1", "-m", self.memory,
            "-kernel", str(self._host.kernel), "-initrd", f"/dev/fd/{initrd}",
            "-append", f"{_KERNEL_ARGUMENTS} npt={int(self.nested_paging)}",
            "-serial", "stdio", "-serial", f"file:/dev/fd/{guest_end}",
        ]  # fmt: skip
        if shutil.which("setpriv"):
            arguments[:0] = ["setpriv", "--pdeathsig", "KILL"]
        qemu = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            pass_fds=(guest_end, initrd),
            start_new_session=True,
        )
        os.close(guest_end)
        with qemu:
            try:
                yield (qemu.stdout.fileno() if qemu.stdout else -1), control
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(qemu.pid, signal.SIGKILL)
                os.close(control)

    def _listen(self, console: int, control: int) -> bool:
        # Pass on what the machine says until it hangs up. True: the time was over first.
        deadline = self._started + self.timeout_s
        pending = b""
        with selectors.DefaultSelector() as selector:
            selector.register(console, selectors.EVENT_READ)
            selector.register(control, selectors.EVENT_READ)
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    return self._status is None
                for key, _ in selector.select(left):
                    chunk = os.read(key.fd, 65536)
                    if not chunk:
                        selector.unregister(key.fd)
                    elif key.fd == console:
                        sys.stdout.buffer.write(chunk.replace(b"\r\n", b"\n"))
                        sys.stdout.buffer.flush()
                    else:
                        *lines, pending = (pending + chunk).split(b"\n")
                        for line in lines:
                            self._heed(line.decode(errors="replace").strip())
                        if self._status is not None:
                            deadline = min(deadline, time.monotonic() + _LINGER_S)
        return False

    def _heed(self, line: str) -> None:
        word, _, rest = line.partition(": ")
        if word == "exit":
            self._status = int(rest)
        elif word == "ready":
            paging = "nested" if rest not in {"N", "0"} else "shadow"
            _say(f"KVM with {paging} paging is up after {time.monotonic() - self._started:.1f} s")
        elif word in {"broken", "kernel"}:
            _say(f"{word}: {rest}")

    def _verdict(self, timed_out: bool, complaints: str) -> int:
        elapsed = f"after {time.monotonic() - self._started:.1f} s"
        if timed_out:
            _say(f"killed {elapsed}: --timeout {self.timeout_s:g} is over, the run is not complete")
            return EXIT_TIMEOUT
        if self._status is None:
            _say(f"the machine ended {elapsed}, before its command did")
            if complaints:
                _say(f"qemu said: {complaints.strip()}")
            return EXIT_BROKEN
        _say(f"exit status {self._status} {elapsed}")
        return self._status


def _lay_end_to_end(layers: list[Path], script: str, initrd: BinaryIO) -> None:
    for layer in layers:
        with layer.open("rb") as archive:
            shutil.copyfileobj(archive, initrd, 1 << 20)
    write_command(script, initrd)
    initrd.flush()


def _say(text: str) -> None:
    # To stderr: standard output is the machine's console alone.
    sys.stdout.flush()
    print(f"npt: {text}", file=sys.stderr, flush=True)
