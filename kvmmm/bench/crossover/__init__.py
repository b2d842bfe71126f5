"""`bench crossover`: where do copies through the address space beat internal mappings, here?

    plan.py        which cells (operation, size, residency, layout, ...), and for how long
    geometry.py    what a layout is made of: segments of guest memory, where they lie in the arena
    pool.py        the frames of all layouts; space.py: page tables that no CPU uses
    ground.py      guest memory of one layout, twice: with a mirror that is full, and an empty one
    states.py      residency states: brought about outside of the timed region, and verified
    probes.py      what is timed: an operation by one mechanism, called from C; planted.py: costs
    calls.py       the same, called from Python; outside.py: by the kernel
    worker.py      a process of its own: rounds of all cells, in random order
    process.py     the parent's end of one: lines come in, a deadline, an end
    sweep.py       the processes one after the other; what is done is kept
    resume.py      what is left of a sweep
    facts.py       what the header says about the host
    record.py      the results' file
    cluster.py     the same on every host of a Dask cluster; cluster_host.py: what happens there
    command.py     `kvmmm bench crossover`, `kvmmm bench compare`; finish.py: what follows a sweep
    agreement.py   whether two sweeps say the same
    the others     statistics, the answer, the report

What is compared. A ratio is the time of the mirror (or walk) divided by that of internal mappings:
below 1 the address space wins. Both sides use one copy kernel and the same buffers, and are given
the same offsets within pages; which pages is drawn anew for each. A round measures every variant of
a cell once, in random order, internal mappings twice: how far those two lie apart is noise.

Called from C it is the product's own C that is timed, from the look-up on; called from Python, what
a user calls: internal mappings as they come, the mirror as a policy that uses it has it. What goes
to a Reader or Writer is of two kinds: from C, what the best one could do (blocks and buffer are
there beforehand); from Python, what kvmmm does (they are not).

What is not compared: a guest that runs meanwhile, memory of several nodes, and the price that a
process with a VM pays for every mmap (MMU notifiers): the address space here is page tables that no
CPU uses.
"""
