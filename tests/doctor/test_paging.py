"""What is said of the ways to have a running vCPU forget a translation."""

from __future__ import annotations

import pytest

from kvmmm.doctor import paging
from kvmmm.errors import KvmmmError
from kvmmm.platform.kvm.shootdown_trial import Proven


def check_with(monkeypatch: pytest.MonkeyPatch, *, dontneed: bool, zap: bool) -> paging.Finding:
    proven = Proven(dontneed=dontneed, zap=zap, root=True, is_nested=False)
    monkeypatch.setattr(paging, "open_device", lambda: None)
    monkeypatch.setattr(paging, "proven_on", lambda _device: proven)
    return paging._running()


def test_all_of_them(monkeypatch: pytest.MonkeyPatch):
    found = check_with(monkeypatch, dontneed=True, zap=True)
    assert (found.result, found.remedy) == ("ok", "")
    assert found.fact.startswith("madvise, dummy memslot, new root: ")


@pytest.mark.parametrize(
    ("dontneed", "zap", "named", "remedy"),
    [
        (False, True, "dummy memslot, new root", "a small unmap drops everything"),
        (True, False, "madvise, new root", "stops every vCPU"),
    ],
)
def test_one_does_not_work(
    monkeypatch: pytest.MonkeyPatch, dontneed: bool, zap: bool, named: str, remedy: str
):
    found = check_with(monkeypatch, dontneed=dontneed, zap=zap)
    assert found.result == "works differently"
    assert found.fact.startswith(f"{named}: ")
    assert "slower, not wrong" in found.remedy
    assert remedy in found.remedy


def test_none_works(monkeypatch: pytest.MonkeyPatch):
    def refuse(_device: object) -> Proven:
        raise KvmmmError("no way was found")

    monkeypatch.setattr(paging, "open_device", lambda: None)
    monkeypatch.setattr(paging, "proven_on", refuse)
    found = paging._running()
    assert (found.result, found.fact) == ("missing", "no way was found")
    assert "guest kernels run here" in found.remedy


@pytest.mark.kvm
@pytest.mark.npt
def test_here():
    check = next(c for c in paging.CHECKS if c.key == "shootdown_running")
    found = check.probe()
    assert found.result in {"ok", "works differently"}, found
    assert "new root" in found.fact
    assert not check.is_needed
