"""What the host looks at again: pages that must not change any more, and frames that are dead.

    still   a page that nobody may write from now on: its bytes stay what they were when the
            call that said so had returned
    grave   a frame that was dropped: filled with poison at once, it stays so until it is given back

Each holds a reference, so that the frame does not find a new owner meanwhile; nothing is punched,
which would make a CPU forget the frame just as a shootdown does.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from kvmmm.arena import Arena
from kvmmm.hostarch.ranges import FileRange
from tests.hammer.guest import MAGIC, PAGE, POISON, POISON_WORD, TURN_BITS

if TYPE_CHECKING:
    from kvmmm.memmap.file import File

_GRAVES_MAX = 512


class Violation(AssertionError):  # noqa: N818 - what the whole thing is about
    """A byte that must not be there."""


def say(word: int) -> str:
    """What a word of a cell says."""
    if word == POISON_WORD:
        return "poison"
    if word >> 48 != MAGIC:
        return f"{word:#x}"
    vcpu, turn = word >> TURN_BITS & 3, word & (1 << TURN_BITS) - 1
    return f"the stamp of cell {word >> 32 & 0xFFFF} by vCPU {vcpu} in turn {turn}"


def page_of(file: Any, fo: int) -> bytes:
    """The bytes of a page of a file, wherever that ends now."""
    if isinstance(file, Arena):
        return bytes(file.view[fo : fo + PAGE])
    return os.pread(file.fd, PAGE, fo).ljust(PAGE, b"\0")


def difference(before: bytes, now: bytes) -> str:
    """Where two pages differ first, and how."""
    at = next(i for i in range(0, PAGE, 8) if before[i : i + 8] != now[i : i + 8])
    old, new = (struct.unpack_from("<Q", page, at)[0] for page in (before, now))
    return f"+{at:#x} held {say(old)}, and holds {say(new)}"


class Still:
    """A page that must not change."""

    __slots__ = ("_bytes", "_file", "_fo", "why")

    def __init__(self, file: File, fo: int, why: str) -> None:
        self._file = file
        self._fo = fo
        self.why = why
        file.inc_ref(FileRange(fo, fo + PAGE))
        self._bytes = page_of(file, fo)

    def check(self) -> None:
        now = page_of(self._file, self._fo)
        if now != self._bytes:
            raise Violation(
                f"the page at offset {self._fo:#x} of {self._file!r}, {self.why}, was written: "
                + difference(self._bytes, now)
            )

    def let_go(self) -> None:
        self._file.dec_ref(FileRange(self._fo, self._fo + PAGE))


class Graveyard:
    """Frames of an arena that are nobody's; each with one reference, ours.

    Attributes:
        n_buried: How many there were so far.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._graves: deque[tuple[FileRange, str]] = deque()
        self._n_pages = 0
        self.n_buried = 0

    def bury(self, fr: FileRange, why: str) -> None:
        """Take over a reference, and poison the frames."""
        n_pages = fr.length_bytes // PAGE
        self._arena.view[fr.start : fr.end] = POISON * n_pages
        self._graves.append((fr, why))
        self._n_pages += n_pages
        self.n_buried += n_pages

    def check(self) -> None:
        for fr, why in self._graves:
            now = bytes(self._arena.view[fr.start : fr.end])  # much faster than comparing a view
            if now != POISON * (fr.length_bytes // PAGE):
                for fo in range(fr.start, fr.end, PAGE):
                    now = page_of(self._arena, fo)
                    if now != POISON:
                        raise Violation(
                            f"the frame at {fo:#x}, dropped by {why}, was written: "
                            + difference(POISON, now)
                        )

    def give_back(self, n_pages_kept: int = _GRAVES_MAX) -> None:
        """Let go of the oldest."""
        while self._graves and self._n_pages > n_pages_kept:
            fr, _ = self._graves.popleft()
            self._n_pages -= fr.length_bytes // PAGE
            self._arena.dec_ref(fr)
