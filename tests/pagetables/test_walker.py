from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.pagetables.walker import is_clear, leaf_run


@given(
    st.integers(1, 512),
    st.sampled_from([1 << 12, 1 << 21, 1 << 30]),
    st.integers(0, (1 << 51) - 1),
    st.sampled_from([0x67, 0xE7, 0x63 | 1 << 63, 0x1FF | 1 << 63]),
)
def test_leaf_run_is_an_arithmetic_progression(count: int, span: int, gpa: int, flags: int):
    first = (gpa & -span & ((1 << 51) - 1)) | flags
    last = first + (count - 1) * span
    assert list(leaf_run(first, span, count)) == list(range(first, last + 1, span))


def test_leaf_run_cannot_be_written():
    with pytest.raises(TypeError):
        leaf_run(0x67, 4096, 20)[0] = 1


@pytest.mark.parametrize("count", [1, 511, 512])
def test_is_clear_sees_every_entry(count: int):
    entries = memoryview(array("Q", [0]) * count)
    assert is_clear(entries)
    for i in (0, count // 2, count - 1):
        entries[i] = 1 << 63
        assert not is_clear(entries)
        entries[i] = 0
