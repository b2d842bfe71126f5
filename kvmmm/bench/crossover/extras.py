"""Libraries that only the crossover benchmark needs, and what to do when they are missing."""

from __future__ import annotations

from importlib.util import find_spec

from kvmmm.errors import KvmmmError


class MissingExtraError(KvmmmError, ImportError):
    """Libraries of an optional extra are not installed.

    Attributes:
        libraries: Which.
    """

    def __init__(self, libraries: list[str], what: str, extra: str = "crossover") -> None:
        self.libraries = libraries
        super().__init__(f"{what} needs {' and '.join(libraries)}: pip install 'kvmmm[{extra}]'")


def need(*libraries: str, what: str, extra: str = "crossover") -> None:
    """Make sure that libraries of an extra can be imported.

    Raises:
        MissingExtraError: One cannot; the message says what to install.
    """
    missing = [library for library in libraries if find_spec(library) is None]
    if missing:
        raise MissingExtraError(missing, what, extra)
