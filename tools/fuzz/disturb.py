"""What happens to a world meanwhile: mappings that come, go and change, forks, files cut short."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvmmm.errors import KvmmmError
from kvmmm.hostarch.access import NO_ACCESS, READ, READ_EXECUTE, READ_WRITE
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.mm.advice import MADV_DONTNEED

from .world import BIG, BIG_BYTES, FILED, LAST, N_PAGES, PATCHES, PLAIN, SHARED

if TYPE_CHECKING:
    import random
    import threading

    from kvmmm.mm import MemoryManager

    from .world import World

REGIONS = (PLAIN, PATCHES, FILED, SHARED, LAST)
_PERMS = (NO_ACCESS, READ, READ_WRITE, READ_WRITE, READ_EXECUTE)


def place(rng: random.Random) -> tuple[int, int]:
    """Return some pages of a region: address and length, page aligned."""
    if rng.random() < 0.2:
        n_bytes = PAGE_BYTES * rng.choice((1, 16, 64, 512))
        return BIG + PAGE_BYTES * rng.randrange((BIG_BYTES - n_bytes) // PAGE_BYTES + 1), n_bytes
    region = rng.choice(REGIONS)
    n_pages = 4 if region == LAST else N_PAGES
    first = rng.randrange(n_pages)
    return region + first * PAGE_BYTES, PAGE_BYTES * rng.randint(1, n_pages - first)


def disturb(world: World, rng: random.Random) -> str:
    """Do one thing; returns what, as text. Refusals of the memory manager are part of it."""
    mm = rng.choice(world.mms)
    addr, n_bytes = place(rng)
    kind = rng.choices(_KINDS, _WEIGHTS)[0]
    text = f"{kind} {addr:#x} {n_bytes:#x}"
    try:
        _do(kind, world, mm, rng, addr, n_bytes)
    except (KvmmmError, OSError, IndexError) as e:
        # IndexError: another thread took the last child.
        return f"{text}: {type(e).__name__}"
    return text


def _do(
    kind: str, world: World, mm: MemoryManager, rng: random.Random, addr: int, n_bytes: int
) -> None:
    if kind == "munmap":
        mm.munmap(addr, n_bytes)
    elif kind == "mmap":
        mm.mmap(n_bytes, rng.choice(_PERMS), addr=addr, fixed=True, replace=True)
    elif kind == "map shared":
        offset = PAGE_BYTES * rng.randrange(N_PAGES)
        mappable = world.shared if rng.random() < 0.5 else world.file
        mm.mmap(
            n_bytes, READ_WRITE, addr=addr, fixed=True, replace=True, mappable=mappable,
            offset=offset, private=rng.random() < 0.5,
        )  # fmt: skip
    elif kind == "mprotect":
        mm.mprotect(addr, n_bytes, rng.choice(_PERMS))
    elif kind == "forget":
        mm.madvise(addr, n_bytes, MADV_DONTNEED)
    elif kind == "mremap":
        mm.mremap(addr, n_bytes, n_bytes + PAGE_BYTES * rng.choice((-1, 0, 1, 7)), may_move=True)
    elif kind == "fork":
        world.fork(rng)
    elif kind == "cut":
        world.cut(rng, guests=rng.random() < 0.5)
    elif kind == "fault":
        mm.handle_user_fault(addr, rng.choice((1, 2, 4)))
    else:
        world.map_all(mm)


_KINDS = (
    "munmap", "mmap", "map shared", "mprotect", "forget", "mremap", "fork", "cut", "fault",
    "map all",
)  # fmt: skip
_WEIGHTS = (4, 4, 2, 6, 4, 1, 2, 4, 4, 2)


def disturb_until(
    world: World, rng: random.Random, end: threading.Event, failures: list[BaseException]
) -> None:
    """Disturb until `end` is set; a thread's body."""
    try:
        while not end.is_set():
            disturb(world, rng)
            time.sleep(rng.choice((0, 0, 0.0002, 0.002)))
    except BaseException as e:  # noqa: BLE001 - told by whoever started this
        failures.append(e)
