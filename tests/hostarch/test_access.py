from __future__ import annotations

import pytest

from kvmmm.hostarch import access
from kvmmm.hostarch.access import EXECUTE, NO_ACCESS, READ, WRITE

ALL = range(8)


def test_bits_are_distinct():
    assert sorted((READ, WRITE, EXECUTE)) == [1, 2, 4]
    assert READ | WRITE == access.READ_WRITE
    assert READ | EXECUTE == access.READ_EXECUTE
    assert READ | WRITE | EXECUTE == access.ANY_ACCESS


@pytest.mark.parametrize("bits", ALL)
def test_effective(bits: int):
    effective = access.effective(bits)
    assert effective & bits == bits
    assert bool(effective & READ) == bool(bits)
    assert effective & ~READ == bits & ~READ
    assert access.effective(effective) == effective


@pytest.mark.parametrize("perms", ALL)
@pytest.mark.parametrize("wanted", ALL)
def test_allows(perms: int, wanted: int):
    permitted = {
        READ: perms != NO_ACCESS,  # x86 cannot withhold it from what may be written or run
        WRITE: bool(perms & WRITE),
        EXECUTE: bool(perms & EXECUTE),
    }
    assert access.allows(perms, wanted) == all(permitted[b] for b in permitted if wanted & b)


@pytest.mark.parametrize(
    ("bits", "text"),
    [(NO_ACCESS, "---"), (READ, "r--"), (WRITE, "-w-"), (EXECUTE, "--x"), (7, "rwx")],
)
def test_text(bits: int, text: str):
    assert access.access_str(bits) == text


@pytest.mark.parametrize("bits", ALL)
def test_text_and_back(bits: int):
    assert access.parse_access(access.access_str(bits)) == bits


@pytest.mark.parametrize(("text", "bits"), [("", 0), ("rx", 5), ("xr", 5), ("w", 2)])
def test_parse_access(text: str, bits: int):
    assert access.parse_access(text) == bits


@pytest.mark.parametrize("text", ["rwz", "R", "r w"])
def test_no_access(text: str):
    with pytest.raises(ValueError, match="is no access"):
        access.parse_access(text)
