"""`Loan`: host memory that somebody may use for the time of one call."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from kvmmm.errors import StateError
from kvmmm.safemem.ffi import address_of, ffi

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Loan:
    """What all `BlockSeq` that were made from one have in common. Not thread-safe.

    The memory itself belongs to somebody else: once the call is over, it may hold anybody's bytes.

    Attributes:
        writable: Whether it may be written.
        is_over: Whether the call that it was lent for is over.
    """

    __slots__ = ("_buffer", "_views", "is_over", "writable")

    def __init__(self, *, writable: bool) -> None:
        self.writable = writable
        self.is_over = False
        self._buffer: Any = None
        # What was handed out, and what every slice of it and array over it keeps alive.
        self._views: list[tuple[memoryview, weakref.ref[Any]]] = []

    def hold(self, buffer: ReadableBuffer) -> tuple[int, int]:
        """Keep a buffer until the end; return its host address and its length in bytes.

        Raises:
            TypeError: It is no buffer, not contiguous, or read-only where this is writable.
        """
        try:
            self._buffer = ffi.from_buffer(buffer, require_writable=self.writable)
        except BufferError as error:
            raise TypeError(f"{type(buffer).__name__} cannot be used: {error}") from error
        return address_of(self._buffer), len(self._buffer)

    def check(self, *, writing: bool = False) -> None:
        """Raise, unless it may be used.

        Raises:
            StateError: It is over, or for reading only.
        """
        if self.is_over:
            raise StateError("this memory was lent for one call, which is over")
        if writing and not self.writable:
            raise StateError("this memory was lent for reading only")

    def view(self, hva: int, length_bytes: int) -> memoryview:
        """Return the bytes at `hva`, which dies with the loan.

        Preconditions:
            - They belong to it, and cannot fault.

        Raises:
            StateError: It is over.
        """
        self.check()
        exporter = ffi.buffer(ffi.cast("char *", hva), length_bytes)
        view = memoryview(exporter)
        if not self.writable:
            view = view.toreadonly()
        self._views.append((view, weakref.ref(exporter)))
        return view

    def end(self, *, quietly: bool = False) -> None:
        """Take everything back. Idempotent.

        Args:
            quietly: Do not look whether a slice of a view is still held: an exception is on its
                way, whose traceback may hold some.

        Raises:
            StateError: Somebody still has a view, a slice of one, or an array over one.
        """
        self.is_over = True
        n_held = 0
        while self._views:
            view, exporter = self._views.pop()
            try:
                view.release()
            except BufferError:
                n_held += 1
            else:
                del view
                n_held += exporter() is not None
        if self._buffer is not None:
            ffi.release(self._buffer)
            self._buffer = None
        if n_held and not quietly:
            raise StateError(
                f"{n_held} view{'s' * (n_held > 1)} of memory that was lent for one call are still "
                "held after it: copy the bytes instead, and let go of slices and arrays"
            )
