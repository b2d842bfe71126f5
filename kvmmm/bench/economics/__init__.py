"""`bench faults --out DIR`, `bench exits --out DIR`: what first touches and exits cost, how surely.

The groups of `bench faults` and `bench exits` measure in one process. Here the same guests are
measured as `bench crossover` measures copies: in several processes one after the other, rounds of
everything in random order, everything twice (A/A). Sweep, results' file, bootstrap and the page's
scripts are the crossover's.

    plan.py      what is measured, as cells of the results' file
    probes.py    how: first touches by way and window, faults among memslots, exits of each kind
    worker.py    a process of the sweep
    asked.py     what is compared with what; verdicts.py: what may be said, as data
    analysis.py  figures with intervals, and comparisons that are told only beyond noise
    words.py     costs and ways as people read them
    answer.py    what it says of this host, in some ten lines
    page.py      report.html; economics.html and economics.js are its own, the rest is shared
    figures.py   the same pictures as SVG and PNG
    command.py   the sweep from beginning to end
"""
