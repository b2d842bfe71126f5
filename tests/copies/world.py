"""`World`: the same memory several times, once for each way to copy, and the model of it.

A step is plain data, and does the same to all of them: a change of the memory, or a copy. Whatever
they went through, they must have come to the same, and the model must have said so.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmmm.errors import GuestFaultError, MmError
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.memmap.host_file import HostFile
from kvmmm.memmap.shared_memory import SharedMemory
from kvmmm.mm import IOOpts, MemoryManager
from kvmmm.mm.policy import Policy
from tests.copies.memory import FILE_BYTES, SHARED_BYTES, CopyMemory, peek
from tests.model.checks import _resident_pages
from tests.model.memory import PAGE
from tests.model.model import Fault, Refusal
from tests.model.operations import ModelMm

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.copies.memory import Outcome
    from tests.model.backends import Backend

MARGIN = 16
"""So many bytes on either side of what was written are looked at."""
MIXED = "mixed"
OPTIONS = {
    (mechanism, ignore): IOOpts(mechanism=mechanism, ignore_permissions=ignore)
    for mechanism in (None, "internal", "walk", "mirror")
    for ignore in (False, True)
}


class Step(NamedTuple):
    """What is done to all: the name of a change or of an operation, and everything it takes.

    Attributes:
        mixed: The mechanism of the subject that uses them all by turns.
    """

    name: str
    arguments: dict[str, Any]
    mixed: str | None = None


class DisagreementError(AssertionError):
    """They did not come to the same."""


class Subject:
    """One memory, relatives included, and the way in which copies go; files are its own."""

    def __init__(self, backend: Backend, mechanism: str, numbers: dict[str, int]) -> None:
        self.backend = backend
        self.mechanism = mechanism
        policy = Policy(**numbers, mirror=mechanism == MIXED)
        self.fds: dict[str, int] = {}
        for name in ("/file", "/cut", "/brief"):
            self.fds[name] = fd = os.memfd_create("copies", os.MFD_CLOEXEC)
            os.ftruncate(fd, FILE_BYTES)
        self.mappables: dict[str, HostFile | SharedMemory] = {
            name: HostFile(fd, name=name) for name, fd in self.fds.items()
        }
        for name, of in (("/read-only", "/file"), ("/cut-read-only", "/cut")):
            self.mappables[name] = HostFile(self.fds[of], name=name, writable=False)
        self.mappables["/shared"] = SharedMemory(backend.arena, SHARED_BYTES, "/shared")
        self.mms = [MemoryManager(backend.arena, backend.new_space(), policy=policy)]
        backend.attach(self.mms[0])

    def mm(self, who: int) -> MemoryManager:
        return self.mms[who % len(self.mms)]

    def how(self, step: Step) -> dict[str, Any]:
        """The keyword arguments that make a copy go this way."""
        ignore = step.arguments.get("ignore", False)
        if self.mechanism != MIXED:
            return {"opts": OPTIONS[self.mechanism, ignore]}
        if step.mixed is None:
            return {"ignore_permissions": ignore}
        return {"opts": OPTIONS[step.mixed, ignore]}

    def fork(self, who: int) -> None:
        mm = self.mm(who).fork(self.backend.new_space())
        self.backend.attach(mm)
        self.mms.append(mm)

    def end(self, who: int) -> None:
        mm = self.mms.pop(who % len(self.mms))
        self.backend.detach(mm)
        mm.close()
        mm.address_space.release()

    def close(self) -> None:
        while self.mms:
            self.end(0)
        for mappable in self.mappables.values():
            mappable.close()
        for fd in self.fds.values():
            os.close(fd)


class World:
    """Subjects over one backend, and their model.

    Args:
        backend: Address spaces, all over one arena; it outlives this.
        mechanisms: "internal", "walk", "mirror", or "mixed", which uses all of them by turns, and
            often leaves it to the policy.
        numbers: Of the policy.

    Attributes:
        subjects: One for each mechanism that was asked for.
        models: The model of each mm that every subject has, in the same order.
        is_brief_cut: See `CopyMemory.brief`.
    """

    def __init__(
        self, backend: Backend, mechanisms: tuple[str, ...], numbers: dict[str, int]
    ) -> None:
        self.backend = backend
        self.memory = CopyMemory()
        self.models = [ModelMm(self.memory, backend.max_addr // PAGE)]
        self.is_brief_cut = False
        self.subjects: list[Subject] = []
        try:
            for mechanism in mechanisms:
                subject = Subject(backend, mechanism, numbers)
                self.subjects.append(subject)
        except BaseException:
            self.close()
            raise

    def model(self, who: int) -> ModelMm:
        return self.models[who % len(self.models)]

    def do(self, step: Step) -> None:
        """Do a step everywhere.

        Raises:
            DisagreementError: It did not come to the same everywhere, or the model says other.
        """
        from tests.copies.catalogue import OPERATIONS
        from tests.copies.changes import CHANGES

        if step.name in CHANGES:
            CHANGES[step.name](self, **step.arguments)
        else:
            self._copy(step, OPERATIONS[step.name])

    # ---- changes ----

    def agree(self, real: Callable[[Subject], Any], model: Callable[[], Any]) -> bool:
        """Do it everywhere: done, or refused alike; returns whether it was done."""
        refusal: Refusal | Fault | None = None
        want: Any = None
        try:
            want = model()
        except (Refusal, Fault) as e:
            refusal = e
        for subject in self.subjects:
            got: Any = None
            error: OSError | None = None
            try:
                got = real(subject)
            except (MmError, GuestFaultError) as e:
                error = e
            if isinstance(got, AddrRange):
                got = got.start, got.end
            if (refusal is None) != (error is None) or (want is not None and got != want):
                raise DisagreementError(
                    f"{subject.mechanism}: {error!r}, {got!r}; model: {refusal!r}, {want!r}"
                )
        return refusal is None

    # ---- copies ----

    def _copy(self, step: Step, operation: Any) -> None:
        arguments = {k: v for k, v in step.arguments.items() if k not in {"who", "ignore"}}
        who = step.arguments["who"]
        ignore = step.arguments.get("ignore", False)
        model = self.model(who)
        operation.prepare(model, arguments)
        outcomes = [
            operation.perform(subject.mm(who), subject.how(step), **arguments)
            for subject in self.subjects
        ]
        first = outcomes[0]
        for subject, outcome in zip(self.subjects, outcomes, strict=True):
            if outcome != first and not operation.may_differ(
                first, outcome, model, ignore, **arguments
            ):
                raise DisagreementError(
                    f"{subject.mechanism}: {shown(outcome)}\n"
                    f"{self.subjects[0].mechanism}: {shown(first)}"
                )
        try:
            written = operation.check(model, ignore, first, **arguments)
        except AssertionError as e:
            raise DisagreementError(f"all: {shown(first)}; model: {e}") from e
        for addr, n in written:
            self._look(who, addr - MARGIN, n + 2 * MARGIN)

    def _look(self, who: int, addr: int, n_bytes: int) -> None:
        # At the frames behind a range.
        model = self.model(who)
        first = peek(self.subjects[0].mm(who), addr, n_bytes)
        for subject in self.subjects:
            found = first if subject is self.subjects[0] else peek(subject.mm(who), addr, n_bytes)
            if subject is not self.subjects[0] and found == first:
                continue
            for at, data in found:
                if not model.sees(at, data):
                    raise DisagreementError(
                        f"{subject.mechanism}: other bytes in memory at {at:#x}: "
                        f"{differing(model, at, data)}"
                    )

    def compare(self) -> None:
        """Look at every frame of everybody.

        Raises:
            DisagreementError: A byte is not what the model says.
        """
        for who, model in enumerate(self.models):
            looked_at: dict[int, bytes] = {}
            for subject in self.subjects:
                mm = subject.mms[who]
                pages = {*model.own, *_resident_pages(mm, self.backend.arena)}
                pages |= {
                    page for page, kind in model.kinds.items()
                    if kind.backing is not None and page + kind.delta in kind.backing.store.cells
                }  # fmt: skip
                for page in pages:
                    for at, data in peek(mm, page * PAGE, PAGE):
                        if looked_at.setdefault(at, data) is not data and looked_at[at] == data:
                            continue  # as in one before
                        if not model.is_behind(page) and not model.sees(at, data):
                            raise DisagreementError(
                                f"{subject.mechanism}: other bytes in the page {page * PAGE:#x} "
                                f"of {who}: {differing(model, at, data)}"
                            )

    def check(self) -> None:
        """Check what always holds of a memory manager."""
        for subject in self.subjects:
            first, *others = subject.mms
            first.check_invariants(others)

    def close(self) -> None:
        """End everybody; nothing may be left in the arena."""
        for subject in self.subjects:
            subject.close()
        self.subjects = []
        used_bytes = self.backend.arena.statistics().used_bytes
        left = used_bytes - self.backend.own_bytes()
        assert not left, f"{left:#x} bytes are left"


def shown(outcome: Outcome) -> str:
    """An outcome in a line."""
    text = f"returned {short(outcome.value)}" if outcome.error is None else f"{outcome.error}"
    text += f", buffer {short(outcome.buffer)}" if outcome.buffer else ""
    return text + ("" if outcome.consumed is None else f", consumed {outcome.consumed}")


def short(value: object) -> str:
    if isinstance(value, bytes) and len(value) > 48:
        import zlib

        shape = f"{value[:24].hex()}…{value[-16:].hex()}, crc {zlib.crc32(value):08x}"
        return f"{len(value)} bytes, {shape}"
    return value.hex() if isinstance(value, bytes) else repr(value)


def differing(model: ModelMm, addr: int, data: bytes) -> str:
    """Where bytes are not the model's."""
    for n in range(len(data)):
        if not model.sees(addr + n, data[n : n + 1]):
            return f"first {data[n : n + 16].hex()} at {addr + n:#x}"
    return "no single one"
