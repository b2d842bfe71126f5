"""What is timed does what it says: every operation, mechanism, caller and state moves its bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from kvmmm.bench.crossover.calls import Calls, FreshCalls
from kvmmm.bench.crossover.geometry import START
from kvmmm.bench.crossover.ground import Fresh, Ground
from kvmmm.bench.crossover.plan import RANGES, WORDS
from kvmmm.bench.crossover.planted import Planted
from kvmmm.bench.crossover.pool import GroundError, Pool
from kvmmm.bench.crossover.probes import (
    MECHANISMS,
    OPERATIONS,
    REFERENCES,
    VARIANTS,
    Buffers,
    Probe,
    clock_ns,
    length_of,
    with_tries,
)  # fmt: skip
from kvmmm.bench.crossover.record import Cell
from kvmmm.bench.crossover.states import Pagemap, State
from kvmmm.safemem.ffi import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator

C = cast("Any", lib)
RESIDENCY = ("warm", "mirror-cold", "linear-cold", "cold")
MOST_BYTES = 64 << 10
LAYOUT = ("1000", "scattered")


class Rig:
    """One ground and all that probes need."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.ground = Ground(self.pool, *LAYOUT)
        self.fresh = Fresh()
        self.buffers = Buffers(MOST_BYTES)
        self.pagemap = Pagemap()

    def close(self) -> None:
        self.ground.close()
        self.pool.close()
        self.fresh.close()
        self.pagemap.close()

    def probe(self, cell: Cell, planted: Planted | None = None) -> Probe | Calls | FreshCalls:
        if cell.residency == "absent":
            return FreshCalls(cell, self.fresh, self.buffers)
        state = State(self.ground, cell.residency, self.pagemap)
        if cell.caller == "python":
            return Calls(cell, self.ground, state, self.buffers)
        return Probe(cell, self.ground, state, self.buffers, planted)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    found = Rig()
    yield found
    found.close()


def cell_of(
    operation: str, bytes_: int = 4096, residency: str = "warm", caller: str = "c",
    locality: str = "spread",
) -> Cell:  # fmt: skip
    return Cell("c0", operation, bytes_, *LAYOUT, locality, residency, 4096, caller)


# C cannot allocate: where no pma is, Python calls.
@pytest.mark.parametrize(
    ("residency", "caller"),
    [*((one, caller) for one in RESIDENCY for caller in ("c", "python")), ("absent", "python")],
)
@pytest.mark.parametrize("operation", [*RANGES, *WORDS])
def test_every_cell_gives_a_time_for_each_variant(
    rig: Rig, operation: str, residency: str, caller: str
):
    for n_bytes in (4,) if operation in WORDS else (8, 5000, MOST_BYTES):
        probe = rig.probe(cell_of(operation, n_bytes, residency, caller))
        assert set(VARIANTS) <= set(probe.variants)
        for variant in probe.variants:
            assert probe.sample(variant, 1, 2) > 0
            assert probe.sample(variant, 1, 3) > 0


@pytest.mark.parametrize("locality", ["hot", "spread"])
def test_outside_references_are_measured_for_plain_copies_only(rig: Rig, locality: str):
    assert rig.probe(cell_of("copy_in", locality=locality)).variants[-2:] == list(REFERENCES)
    assert rig.probe(cell_of("zero_out", locality=locality)).variants == list(VARIANTS)


def one_operation(rig: Rig, operation: str, variant: str, addr: int, n_bytes: int) -> Any:
    state = State(rig.ground, "warm", rig.pagemap)
    probe = Probe(cell_of(operation, n_bytes), rig.ground, state, rig.buffers)
    x = probe._x
    x.n, x.mechanism = 1, MECHANISMS[variant]
    x.addrs[0], x.hosts[0] = addr, rig.buffers.hva + 24
    assert C.kvmmm_cross_run(x) >= 0
    return state.mm


@pytest.mark.parametrize("variant", [*VARIANTS, *REFERENCES])
def test_in_c_the_right_bytes_are_moved(rig: Rig, variant: str):
    n_bytes, addr = 9000, START + 7 * 4096 + 321
    host = memoryview(rig.buffers.data)[24 : 24 + n_bytes]
    data = bytes((at * 31 + len(variant)) & 255 for at in range(n_bytes))
    host[:] = data
    out = ("copy_out",) if variant in REFERENCES else ("copy_out", "copy_out_from")
    for operation in out:
        rig.ground.warm().zero_out(addr - 8, n_bytes + 16)
        mm = one_operation(rig, operation, variant, addr, n_bytes)
        assert mm.read(addr - 8, n_bytes + 16) == bytes(8) + data + bytes(8)
    for operation in ("copy_in",) if variant in REFERENCES else ("copy_in", "copy_in_to"):
        host[:] = bytes(n_bytes)
        one_operation(rig, operation, variant, addr, n_bytes)
        assert bytes(host) == data
    if variant in REFERENCES:
        return
    mm = one_operation(rig, "zero_out", variant, addr + 8, n_bytes - 16)
    assert mm.read(addr, n_bytes) == data[:8] + bytes(n_bytes - 16) + data[-8:]
    one_operation(rig, "cas", variant, START + 4096, 4)
    mm.copy_out(START + 4096, bytes(4))
    one_operation(rig, "cas", variant, START + 4096, 4)
    assert mm.load_uint32(START + 4096) == START + 4096
    one_operation(rig, "swap", variant, START + 8192, 4)
    assert mm.load_uint32(START + 8192) == START + 8192


def test_a_place_that_no_mechanism_finds_is_an_error_and_no_time(rig: Rig):
    state = State(rig.ground, "warm", rig.pagemap)
    probe = Probe(cell_of("copy_in", 8192), rig.ground, state, rig.buffers)
    probe._x.n = 1
    probe._x.addrs[0] = START + rig.ground.geometry.length_bytes - 4096
    probe._x.hosts[0] = rig.buffers.hva
    for variant in (*VARIANTS, *REFERENCES):
        probe._x.mechanism = MECHANISMS[variant]
        assert C.kvmmm_cross_run(probe._x) < 0


def test_places_share_their_offsets_not_their_pages(rig: Rig):
    state = State(rig.ground, "warm", rig.pagemap)
    probe = Probe(cell_of("copy_in", 6000), rig.ground, state, rig.buffers)
    found = []
    for own_seed in (1, 2):
        probe._place(500, 7, own_seed)
        found.append((list(probe._x.addrs[0:500]), list(probe._x.hosts[0:500])))
    (first, hosts), (second, hosts_again) = found
    assert hosts == hosts_again
    assert [addr % 4096 for addr in first] == [addr % 4096 for addr in second]
    assert sum(a // 4096 == b // 4096 for a, b in zip(first, second, strict=True)) < 50
    assert len({addr % 4096 for addr in first}) > 100
    end = START + rig.ground.geometry.length_bytes
    assert all(addr >= START and addr + 6000 <= end for addr in first)
    assert all(0 <= host - rig.buffers.hva < 4096 for host in hosts)


def test_hot_places_lie_together(rig: Rig):
    state = State(rig.ground, "warm", rig.pagemap)
    probe = Probe(cell_of("copy_in", 64, locality="hot"), rig.ground, state, rig.buffers)
    probe._place(500, 7, 1)
    addrs = list(probe._x.addrs[0:500])
    assert max(addrs) - min(addrs) <= 17 * 4096


def test_a_planted_cost_is_spent(rig: Rig):
    planted = Planted({"mirror": (20_000.0, 0.0), "internal": (0.0, 5.0)})
    probe = rig.probe(cell_of("copy_in", 8000, locality="hot"), planted)
    assert isinstance(probe, Probe)
    assert probe.variants == ["internal", "internal2", "mirror"]
    for turn in range(20):
        # A thread that is not run in between takes longer, never less.
        assert probe.sample("mirror", turn, 1) >= 20_000
        assert probe.sample("internal", turn, 1) >= 40_000
    assert min(probe.sample("internal2", turn, 1) for turn in range(20)) < 20_000


def test_planted_sides_are_the_same_side_otherwise(rig: Rig):
    probe = rig.probe(cell_of("copy_in", 8000), Planted({}))
    assert isinstance(probe, Probe)
    probe.sample("mirror", 1, 2)
    assert probe._x.mechanism == 0
    probe = rig.probe(cell_of("copy_in", 8000), Planted({}, identical=False))
    assert isinstance(probe, Probe)
    probe.sample("mirror", 1, 2)
    assert probe._x.mechanism == MECHANISMS["mirror"]


def test_planted_costs_travel():
    planted = Planted({"mirror": (20.0, 0.5)}, identical=False)
    assert Planted.from_json(planted.as_json()) == planted
    assert planted.ns_of("mirror", 100) == 70
    assert planted.ns_of("internal", 100) == 0


def test_tries_end():
    seen: list[int] = []

    def fail(turn: int) -> float:
        seen.append(turn)
        raise GroundError("no")

    with pytest.raises(GroundError):
        with_tries(fail)
    assert len(seen) == len(set(seen)) == 3
    assert with_tries(lambda turn: 7.0 if turn else fail(turn)) == 7.0


def test_numbers_are_those_of_the_header():
    assert [length_of(ns) for ns in (0, 60, 6_000, 1e9)] == [1024, 1000, 10, 1]
    assert sorted(OPERATIONS.values()) == list(range(7))
    assert 0 <= clock_ns() < 100_000
    assert C.kvmmm_cross_canary(8000) > 0
    assert ffi.sizeof("struct kvmmm_cross") > 0
