"""SegmentSet as a C type: references, callbacks that misbehave, changes while iterating."""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import weakref
from typing import TYPE_CHECKING

import pytest

from kvmmm.segment import SegmentSet

if TYPE_CHECKING:
    from collections.abc import Callable


def units(n: int, step: int = 1) -> SegmentSet[int]:
    s: SegmentSet[int] = SegmentSet()
    for i in range(n):
        s.insert(i * step, i * step + 1, i)
    return s


def test_generic_alias_and_subclass():
    class Named(SegmentSet[int]):
        pass

    s = Named(SegmentSet.merge_equal)
    s.name = "pmas"  # type: ignore[attr-defined]
    s.insert(0, 1, 1)
    s.insert(1, 2, 1)
    assert list(s) == [(0, 2, 1)]
    assert SegmentSet.merge_equal(0, 1, 5, 5) == 5
    assert SegmentSet.merge_equal(0, 1, 5, 6) is None


# References: a value's count is one for every segment that has it, whatever happened.


class Token:
    """A value; nothing else refers to it but the set and `tokens`."""

    def __init__(self, n: int) -> None:
        self.n = n


def sometimes_merge(_s1: int, _e1: int, value1: Token, value2: Token) -> Token | None:
    return (None, value1, value2)[(value1.n + value2.n) % 3]


def swap_split(_s: int, _e: int, value: Token, at: int) -> tuple[Token, Token]:
    if at % 7 == 0:
        raise ZeroDivisionError
    return (value, value) if value.n % 2 else (value, tokens[at % len(tokens)])


def random_change(_s: int, _e: int, value: Token) -> Token:
    if value.n == 5 and random.random() < 0.2:
        raise ZeroDivisionError
    return tokens[(value.n + 1) % len(tokens)]


tokens = [Token(i) for i in range(8)]


@pytest.mark.parametrize("block_max", [2, 5, 256])
@pytest.mark.parametrize("split", [None, swap_split])
def test_references(block_max: int, split: Callable[..., tuple[Token, Token]] | None):
    random.seed(block_max)
    s: SegmentSet[Token] = SegmentSet(sometimes_merge, split, block_max=block_max)
    before = [sys.getrefcount(token) for token in tokens]

    def one(step: int) -> None:
        start = random.randrange(1000)
        end = start + random.randrange(1, 40)
        with contextlib.suppress(ValueError, ZeroDivisionError):
            match step % 8:
                case 0 | 1 | 2 | 3:
                    s.insert(start, end, tokens[step % 7])
                case 4 | 5:
                    s.remove(start, end)
                case 6:
                    s.mutate(start, end, random_change)
                case _:
                    s.isolate(start, end)
                    s.merge_range(start, end)

    for step in range(4000):
        one(step)
        if step % 50 == 0:
            counts = [sum(value is token for _, _, value in s) for token in tokens]
            now = [sys.getrefcount(token) for token in tokens]
            assert now == [b + c for b, c in zip(before, counts, strict=True)]
            s.check_invariants()
    s.clear()
    assert [sys.getrefcount(token) for token in tokens] == before


def test_collector_finds_cycles():
    s: SegmentSet[object] = SegmentSet()
    token = Token(1)
    gone = weakref.ref(token)
    token.owner = s  # type: ignore[attr-defined]
    s.insert(0, 1, token)
    iterator = s.segments()
    token.iterator = iterator  # type: ignore[attr-defined]
    del token, s, iterator
    gc.collect()
    assert gone() is None


def test_set_outlives_its_iterators_owner():
    iterator = units(3).segments()
    assert list(iterator) == [(0, 1, 0), (1, 2, 1), (2, 3, 2)]
    assert next(iterator, None) is None


# Callbacks that do what they must not.

CHANGES: list[Callable[[SegmentSet[int]], object]] = [
    lambda s: s.insert(500, 501, 1),
    lambda s: s.remove(0, 500),
    lambda s: s.isolate(5, 6),
    lambda s: s.mutate(0, 500, lambda _s, _e, v: v),
    lambda s: s.merge_range(0, 500),
    lambda s: s.clear(),
]
CALLERS: list[Callable[[SegmentSet[int]], object]] = [
    lambda s: s.insert(10, 20, 1),  # merge
    lambda s: s.merge_range(0, 100),
    lambda s: s.remove(5, 7),  # split
    lambda s: s.remove(5, 35),
    lambda s: s.isolate(5, 7),
    lambda s: s.mutate(0, 10, lambda _s, _e, _v: CHANGES[1](s) and 1),
]


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
@pytest.mark.parametrize("caller", CALLERS, ids=range(len(CALLERS)))
def test_callback_that_changes_the_set(
    caller: Callable[[SegmentSet[int]], object], change: Callable[[SegmentSet[int]], object]
):
    def merge(_s: int, _e: int, _v1: int, _v2: int) -> int | None:
        if s.span_bytes == 30:
            assert list(s) == was  # looking is allowed, and nothing has happened yet
            change(s)
            return 1
        return None

    def split(_s: int, _e: int, _v: int, _at: int) -> tuple[int, int]:
        assert list(s) == was
        change(s)
        return 1, 1

    s: SegmentSet[int] = SegmentSet(merge, split)
    was = [(0, 10, 1), (20, 30, 2), (30, 40, 3)]
    for segment in was:
        s.insert(*segment)
    with pytest.raises(RuntimeError, match="being changed"):
        caller(s)
    assert list(s) == was
    s.check_invariants()
    s.clear()  # no change is under way any more
    assert not list(s)


class Meddler:
    """Changes the set when its last reference goes."""

    def __init__(self, s: SegmentSet[object]) -> None:
        self.set = s

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeError, ValueError):
            self.set.insert(random.randrange(1000), 1000, 1)
        with contextlib.suppress(RuntimeError):
            self.set.remove(random.randrange(500), 600)
        list(self.set)


def test_finalizers_that_change_the_set():
    random.seed(3)
    s: SegmentSet[object] = SegmentSet(
        lambda _s, _e, v1, _v2: v1 if random.random() < 0.5 else None, block_max=4
    )
    for _ in range(2000):
        start = random.randrange(900)
        with contextlib.suppress(ValueError):
            s.insert(start, start + random.randrange(1, 20), Meddler(s))
        s.mutate(start, start + 50, lambda _s, _e, _v: Meddler(s))
        s.remove(start, start + 9)
        s.check_invariants()
    s.clear()
    s.clear()  # the finalizers of the first may have put something in


def test_changes_while_iterating():
    random.seed(4)
    s = units(3000, step=2)
    for iterator in (iter(s), s.segments(100, 5000), s.gaps(7, 5555)):
        last = -1
        for item in iterator:
            assert item[0] >= last
            last = item[0]
            start = random.randrange(6000)
            s.remove(start, start + 9)
            with contextlib.suppress(ValueError):
                s.insert(start, start + 3, 1)
    s.check_invariants()


def test_callbacks_that_raise_change_nothing():
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    s: SegmentSet[int] = SegmentSet(fail, fail)  # type: ignore[arg-type]
    s.insert(10, 20, 1)
    for operation in (
        lambda: s.insert(0, 10, 1),
        lambda: s.insert(20, 30, 1),
        lambda: s.remove(15, 20),
        lambda: s.remove(12, 15),
        lambda: s.isolate(15, 15),
        lambda: s.mutate(15, 20, lambda _s, _e, v: v),
    ):
        with pytest.raises(ZeroDivisionError):
            operation()
        assert list(s) == [(10, 20, 1)]
        s.check_invariants()


@pytest.mark.parametrize("halves", [None, 5, (1,), (1, 2, 3), (None, 1), (1, None)])
def test_split_that_returns_nonsense(halves: object):
    s: SegmentSet[int] = SegmentSet(None, lambda *_: halves)  # type: ignore[arg-type,return-value]
    s.insert(0, 10, 1)
    with pytest.raises(TypeError, match="two values"):
        s.remove(5, 6)
    assert list(s) == [(0, 10, 1)]


def test_none_is_no_value():
    s: SegmentSet[int | None] = SegmentSet()
    with pytest.raises(TypeError, match="None"):
        s.insert(0, 10, None)
    s.insert(0, 10, 1)
    with pytest.raises(TypeError, match="None"):
        s.mutate(0, 10, lambda _s, _e, _v: None)
    assert list(s) == [(0, 10, 1)]


@pytest.mark.parametrize("arguments", [(), (1,), (1.5, 2, 3), ("a", 2, 3), (1, 2, 3, 4)])
def test_wrong_arguments(arguments: tuple[object, ...]):
    s: SegmentSet[int] = SegmentSet()
    for name in ("insert", "mutate", "find_large_gap"):
        with pytest.raises(TypeError):
            getattr(s, name)(*arguments)
    with pytest.raises(TypeError):
        s.find_large_gap(0, 1, 1, up=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="block_max"):
        SegmentSet(block_max=1)
