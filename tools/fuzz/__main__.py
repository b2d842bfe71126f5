"""The command line of the fuzzer; see `--help`."""

from __future__ import annotations

import argparse
import random
import sys

from . import sanitize
from .replay import replay
from .watch import Watch

_EPILOG = """\
examples:
  make fuzz                                    for an hour, from any seed
  make fuzz ARGS="--minutes 5 --seed 1"        the same cases each time, but for threads
  make fuzz ARGS="--seed 77 --replay"          one epoch again, and what is needed of it
  make fuzz ARGS="--sanitize --deadline 90"    with AddressSanitizer under it

exit status: 0 nothing found, 1 something was, 130 stopped by Ctrl-C and nothing found.
"""


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; returns an exit status."""
    options = _parser().parse_args(arguments)
    if options.child:
        if options.core:
            sanitize.use(options.core)
        from . import child

        return child.run(options)
    extra = ["--cases", str(options.cases)]
    extra += ["--repeat"] if options.repeat else []
    extra += ["--first", str(options.first)] if options.first else []
    extra += ["--provoke", options.provoke] if options.provoke else []
    environment = {}
    if options.sanitize:
        print("building the core with sanitizers", flush=True)
        extra += ["--core", str(sanitize.build())]
        environment = sanitize.environment()
    elif options.core:
        extra += ["--core", options.core]
    watch = Watch(deadline_seconds=options.deadline, extra=extra, environment=environment)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 40)
    if options.replay:
        found = replay(watch, seed, options.cases, options.minutes * 60)
        print(found or f"seed {seed}: nothing found in {options.minutes} minutes")
        return 1 if found else 0
    is_stopped = False
    print(f"from seed {seed} on, {options.minutes:g} minutes", flush=True)
    try:
        watch.run(seed, options.minutes, max_findings=options.findings)
    except KeyboardInterrupt:
        is_stopped = True
        print("\nstopped", flush=True)
    print(f"\n{watch.summary()}")
    return 1 if watch.findings else 130 if is_stopped else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description="Fuzz the entry points of copies in C.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=60.0, metavar="N", help="default: %(default)g"
    )
    parser.add_argument("--seed", type=int, help="of the first epoch; default: any")
    parser.add_argument("--replay", action="store_true", help="the epoch of --seed alone")
    parser.add_argument(
        "--first", type=int, default=0, metavar="N", help="leave out cases before N"
    )
    parser.add_argument("--cases", type=int, default=2000, metavar="N", help="in an epoch")
    parser.add_argument("--repeat", action="store_true", help="look for leaks after every epoch")
    parser.add_argument("--findings", type=int, default=10, metavar="N", help="stop after so many")
    parser.add_argument(
        "--deadline", type=float, default=30.0, metavar="N", help="seconds without a case: a hang"
    )
    parser.add_argument("--sanitize", action="store_true", help="with gcc's sanitizers (slower)")
    for name in ("--provoke", "--record", "--core"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=1, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
