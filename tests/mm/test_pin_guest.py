"""mm.pin under a real guest: what it writes is in the buffer, and the other way round."""

from __future__ import annotations

import pytest

import kvmmm

DATA = 0x500000
# mov $DATA,%ebx; mov (%rbx),%eax; movl $42,4(%rbx); out %eax,$0xb8
CODE = bytes.fromhex("bb00005000 8b03 c743042a000000 e7b8")


@pytest.mark.kvm
@pytest.mark.npt
def test_both_sides_see_it():
    with kvmmm.MicroVM(memory="16M") as vm:
        vm.load(CODE, base=0x200000)
        view = vm.mm.pin(DATA, 8)
        view[:4] = (7).to_bytes(4, "little")
        result = vm.run(timeout=10.0)
        assert result.status == 7
        assert bytes(view) == b"\x07\0\0\0\x2a\0\0\0"
    # And the machine is gone.
    view[0] = 1
    assert view[4] == 42
    view.release()
