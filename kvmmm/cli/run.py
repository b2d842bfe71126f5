"""`kvmmm run`: the options, and what they mean. The run itself is `session`."""

from __future__ import annotations

from typing import IO

import click

from kvmmm.cli.maps_file import MapsFile, MapsPath
from kvmmm.cli.parameter import ADDRESS, DURATION, ENVIRONMENT, SIZE
from kvmmm.errors import EXIT_CODES

_EXIT_CODES = "\n".join(f"  {code}  {cause}" for code, cause in EXIT_CODES.items())
_EPILOG = f"""\
\b
The guest's own exit status, 0 to 255, becomes kvmmm's. kvmmm ends with these itself:
{_EXIT_CODES}
The last line on stderr says whose status it is.

\b
A program for Linux says so itself: by the ABI note that start code of C libraries brings along
(NT_GNU_ABI_TAG), by its EI_OSABI, or by asking for an interpreter, which is refused: it must be
static. It runs in ring 3; served are exit, exit_group, write, mmap, munmap, mprotect, mremap,
brk, madvise, fork, getpid, sched_yield and arch_prctl, and other system calls fail with ENOSYS.
Its words are its name and ARGS, its environment is what --env says. Where Linux would send a
signal, for a fault or an exception, the run ends with a report; else when all processes have
ended, with the status of the first.

\b
Examples:
  kvmmm run touch --stats                  a bundled guest, and what demand paging did
  kvmmm run kernel.elf --timeout 10s -- quiet root=none
  kvmmm run boot.bin --base 0x100000 --rwx
  kvmmm run touch --maps touch.svg         a picture of its memory when it is over
  echo hello | kvmmm run echo
  kvmmm run --user a.out --env HOME=/ -- one two
"""


@click.command(epilog=_EPILOG)
@click.argument("image", metavar="FILE|NAME")
@click.argument("args", metavar="[-- ARGS...]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--memory",
    type=SIZE,
    metavar="SIZE",
    help="Guest memory; costs nothing until it is touched.  [default: 64M, or the guest's own]",
)
@click.option(
    "--arena",
    type=SIZE,
    metavar="SIZE",
    help="Most that a kernel may take on the host.  [default: enough for all of --memory]",
)
@click.option(
    "--timeout",
    type=DURATION,
    metavar="TIME",
    help="Stop the guest after that time: 10s, 250ms.  [default: never]",
)
@click.option(
    "--base",
    type=ADDRESS,
    metavar="ADDR",
    help="The file is a flat binary: load it there, and begin there.",
)
@click.option(
    "--rwx",
    is_flag=True,
    help="Give every segment all permissions, as a boot loader would.",
)
@click.option(
    "--user/--kernel",
    default=None,
    help="Run it as a program for Linux in ring 3, or as a guest kernel.  [default: as it says]",
)
@click.option(
    "--env",
    type=ENVIRONMENT,
    multiple=True,
    metavar="NAME=VALUE",
    help="For a program: put this into its environment, which is empty otherwise. Repeatable.",
)
@click.option("--no-input", is_flag=True, help="The guest's console input is empty, not stdin.")
@click.option("--stats", is_flag=True, help="Show exits, faults, memory and times when it is over.")
@click.option(
    "--json", "json_file", type=click.File("w", lazy=False), metavar="FILE",
    help="Write the outcome and all counts to FILE.",
)  # fmt: skip
@click.option(
    "--maps", "maps_file", type=MapsPath(), metavar="FILE",
    help="When it is over, show what is mapped, what of it is resident and whose, and where faults "
    "fell: FILE.svg is a picture, FILE.html has tables as well, FILE.txt is text as in "
    "/proc/PID/status, maps and smaps, and - is a table on stderr.",
)  # fmt: skip
def run(
    image: str, args: tuple[str, ...], memory: int | None, arena: int | None, timeout: int | None,
    base: int | None, rwx: bool, user: bool | None, env: tuple[tuple[str, str], ...],
    no_input: bool, stats: bool, json_file: IO[str] | None, maps_file: MapsFile | None,
) -> int:  # fmt: skip
    """Run a guest: a static x86-64 ELF, a flat binary with --base, or a bundled guest by NAME.

    It is a kernel, entered in ring 0; or, with --user or if its file says so, a program for Linux,
    entered in ring 3. The guest's console is stdin and stdout; all that kvmmm has to say goes to
    stderr. ARGS become the guest's command line. Ctrl-C stops the guest, and says where it was.
    """
    from kvmmm.cli.session import prepare

    session = prepare(
        image, args, memory=memory, arena=arena, base=base, rwx=rwx, user=user, env=dict(env)
    )
    return session.run(
        timeout_ns=timeout,
        has_input=not no_input,
        shows_stats=stats,
        json_file=json_file,
        maps_file=maps_file,
    )
