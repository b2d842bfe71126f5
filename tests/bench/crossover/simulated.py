"""Sweeps that never ran: known curves, effects of processes, noise with heavy tails, A/A pairs."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from kvmmm.bench.crossover.record import Cell, Footer, Header, Results, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

SIZES = [8 << (2 * i) for i in range(11)]
HOST = {"cpu": "AMD EPYC", "kernel": "6.18", "kvm": {"kind": "pvm"}, "n_cpus": 2}


def internal_ns(n_bytes: int) -> float:
    return 10 + n_bytes / 30


def cells_of(sizes: Sequence[int] = SIZES, **dims: str | int) -> list[Cell]:
    named = {
        "operation": "copy_in", "layout": "1", "order": "contiguous", "locality": "hot",
        "residency": "warm", "page_bytes": 4096, "caller": "c",
    } | dims  # fmt: skip
    label = "-".join(str(value) for value in named.values())
    return [Cell(f"{label}-{n}", bytes=n, **named) for n in sizes]


class Simulated:
    """How a simulated host behaves.

    Attributes:
        ns: What an operation takes: of a cell, a variant.
        process_sd: Of a process's effect on one cell's ratio: half of its variance is common to
            all cells.
        round_sd: Of a round's effect on one measurement; a tenth of them is five times as bad, and
            one in fifty is hit by an interruption.
        drift: How far a variant wanders from a process's first round to its last (a standard
            deviation).
        sticky: How much of a round's effect the next round has, too: 0 to 1.
    """

    def __init__(
        self, ns: Callable[[Cell, str], float], *, seed: int, process_sd: float = 0.02,
        round_sd: float = 0.01, processes: int = 5, rounds: int = 15,
        variants: Sequence[str] = ("mirror",), varied: bool = True, drift: float = 0.0,
        sticky: float = 0.0,
    ) -> None:  # fmt: skip
        import numpy as np

        self.ns = ns
        self.random = np.random.default_rng(seed)
        self.process_sd = process_sd
        self.round_sd = round_sd
        self.processes = processes
        self.rounds = rounds
        self.variants = variants
        self.varied = varied
        self.drift = drift
        self.sticky = sticky

    def results(self, cells: Sequence[Cell], *, complete: bool = True) -> Results:
        samples = []
        n = self.processes
        for variant in self.variants:
            common = self.random.normal(0, self.process_sd / 2**0.5, n)
            for cell in cells:
                # Some cells are steadier than others.
                scale = self.random.lognormal(0, 0.5) if self.varied else 1.0
                own = self.random.normal(0, self.process_sd / 2**0.5, n)
                samples += self._samples(cell, variant, scale * (common + own), scale)
        header = Header("0.1.0", None, "2026-01-01T00:00:00+00:00", "default", 1, HOST)
        footer = Footer(complete=complete, seconds=1.0)
        return Results(header, {cell.id: cell for cell in cells}, merged(samples), [], footer, [])

    def measured(self, cells: Sequence[Cell]) -> list[Any]:
        """Return what the analysis makes of samples, without making these: fast."""
        import numpy as np

        from kvmmm.bench.crossover.resample import centre_of
        from kvmmm.bench.crossover.statistics import _Measured

        common = self.random.normal(0, self.process_sd / 2**0.5, self.processes)
        shape = (self.processes, self.rounds)
        made = []
        for cell in cells:
            scale = self.random.lognormal(0, 0.5) if self.varied else 1.0
            own = self.random.normal(0, self.process_sd / 2**0.5, self.processes)
            ratio = self.ns(cell, "mirror") / self.ns(cell, "internal")
            base = np.log(self._noise(shape, scale))
            again = np.log(self._noise(shape, scale)) - base
            mirror = np.log(ratio * self._noise(shape, scale)) - base
            mirror += (scale * (common + own))[:, None]
            for variant, logs in (("internal2", again), ("mirror", mirror)):
                rounds = list(logs)
                made.append(_Measured(cell, (variant, "internal"), rounds, centre_of(rounds)))
        return made

    def _samples(self, cell: Cell, variant: str, effects: np.ndarray, scale: float) -> list[Sample]:
        import numpy as np

        shape = (self.processes, self.rounds)
        ns = {
            "internal": self.ns(cell, "internal") * self._noise(shape, scale),
            "internal2": self.ns(cell, "internal") * self._noise(shape, scale),
            variant: self.ns(cell, variant) * self._noise(shape, scale)
            * np.exp(effects)[:, None],
        }  # fmt: skip
        return [
            Sample(cell.id, p, r, {name: float(values[p, r]) for name, values in ns.items()})
            for p in range(shape[0])
            for r in range(shape[1])
        ]

    def _noise(self, shape: tuple[int, int], scale: float) -> np.ndarray:
        import numpy as np

        sd = self.round_sd * scale * np.where(self.random.random(shape) < 0.1, 5, 1)
        hit = np.where(self.random.random(shape) < 0.02, self.random.exponential(1, shape), 0)
        rounds = self.random.normal(0, 1, shape)
        for i in range(1, shape[1] if self.sticky else 0):
            rounds[:, i] *= (1 - self.sticky**2) ** 0.5
            rounds[:, i] += self.sticky * rounds[:, i - 1]
        noise = np.exp(rounds * sd + hit)
        if self.drift:
            slope = self.random.normal(0, self.drift * scale, (shape[0], 1))
            noise *= np.exp(slope * np.linspace(-0.5, 0.5, shape[1]))
        return np.asarray(noise)


def merged(samples: Sequence[Sample]) -> list[Sample]:
    """Make one sample of those of the same cell, process and round: the first internal side."""
    by_key: dict[tuple[str, int, int], Sample] = {}
    for s in samples:
        key = (s.cell, s.process, s.round)
        by_key[key] = s._replace(ns={**s.ns, **by_key[key].ns}) if key in by_key else s
    in_order = list(by_key.values())
    random.Random(1).shuffle(in_order)
    return in_order


def planted_ns(ns_per_operation: float, ns_per_byte: float) -> Callable[[Cell, str], float]:
    """Return times in which a variant pays for each operation, and internal mappings for each byte:
    the first is slower below ns_per_operation / ns_per_byte bytes."""

    def ns(cell: Cell, variant: str) -> float:
        base = internal_ns(cell.bytes)
        return base + (ns_per_operation if variant == "mirror" else ns_per_byte * cell.bytes)

    return ns


def identical_ns(cell: Cell, _variant: str) -> float:
    return internal_ns(cell.bytes)
