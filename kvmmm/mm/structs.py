"""Numbers and records in guest memory, by whatever library describes them.

A layout is told by what it can do, so that none of these libraries is imported here:

    layout                                   read_struct returns      write_struct takes
    a format of the struct module, "<IQ"     a tuple                  a tuple
    a `struct.Struct`                        a tuple                  a tuple
    a ctypes class                           an instance              an instance
    a construct, `construct.Struct(...)`     what its parse returns   what its build takes
    (ffi, "struct name") of cffi             an owning pointer        a pointer, a struct, or what
                                                                      `ffi.new` takes

A record is copied at once; that makes it neither aligned nor atomic.
"""

# ruff: noqa: ANN401  # layouts and values are those of libraries without types
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm.guest_file import GuestFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

    from kvmmm.mm.copy_options import CopyOptions
    from kvmmm.mm.manager import MemoryManager


def read_int(
    mm: MemoryManager, addr: int, n_bytes: int, *, signed: bool = False,
    **options: Unpack[CopyOptions],
) -> int:  # fmt: skip
    """Return the little-endian number of `n_bytes` bytes at `addr` (guest -> host).

    Args:
        mm: The address space.
        addr: Guest address; any alignment.
        n_bytes: Above zero.
        signed: Whether it is in two's complement.
        options: `opts`, `ignore_permissions`, as for `copy_in`.

    Raises:
        GuestFaultError: As `copy_in`, as with its other errors.
        ValueError: It has no bytes.
    """
    if n_bytes <= 0:
        raise ValueError(f"a number has no {n_bytes} bytes")
    return int.from_bytes(mm.read(addr, n_bytes, **options), "little", signed=signed)


def write_int(
    mm: MemoryManager, addr: int, value: int, n_bytes: int, *, signed: bool = False,
    **options: Unpack[CopyOptions],
) -> int:  # fmt: skip
    """Write a little-endian number of `n_bytes` bytes to `addr` (host -> guest).

    Args:
        mm: The address space.
        addr: Guest address; any alignment.
        value: The number.
        n_bytes: Above zero.
        signed: Whether in two's complement; a number below zero needs it.
        options: `opts`, `ignore_permissions`, as for `copy_out`.

    Returns:
        Bytes written, always `n_bytes`.

    Raises:
        OverflowError: It does not fit; nothing was written.
        GuestFaultError: As `copy_out`, as with its other errors.
        ValueError: It has no bytes.
    """
    if n_bytes <= 0:
        raise ValueError(f"a number has no {n_bytes} bytes")
    return mm.copy_out(addr, value.to_bytes(n_bytes, "little", signed=signed), **options)


def read_struct(mm: MemoryManager, addr: int, layout: Any, **options: Unpack[CopyOptions]) -> Any:
    """Return the record at `addr` (guest -> host).

    What of a construct depends on its contents is read piece by piece: no byte is touched that it
    does not ask for. An error's `.done` then is that of the piece.

    Args:
        mm: The address space.
        addr: Guest address of its first byte.
        layout: See the module.
        options: `opts`, `ignore_permissions`, as for `copy_in`.

    Returns:
        What the layout's library returns.

    Raises:
        GuestFaultError: As `copy_in`, as with its other errors.
        TypeError: That is no layout.
        Exception: What the library says to these bytes.
    """
    if _is_construct(layout):
        return _parse_construct(mm, addr, layout, options)
    size, parse = _reader(layout)
    return parse(mm.read(addr, size, **options))


def write_struct(
    mm: MemoryManager, addr: int, layout: Any, value: Any, **options: Unpack[CopyOptions]
) -> int:
    """Write a record to `addr` (host -> guest).

    Args:
        mm: The address space.
        addr: Guest address of its first byte.
        layout: See the module.
        value: What the layout's library takes.
        options: `opts`, `ignore_permissions`, as for `copy_out`.

    Returns:
        Bytes written, always all.

    Raises:
        GuestFaultError: As `copy_out`, as with its other errors.
        TypeError: That is no layout, or the value is none of it; nothing was written.
        Exception: What the library says to this value; nothing was written.
    """
    return mm.copy_out(addr, _bytes_of(layout, value), **options)


def _reader(layout: Any) -> tuple[int, Callable[[bytes], Any]]:
    # (size in bytes; bytes -> what the library returns)
    if isinstance(layout, str):
        import struct

        layout = struct.Struct(layout)
    if isinstance(layout, tuple):
        ffi, name = layout
        return ffi.sizeof(name), lambda data: _to_cffi(ffi, name, data)
    if isinstance(layout, type) and hasattr(layout, "from_buffer_copy"):
        return _ctypes_size(layout), layout.from_buffer_copy
    if hasattr(layout, "unpack") and hasattr(layout, "size"):
        return layout.size, layout.unpack
    raise _no_layout(layout)


def _bytes_of(layout: Any, value: Any) -> bytes:
    if isinstance(layout, str):
        import struct

        return struct.pack(layout, *value)
    if isinstance(layout, tuple):
        ffi, name = layout
        return _from_cffi(ffi, name, value)
    if isinstance(layout, type) and hasattr(layout, "from_buffer_copy"):
        if not isinstance(value, layout):
            raise TypeError(f"{value!r} is no {layout.__name__}")
        return bytes(memoryview(value))  # type: ignore[arg-type]  # ctypes objects are buffers
    if _is_construct(layout):
        return bytes(layout.build(value))
    if hasattr(layout, "pack") and hasattr(layout, "size"):
        return bytes(layout.pack(*value))
    raise _no_layout(layout)


def _no_layout(layout: object) -> TypeError:
    return TypeError(
        f"{layout!r} is no layout: a struct format or Struct, a ctypes class, a construct, or "
        "(ffi, type name) of cffi"
    )


def _ctypes_size(layout: Any) -> int:
    # Without __init__, which may be the user's.
    return memoryview(layout.__new__(layout)).nbytes


def _is_construct(layout: object) -> bool:
    return all(hasattr(layout, name) for name in ("parse", "parse_stream", "build", "sizeof"))


class _Record(GuestFile):
    # What a construct reads from: at once as much as it has at least, then whatever else it wants
    # (it may follow pointers). All that is asked for, or an error, which is kept: construct does
    # not say what it was.

    head = b""
    error: OSError | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return self.readall()
        at = self._at
        if at + size <= len(self.head):
            found = self.head[at : at + size]
        else:
            try:
                found = self._mm.read(self.ar.start + at, size, **self._options)
            except OSError as e:
                self.error = e
                raise
        self._at = at + size
        return found


def _parse_construct(mm: MemoryManager, addr: int, layout: Any, options: CopyOptions) -> Any:
    stream = _Record(mm, AddrRange(addr, max(addr, mm.max_addr)), False, **options)
    stream.head = mm.read(addr, _construct_size(layout), **options)
    try:
        return layout.parse_stream(stream)
    except Exception as e:
        # Not every error that was met is why: a layout may do without a part.
        error: BaseException | None = e
        while error is not None and error is not stream.error:
            error = error.__context__
        if error is not None:
            raise error from e
        raise


def _construct_size(layout: Any) -> int:
    try:
        return int(layout.sizeof())
    except Exception as e:
        # Its own error class cannot be named without importing it.
        if type(e).__name__ == "SizeofError":
            return 0  # only its contents tell
        raise


def _to_cffi(ffi: Any, name: str, data: bytes) -> Any:
    made = ffi.new(ffi.getctype(name, "*"))
    ffi.memmove(made, data, len(data))
    return made


def _from_cffi(ffi: Any, name: str, value: Any) -> bytes:
    kind = ffi.typeof(ffi.getctype(name, "*"))
    if not (isinstance(value, ffi.CData) and ffi.typeof(value) is kind):
        value = ffi.new(kind, value)
    return bytes(ffi.buffer(value, ffi.sizeof(name)))
