"""The guests that come with kvmmm: small ELFs beside the compiled core, listed in a manifest.

`MicroVM.load` takes paths and bytes only; a name becomes a path here. What a manifest entry may
hold is said at the head of the manifest itself (`guest/manifest.toml`).
"""

from __future__ import annotations

import errno
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvmmm.vmm.image_file import ImageNotFoundError

_DIRECTORY = "_guests"
_MANIFEST = "manifest.toml"


class BundledGuest:
    """One bundled guest. Treat it as immutable.

    Attributes:
        name: What `kvmmm run` calls it.
        group: `demo`, `test`, `user` or `bench`.
        property: What it proves, one line.
        path: Its ELF.
        command_line: What it is run with when the user gives nothing.
        memory: The `--memory` it wants.
        timeout: Longer than any sane host needs; for those who test it.
        expect: How it must end: `outcome` as in `kvmmm.vmm.result`, and what belongs to it.
        entry: Everything the manifest says about it.
    """

    __slots__ = (
        *("command_line", "entry", "expect", "group", "memory", "name", "path", "property"),
        "timeout",
    )

    def __init__(self, directory: Path, entry: dict[str, Any]) -> None:
        self.entry = entry
        self.name: str = entry["name"]
        self.group: str = entry["group"]
        self.property: str = entry["property"]
        self.path = directory / f"{self.name}.elf"
        self.command_line: str = entry.get("cmdline", "")
        self.memory: str = entry.get("memory", "64M")
        self.timeout: str = entry.get("timeout", "10s")
        self.expect: dict[str, Any] = entry["expect"]

    @property
    def is_user(self) -> bool:
        """Whether it is a program for ring 3, to be run by a `UserVM`."""
        return self.group == "user"

    @property
    def expected(self) -> str:
        """How it must end, for a person: `exit status 0`, `fault: write`."""
        outcome = str(self.expect["outcome"])
        if outcome == "exited":
            return f"exit status {self.expect.get('status', 0)}"
        if outcome == "fault":
            at = f" at {self.expect['address']:#x}" if "address" in self.expect else ""
            return f"fault: {self.expect['access']}{at}"
        return _ENDS.get(outcome, outcome)

    def __repr__(self) -> str:
        return f"<BundledGuest {self.name} ({self.group})>"


_ENDS = {
    "deadline": "never ends by itself",
    "shutdown": "triple fault",
    "handler": "run by its benchmark only",
    "memory": "memory exhausted",
    "exception": "an exception",
}


def directory() -> Path:
    """Return the directory of the bundled guests: beside the compiled core, wherever that lies.

    Raises:
        ImageNotFoundError: The core has not been built.
    """
    # An editable installation keeps the core, and with it the guests, apart from the sources.
    spec = find_spec("kvmmm._core")
    if spec is None or spec.origin is None:
        raise _not_built(Path(_DIRECTORY))
    return Path(spec.origin).parent / _DIRECTORY


@lru_cache(maxsize=1)
def guests() -> tuple[BundledGuest, ...]:
    """Return all bundled guests, in the manifest's order.

    Raises:
        ImageNotFoundError: They have not been built or installed.
    """
    import tomllib  # for people who name a guest only

    base = directory()
    path = base / _MANIFEST
    try:
        with path.open("rb") as file:
            manifest = tomllib.load(file)
    except FileNotFoundError as e:
        raise _not_built(path) from e
    return tuple(BundledGuest(base, entry) for entry in manifest["guest"])


def find(name: str) -> BundledGuest:
    """Return the bundled guest of that name.

    Raises:
        ImageNotFoundError: There is none; the message lists those that there are.
    """
    known = {guest.name: guest for guest in guests()}
    if name in known:
        return known[name]
    import difflib

    shown = [guest.name for guest in guests() if guest.group != "bench"]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?\n" if near else ""
    raise ImageNotFoundError(
        name,
        errno.ENOENT,
        "there is no such file, and no bundled guest of that name",
        f"{hint}bundled guests: {', '.join(shown)}\n`kvmmm guests` says what each does",
    )


def _not_built(path: Path) -> ImageNotFoundError:
    return ImageNotFoundError(
        str(path), errno.ENOENT, "the bundled guests have not been built", "type `make guests`"
    )
