"""Where a guest's console goes to and comes from, and what Ctrl-C and SIGTERM do meanwhile."""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
import sys
from typing import TYPE_CHECKING, Self

from kvmmm.errors import EXIT_CONSOLE, KvmmmError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from rich.console import RenderableType

_PIPE_PIECE_BYTES = 4096
"""What a pipe or terminal takes without blocking once poll() says that it is writable (pipe(7))."""
_POLL_MS = 20
_PLAIN_COLUMNS = 100


class ConsoleLostError(KvmmmError, OSError):
    """Nobody takes the guest's output any more, or the file it goes to refuses it.

    Attributes:
        errno: What write(2) said; EPIPE when the reader has gone.
    """

    exit_code = EXIT_CONSOLE

    def __init__(self, err: int) -> None:
        gone = "nobody reads the guest's console any more"
        other = f"the guest's console (stdout) cannot be written: {os.strerror(err)}"
        super().__init__(err, gone if err == errno.EPIPE else other)

    def __str__(self) -> str:
        return str(self.strerror)


class ConsoleOutput:
    """The guest's output: every byte as it is, at once, to a descriptor.

    Called on whichever thread drains the console. It must not hang on a reader that has stopped
    reading, since a run that is being stopped waits for it: so it waits in small pieces, and gives
    up when `give_up` is called.

    Attributes:
        is_mid_line: Whether the last byte was something else than a newline.
        is_terminal: Whether it goes to one.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # A regular file is always ready; asking costs more than writing.
        self._may_block = not stat.S_ISREG(os.fstat(fd).st_mode)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._has_given_up = False
        self.is_mid_line = False
        self.is_terminal = os.isatty(fd)

    def __call__(self, chunk: bytes) -> None:
        """Write all of `chunk`.

        Raises:
            ConsoleLostError: It cannot be written.
        """
        view = memoryview(chunk)
        try:
            while view and self._is_ready():
                view = view[os.write(self._fd, view[: self._piece_bytes]) :]
        except BlockingIOError:
            self(bytes(view))  # somebody has made our stdout non-blocking: poll again
        except OSError as e:
            raise ConsoleLostError(e.errno or errno.EIO) from e
        self.is_mid_line = chunk[-1:] != b"\n"

    @property
    def _piece_bytes(self) -> int:
        return _PIPE_PIECE_BYTES if self._may_block else 1 << 30

    def _is_ready(self) -> bool:
        while self._may_block and not self._poll.poll(_POLL_MS):
            if self._has_given_up:
                return False
        return True

    def give_up(self) -> None:
        """Write no more than what can be written at once; async-signal-safe in Python's sense."""
        self._has_given_up = True


class Interruption:
    """While it is entered, Ctrl-C and SIGTERM stop the guest; a second one ends the process.

    Ctrl-C becomes KeyboardInterrupt, as ever, for `MicroVM.run` to say where the guest was.

    Args:
        stop: `MicroVM.stop`.
        give_up: Ends a write to a reader that does not read.

    Attributes:
        signal_name: What came, `SIGTERM`; empty when nothing did.
    """

    def __init__(self, stop: Callable[[], None], give_up: Callable[[], None]) -> None:
        self._stop = stop
        self._give_up = give_up
        self._before: dict[int, object] = {}
        self.signal_name = ""

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and `&` in scripts do
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.signal_name = signal.Signals(number).name
        self._give_up()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop()


def input_descriptor() -> int | None:
    """Return the descriptor of stdin, or None where it has been closed."""
    return 0 if sys.stdin is not None else None


def output_descriptor() -> int:
    """Return the descriptor of stdout.

    Raises:
        ConsoleLostError: It has been closed; whatever is opened next will have its number.
    """
    if sys.stdout is None:
        raise ConsoleLostError(errno.EBADF)
    return 1


def show(*parts: RenderableType, stderr: bool = False) -> None:
    """Print rich's renderables: in colour, as wide as the terminal; or plain, 100 columns wide."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    if stream is None:  # closed by whoever started us
        return
    is_terminal = stream.isatty()
    console = Console(file=stream, highlight=False, width=None if is_terminal else _PLAIN_COLUMNS)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    text = captured.get()
    if not is_terminal:  # tables are padded; files and diffs should not be
        text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    stream.write(text)
    stream.flush()
