"""`CopyOptions`: the keywords that every operation on guest bytes takes. For type checkers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from kvmmm.safemem.ffi import IOOpts


class CopyOptions(TypedDict, total=False):
    """What is passed on to the copies of `MemoryManager`.

    Attributes:
        opts: How to copy.
        ignore_permissions: Access whatever could ever be allowed (`max_perms`), as a debugger does.
    """

    opts: IOOpts | None
    ignore_permissions: bool
