"""The guest's machine code is what its listing says."""

from __future__ import annotations

from tests.hammer.guest import CODE, LISTING, NEXT


def test_listing():
    import capstone

    found = [
        (i.address, bytes(i.bytes).hex(" "), f"{i.mnemonic} {i.op_str}")
        for i in capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm(CODE, 0)
    ]
    assert found == list(LISTING)
    assert NEXT in {at for at, _, _ in LISTING}
