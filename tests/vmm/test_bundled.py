"""Bundled guests: where they are, what they say of themselves, and names that nobody knows."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import EXIT_NO_INPUT
from kvmmm.hostarch.units import parse_bytes, parse_duration_ns
from kvmmm.vmm import bundled
from kvmmm.vmm.bundled import BundledGuest
from kvmmm.vmm.image import read_image
from kvmmm.vmm.image_file import ImageNotFoundError
from kvmmm.vmm.user_image import read_user_image

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


def test_every_guest_of_the_manifest_has_an_image_that_loads():
    assert bundled.guests()
    for guest in bundled.guests():
        if guest.is_user:
            assert read_user_image(guest.path).kind == "elf"
            continue
        image = read_image(str(guest.path), memory_bytes=parse_bytes(guest.memory))
        assert image.kind == "elf"


def test_manifest_entries_are_complete():
    names = [guest.name for guest in bundled.guests()]
    assert len(names) == len(set(names))
    for guest in bundled.guests():
        assert guest.group in {"demo", "test", "user", "bench"}
        assert guest.property
        assert guest.expected
        assert parse_duration_ns(guest.timeout)


def test_find_gives_the_guest():
    guest = bundled.find("hello")
    assert guest.name == "hello"
    assert guest.path.name == "hello.elf"
    assert guest.group == "demo"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ImageNotFoundError) as caught:
        bundled.find("nobody")
    error = caught.value
    assert error.errno == errno.ENOENT
    assert error.exit_code == EXIT_NO_INPUT
    assert "touch" in error.remedy
    assert "bench_pio" not in error.remedy
    assert "did you mean" not in error.remedy


def test_near_miss_is_suggested():
    with pytest.raises(ImageNotFoundError, match=r"did you mean hello\?"):
        bundled.find("helo")


@pytest.mark.parametrize(
    ("expect", "text"),
    [
        ({"outcome": "exited"}, "exit status 0"),
        ({"outcome": "exited", "status": 33}, "exit status 33"),
        ({"outcome": "fault", "access": "write"}, "fault: write"),
        ({"outcome": "fault", "access": "read", "address": 0}, "fault: read at 0x0"),
        ({"outcome": "shutdown"}, "triple fault"),
        ({"outcome": "halted"}, "halted"),
    ],
)
def test_expected_is_said_for_people(tmp_path: Path, expect: dict[str, Any], text: str):
    entry = {"name": "x", "group": "demo", "property": "is", "expect": expect}
    assert BundledGuest(tmp_path, entry).expected == text


def test_guests_that_were_not_built_are_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bundled, "directory", lambda: tmp_path)
    bundled.guests.cache_clear()
    try:
        with pytest.raises(ImageNotFoundError, match="make guests"):
            bundled.guests()
    finally:
        bundled.guests.cache_clear()
