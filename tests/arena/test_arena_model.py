"""Arena against a model: an array of pages, each with a count, an owner and a tag."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvmmm.arena import Arena, Reservation
from kvmmm.errors import ArenaExhaustedError, StateError
from kvmmm.hostarch.ranges import FileRange

PAGE = 4096
HUGE = 1 << 21
PAGES = 2 * HUGE // PAGE
LENGTHS = st.one_of(st.integers(1, 8), st.integers(1, PAGES))
# Pages near the edges of frames and of what is in use are the interesting ones.
PLACES = st.one_of(st.integers(0, 16), st.integers(504, 520), st.integers(0, PAGES - 1))
ALIGNMENTS = st.sampled_from([1, 16, 512])


class ArenaMachine(RuleBasedStateMachine):
    @initialize(debug=st.booleans())
    def make(self, debug: bool) -> None:
        self.arena = Arena(PAGES * PAGE, debug=debug)
        self.counts = [0] * PAGES
        self.owners: list[Reservation | None] = [None] * PAGES
        self.tags = [0] * PAGES
        self.reservations: list[Reservation] = []
        self.next_tag = 1
        self.peak = 0

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.arena.close()

    def is_free(self, start: int, end: int) -> bool:
        return end <= PAGES and not any(self.counts[start:end]) and not any(self.owners[start:end])

    def fits(self, length: int, align: int, phase: int) -> bool:
        return any(
            self.is_free(start, start + length) for start in range(phase % align, PAGES, align)
        )

    def accept(self, fr: FileRange, length: int) -> None:
        """Check an allocation, then leave a tag in each of its pages."""
        assert fr.length_bytes == length * PAGE
        assert bytes(self.arena.view[fr.start : fr.end]) == bytes(fr.length_bytes)
        for page in range(fr.start // PAGE, fr.end // PAGE):
            assert self.counts[page] == 0
            self.counts[page] = 1
            self.tags[page] = self.next_tag = self.next_tag % 250 + 1
            self.arena.view[page * PAGE + 17] = self.tags[page]
        self.peak = max(self.peak, sum(map(bool, self.counts)))

    @rule(length=LENGTHS, align=ALIGNMENTS, phase=PLACES, top_down=st.booleans())
    def allocate(self, length: int, align: int, phase: int, top_down: bool) -> None:
        def call() -> FileRange:
            return self.arena.allocate(
                length * PAGE,
                align_bytes=align * PAGE,
                phase_bytes=phase * PAGE,
                top_down=top_down,
            )

        if not self.fits(length, align, phase):
            with pytest.raises(ArenaExhaustedError) as e:
                call()
            free_pages = sum(self.is_free(page, page + 1) for page in range(PAGES))
            assert e.value.free_bytes == free_pages * PAGE
            return
        fr = call()
        assert (fr.start // PAGE - phase) % align == 0
        assert self.is_free(fr.start // PAGE, fr.end // PAGE)
        self.accept(fr, length)

    @rule(start=PLACES, length=LENGTHS)
    def allocate_at(self, start: int, length: int) -> None:
        length = min(length, PAGES - start)
        if self.is_free(start, start + length):
            fr = self.arena.allocate(length * PAGE, at=start * PAGE)
            assert fr.start == start * PAGE
            self.accept(fr, length)
        else:
            with pytest.raises(ArenaExhaustedError):
                self.arena.allocate(length * PAGE, at=start * PAGE)

    @rule(length=LENGTHS, align=ALIGNMENTS, phase=PLACES)
    def reserve(self, length: int, align: int, phase: int) -> None:
        fits = self.fits(length, align, phase)
        reservation = self.arena.reserve(
            length * PAGE, align_bytes=align * PAGE, phase_bytes=phase * PAGE
        )
        assert (reservation is not None) == fits
        if reservation is not None:
            start, end = reservation.start // PAGE, reservation.end // PAGE
            assert end - start == length
            assert (start - phase) % align == 0
            assert self.is_free(start, end)
            self.owners[start:end] = [reservation] * length
            self.reservations.append(reservation)

    @precondition(lambda self: self.reservations)
    @rule(data=st.data(), skip=st.integers(0, 8), length=st.integers(1, 8))
    def commit(self, data: st.DataObject, skip: int, length: int) -> None:
        reservation = data.draw(st.sampled_from(self.reservations))
        start = reservation.start // PAGE + skip
        end = min(start + length, reservation.end // PAGE)
        if start < end and not any(self.counts[start:end]):
            at, n_bytes = start * PAGE, (end - start) * PAGE
            self.accept(self.arena.allocate(n_bytes, at=at, reservation=reservation), end - start)
        elif start < end:
            with pytest.raises(ArenaExhaustedError):
                self.arena.allocate(PAGE * (end - start), at=start * PAGE, reservation=reservation)

    @precondition(lambda self: self.reservations)
    @rule(data=st.data())
    def unreserve(self, data: st.DataObject) -> None:
        reservation = data.draw(st.sampled_from(self.reservations))
        self.arena.unreserve(reservation)
        self.reservations.remove(reservation)
        self.owners = [None if owner is reservation else owner for owner in self.owners]
        with pytest.raises(StateError):
            self.arena.unreserve(reservation)

    @rule(start=PLACES, length=LENGTHS, up=st.booleans(), whole=st.booleans())
    def change_references(self, start: int, length: int, up: bool, whole: bool) -> None:
        end = min(start + length, PAGES)
        if whole:  # stop at the first page that is not in use, so that most calls succeed
            end = next((p for p in range(start, end) if not self.counts[p]), end)
        if start == end:
            return
        change = self.arena.inc_ref if up else self.arena.dec_ref
        fr = FileRange(start * PAGE, end * PAGE)
        if not all(self.counts[start:end]):
            with pytest.raises(StateError):
                change(fr)
            return
        change(fr)
        for page in range(start, end):
            self.counts[page] += 1 if up else -1

    @rule(pieces=st.lists(st.tuples(PLACES, st.integers(1, 8)), max_size=4))
    def add_many_references(self, pieces: list[tuple[int, int]]) -> None:
        ranges = [(start, min(start + length, PAGES)) for start, length in pieces]
        files = [FileRange(start * PAGE, end * PAGE) for start, end in ranges]
        if not all(all(self.counts[start:end]) for start, end in ranges):
            with pytest.raises(StateError):
                self.arena.inc_ref_many(files)
            return
        self.arena.inc_ref_many(files)
        for start, end in ranges:
            for page in range(start, end):
                self.counts[page] += 1

    @rule(start=PLACES, length=LENGTHS)
    def look_for_sharing(self, start: int, length: int) -> None:
        end = min(start + length, PAGES)
        fr = FileRange(start * PAGE, end * PAGE)
        page = next((p for p in range(start, end) if self.counts[p] != 1), None)
        if page is not None and not self.counts[page]:
            with pytest.raises(StateError):
                self.arena.has_unique_ref(fr)
            return
        assert self.arena.first_shared(fr) == (None if page is None else page * PAGE)
        assert self.arena.has_unique_ref(fr) == (page is None)

    @rule(source=PLACES, length=st.integers(1, 8))
    def copy(self, source: int, length: int) -> None:
        length = min(length, PAGES - source)
        if not all(self.counts[source : source + length]) or not self.fits(length, 1, 0):
            return
        fr, n_bytes = self.arena.copy_from(self.arena, source * PAGE, length * PAGE)
        assert n_bytes == length * PAGE == fr.length_bytes
        first = fr.start // PAGE
        for page in range(length):
            assert self.counts[first + page] == 0
            self.counts[first + page] = 1
            self.tags[first + page] = self.tags[source + page]
        self.peak = max(self.peak, sum(map(bool, self.counts)))

    @invariant()
    def same_as_model(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.arena._usage.check_invariants()
        for page, count in enumerate(self.counts):
            assert self.arena.ref_count(page * PAGE) == count
            if count:
                assert self.arena.view[page * PAGE + 17] == self.tags[page]
        used = sum(map(bool, self.counts))
        reserved = sum(
            owner is not None and not count
            for owner, count in zip(self.owners, self.counts, strict=True)
        )
        statistics = self.arena.statistics()
        assert statistics.used_bytes == used * PAGE
        assert statistics.reserved_bytes == reserved * PAGE
        assert statistics.free_bytes == (PAGES - used - reserved) * PAGE
        assert statistics.peak_used_bytes == self.peak * PAGE


def test_model():
    run_state_machine_as_test(
        ArenaMachine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )
