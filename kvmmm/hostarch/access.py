"""Access bits: what an access does, and what a mapping allows.

Plain ints, because `enum.IntFlag` costs 0.7 us for one `&` (and three times that right after an
exit).
"""

from __future__ import annotations

READ = 1
WRITE = 2
EXECUTE = 4
NO_ACCESS = 0
READ_WRITE = READ | WRITE
READ_EXECUTE = READ | EXECUTE
ANY_ACCESS = READ | WRITE | EXECUTE


def effective(access: int) -> int:
    """Return what `access` permits on x86, where write and execute imply read.

    Source: gVisor hostarch.AccessType.Effective.
    """
    return access | READ if access & (WRITE | EXECUTE) else access


def allows(perms: int, access: int) -> bool:
    """Return whether a mapping with `perms` permits every bit of `access`."""
    return not access & ~effective(perms)


def access_str(access: int) -> str:
    """Return `access` as in /proc/<pid>/maps: `rw-`."""
    return (
        ("r" if access & READ else "-")
        + ("w" if access & WRITE else "-")
        + ("x" if access & EXECUTE else "-")
    )


def parse_access(text: str) -> int:
    """Return the bits of a string such as `rw-` or `rx`.

    Raises:
        ValueError: A letter other than r, w, x and -.
    """
    bits = {"r": READ, "w": WRITE, "x": EXECUTE, "-": NO_ACCESS}
    try:
        access = 0
        for letter in text:
            access |= bits[letter]
    except KeyError as e:
        raise ValueError(f"{text!r} is no access: use letters of 'rwx-'") from e
    return access
