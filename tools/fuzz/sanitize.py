"""The core built with AddressSanitizer and UndefinedBehaviorSanitizer, and how a child gets it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parents[2]
_BUILD = _REPOSITORY / "build" / "fuzz"
_FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"


def build() -> Path:
    """Build it, if it is not up to date; return where it is.

    Raises:
        subprocess.CalledProcessError: Something that it takes is missing, or does not compile.
    """
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    source = _REPOSITORY / "kvmmm" / "_native"
    configure: list[str | Path] = [
        "cmake", "-S", source, "-B", _BUILD, "-G", "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_C_FLAGS={_FLAGS}",
    ]  # fmt: skip
    compiles: list[str | Path] = ["cmake", "--build", _BUILD, "--target", "_core"]
    for command in (configure, compiles):
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return next(_BUILD.glob("_core*.so"))


def environment() -> dict[str, str]:
    """Return what a process needs to load it: the sanitizer first, and our handlers left alone."""
    asked = ["gcc", "-print-file-name=libasan.so"]
    runtime = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    return {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": (
            "detect_leaks=0:handle_segv=0:handle_sigbus=0:allocator_may_return_null=1:"
            "quarantine_size_mb=16"
        ),
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def use(core: str) -> None:
    """Have this process take that core; before anything imports one."""
    spec = importlib.util.spec_from_file_location("kvmmm._core", core)
    if spec is None or spec.loader is None:
        raise ImportError(f"{core} is no extension module")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kvmmm._core"] = module
    spec.loader.exec_module(module)
