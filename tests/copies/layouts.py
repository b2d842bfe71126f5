"""Layouts: what memory consists of at first, and what may happen to it while copies go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.copies.memory import FILE_BYTES
from tests.copies.world import Step
from tests.model.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.copies.draw import Draw

HUGE = 512
NAMES = ("/file", "/read-only", "/shared", "/cut", "/cut-read-only", "/brief")


def a_mapping(d: Draw, who: int, page: int, *, n: int | None = None) -> Step:
    """Something mapped at a page."""
    name = d.pick(("",) * 8 + NAMES)
    private = {"/cut": False, "/cut-read-only": False, "/brief": True}.get(name, d.chance(0.6))
    if not name:
        private = d.chance(0.8)
    n = n or d.pick((1, 1, 1, 2, 2, 3, 4, 5, 8, 16, 17, 33, 64, 66))
    index = 0
    if name:
        index = d.pick((0, 0, 0, 1, 2, 7, FILE_BYTES // PAGE - n, FILE_BYTES // PAGE + 1 - n))
    perms = d.pick((3, 3, 3, 3, 7, 1, 2, 4, 5, 0))
    if name.endswith("read-only") and not private:
        perms &= ~2
    return Step(
        "maps",
        {
            "who": who, "page": page, "n": n, "perms": perms, "name": name, "private": private,
            "index": max(index, 0), "stack": not name and d.chance(0.05),
        },
    )  # fmt: skip


def a_layout(d: Draw) -> list[Step]:
    """A few neighbourhoods, with regions side by side and holes between them."""
    steps = []
    limit = d.world.models[0].n_pages
    for hood in d.sample(sorted(d.world.backend.hoods), d.pick((1, 2, 2, 3))):
        page = hood
        if page > limit - 16 and d.chance(0.7):
            page = limit - 100
        elif d.chance(0.3):
            page = max(page - d.upto(60), 0)
        for _ in range(d.pick((2, 3, 4, 6))):
            kind = d.upto(19)
            if kind < 2:
                pages = list(range(page, page + d.pick((3, 8, 20, 66))))
                d.rng.shuffle(pages)
                pages = [p for p in pages if p < limit]
                steps.append(Step("scatters", {"who": 0, "pages": pages, "perms": 3}))
                page += len(pages)
            elif kind < 5 and page + 3 * HUGE < limit:
                start = -(-page // HUGE) * HUGE
                n = d.pick((HUGE, HUGE + 3, 2 * HUGE))
                arguments = a_mapping(d, 0, start, n=n).arguments
                arguments |= {"name": "", "index": 0, "perms": 3}
                steps.append(Step("maps", arguments))
                for _ in range(d.upto(2)):
                    # What a CPU has touched is mapped around as well, if it can be by a large leaf.
                    at = (start + d.upto(n - 1)) * PAGE
                    touch = {"who": 0, "addr": at, "n_bytes": 8, "seed": d.seed()}
                    steps.append(Step("cpu_stores", touch))
                page = start + n
            elif page < limit:
                steps.append(a_mapping(d, 0, page))
                steps[-1].arguments["n"] = n = min(steps[-1].arguments["n"], limit - page)
                page += n
            if d.chance(0.25):
                page += d.pick((1, 1, 2, 7))
    return steps


def a_change(d: Draw) -> Step:
    """Anything that may happen between copies."""
    kind = d.weighted(_WEIGHTS)
    who = d.who()
    if kind == "maps":
        return a_mapping(d, who, d.pages(who)[0])
    return Step(kind, _ARGUMENTS[kind](d, who))


def _member(_: Draw, who: int) -> dict[str, Any]:
    return {"who": who}


def _pages(d: Draw, who: int) -> dict[str, Any]:
    page, n = d.pages(who)
    return {"who": who, "page": page, "n": n}


def _scattered(d: Draw, who: int) -> dict[str, Any]:
    page, n = d.pages(who)
    pages = list(range(page, min(page + n, d.world.models[0].n_pages)))[:66]
    d.rng.shuffle(pages)
    return {"who": who, "pages": pages, "perms": d.pick((3, 3, 7, 1))}


def _protected(d: Draw, who: int) -> dict[str, Any]:
    return {**_pages(d, who), "perms": d.pick((3, 3, 3, 1, 1, 0, 2, 4, 5, 7))}


def _moved(d: Draw, who: int) -> dict[str, Any]:
    found = _pages(d, who)
    n_new = found["n"] if d.chance(0.6) else d.pick((1, 2, 8))
    return {**found, "n_new": n_new, "to": d.pages(who)[0] if d.chance(0.6) else None}


def _size(d: Draw, _who: int) -> dict[str, Any]:
    return {
        "size_bytes": d.pick((0, 1, PAGE, 8 * PAGE, FILE_BYTES, FILE_BYTES, d.upto(FILE_BYTES)))
    }


def _told(d: Draw, who: int) -> dict[str, Any]:
    return {**_size(d, who), "told": d.chance(0.4)}


def _written(d: Draw, _who: int) -> dict[str, Any]:
    return {
        "name": d.pick(("/file", "/cut")), "offset": d.upto(FILE_BYTES),
        "n_bytes": d.pick((1, 40, 5000)), "seed": d.seed(),
    }  # fmt: skip


def _loaded(d: Draw, who: int) -> dict[str, Any]:
    addr = d.address(who, 8)
    addr = min(addr - addr % 8, d.world.backend.max_addr - 8)
    return {"who": who, "addr": addr, "n_bytes": d.pick((1, 2, 4, 8))}


def _stored(d: Draw, who: int) -> dict[str, Any]:
    return {**_loaded(d, who), "seed": d.seed()}


_ARGUMENTS: dict[str, Callable[[Draw, int], dict[str, Any]]] = {
    "scatters": _scattered, "unmaps": _pages, "protects": _protected, "moves": _moved,
    "empties": _pages, "populates": _pages, "maps_resident": _member, "forks": _member,
    "ends": _member, "truncates": _size, "cuts_quietly": _told, "cuts_brief": _size,
    "somebody_writes": _written, "cpu_loads": _loaded, "cpu_stores": _stored,
}  # fmt: skip
_WEIGHTS = {
    "maps": 8, "scatters": 1, "unmaps": 4, "protects": 10, "moves": 3, "empties": 3, "populates": 3,
    "maps_resident": 1, "forks": 5, "ends": 3, "truncates": 3, "cuts_quietly": 4, "cuts_brief": 1,
    "somebody_writes": 3, "cpu_loads": 6, "cpu_stores": 8,
}  # fmt: skip
