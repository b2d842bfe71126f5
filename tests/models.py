"""What memory is, in the plainest words: a dict of pages."""

from __future__ import annotations

from kvmmm.hostarch.access import effective
from kvmmm.hostarch.addr import PAGE_BYTES, page_down


class RefusedError(Exception):
    """An access that must fail.

    Attributes:
        addr: First address that cannot be accessed.
        done: Bytes done before it.
        mapped: Whether something is mapped there.
    """

    def __init__(self, addr: int, done: int, *, mapped: bool) -> None:
        self.addr = addr
        self.done = done
        self.mapped = mapped
        super().__init__(f"{addr:#x} after {done}")


class ModelMemory:
    """Private memory by page: permissions, a name, and bytes (zero until written)."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[int, str]] = {}
        self.contents: dict[int, bytearray] = {}

    def mmap(self, start: int, end: int, perms: int, name: str) -> None:
        self.munmap(start, end)
        for page in range(start, end, PAGE_BYTES):
            self.pages[page] = perms, name

    def munmap(self, start: int, end: int) -> None:
        for page in range(start, end, PAGE_BYTES):
            self.pages.pop(page, None)
            self.contents.pop(page, None)

    def mprotect(self, start: int, end: int, perms: int) -> None:
        """Up to the first page that is not mapped."""
        for page in range(start, end, PAGE_BYTES):
            if page not in self.pages:
                raise RefusedError(page, page - start, mapped=False)
            self.pages[page] = perms, self.pages[page][1]

    def read(self, addr: int, length: int, access: int) -> bytes:
        out = b""
        for page, start, stop in self._pieces(addr, length, access):
            out += self.contents.get(page, bytearray(PAGE_BYTES))[start:stop]
        return out

    def write(self, addr: int, data: bytes, access: int) -> None:
        """Up to the first page that refuses."""
        done = 0
        for page, start, stop in self._pieces(addr, len(data), access):
            content = self.contents.setdefault(page, bytearray(PAGE_BYTES))
            content[start:stop] = data[done : done + stop - start]
            done += stop - start

    def _pieces(self, addr: int, length: int, access: int):  # noqa: ANN202 - (page, start, stop)
        at = addr
        while at < addr + length:
            page = page_down(at)
            perms = self.pages.get(page)
            if perms is None or access & ~effective(perms[0]):
                raise RefusedError(at, at - addr, mapped=perms is not None)
            stop = min(page + PAGE_BYTES, addr + length)
            yield page, at - page, stop - page
            at = stop

    def vmas(self) -> list[tuple[int, int, int, str]]:
        """(start, end, permissions, name), merged as far as they can be."""
        found: list[tuple[int, int, int, str]] = []
        for page, (perms, name) in sorted(self.pages.items()):
            if found and found[-1][1:] == (page, perms, name):
                found[-1] = (found[-1][0], page + PAGE_BYTES, perms, name)
            else:
                found.append((page, page + PAGE_BYTES, perms, name))
        return found
