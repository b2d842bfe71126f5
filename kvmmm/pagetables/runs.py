"""`RunScan`: which frames a range leads to, found by C: for whoever is about to change it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.safemem.ffi import ffi, lib

if TYPE_CHECKING:
    from kvmmm.pagetables.tables import PageTables

_scan = lib.kvmmm_pt_scan
_NO_LIMIT = (1 << 64) - 1


class RunScan:
    """Scans of one object's tables. To be used by one thread at a time, as they are."""

    __slots__ = ("_scan", "_tables")

    def __init__(self, tables: PageTables) -> None:
        self._tables: Any = tables._c  # noqa: SLF001 - of this package
        self._scan: Any = ffi.new("struct kvmmm_pt_scan *")

    def has_any(self, gva: int, length_bytes: int) -> bool:
        """Return whether anything is mapped in [gva, gva + length_bytes)."""
        scan = self._scan
        _scan(self._tables, gva, length_bytes, 0, scan)
        return bool(scan.n_bytes)

    def runs(
        self, gva: int, length_bytes: int, max_bytes: int = _NO_LIMIT
    ) -> tuple[list[tuple[int, int, int, int]], bool]:
        """Return what is mapped in [gva, gva + length_bytes), clipped to it, ascending.

        Returns:
            (gva, gpa, length in bytes, effective flags) of pieces that are contiguous in both
            address spaces; and whether that is all: not if more than `max_bytes` are mapped.
        """
        scan = self._scan
        found: list[tuple[int, int, int, int]] = []
        end = gva + length_bytes
        n_left = max_bytes
        while gva < end:
            gva = _scan(self._tables, gva, end - gva, n_left, scan)
            found += [(r.gva, r.gpa, r.n_bytes, r.flags) for r in scan.runs[0 : scan.n_runs]]
            if scan.n_bytes > n_left:
                return found, False
            n_left -= scan.n_bytes
        return found, True
