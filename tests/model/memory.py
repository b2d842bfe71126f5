"""What several address spaces have in common: bytes, and files that hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.access import ANY_ACCESS, READ_EXECUTE

if TYPE_CHECKING:
    from tests.model.model import Space

PAGE = 4096
ZEROS = bytes(PAGE)


def pages_of(n_bytes: int) -> int:
    """How many pages hold so many bytes."""
    return -(-n_bytes // PAGE)


class Cell:
    """One page's bytes. Who has the same cell sees the same bytes, as with a frame.

    Where it is not said which of several contents there are, it holds all of them, until somebody
    looks.
    """

    __slots__ = ("options",)

    def __init__(self, *options: bytes | bytearray) -> None:
        self.options = [bytearray(o) for o in options]

    def write(self, at: int, data: bytes) -> None:
        for option in self.options:
            option[at : at + len(data)] = data

    def may_write(self, at: int, data: bytes) -> None:
        """It is written, or it is not."""
        more = Cell(*self.options)
        more.write(at, data)
        self.options += [option for option in more.options if option not in self.options]

    def sees(self, at: int, data: bytes) -> bool:
        """Whether these bytes can be there; if so, what contradicts them cannot any more."""
        found = [o for o in self.options if o[at : at + len(data)] == data]
        self.options = found or self.options
        return bool(found)

    def copy(self) -> Cell:
        return Cell(*self.options)


class Store:
    """The bytes of a file or of shared memory, by page; zero where nothing was written.

    Attributes:
        size_bytes: Its length.
        is_memory: It forgets everything when nobody maps it any more.
        n_mapped: In how many pages of all spaces together it is mapped.
    """

    def __init__(self, size_bytes: int, *, is_memory: bool) -> None:
        self.size_bytes = size_bytes
        self.is_memory = is_memory
        self.n_mapped = 0
        self.cells: dict[int, Cell] = {}

    @property
    def n_pages(self) -> int:
        """Pages that can be touched."""
        return pages_of(self.size_bytes)

    def cell(self, index: int) -> Cell:
        if index not in self.cells:
            self.cells[index] = Cell(ZEROS)
        return self.cells[index]

    def unmapped(self, n_pages: int) -> None:
        self.n_mapped -= n_pages
        if not self.n_mapped and self.is_memory:
            self.cells.clear()


class Backing:
    """What a mapping maps: a way to a store. Compared by identity.

    Attributes:
        store: Its bytes.
        name: What mappings of it are called.
        max_shared_perms: What a shared mapping may be given.
        real: The mappable that it stands for, once known.
        is_copied: Whether any private mapping ever had a page of its own: others near it may have
            been copied with it, and stay when that page goes.
    """

    def __init__(
        self, store: Store, name: str, max_shared_perms: int = ANY_ACCESS, real: object = None
    ) -> None:
        self.store = store
        self.name = name
        self.max_shared_perms = max_shared_perms
        self.real = real
        self.is_copied = False

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Memory:
    """All spaces, and the file that they may map, by a writable and by a read-only descriptor."""

    def __init__(self, file_bytes: int, shared_bytes: int) -> None:
        self.spaces: list[Space] = []
        store = Store(file_bytes, is_memory=False)
        self.file = Backing(store, "/file")
        self.read_only = Backing(store, "/read-only", READ_EXECUTE)
        self.shared = Backing(Store(shared_bytes, is_memory=True), "/shared")

    @staticmethod
    def anonymous(size_bytes: int) -> Backing:
        """What a shared anonymous mapping of its own maps."""
        return Backing(Store(size_bytes, is_memory=True), "/dev/zero (deleted)")

    def will_change(self, store: Store, index: int) -> None:
        """Have everybody who maps a page of a store privately remember what it has held.

        A private mapping sees the file's bytes, or what they were: nobody says when it is copied.
        """
        now = store.cell(index).options
        for space in self.spaces:
            for page, kind in space.private_pages_of(store):
                if page + kind.delta == index and page not in space.own:
                    olds = space.olds.setdefault(page, [])
                    olds += [bytes(option) for option in now if option not in olds]

    def write_store(self, store: Store, index: int, at: int, data: bytes) -> None:
        self.will_change(store, index)
        store.cell(index).write(at, data)

    def truncate(self, size_bytes: int) -> None:
        """Set the file's size: pages behind it go, and private copies of them."""
        store = self.file.store
        if size_bytes < store.size_bytes:
            n_pages, tail = pages_of(size_bytes), size_bytes % PAGE
            for index in [i for i in store.cells if i >= n_pages]:
                del store.cells[index]
            for space in self.spaces:
                for page, kind in space.private_pages_of(store):
                    if page + kind.delta >= n_pages:
                        space.forget_page(page)
            if tail:
                self.write_store(store, n_pages - 1, tail, ZEROS[tail:])
        store.size_bytes = size_bytes
