"""`Check`: what is asked. `Finding`: what came out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

OK = "ok"
DIFFERS = "works differently"
MISSING = "missing"
FAILED = "failed"
SKIPPED = "not tried"
"""What a finding can say. `DIFFERS` is no fault: kvmmm knows that way, too."""


class Finding:
    """What a check came to. Treat it as immutable.

    Attributes:
        result: One of the constants of this module.
        fact: What was seen or measured, short.
        remedy: What to do or to mind; empty where there is nothing.
        value: The same for programs: a number or a word, where the fact holds one.
    """

    __slots__ = ("fact", "remedy", "result", "value")

    def __init__(
        self, result: str, fact: str, *, remedy: str = "", value: float | str | bool | None = None
    ) -> None:
        self.result = result
        self.fact = fact
        self.remedy = remedy
        self.value = value

    def __repr__(self) -> str:
        return f"<Finding {self.result}: {self.fact}>"


def ok(fact: str, *, value: float | str | bool | None = None) -> Finding:
    """Return a finding: it works as on any KVM."""
    return Finding(OK, fact, value=value)


def differs(fact: str, remedy: str = "", *, value: float | str | bool | None = None) -> Finding:
    """Return a finding: it works in another way, which the remedy says how to live with."""
    return Finding(DIFFERS, fact, remedy=remedy, value=value)


def missing(fact: str, remedy: str = "", *, value: float | str | bool | None = None) -> Finding:
    """Return a finding: it is not there, or does something wrong."""
    return Finding(MISSING, fact, remedy=remedy, value=value)


class Check:
    """One question.

    Attributes:
        key: Its name for programs: `ring3`.
        name: Its name for people, a few words.
        probe: Finds the answer; may raise, which is a finding as well.
        is_needed: Whether kvmmm works without it.
    """

    __slots__ = ("is_needed", "key", "name", "probe")

    def __init__(
        self, key: str, name: str, probe: Callable[[], Finding], *, is_needed: bool = True
    ) -> None:
        self.key = key
        self.name = name
        self.probe = probe
        self.is_needed = is_needed
