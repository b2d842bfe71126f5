"""Processes that really have no VMA left: the mirror gives way, and they go on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_MOST = 300_000  # more than that takes too long to reach

PRELUDE = """
import mmap, os, threading
from kvmmm.errors import AddressSpaceIOUnavailableError
from kvmmm.hostarch.access import READ
from kvmmm.platform.mirror import Mirror
from kvmmm.safemem.ffi import MirrorWindow, own_faults
from tests.platform.mirror_rig import BASE, GIB, MAX_ADDR, PAGE, at, check_windows, hva_of, peek

own_faults()
fd = os.memfd_create("mirrored")
os.ftruncate(fd, PAGE)
os.pwrite(fd, b"the bytes", 0)
mirror = Mirror(MAX_ADDR, lambda: None, budget_vmas=1 << 30)

def map_isolated(i):
    # None of them merges with another.
    addr = BASE + i * 2 * PAGE
    mirror.map_run(addr, addr + PAGE, fd, 0, READ, (addr, addr + 1))
    return addr

taken = []

def exhaust(other, i=0):
    # What somebody else takes, until nothing is left: not even for what would replace a mapping.
    try:
        while True:
            other.map(BASE + i * 2 * PAGE, BASE + (i * 2 + 1) * PAGE, fd, 0, READ)
            i += 1
    except OSError:
        pass
    # The last one has to be one that splits nothing.
    try:
        while True:
            taken.append(mmap.mmap(-1, PAGE))
    except OSError:
        return i

def the_process_goes_on():
    done = []
    thread = threading.Thread(target=lambda: done.append(len(bytearray(1 << 24))))
    thread.start()
    thread.join()
    assert done == [1 << 24]
    mmap.mmap(-1, 1 << 24).close()
    check_windows(mirror)
"""

FILL = """
i = 0
while not mirror.n_evictions:
    addr = map_isolated(i)
    i += 1
assert peek(at(mirror, addr)) == b"the bytes"
assert peek(hva_of(mirror, BASE)) == 11
assert mirror.n_stuck == 0
the_process_goes_on()
n_evictions = mirror.n_evictions
for i in range(i, i + 3000):
    addr = map_isolated(i)
    assert peek(at(mirror, addr)) == b"the bytes"
the_process_goes_on()
mirror.release()
assert mirror.n_vmas_of_process == 0
"""

REMOVAL = """
for i in range(2000):
    map_isolated(i)
other = MirrorWindow(MAX_ADDR)
n_taken = exhaust(other)
# At the limit nothing can be mapped, PROT_NONE neither. Still what must go goes.
mirror.unmap(BASE, BASE + PAGE)
assert mirror.n_stuck == 0
assert peek(hva_of(mirror, BASE)) == 11
assert mirror.find(BASE, 1, READ) is None
check_windows(mirror)
# And again: the reserve was made anew as soon as there was room.
addr = map_isolated(7)
exhaust(other, n_taken)
mirror.unmap(addr, addr + PAGE)
assert mirror.n_stuck == 0
assert peek(hva_of(mirror, addr)) == 11
# There is nothing left that this mirror could give up for a new window.
exhaust(other, n_taken + 5000)
try:
    far = BASE + 40 * GIB
    mirror.map_run(far, far + PAGE, fd, 0, READ, (far, far + 1))
    raise AssertionError("there are still VMAs")
except AddressSpaceIOUnavailableError:
    pass
other.release()
for mapping in taken:
    mapping.close()
the_process_goes_on()
addr = map_isolated(5)
assert peek(at(mirror, addr)) == b"the bytes"
mirror.release()
"""


@pytest.mark.parametrize("code", [FILL, REMOVAL], ids=["filling", "removal"])
def test_at_the_limit(code: str):
    limit = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
    if limit > LIMIT_MOST:
        pytest.skip(f"vm.max_map_count is {limit}: it takes too long to get there")
    run = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
