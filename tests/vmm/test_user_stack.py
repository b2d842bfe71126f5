"""The initial stack, read back as a program would."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.errors import ImageError
from kvmmm.vmm import user_stack
from kvmmm.vmm.user_stack import STACK_BYTES, build_stack

TOP = 0x7FFF_FFFF_F000
WORDS = st.lists(st.binary(max_size=40).filter(lambda word: b"\0" not in word), max_size=12)


class Program:
    """What a program reads from its stack."""

    def __init__(self, rsp: int, content: bytes, top: int = TOP) -> None:
        self.rsp, self.content, self.top = rsp, content, top

    def word(self, addr: int) -> int:
        return int(struct.unpack_from("<Q", self.content, addr - self.rsp)[0])

    def text(self, addr: int) -> bytes:
        start = addr - self.rsp
        return self.content[start : self.content.index(b"\0", start)]

    def pointers(self, addr: int) -> tuple[list[bytes], int]:
        """The texts of a NULL-terminated array, and where it ends."""
        found = []
        while pointer := self.word(addr):
            found.append(self.text(pointer))
            addr += 8
        return found, addr + 8

    def auxv(self, addr: int) -> dict[int, int]:
        found = {}
        while kind := self.word(addr):
            assert kind not in found
            found[kind] = self.word(addr + 8)
            addr += 16
        return found


@given(
    argv=WORDS, env=WORDS, execfn=st.binary(max_size=20).filter(lambda t: b"\0" not in t),
    auxv=st.dictionaries(st.sampled_from([3, 4, 5, 6, 9, 11, 17]), st.integers(0, 2**64 - 1)),
)  # fmt: skip
def test_a_program_finds_what_was_put_there(
    argv: list[bytes], env: list[bytes], execfn: bytes, auxv: dict[int, int]
):
    random = bytes(range(16))
    rsp, content = build_stack(TOP, argv, env, auxv, execfn=execfn, random=random)
    assert rsp % 16 == 0
    assert rsp + len(content) == TOP
    program = Program(rsp, content)
    assert program.word(rsp) == len(argv)
    words, after = program.pointers(rsp + 8)
    variables, after = program.pointers(after)
    assert (words, variables) == (argv, env)
    found = program.auxv(after)
    assert {kind: found[kind] for kind in auxv} == auxv
    assert program.text(found[user_stack.AT_EXECFN]) == execfn
    assert program.text(found[user_stack.AT_PLATFORM]) == b"x86_64"
    at = found[user_stack.AT_RANDOM] - rsp
    assert content[at : at + 16] == random
    assert program.word(TOP - 8) == 0


def build(argv: list[bytes], env: list[bytes] | None = None) -> None:
    build_stack(TOP, argv, env or [], {}, execfn=b"x", random=bytes(16))


def test_as_much_text_as_linux_takes():
    build([b"x" * (128 * 1024 - 1)] * 15)
    with pytest.raises(ImageError, match="131072 bytes: at most 131071 fit"):
        build([b"x" * (128 * 1024)])
    with pytest.raises(ImageError, match=f"{STACK_BYTES // 4} fit"):
        build([b"x" * 100_000] * 11, [b"y" * 100_000] * 11)


def test_a_nul_inside_of_a_word():
    with pytest.raises(ImageError, match="NUL"):
        build([b"a\0b"])
