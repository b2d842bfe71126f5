"""The part of README.md that a run fills in: the picture, the answer, what was measured where."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvmmm.bench.crossover.report.words import host_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.bench.crossover.record import Results

BEGIN = "<!-- crossover: `make picture` writes what follows -->"
END = "<!-- crossover: to here -->"
_PATH = "tools/picture/crossover.svg"
_FACTS = {
    "microcode": "microcode",
    "tsc_mhz": "TSC MHz",
    "n_cpus": "CPUs",
    "n_nodes": "NUMA nodes",
    "thp_shmem": "huge pages of shared memory",
    "python": "Python",
}


class SectionError(Exception):
    """README.md has no place for the answer, or the run is none to show."""


def run_name(results: Results) -> str:
    """Return what names a run, in the picture and in README alike."""
    header = results.header
    commit = (header.commit or "unknown")[:12]
    return f"run of {header.started}, seed {header.seed}, commit {commit}"


def section_of(results: Results, answer: Sequence[str]) -> str:
    """Return the section in Markdown.

    Raises:
        SectionError: The run did not come to its end: it is no run to show.
    """
    if results.footer is None or not results.footer.complete:
        raise SectionError("the sweep is not complete: `make picture` goes on with it")
    where = host_line(results.header.host)
    caption = f"Time of copies through the address space ÷ through internal mappings: {where}"
    measured = f"Measured by `kvmmm bench crossover`, {run_name(results)}. "
    return "\n".join([
        f"![{_escaped(caption)}]({_PATH})",
        "",
        *(f"- {_escaped(line)}" for line in answer),
        "",
        f"{measured}{_escaped(_facts(results))}. Brackets: 95 %.",
    ])  # fmt: skip


def _facts(results: Results) -> str:
    host = results.header.host
    known = [
        f"{label} {host[name]}" for name, label in _FACTS.items() if host.get(name) is not None
    ]
    return "; ".join(known) or "The host says nothing of itself"


def _escaped(text: str) -> str:
    # What a host calls itself must not become markup.
    return re.sub(r"([\\`*_<>|])", r"\\\1", text)


def with_section(readme: str, section: str) -> str:
    """Return README with the section in its place.

    Raises:
        SectionError: It has no such place, or several.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SectionError(f"README needs one line {BEGIN!r} and one {END!r}")
    before, rest = readme.split(BEGIN)
    if END not in rest:
        raise SectionError(f"{END!r} stands before {BEGIN!r}")
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{rest.split(END)[1]}"
