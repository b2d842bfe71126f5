"""Hostile addresses, lengths, options, sequences and batches: a clear error, and nothing done."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import GuestAlignmentError, GuestFaultError
from kvmmm.safemem.ffi import IOOpts
from tests.mm.copying import MAX, MECHANISMS, PAGE, START, Ground, through

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmmm.mm import MemoryManager

    Copy = Callable[..., Any]

END = MAX - PAGE
WORD = 1 << 64


@pytest.fixture
def ground() -> Iterator[Ground]:
    """Memory at both ends of the address space, and in the middle."""
    with Ground() as made:
        made.map(END, PAGE)
        made.map(0, PAGE)
        yield made


def copies(mm: MemoryManager, **options: Any) -> dict[str, Copy]:
    """Every plain copy as f(addr, n_bytes)."""
    return {
        "copy_in": lambda addr, n: mm.copy_in(addr, bytearray(n), **options),
        "copy_out": lambda addr, n: mm.copy_out(addr, b"\xee" * n, **options),
        "write": lambda addr, n: mm.write(addr, b"\xee" * n, **options),
        "read": lambda addr, n: len(mm.read(addr, n, **options)),
        "zero_out": lambda addr, n: mm.zero_out(addr, n, **options),
        "in many": lambda addr, n: len(mm.copy_in_many([(addr, n)], **options)[0]),
        "out many": lambda addr, n: mm.copy_out_many([(addr, b"\xee" * n)], **options),
    }


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_very_ends(ground: Ground, mechanism: str):
    for name, copy in copies(ground.mm, **through(mechanism)).items():
        for addr, n in ((MAX - 1, 1), (MAX - 16, 16), (END, PAGE), (MAX, 0), (0, 1), (0, 0)):
            assert copy(addr, n) == n, name


BEYOND = (
    (MAX, 1), (MAX - 1, 2), (MAX - 15, 16), (END, PAGE + 1), (MAX - (1 << 20), (1 << 20) + 1),
    (MAX + 1, 0), (MAX + 1, 1),
    (1 << 47, 8), (1 << 63, 8), (WORD - 8, 7), (WORD - 8, 8), (WORD - 8, 9), (WORD - 1, 0),
    (WORD - 1, 1), (WORD, 0), (WORD, 1), (WORD + START, 8), (10**40, 1),
)  # fmt: skip


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_beyond_the_end_nothing_is_done(ground: Ground, mechanism: str):
    before = ground.mm.read(END, PAGE)
    for addr, n in BEYOND:
        for name, copy in copies(ground.mm, **through(mechanism)).items():
            with pytest.raises(GuestFaultError) as caught:
                copy(addr, n)
            error = caught.value
            # What has more than 64 bits stands for the last address.
            assert error.addr == min(max(addr, MAX), WORD - 1), (name, addr, n)
            assert (error.done, error.mapped) == (0, False), (name, addr, n)
    assert ground.mm.read(END, PAGE) == before


def test_lengths_that_no_address_space_has(ground: Ground):
    mm = ground.mm
    lengths = (1 << 62, (1 << 63) - 1, 1 << 63, WORD - 1, WORD, WORD + 8, 10**40)
    for addr, n in itertools.product((0, 1, START, MAX), lengths):
        for call in (mm.read, mm.zero_out, lambda a, k: mm.copy_in_many([(a, k)])):
            with pytest.raises(GuestFaultError) as caught:
                call(addr, n)
            assert (caught.value.addr, caught.value.done) == (MAX, 0)


def test_a_length_that_no_host_has_memory_for():
    """The range is one, so memory is asked for, and there is none."""
    with Ground(max_addr=1 << 47) as ground:
        with pytest.raises((MemoryError, GuestFaultError)):
            ground.mm.read(START, 1 << 46)
        with pytest.raises((MemoryError, GuestFaultError)):
            ground.mm.copy_in_many([(START, 8), (START, 1 << 46)])


def test_below_zero(ground: Ground):
    mm = ground.mm
    for n in (-1, -8, -(1 << 63), -WORD):
        for call in (mm.read, mm.zero_out, lambda a, k: mm.copy_in_many([(a, k)])):
            with pytest.raises((GuestFaultError, ValueError, OverflowError)):
                call(START, n)
        for copy in copies(mm).values():
            for n_bytes in (0, 8):
                with pytest.raises((GuestFaultError, ValueError, OverflowError)):
                    copy(n, n_bytes)


class Number:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __index__(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class Truth:
    def __bool__(self) -> bool:
        raise ZeroDivisionError("neither")


NO_NUMBERS: tuple[Any, ...] = (
    None, 16.0, "16", b"16", [16], 16j, Number(None), Number(16.0), Number("16"),
)  # fmt: skip


def test_what_is_no_number(ground: Ground):
    for wrong in NO_NUMBERS:
        check_no_number(ground.mm, wrong)


def check_no_number(mm: MemoryManager, wrong: Any) -> None:
    for call in (
        lambda: mm.read(wrong, 8),
        lambda: mm.read(START, wrong),
        lambda: mm.zero_out(wrong, 8),
        lambda: mm.zero_out(START, wrong),
        lambda: mm.copy_in(wrong, bytearray(8)),
        lambda: mm.copy_out(wrong, b"12345678"),
        lambda: mm.swap_uint32(wrong, 1),
        lambda: mm.swap_uint32(START, wrong),
        lambda: mm.compare_and_swap_uint32(START, wrong, 1),
        lambda: mm.compare_and_swap_uint32(START, 1, wrong),
        lambda: mm.load_uint32(wrong),
        lambda: mm.copy_in_many([(wrong, 8)]),
        lambda: mm.copy_in_many([(START, wrong)]),
        lambda: mm.copy_out_many([(wrong, b"x")]),
    ):
        with pytest.raises(TypeError):
            call()


def test_what_stands_for_a_number(ground: Ground):
    mm = ground.mm
    mm.copy_out(START, b"12345678")
    for addr in (Number(START), type("Int", (int,), {})(START)):
        assert mm.read(addr, Number(8)) == b"12345678"
        assert mm.copy_in_many([(addr, Number(8))]) == [b"12345678"]
        assert mm.load_uint32(addr) == int.from_bytes(b"1234", "little")
    mm.copy_out(1, b"z")
    assert mm.read(True, True) == b"z"  # a bool is an int, in Python
    for number in (Number(ZeroDivisionError("mine")), Number(KeyError("mine"))):
        with pytest.raises((ZeroDivisionError, KeyError)):
            mm.read(number, 8)


def test_words(ground: Ground):
    mm = ground.mm
    for bits in range(1, 4):
        for call in (
            lambda at: mm.swap_uint32(at, 1),
            lambda at: mm.compare_and_swap_uint32(at, 0, 1),
            mm.load_uint32,
        ):
            with pytest.raises(GuestAlignmentError) as caught:
                call(START + bits)
            assert (caught.value.addr, caught.value.done) == (START + bits, 0)
            for at in (MAX, MAX - 4 + bits, WORD - 4, WORD, -4, START - 4):
                with pytest.raises(GuestFaultError):
                    call(at)
    for value in (-1, 1 << 32, WORD, -WORD):
        with pytest.raises((OverflowError, ValueError)):
            mm.swap_uint32(START, value)
        with pytest.raises((OverflowError, ValueError)):
            mm.compare_and_swap_uint32(START, value, 0)
        with pytest.raises((OverflowError, ValueError)):
            mm.compare_and_swap_uint32(START, 0, value)
    assert mm.load_uint32(START) == 0
    assert mm.swap_uint32(MAX - 4, 0xFFFF_FFFF) == 0
    assert mm.load_uint32(MAX - 4) == 0xFFFF_FFFF


# ---- arguments and options ----


def test_numbers_of_arguments(ground: Ground):
    mm = ground.mm
    for name, n_right in (
        ("copy_in", 2), ("copy_out", 2), ("write", 2), ("read", 2), ("zero_out", 2),
        ("copy_in_vec", 2), ("copy_out_vec", 2), ("copy_in_many", 1), ("copy_out_many", 1),
        ("swap_uint32", 2), ("compare_and_swap_uint32", 3), ("load_uint32", 1),
    ):  # fmt: skip
        for n in range(6):
            if n != n_right:
                with pytest.raises(TypeError):
                    getattr(mm, name)(*[START] * n)
        with pytest.raises(TypeError):
            getattr(mm, name)(*[START] * n_right, nonsense=1)
        with pytest.raises(TypeError):
            getattr(mm, name)(addr=START)


def test_options(ground: Ground):
    mm = ground.mm
    for wrong in ("walk", 5, object(), {}, IOOpts):
        with pytest.raises(TypeError):
            mm.read(START, 8, opts=wrong)
    assert mm.read(START, 8, opts=None) == bytes(8)
    with pytest.raises(ZeroDivisionError):
        mm.read(START, 8, ignore_permissions=Truth())  # type: ignore[arg-type]
    for nonsense in ("", "x", "WALK", b"walk", 1, True):
        with pytest.raises((TypeError, ValueError)):
            IOOpts(mechanism=nonsense)  # type: ignore[arg-type]
    for options in ({"nonsense": 1}, {"ignore_permissions": Truth()}):
        with pytest.raises((TypeError, ZeroDivisionError)):
            IOOpts(**options)  # type: ignore[arg-type]
    opts = IOOpts()
    with pytest.raises((AttributeError, TypeError)):
        opts.mechanism = "walk"  # type: ignore[misc]
    with pytest.raises(TypeError):
        type("Sub", (IOOpts,), {})


def test_a_mechanism_that_is_not_to_be_used_falls_back(ground: Ground):
    """Ignoring permissions, or an address space that is not active: by internal mappings."""
    ground.mm.mprotect(START, PAGE, 0)
    for mechanism in MECHANISMS:
        opts = IOOpts(ignore_permissions=True, mechanism=mechanism)
        assert ground.mm.read(START, 8, opts=opts) == bytes(8)
        with pytest.raises(GuestFaultError):
            ground.mm.read(START, 8, **through(mechanism))
        idle = IOOpts(address_space_active=False, mechanism=mechanism)
        assert ground.mm.read(START + PAGE, 8, opts=idle) == bytes(8)
