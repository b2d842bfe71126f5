"""The guest's output to stdout: whole, binary, and never hanging on a reader that has stopped."""

from __future__ import annotations

import errno
import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from kvmmm.cli.terminal import ConsoleLostError, ConsoleOutput, Interruption

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def pipe():
    ends = list(os.pipe())
    yield ends
    for end in ends:
        if end >= 0:
            os.close(end)


def test_bytes_arrive_as_they_are(pipe: list[int]):
    output = ConsoleOutput(pipe[1])
    output(b"a\xff\x00b\n")
    assert os.read(pipe[0], 100) == b"a\xff\x00b\n"
    assert not output.is_mid_line
    output(b"more")
    assert output.is_mid_line
    assert not output.is_terminal


def test_more_than_a_pipe_holds(pipe: list[int]):
    data = os.urandom(300_000)
    received = bytearray()

    def read() -> None:
        while len(received) < len(data):
            received.extend(os.read(pipe[0], 1 << 16))

    reader = threading.Thread(target=read)
    reader.start()
    ConsoleOutput(pipe[1])(data)
    reader.join()
    assert received == data


def test_non_blocking_output_is_waited_for(pipe: list[int]):
    os.set_blocking(pipe[1], False)
    test_more_than_a_pipe_holds(pipe)


def test_regular_files(tmp_path: Path):
    path = tmp_path / "out"
    with path.open("wb", buffering=0) as file:
        ConsoleOutput(file.fileno())(b"x" * 100_000)
    assert path.read_bytes() == b"x" * 100_000


def test_a_reader_that_has_gone(pipe: list[int]):
    os.close(pipe[0])
    pipe[0] = -1
    with pytest.raises(ConsoleLostError, match="nobody reads") as caught:
        ConsoleOutput(pipe[1])(b"x")
    assert caught.value.errno == errno.EPIPE
    assert caught.value.exit_code == 74


def test_a_full_disk():
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(ConsoleLostError, match="No space left"):
            ConsoleOutput(fd)(b"x")
    finally:
        os.close(fd)


def test_giving_up_ends_a_write_that_nobody_reads(pipe: list[int]):
    output = ConsoleOutput(pipe[1])
    threading.Timer(0.1, output.give_up).start()
    output(b"x" * 1_000_000)  # comes back
    assert len(os.read(pipe[0], 1 << 20)) < 1_000_000


def test_sigterm_stops_and_handlers_are_put_back():
    calls: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(
        lambda: calls.append("stop"), lambda: calls.append("give up")
    ) as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # the second one ends us
    assert calls == ["give up", "stop"]
    assert interruption.signal_name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_is_a_keyboard_interrupt():
    with (
        pytest.raises(KeyboardInterrupt),
        Interruption(lambda: None, lambda: None) as interruption,
    ):
        signal.raise_signal(signal.SIGINT)
    assert interruption.signal_name == "SIGINT"


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption(lambda: None, lambda: None):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
