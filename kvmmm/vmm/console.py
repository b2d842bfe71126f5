"""The host's end of the guest's console, on the thread that runs the vCPU.

Output is drained when the guest rings, at ticks while the console is busy, and when a run ends.
Input is waited for when the guest asks for it; a stop and the deadline end that wait.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

from kvmmm.errors import GuestConsoleError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.platform.kvm.vcpu import Vcpu
    from kvmmm.vmm.system_area import SystemArea

_INPUT_POLL_MS = 20


class Console:
    """Output to a sink (or collected), input from a file descriptor (or none).

    Args:
        vcpu: Whose thread rings.
        sink: Called with each chunk of output; None collects in `output`.
        input_fd: Where input is read from; None is an empty input.
    """

    __slots__ = ("_vcpu", "eof", "input_fd", "n_bytes", "output", "sink")

    def __init__(
        self, vcpu: Vcpu, sink: Callable[[bytes], object] | None, input_fd: int | None
    ) -> None:
        self._vcpu = vcpu
        self.sink = sink
        self.input_fd = input_fd
        self.output = bytearray()
        self.n_bytes = 0
        self.eof = input_fd is None

    def drain(self) -> None:
        """Hand on what the guest has printed.

        Raises:
            GuestConsoleError: The guest broke the ring's rules.
            Whatever the sink raises.
        """
        try:
            chunk = self._vcpu.console_take()
        except OSError as e:
            raise GuestConsoleError(
                "the guest's console ring claims more bytes than it holds (out_head)"
            ) from e
        if chunk:
            self.accept(chunk)

    def accept(self, chunk: bytes) -> None:
        """Hand on output that came another way than by the ring: a write(2).

        Raises:
            Whatever the sink raises.
        """
        self.n_bytes += len(chunk)
        if self.sink is None:
            self.output += chunk
        else:
            self.sink(chunk)

    def take_output(self) -> bytes:
        """Return what was collected, and forget it."""
        output = bytes(self.output)
        self.output.clear()
        return output

    def fill_input(self, area: SystemArea) -> None:
        """Wait for input and put it into the guest's ring; sets `in_eof` at the end of input.

        Returns early, without input, when the run is being stopped: the guest asks again.
        """
        room = area.input_room()
        if not room:
            return
        poll = select.poll()  # select() knows no descriptor above 1023
        if self.input_fd is not None:
            poll.register(self.input_fd, select.POLLIN)
        while not self.eof and self.input_fd is not None:
            if self._vcpu.is_stopping:
                return
            if not poll.poll(_INPUT_POLL_MS):
                continue
            chunk = os.read(self.input_fd, room)
            if chunk:
                area.put_input(chunk)
                return
            self.eof = True
        area.end_input()
