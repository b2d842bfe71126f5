"""The fuzzer of the entry points in C: `python -m tools.fuzz` (`make fuzz`).

    watch ──starts──► a child: epoch after epoch      each with a seed, a world and 2000 cases
      │                 │  log of the last cases, in shared memory: a crash leaves it behind
      └── looks for a crash, a hang, a leak, a broken invariant ◄──┘

A case is one call with arguments drawn from its own number and the epoch's seed: it can be made
again alone, or with a tail of those before it.
"""
