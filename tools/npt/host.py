"""What the test machine is made of on this host, and which Debian package brings what is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

_APT = "apt-get install -y --no-install-recommends"
_UNPACK = {".xz": "xz", ".gz": "gzip", ".zst": "zstd"}


class MissingError(Exception):
    """Parts of the machine are not on this host.

    Attributes:
        parts: One line each: what is missing and the command that brings it.
    """

    def __init__(self, parts: list[str]) -> None:
        super().__init__("\n".join(parts))
        self.parts = parts


class Host:
    """The parts found.

    Attributes:
        qemu: qemu-system-x86_64.
        kernel: The compressed Linux image that is booted.
        modules: kvm-amd.ko and what it depends on, in the order in which they are loaded.
        busybox: The shell of /init and its commands.
    """

    def __init__(self, qemu: str, kernel: Path, modules: list[Path], busybox: str) -> None:
        self.qemu = qemu
        self.kernel = kernel
        self.modules = modules
        self.busybox = busybox

    @classmethod
    def find(cls, kernel: Path | None = None) -> Host:
        """Look for every part.

        Args:
            kernel: Boot this image instead of the newest Debian cloud kernel.

        Raises:
            MissingError: `parts` names all that are not here.
        """
        missing = []
        qemu = shutil.which("qemu-system-x86_64") or ""
        if not qemu:
            missing.append(f"qemu-system-x86_64 is missing: {_APT} qemu-system-x86")
        image, modules, complaint = _kernel(kernel)
        if complaint:
            missing.append(complaint)
        busybox = shutil.which("busybox") or ""
        if not busybox:
            missing.append(f"busybox is missing: {_APT} busybox-static")
        if missing:
            raise MissingError(missing)
        return cls(qemu, image, modules, busybox)

    @property
    def release(self) -> str:
        """Kernel release, as in `uname -r`."""
        return _release(self.kernel)


def unpacked(module: Path) -> bytes:
    """Return a kernel module's bytes, whatever Debian compressed it with."""
    tool = _UNPACK.get(module.suffix)
    if tool is None:
        return module.read_bytes()
    return subprocess.run([tool, "-dc", str(module)], check=True, stdout=subprocess.PIPE).stdout


def _kernel(wanted: Path | None) -> tuple[Path, list[Path], str]:
    images = [wanted] if wanted else sorted(Path("/boot").glob("vmlinuz-*-cloud-amd64"), key=_age)
    complaint = f"a Debian cloud kernel is missing: {_APT} linux-image-cloud-amd64"
    for image in reversed(images):
        modules = _modules(_release(image))
        if not modules:
            complaint = (
                f"/lib/modules/{_release(image)} has no kvm-amd.ko: {_APT} linux-image-cloud-amd64"
            )
        elif not os.access(image, os.R_OK):
            complaint = f"{image} cannot be read: chmod a+r {image}"
        else:
            return image, modules, ""
    return Path(), [], complaint


def _age(image: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", image.name)]


def _release(image: Path) -> str:
    return image.name.partition("-")[2]


def _modules(release: str) -> list[Path]:
    # A line of modules.dep: "kvm-amd.ko: what it needs, the last to be loaded first".
    folder = Path("/lib/modules") / release
    try:
        lines = (folder / "modules.dep").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        name, _, needs = line.partition(":")
        if Path(name).name.startswith("kvm-amd.ko"):
            found = [folder / part for part in [*reversed(needs.split()), name]]
            return found if all(part.exists() for part in found) else []
    return []
