"""The command line: `kvmmm run`, `guests`, `doctor`, `calibrate`, `bench`.

    group.py       the commands by name, imported when one of them runs
    failure.py     the one place where an error becomes a message and an exit code
    parameter.py   sizes, durations, addresses as people type them
    run.py         `kvmmm run`: options; session.py: one run, from image to exit code
    terminal.py    where a guest's console goes to and comes from; Ctrl-C and SIGTERM
    summary.py     the tables of `--stats`
    guests.py      `kvmmm guests`
    doctor.py      `kvmmm doctor`: how kvmmm.doctor's findings look
    calibrate.py   `kvmmm calibrate`: the numbers of kvmmm.bench.calibrate, and their file

A guest's console is stdout and stdin; everything that kvmmm itself has to say goes to stderr, and
its last line says whose the exit status is. Nothing else in kvmmm prints.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line of this process; ends it."""
    # Imported late: whoever imports kvmmm.cli for its parts need not have click imported.
    from kvmmm.cli.group import kvmmm

    kvmmm.main(prog_name="kvmmm")
