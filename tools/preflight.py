"""Say, before anything is built, which system package is missing. Standard library only.

Run by the Makefile with the Python that is to become the virtual environment's. Prints one line a
thing that is missing, with the command that installs it, and ends with 1; prints nothing when all
is there.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path

PACKAGES = {  # what: (Debian and Ubuntu, Fedora)
    "venv": ("python3-venv", "python3"),
    "headers": ("python3-dev", "python3-devel"),
    "gcc": ("gcc libc6-dev linux-libc-dev", "gcc glibc-devel kernel-headers"),
}


def install_command(what: str) -> str:
    """Return how to install `what` here."""
    debian, fedora = PACKAGES[what]
    if shutil.which("apt-get"):
        return f"sudo apt-get install {debian}"
    if shutil.which("dnf"):
        return f"sudo dnf install {fedora}"
    return f"install {debian} (Debian's names) with your package manager"


def missing() -> list[str]:
    """Return what is missing, one sentence each."""
    found = []
    if sys.version_info < (3, 11):  # noqa: UP036 - it runs before anything is installed
        version = ".".join(map(str, sys.version_info[:2]))
        found.append(
            f"Python 3.11 or later is needed, this is {version}: try `make PYTHON=python3.12`"
        )
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        found.append(f"Python's venv module is incomplete: {install_command('venv')}")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        found.append(f"Python's headers are missing: {install_command('headers')}")
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc")):
        found.append(f"there is no C compiler: {install_command('gcc')}")
    elif not Path("/usr/include/linux/kvm.h").exists():
        found.append(f"<linux/kvm.h> is missing: {install_command('gcc')}")
    return found


if __name__ == "__main__":
    problems = missing()
    for problem in problems:
        print(f"kvmmm needs something first: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)
