"""README's one picture and its ten lines, from a run of `kvmmm bench crossover` on this machine.

    __main__.py    `make picture`: draws the picture, puts the answer into README.md
    section.py     the part of README.md that is made here
    crossover.svg  the picture

Both name the run that they come from, so that a test can see that they belong together.
"""
