"""Fixtures of the mirror's tests."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kvmmm.platform.mirror import Mirror
from kvmmm.safemem.ffi import own_faults
from tests.platform.mirror_rig import MAX_ADDR, N_PAGES, PAGE, check_windows, stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def mirrored_fd() -> Iterator[int]:
    own_faults()  # pytest's faulthandler has them
    fd = os.memfd_create("mirrored")
    os.ftruncate(fd, N_PAGES * PAGE)
    for page in range(N_PAGES):
        os.pwrite(fd, stamp(page), page * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def new_mirror() -> Iterator[Callable[..., Mirror]]:
    mirrors = []

    def make(budget_vmas: int | None = 1000, drain: Callable[[], None] = lambda: None) -> Mirror:
        mirrors.append(Mirror(MAX_ADDR, drain, budget_vmas=budget_vmas))
        return mirrors[-1]

    yield make
    for mirror in mirrors:
        if mirror.n_windows:
            check_windows(mirror)
        mirror.release()
