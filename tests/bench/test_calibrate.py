"""`kvmmm calibrate`: what is measured, and which policy follows from it."""

from __future__ import annotations

import json
import os
import random
from time import monotonic, perf_counter_ns
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.bench import costs
from kvmmm.bench.calibrate import MOST_REUSES, break_even_copies, calibrate, derive
from kvmmm.bench.costs import Costs, Pair, pair_of
from kvmmm.mm import MemoryManager
from kvmmm.mm.policy import DEFAULTS, Policy
from kvmmm.safemem.ffi import address_of, ffi

if TYPE_CHECKING:
    from kvmmm.hostarch.ranges_seq import AddrRangeSeq

pytestmark = pytest.mark.usefixtures("no_leak")
NS = 1000.0


def pair(ratio: float, *, a_ns: float = NS, noise: float = 0.01) -> Pair:
    return Pair(a_ns, a_ns * ratio, ratio, ratio - noise, ratio + noise, a_ns * (1 - ratio))


def planted(**changes: object) -> Costs:
    fields: dict[str, object] = {
        "fault_ns": 3000.0,
        "serve_ns": 3000.0,
        "mmap_ns": 4000.0,
        "page_ns": 250.0,
        "run_ns": 20_000.0,
        "gains": {"8 hot": pair(1.2), "4096 spread": pair(1.0), "65536 spread": pair(0.9)},
        "release": pair(1.05, a_ns=1600.0),
        "bounces": {64: pair(1.2), 512: pair(1.2)},
    }
    return Costs(**(fields | changes))  # type: ignore[arg-type]


def quicker(*ratios: float) -> dict[str, Pair]:
    return {str(number): pair(ratio) for number, ratio in enumerate(ratios)}


def test_numbers_are_a_policy_and_each_has_its_reason():
    numbers, reasons = derive(planted())

    assert Policy(**numbers).as_dict() == numbers
    assert set(reasons) == set(DEFAULTS) - {"mirror_vmas"}
    assert all(reasons.values())


def test_the_mirror_is_off_where_copies_of_one_kind_lose():
    numbers, reasons = derive(planted())

    assert (numbers["mirror"], numbers["mirror_reuses"]) == (0, DEFAULTS["mirror_reuses"])
    assert "8 hot" in reasons["mirror"]


def test_the_mirror_is_on_where_it_is_quicker_and_soon_repaid():
    numbers, _ = derive(planted(gains=quicker(0.9, 0.8, 0.7)))

    # A run costs 20 us, a copy saves 200 ns.
    assert numbers["mirror"] == 1
    assert numbers["mirror_reuses"] == pytest.approx(100, abs=1)


@pytest.mark.parametrize(
    ("gains", "run_ns", "mirror"),
    [
        (quicker(0.99, 0.98, 0.97), 20_000.0, 0),  # hardly quicker
        (quicker(0.9, 0.9, 0.9), NS * 0.1 * (MOST_REUSES - 2), 1),
        (quicker(0.9, 0.9, 0.9), NS * 0.1 * (MOST_REUSES + 2), 0),  # repaid too late
        (quicker(0.5, 0.5, 1.1), 20_000.0, 0),  # at the cost of others
        (quicker(0.5, 0.5, 1.02), 20_000.0, 1),  # which might be noise
        (quicker(0.9, 0.9, 0.9), 0.0, 1),
    ],
)
def test_where_the_mirror_begins(gains: dict[str, Pair], run_ns: float, mirror: int):
    numbers, _ = derive(planted(gains=gains, run_ns=run_ns))

    assert numbers["mirror"] == mirror
    assert 1 <= numbers["mirror_reuses"] <= MOST_REUSES


@pytest.mark.parametrize(
    ("release_ns", "rate", "wanted"),
    [
        (100, 40, 128 << 10),  # 200 000 bytes
        (50, 27, 128 << 10),  # 67 500: that might as well be the default
        (20, 30, 32 << 10),  # 30 000
        (24, 34, 32 << 10),  # 40 800
        (200, 30, 256 << 10),  # 300 000
        (1, 26, 32 << 10),
        (100_000, 26, 1 << 20),
    ],
)
def test_the_gil_is_released_where_that_is_a_fiftieth(release_ns: int, rate: int, wanted: int):
    a_ns = costs.RELEASED_BYTES / rate
    release = pair(1 + release_ns / a_ns, a_ns=a_ns, noise=0)

    assert derive(planted(release=release))[0]["release_bytes"] == wanted


def test_noise_leaves_the_defaults():
    numbers, _ = derive(
        planted(
            release=pair(1.0, noise=0.2), gains=quicker(0.99, 1.01), page_ns=0.0,
            bounces={n: pair(1.01, noise=0.02) for n in costs.BOUNCED},
        )
    )  # fmt: skip

    assert numbers == DEFAULTS


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_what_another_process_may_find_leaves_the_defaults(factor: float):
    """Costs of a process differ from those of the next: a decision may not."""
    found = planted(
        release=pair(1 + 0.04 * factor, noise=0.002), mmap_ns=250.0 * 16 * factor,
        gains=quicker(0.97, 0.98, 0.96), bounces={64: pair(1.01), 512: pair(1.02)},
    )  # fmt: skip

    numbers, _ = derive(found)

    assert numbers["release_bytes"] == DEFAULTS["release_bytes"]
    assert numbers["mirror_min_run_pages"] == DEFAULTS["mirror_min_run_pages"]
    assert (numbers["mirror"], numbers["bounce_max_bytes"]) == (0, 512)


@pytest.mark.parametrize(
    ("ratios", "wanted"),
    [
        ((0.8, 0.9, 1.0, 1.1), 512),
        ((0.8, 0.9, 1.1, 0.8), 256),
        ((1.1, 0.9, 0.9, 0.9), 0),
        ((1.0, 1.0, 1.0, 0.8), 1024),
        ((0.9, 0.9, 0.9, 0.995), 512),
    ],
)
def test_a_buffer_is_used_up_to_where_it_loses(ratios: tuple[float, ...], wanted: int):
    sizes = (64, 256, 512, 1024)
    bounces = {n: pair(ratio) for n, ratio in zip(sizes, ratios, strict=True)}

    assert derive(planted(bounces=bounces))[0]["bounce_max_bytes"] == wanted


def test_the_mirror_must_be_worth_it_beyond_doubt():
    gains = {str(n): pair(0.94, noise=0.03) for n in range(6)}

    assert derive(planted(gains=gains))[0]["mirror"] == 0
    assert derive(planted(gains={n: pair(0.94, noise=0.005) for n in gains}))[0]["mirror"] == 1


def test_it_says_after_how_many_copies_a_run_is_repaid():
    assert break_even_copies(planted(gains=quicker(0.9, 0.8, 0.7))) == 101
    assert break_even_copies(planted(gains=quicker(1.1, 1.2, 0.9))) is None
    for gains in (quicker(0.9, 0.8, 0.7), quicker(0.99, 0.98, 0.97)):
        repaid = break_even_copies(planted(gains=gains))
        assert f"after {repaid} copies" in derive(planted(gains=gains))[1]["mirror_reuses"]


def test_a_run_is_worth_a_mapping_of_the_same_cost():
    assert derive(planted())[0]["mirror_min_run_pages"] == 16
    assert derive(planted(mmap_ns=1.0))[0]["mirror_min_run_pages"] == 4
    assert derive(planted(mmap_ns=1e9))[0]["mirror_min_run_pages"] == 512


def test_pairs_are_compared_by_rounds():
    draw = random.Random(0)
    waves = [draw.uniform(1, 10) for _ in range(41)]

    found = pair_of(waves, [wave * draw.uniform(1.19, 1.21) for wave in waves])

    assert 1.19 < found.low <= found.ratio <= found.high < 1.21
    assert found.saved_ns < 0


def test_an_interval_covers_what_is_true():
    draw = random.Random(1)
    n_covered = 0
    for _ in range(300):
        a, b = ([draw.gauss(100, 10) for _ in range(31)] for _ in range(2))
        found = pair_of(a, b)
        n_covered += found.low <= 1 <= found.high
    assert n_covered >= 0.92 * 300


def test_it_measures_this_host():
    affinity = os.sched_getaffinity(0)
    start_ns = perf_counter_ns()

    found = calibrate(0.3)

    assert found.elapsed_ns <= perf_counter_ns() - start_ns
    assert os.sched_getaffinity(0) == affinity
    assert Policy(**found.numbers).as_dict() == found.numbers
    measured = found.costs
    # A signal costs more than a copy, a mapping more than a page in it, on every machine.
    assert measured.fault_ns > 0
    assert measured.run_ns > 0
    assert {name.split()[-1] for name in measured.gains} == {"hot", "spread"}
    assert set(measured.bounces) == set(costs.BOUNCED)
    assert json.loads(json.dumps(measured.as_dict()))["release"]["a_ns"] > 0


def test_both_sides_of_a_gain_are_what_they_claim(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, int]] = []
    gains = costs._Lab._gains

    def look(lab: costs._Lab, internal: object, mirrored: object, seconds: float) -> object:
        seen.extend(
            (mm.mirror.n_resident_pages if mm.mirror else 0, len(mm.pmas))  # type: ignore[attr-defined]
            for mm in (internal, mirrored)
        )
        return gains(lab, internal, mirrored, seconds)  # type: ignore[arg-type]

    monkeypatch.setattr(costs._Lab, "_gains", look)
    costs.measure(0.05)

    n_pages = costs.MEMORY_BYTES // 4096
    n_runs = n_pages // costs.RUN_PAGES
    assert seen == [(0, n_runs), (n_pages, n_runs)]


def test_vectored_copies_move_all_their_bytes(monkeypatch: pytest.MonkeyPatch):
    """On both sides: a Writer that is full takes nothing, quickly."""
    seen = set()
    copy_in_to = MemoryManager.copy_in_to

    def look(mm: MemoryManager, ranges: AddrRangeSeq, dst: object, **more: Any) -> int:
        n_bytes = copy_in_to(mm, ranges, dst, **more)  # type: ignore[arg-type]
        seen.add((mm.policy.bounce_max_bytes > 0, ranges.n_bytes, n_bytes))
        return n_bytes

    monkeypatch.setattr(MemoryManager, "copy_in_to", look)
    costs.measure(0.05)

    assert seen == {(bounces, n, n) for bounces in (False, True) for n in costs.BOUNCED}


def test_both_sides_of_a_sample_have_the_same_buffer():
    """How it lies in its page may matter more than what is compared."""
    addresses = costs._Addresses(64, 1 << 16)
    seen: list[list[int]] = [[], []]
    mms = [
        SimpleNamespace(
            copy_in=lambda _addr, dst, at=at: at.append(address_of(ffi.from_buffer(dst)))
        )
        for at in seen
    ]
    copiers = [addresses.copier(mm) for mm in mms]  # type: ignore[arg-type]
    for copier in (copiers[0], *copiers, copiers[1]):
        copier()

    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 2


def test_there_is_a_limit_to_patience():
    end = monotonic() + 10
    found = costs.compare(lambda: 1.0, lambda: 2.0, 0.0)

    assert found.ratio == 2.0
    assert monotonic() < end
