"""Bytecode made on the host: Python is some 16 times slower in the machine, its compiler as well.

pytest compiles test files itself, with assertions rewritten, and keeps the result beside Python's
own; without it a run would spend most of its time there.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import io
import marshal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

_HEADER_BYTES = 16
_UNCHECKED_HASH = (1).to_bytes(4, "little")  # the flag word: not to be compared with the source
_REWRITTEN = ("conftest.py", "test_*.py", "*_test.py")  # pytest's python_files, and conftest


def compiled(source: str, status: os.stat_result) -> Iterator[tuple[str, bytes]]:
    """Yield the bytecode files of a Python source: path and content.

    There are none when the source is not Python of this version, such as a template.

    Args:
        source: Absolute path on the host, and in the machine.
        status: What the host says of the file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = Path(importlib.util.cache_from_source(source))
        code = _kept(target, status) or _compile(source)
        if not code:
            return
        yield str(target), importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH + bytes(8) + code
        if any(fnmatch.fnmatch(Path(source).name, pattern) for pattern in _REWRITTEN):
            yield from _rewritten(Path(source))


def _kept(target: Path, status: os.stat_result) -> bytes:
    # The code in the host's own cache, if it was made from this very source.
    numbers = (0, int(status.st_mtime), status.st_size)
    header = b"".join((number & 0xFFFF_FFFF).to_bytes(4, "little") for number in numbers)
    try:
        content = target.read_bytes()
    except OSError:
        return b""
    if content[:_HEADER_BYTES] != importlib.util.MAGIC_NUMBER + header:
        return b""
    return content[_HEADER_BYTES:]


def _compile(source: str) -> bytes:
    try:
        text = Path(source).read_bytes()
        return marshal.dumps(compile(text, source, "exec", dont_inherit=True, optimize=0))
    except (SyntaxError, ValueError):
        return b""


def _rewritten(source: Path) -> Iterator[tuple[str, bytes]]:
    # Private functions of pytest, which alone knows its format (a time or a hash of the source).
    # Should they change, tests are rewritten in the machine: slower, nothing else.
    try:
        from _pytest.assertion import rewrite

        stamp, code = rewrite._rewrite_test(source, None)  # type: ignore[arg-type]  # noqa: SLF001
        content = io.BytesIO()
        rewrite._write_pyc_fp(content, stamp, code)  # noqa: SLF001
        name = source.name.removesuffix(".py") + rewrite.PYC_TAIL
    except (ImportError, AttributeError, TypeError, SyntaxError):
        return
    yield str(source.parent / "__pycache__" / name), content.getvalue()
