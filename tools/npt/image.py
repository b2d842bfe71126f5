"""The machine's root file system, in three layers that the kernel unpacks one after the other.

- base: busybox, kernel modules, Python with its libraries and the environment's packages; kept in
  build/npt until one of them changes;
- project: this repository and the installed kvmmm; likewise;
- run: what is to be run; made anew each time.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import selection
from host import Host, unpacked
from layer import Layer

if TYPE_CHECKING:
    from collections.abc import Callable

_HERE = Path(__file__).resolve().parent
REPOSITORY = _HERE.parent.parent
BUILD = REPOSITORY / "build" / "npt"

_LDD_LINE = re.compile(r"(/\S+) \(0x")
_ACCOUNTS = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
    "/etc/group": "root:x:0:\nkvm:x:104:\nnogroup:x:65534:\n",
    "/etc/hosts": "127.0.0.1 localhost\n",
}


def build(host: Host) -> list[Path]:
    """Bring the base and the project layer up to date.

    Returns:
        Their archives, in the order in which the kernel must find them.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return [
            _kept("base", _base(host), lambda layer: _add_slow_parts(layer, host)),
            _kept("project", _project(), lambda _layer: None),
        ]


def write_command(script: str, out: BinaryIO) -> None:
    """Write the layer that holds what /init runs."""
    layer = Layer()
    layer.content("/npt/command", script.encode())
    layer.write(out)


def _kept(name: str, layer: Layer, complete: Callable[[Layer], None]) -> Path:
    # An archive and the fingerprint it was made for; `complete` adds what follows from the rest.
    archive, note = BUILD / f"{name}.cpio", BUILD / f"{name}.fingerprint"
    fingerprint = layer.fingerprint()
    if archive.exists() and note.exists() and note.read_text() == fingerprint:
        return archive
    print(f"npt: writing {archive.relative_to(REPOSITORY)}", file=sys.stderr, flush=True)
    complete(layer)
    fresh = archive.with_suffix(".new")
    with fresh.open("wb") as out:
        layer.write(out)
    fresh.replace(archive)
    note.write_text(fingerprint)
    return archive


def _base(host: Host) -> Layer:
    layer = Layer()
    for path in ("/dev", "/proc", "/sys", "/root", "/run", "/var/tmp"):  # noqa: S108
        layer.directory(path)
    layer.directory("/tmp", 0o1777)  # noqa: S108 - the machine's own
    for account, content in _ACCOUNTS.items():
        layer.content(account, content.encode())
    _add_busybox(layer, host)
    for part in (*_HERE.glob("*.*"), *host.modules):  # a change of these makes a new image
        layer.mirror(part)
    layer.mirror(sys.executable)
    layer.mirror_tree(sysconfig.get_path("stdlib"), selection.keep_stdlib)
    for folder in selection.environment():
        layer.mirror_tree(folder, selection.keep_package)
    _add_scripts(layer, ("python*", "pytest", "py.test"))
    if sys.prefix != sys.base_prefix:
        layer.mirror(Path(sys.prefix) / "pyvenv.cfg")
    if Path("/etc/ld.so.cache").exists():
        layer.mirror("/etc/ld.so.cache")
    return layer


def _project() -> Layer:
    layer = Layer()
    layer.mirror_tree(REPOSITORY, selection.keep_project)
    for folder in selection.environment():
        layer.mirror_tree(folder, selection.is_ours)
    _add_scripts(layer, ("kvmmm",))
    return layer


def _add_busybox(layer: Layer, host: Host) -> None:
    busybox = layer.mirror(host.busybox)
    layer.content("/init", f"#!{busybox} sh\n{(_HERE / 'init.sh').read_text()}".encode(), 0o755)
    listed = subprocess.run([busybox, "--list"], check=True, stdout=subprocess.PIPE, text=True)
    for applet in listed.stdout.split():
        layer.symlink(f"/npt/bin/{applet}", busybox)
    for folder, applet in (("/bin", "sh"), ("/usr/bin", "env")):  # where scripts look for them
        layer.symlink(f"{layer.mirror(folder)}/{applet}", busybox)


def _add_slow_parts(layer: Layer, host: Host) -> None:
    # What follows from the files that the fingerprint knows: unpacked modules, shared libraries.
    for number, module in enumerate(host.modules):
        name = module.name.partition(".")[0]
        layer.content(f"/npt/modules/{number:02}-{name}.ko", unpacked(module))
    users = [os.path.realpath(sys.executable), os.path.realpath(host.busybox), *layer.libraries()]
    listed = subprocess.run(
        ["ldd", *users], check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for library in sorted(set(_LDD_LINE.findall(listed.stdout))):
        layer.mirror(library)
        # libc opens this one when a thread is cancelled.
        unwinder = Path(library).parent / "libgcc_s.so.1"
        if Path(library).name == "libc.so.6" and unwinder.exists():
            layer.mirror(unwinder)


def _add_scripts(layer: Layer, names: tuple[str, ...]) -> None:
    folder = Path(sysconfig.get_path("scripts"))
    for pattern in names:
        for path in folder.glob(pattern):
            layer.mirror(path)
