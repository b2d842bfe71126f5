"""The guest library's C, run on the host against a fake ring."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "guest" / "lib"
HOSTED = ("console.c", "printf.c", "args.c", "memory.c", "mem.c")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_console_text_options_and_memory_functions(tmp_path: Path) -> None:
    program = tmp_path / "ring_test"
    subprocess.run(
        [
            "gcc", "-O1", "-DKVMMM_HOSTED", "-fno-builtin", "-Wall", "-Wextra",
            f"-I{ROOT / 'guest' / 'include'}", f"-I{LIBRARY}", "-o", program,
            Path(__file__).parent / "ring_test.c", *(LIBRARY / name for name in HOSTED),
        ],
        check=True, timeout=60,
    )  # fmt: skip
    result = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr
