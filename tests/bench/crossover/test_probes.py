"""What is timed does what it says: every operation, mechanism, caller and state moves its bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from kvmmm.bench.crossover.calls import Calls, FreshCalls, loop_ns, way_of
from kvmmm.bench.crossover.geometry import START
from kvmmm.bench.crossover.ground import Fresh, Ground
from kvmmm.bench.crossover.outside import Outside
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
    method,
    spoiled,
    with_tries,
)  # fmt: skip
from kvmmm.bench.crossover.record import Cell
from kvmmm.bench.crossover.states import Pagemap, State
from kvmmm.mm import io
from kvmmm.safemem.ffi import drop_pages, ffi, lib

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


@pytest.mark.parametrize("caller", ["c", "python"])
@pytest.mark.parametrize("operation", [*RANGES, *WORDS])
def test_there_are_outside_references_or_a_reason(rig: Rig, operation: str, caller: str):
    reasons = method()["no_references"]
    variants = rig.probe(cell_of(operation, 4, caller=caller)).variants
    assert variants == [*VARIANTS, *(() if operation in reasons else REFERENCES)]
    assert (operation in reasons) == (operation in {"zero_out", *WORDS})
    if caller == "python":
        assert rig.probe(cell_of(operation, 4, "absent", caller)).variants == list(VARIANTS)
        assert "absent" in reasons


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
    for operation in ("copy_out", "copy_out_from"):
        rig.ground.warm().zero_out(addr - 8, n_bytes + 16)
        mm = one_operation(rig, operation, variant, addr, n_bytes)
        assert mm.read(addr - 8, n_bytes + 16) == bytes(8) + data + bytes(8)
    for operation in ("copy_in", "copy_in_to"):
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


@pytest.mark.parametrize("variant", REFERENCES)
def test_from_python_the_kernel_moves_the_right_bytes(rig: Rig, variant: str):
    n_bytes, mm = 9000, rig.ground.warm()
    places = [(START + 7 * 4096 + 321, 24), (START + 40 * 4096, 12_000)]
    data = bytes((at * 29 + len(variant)) & 255 for at in range(n_bytes))
    host = memoryview(rig.buffers.data)
    for operation in ("copy_out", "copy_out_from", "copy_in", "copy_in_to"):
        outside = Outside(cell_of(operation, n_bytes, caller="python"), rig.ground, rig.buffers)
        for addr, at in places:
            mm.write(addr, data if "in" in operation else bytes(n_bytes))
            host[at : at + n_bytes] = bytes(n_bytes) if "in" in operation else data
        arguments = outside.arguments(
            variant, [(addr, rig.buffers.hva + at) for addr, at in places]
        )
        assert outside.run(variant, arguments) > 0
        for addr, at in places:
            assert mm.read(addr, n_bytes) == data == host[at : at + n_bytes]
        with pytest.raises(GroundError, match="moved 9000 of 18000 bytes"):
            outside.run(variant, arguments[: len(arguments) // 2])


def test_mechanisms_are_had_as_a_user_has_them():
    assert way_of("internal", "copy_in", is_mirrored=True).opts.mechanism is None
    assert not way_of("internal2", "copy_in", is_mirrored=True).uses_mirror
    assert way_of("walk", "swap", is_mirrored=True).opts.mechanism == "walk"
    # The policy alone, where that is enough: to force the mirror is not the usual way through C.
    by_policy = way_of("mirror", "copy_in", is_mirrored=True)
    assert (by_policy.opts.mechanism, by_policy.uses_mirror) == (None, True)
    for operation, is_mirrored in (("copy_in", False), ("copy_in_to", True), ("cas", False)):
        forced = way_of("mirror", operation, is_mirrored=is_mirrored)
        assert (forced.opts.mechanism, forced.uses_mirror) == ("mirror", False)


@pytest.mark.parametrize("caller", ["c", "python"])
def test_what_a_probe_changes_of_the_policy_it_undoes(rig: Rig, caller: str):
    mm = rig.ground.warm()
    probe = rig.probe(cell_of("copy_in", 64, caller=caller))
    probe.sample("mirror", 1, 2)
    # The frame table alone knows this page: whoever finds it does not ask the mirror.
    state = State(rig.ground, "warm", rig.pagemap)
    assert mm.mirror is not None
    drop_pages(rig.pool.arena.hva + rig.ground.offsets[0], 4096)
    mm.read(START, 8)
    state.verify(START, 8)


def test_an_interruption_of_the_empty_loop_makes_no_copy_quicker(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    assert 0 < loop_ns(1) < 20_000
    assert loop_ns(1) < loop_ns(1000) < 1e6
    # Whatever happens to a loop later.
    monkeypatch.setattr("kvmmm.bench.crossover.calls.empty_pair_loop", lambda *_: 10**9)
    for residency in ("warm", "cold", "absent"):
        probe = rig.probe(cell_of("copy_in", 64, residency, "python"))
        assert probe.sample("internal", 1, 2) > 20


def test_the_first_touch_of_fresh_memory_goes_the_usual_way(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []
    usual = io._move_fresh

    def move_fresh(*args: Any) -> int | None:
        seen.append(args[1])
        return usual(*args)

    monkeypatch.setattr(io, "_move_fresh", move_fresh)
    probe = rig.probe(cell_of("copy_out", 64, "absent", "python"))
    probe.sample("mirror", 1, 2)
    assert not seen
    probe.sample("internal", 1, 2)
    assert len(seen) >= 3


@pytest.mark.parametrize("caller", ["c", "python"])
def test_samples_of_all_mechanisms_are_of_equal_length(
    rig: Rig, caller: str, monkeypatch: pytest.MonkeyPatch
):
    # Or one of them would find more in the caches than another.
    lengths = iter(range(5, 100))
    for module in ("probes", "calls"):
        monkeypatch.setattr(f"kvmmm.bench.crossover.{module}.length_of", lambda _: next(lengths))
    probe = rig.probe(cell_of("copy_in", 64, caller=caller))
    assert not isinstance(probe, FreshCalls)
    for variant in ("mirror", "walk", "internal2", "internal", "mirror"):
        probe.sample(variant, 1, 2)
        assert probe._x.n == 5
    probe.sample("file_io", 1, 2)
    assert probe._x.n == 6


@pytest.mark.parametrize("caller", ["c", "python"])
def test_places_that_lost_their_entries_are_noticed_and_mended(
    rig: Rig, caller: str, monkeypatch: pytest.MonkeyPatch
):
    # The first place of a sample is looked at; of the others the page faults tell.
    probe = rig.probe(cell_of("copy_in", 4096, caller=caller))
    hva, n_bytes = rig.pool.arena.hva + rig.pool.frames.start, 1000 * 4096
    monkeypatch.setattr(State, "verify", lambda *_: drop_pages(hva, n_bytes))
    with pytest.raises(GroundError, match="page faults in resident memory"):
        probe.sample("internal", 1, 2)
    monkeypatch.undo()
    assert probe.sample("internal", 1, 2) > 0


def test_a_warm_mirror_that_must_be_filled_is_noticed(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    ground = Ground(rig.pool, "10", "scattered")
    state = State(ground, "warm", rig.pagemap)
    probe = Probe(cell_of("copy_in", 64), ground, state, rig.buffers)
    assert state.mm.mirror is not None
    monkeypatch.setattr(
        State, "verify", lambda *_: state.mm.mirror.forget(START, START + 10 * 4096)
    )
    with pytest.raises(GroundError, match="segments were not in the mirror"):
        probe.sample("mirror", 1, 2)
    ground.close()


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

    before = spoiled["no"]
    with pytest.raises(GroundError):
        with_tries(fail)
    # Nothing is discarded in silence.
    assert spoiled["no"] == before + 2
    assert len(seen) == len(set(seen)) == 3
    assert with_tries(lambda turn: 7.0 if turn else fail(turn)) == 7.0


def test_numbers_are_those_of_the_header():
    assert [length_of(ns) for ns in (0, 60, 6_000, 1e9)] == [1024, 1000, 10, 1]
    assert sorted(OPERATIONS.values()) == list(range(7))
    assert 0 <= clock_ns() < 100_000
    assert C.kvmmm_cross_canary(8000) > 0
    assert ffi.sizeof("struct kvmmm_cross") > 0
