"""Benchmarks: what kvmmm costs, beside the best that C alone is known to do.

    case.py      data: probes (what is measured), cases (what is made of it, and its goal), groups
    runner.py    measures a group: interleaved, everything twice (A/A), medians
    record.py    a case's result, and how it is written as JSON Lines
    host.py      the facts about this machine that a figure needs beside it
    table.py     what a person reads
    registry.py  names of benchmarks, imported when asked for
    command.py   `kvmmm bench`
    floor.py     the C floors (`_native/floor_*.c`), typed
    guest.py     VMs with the guests of guest/bench
    no_cpu.py    an address space for what is measured without a VM
    costs.py     what the policy of copies depends on; calibrate.py: that policy
    policies.py  that policy, the default one, and fixed ones, over whole workloads
    crossover/   where ASIO beats internal mappings: a sweep of several processes, its statistics
    economics/   first touches and exits as such a sweep; progress.py: a sweep's bar
    startup.py, exits.py, console.py, paging.py, scaling.py, fault.py, fork.py, copies*.py
                 the groups themselves

How a figure is made. A *floor* is C that does the best mechanism known, in this process. In every
round each probe runs twice, under the labels A and B, all in random order; a case's value is the
median over rounds of product ÷ floor, or product minus floor. The A/A figure is how far the value
from A alone and the value from B alone lie apart: what is smaller than that is noise. Where one
value stands for several (sizes, directions), it is the worst of their medians. The thread is pinned
to one CPU before any vCPU runs, and garbage collection is off.
"""
