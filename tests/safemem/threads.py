"""A thread whose outcome comes out of `join`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Thread:
    """Does something in a thread; what it raised comes out of `join`."""

    def __init__(self, body: Callable[[], Any]) -> None:
        self.result: Any = None
        self._error: BaseException | None = None
        self._body = body
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._body()
        except BaseException as e:  # noqa: BLE001 - raised by join
            self._error = e

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> Any:
        self._thread.join(20)
        assert not self.is_alive, "it still waits"
        if self._error is not None:
            raise self._error
        return self.result
