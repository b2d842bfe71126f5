"""The stack that a Linux program finds at its entry: words, environment, auxiliary vector.

    top - 8     0
                file name, environment and arguments as NUL-terminated text
                "x86_64", 16 random bytes
                padding to 16
                auxv[]: (type, value) pairs, AT_NULL last
                envp[], 0
                argv[], 0
    rsp ──────► argc                                          rsp % 16 == 0

Source: System V ABI, AMD64 supplement, 3.4.1 and figure 3.9; Linux fs/binfmt_elf.c,
create_elf_tables.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmmm.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

AT_NULL, AT_PHDR, AT_PHENT, AT_PHNUM, AT_PAGESZ, AT_BASE, AT_FLAGS, AT_ENTRY = (
    0,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
)
AT_UID, AT_EUID, AT_GID, AT_EGID, AT_PLATFORM, AT_HWCAP, AT_CLKTCK = 11, 12, 13, 14, 15, 16, 17
AT_SECURE, AT_RANDOM, AT_HWCAP2, AT_EXECFN, AT_MINSIGSTKSZ = 23, 25, 26, 31, 51
"""Source: <linux/auxvec.h>."""

HWCAP2_FSGSBASE = 1 << 1

STACK_BYTES = 8 << 20
"""RLIMIT_STACK as Linux has it by default."""
_STRINGS_LIMIT_BYTES = STACK_BYTES // 4  # Linux fs/exec.c: a quarter of the stack
_STRING_LIMIT_BYTES = 32 * 4096  # MAX_ARG_STRLEN
_RANDOM_BYTES = 16


def build_stack(
    top: int, argv: Sequence[bytes], env: Sequence[bytes], auxv: Mapping[int, int], *,
    execfn: bytes, random: bytes,
) -> tuple[int, bytes]:  # fmt: skip
    """Return the initial rsp, and the bytes from there up to `top`.

    Args:
        top: One past the highest byte of the stack, a multiple of 16.
        argv: The program's words, its name first.
        env: `NAME=value` strings.
        auxv: Values by AT_* type; those that point into the stack are added here.
        execfn: What AT_EXECFN points to.
        random: What AT_RANDOM points to, 16 bytes.

    Raises:
        ImageError: Too much text, or a NUL in it.
    """
    _check(argv, env, execfn)
    chunks: list[bytes] = [bytes(8)]
    at = top - 8

    def put(content: bytes) -> int:
        nonlocal at
        chunks.append(content)
        at -= len(content)
        return at

    execfn_addr = put(execfn + b"\0")
    env_addrs = [put(string + b"\0") for string in reversed(env)][::-1]
    arg_addrs = [put(string + b"\0") for string in reversed(argv)][::-1]
    platform_addr = put(b"x86_64\0")
    random_addr = put(random[:_RANDOM_BYTES].ljust(_RANDOM_BYTES, b"\0"))
    entries = dict(auxv) | {
        AT_RANDOM: random_addr, AT_EXECFN: execfn_addr, AT_PLATFORM: platform_addr,
    }  # fmt: skip
    words = [len(argv), *arg_addrs, 0, *env_addrs, 0]
    for kind, value in entries.items():
        words += (kind, value)
    words += (AT_NULL, 0)
    rsp = (at - 8 * len(words)) & ~15
    put(bytes(at - 8 * len(words) - rsp))
    put(struct.pack(f"<{len(words)}Q", *words))
    return rsp, b"".join(reversed(chunks))


def _check(argv: Sequence[bytes], env: Sequence[bytes], execfn: bytes) -> None:
    strings = (*argv, *env, execfn)
    for string in strings:
        if b"\0" in string:
            raise ImageError("command line", f"a NUL inside of {string[:40]!r}")
        if len(string) >= _STRING_LIMIT_BYTES:
            raise ImageError(
                "command line",
                f"one word has {len(string)} bytes: at most {_STRING_LIMIT_BYTES - 1} fit",
            )
    n_bytes = sum(len(string) + 9 for string in strings)
    if n_bytes > _STRINGS_LIMIT_BYTES:
        raise ImageError(
            "command line",
            f"words and environment take {n_bytes} bytes: {_STRINGS_LIMIT_BYTES} fit",
        )
