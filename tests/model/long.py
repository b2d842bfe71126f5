"""The rules over the fake address space, a million steps: `python -m tests.model.long`.

Steps come in epochs, each with a world and a seed of its own, so that what an epoch does depends on
seed and number alone: the state file says how many have ended, and another run goes on from there.
A failure names the epoch, and shows its last steps as code; `--epoch` does it again.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.model.rules import RULES
from tests.model.start import COMMON, OPTIONS, start

if TYPE_CHECKING:
    from tests.model.rules import Rule
    from tests.model.world import World

STEPS_IN_AN_EPOCH = 2000
CHECK_EVERY = 100
SHOWN_STEPS = 30
FAILED, UNFINISHED, STOPPED = 1, 75, 130


class Epoch:
    """One world, and what is done to it; a failure comes out of `run`.

    Attributes:
        options: What the world was made with.
        done: The steps so far, (rule, arguments) each.
    """

    def __init__(self, seed: int, number: int, n_steps: int) -> None:
        self._rng = random.Random(f"{seed}/{number}")
        self._n_steps = n_steps
        self.options = {
            name: domain.sample(self._rng) for name, domain in {**COMMON, **OPTIONS["fake"]}.items()
        }
        # Each epoch is after something else.
        self._weights = [rule.weight * self._rng.choice((0, 1, 1, 1, 3)) for rule in RULES]
        for n, rule in enumerate(RULES):
            if rule.name in {"mmap", "cpu_stores"}:
                self._weights[n] = rule.weight
        self.done: list[tuple[Rule, dict[str, Any]]] = []

    def run(self, check_every: int) -> None:
        world = start("fake", **self.options)
        for n in range(self._n_steps):
            self._step(world)
            if n % check_every == 0:
                world.check()
                world.compare()
        world.check()
        world.compare()
        world.close()

    def _step(self, world: World) -> None:
        rule = self._rng.choices(RULES, self._weights)[0]
        while not rule.when(world):
            rule = self._rng.choices(RULES, self._weights)[0]
        arguments = {name: domain.sample(self._rng) for name, domain in rule.domains.items()}
        self.done.append((rule, arguments))
        rule.act(world, **arguments)

    def as_code(self, n_shown: int) -> str:
        """The last steps, to be pasted."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        lines = [
            "from tests.model.rules import access_rules, family_rules, mapping_rules",
            "from tests.model.start import start",
            f'world = start("fake", {options})',
        ]
        if len(self.done) > n_shown:
            lines.append(f"# {len(self.done) - n_shown} steps (--show all of them), then:")
        for rule, arguments in self.done[-n_shown:]:
            text = "".join(f", {name}={value!r}" for name, value in arguments.items())
            module = rule.act.__module__.rpartition(".")[2]
            lines.append(f"{module}.{rule.name}(world{text})")
        return "\n".join(lines)


class State:
    """What is kept in a file: the seed, and how many epochs have ended."""

    def __init__(self, path: Path | None, seed: int | None) -> None:
        self._path = path
        self.seed = seed if seed is not None else random.SystemRandom().randrange(1 << 32)
        self.n_epochs = 0
        if path is not None and path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["steps"] == STEPS_IN_AN_EPOCH and seed in {None, kept["seed"]}:
                self.seed, self.n_epochs = kept["seed"], kept["epochs"]

    def keep(self) -> None:
        if self._path is not None:
            kept = {"seed": self.seed, "epochs": self.n_epochs, "steps": STEPS_IN_AN_EPOCH}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside = self._path.with_suffix(".new")
            beside.write_text(json.dumps(kept), encoding="utf-8")
            beside.replace(self._path)

    def forget(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def do(seed: int, number: int, check_every: int = CHECK_EVERY, n_shown: int = SHOWN_STEPS) -> int:
    """Do one epoch; returns an exit status."""
    epoch = Epoch(seed, number, STEPS_IN_AN_EPOCH)
    try:
        epoch.run(check_every)
    except Exception:  # noqa: BLE001 - whatever it is, it is told
        print()
        traceback.print_exc(file=sys.stdout)
        print(f"\nseed {seed}, epoch {number}, step {len(epoch.done)}:\n{epoch.as_code(n_shown)}")
        print(f"\nagain: python -m tests.model.long --seed {seed} --epoch {number} --check 1")
        return FAILED
    return 0


def go(state: State, n_steps: int, minutes: float) -> int:
    """Do what is left of `n_steps`; returns an exit status."""
    n_all = -(-n_steps // STEPS_IN_AN_EPOCH)
    first, begin = state.n_epochs, time.monotonic()
    print(f"seed {state.seed}, epochs {first} to {n_all} of {STEPS_IN_AN_EPOCH} steps", flush=True)
    while state.n_epochs < n_all:
        taken = time.monotonic() - begin
        if taken > minutes * 60:
            print(f"\n{minutes} minutes have passed: run it again to go on")
            return UNFINISHED
        if (status := do(state.seed, state.n_epochs)) != 0:
            return status
        state.n_epochs += 1
        state.keep()
        rate = (state.n_epochs - first) / (time.monotonic() - begin)
        left = (n_all - state.n_epochs) / rate
        print(
            f"\r{state.n_epochs * STEPS_IN_AN_EPOCH} steps, "
            f"{rate * STEPS_IN_AN_EPOCH:.0f} a second, {left / 60:.1f} minutes left ",
            end="", flush=True,
        )  # fmt: skip
    print(f"\n{n_all * STEPS_IN_AN_EPOCH} steps, no difference")
    state.forget()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parse, and do it."""
    parser = argparse.ArgumentParser(prog="python -m tests.model.long", description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so many")
    parser.add_argument("--seed", type=int, help="default: the state file's, or any")
    parser.add_argument("--state", type=Path, help="a file from which another run goes on")
    parser.add_argument("--epoch", type=int, help="do only this one")
    parser.add_argument("--check", type=int, default=CHECK_EVERY, help="with --epoch: how often")
    parser.add_argument("--show", type=int, default=SHOWN_STEPS, help="with --epoch: so many")
    chosen = parser.parse_args(arguments)
    if chosen.epoch is not None:
        return do(chosen.seed or 0, chosen.epoch, chosen.check, chosen.show)
    try:
        return go(State(chosen.state, chosen.seed), chosen.steps, chosen.minutes)
    except KeyboardInterrupt:
        print("\nstopped: run it again to go on")
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
