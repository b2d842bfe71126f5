"""Who gets SIGSEGV and SIGBUS: every order of handlers, each in a process of its own.

A copy that faults is recovered wherever we can be asked at all; a fault of anybody else ends the
process as if we were not there, and never hangs it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

SEGV, BUS = -signal.SIGSEGV, -signal.SIGBUS
TRACE = "Fatal Python error: Segmentation fault"

# What every process begins with. copy() faults halfway and says whether it counted right; crash()
# is a fault of somebody else's.
_PRELUDE = """
import ctypes, faulthandler, mmap, os, signal, sys, threading
from kvmmm.safemem.ffi import own_faults, safe_copy, safe_load_uint32
fd = os.memfd_create("x")
os.ftruncate(fd, 12288)
libc = ctypes.CDLL(None)
memory = mmap.mmap(fd, 12288)
hva = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc.mprotect(ctypes.c_void_p(hva + 4096), ctypes.c_size_t(4096), 0)
os.ftruncate(fd, 8192)
other = ctypes.create_string_buffer(65536)
def copy():
    for n in (600, 70000):
        got = safe_copy(ctypes.addressof(other), hva + 4000, n)
        assert got == (96, signal.SIGSEGV, hva + 4096), got
    got = safe_copy(hva + 8192, ctypes.addressof(other), 10)
    assert got == (0, signal.SIGBUS, hva + 8192), got
    assert safe_load_uint32(0) == (None, signal.SIGSEGV, 0)
def crash():
    sys.stdout.flush()
    ctypes.string_at(0)
def bus():
    sys.stdout.flush()
    ctypes.string_at(hva + 8192, 1)
"""


def run(body: str, *options: str) -> subprocess.CompletedProcess[str]:
    code = _PRELUDE + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


# What leads to a copy that must come back. The copy is made twice: the first may have changed who
# is asked.
_RECOVERED = {
    "alone": "own_faults()",
    "twice": "own_faults(); own_faults()",
    "faulthandler before": "faulthandler.enable(); own_faults()",
    "faulthandler after": "own_faults(); faulthandler.enable()",
    "faulthandler after, owned again": "own_faults(); faulthandler.enable(); own_faults()",
    "enabled before, disabled after, owned": (
        "faulthandler.enable(); own_faults(); faulthandler.disable(); own_faults()"
    ),
    "enabled and disabled after": (
        "faulthandler.disable(); own_faults(); faulthandler.enable(); faulthandler.disable()"
    ),
    "owned in between": (
        "own_faults(); faulthandler.enable(); own_faults(); faulthandler.disable(); own_faults()"
    ),
    "again and again": """
for _ in range(40):
    own_faults(); faulthandler.enable(); own_faults(); copy(); faulthandler.disable()
    own_faults(); signal.signal(signal.SIGSEGV, signal.SIG_IGN)
    own_faults(); signal.signal(signal.SIGSEGV, lambda *_: None)
    own_faults(); signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    own_faults()
""",
    "a Python handler before": "signal.signal(signal.SIGSEGV, lambda *_: None); own_faults()",
    "a Python handler after, owned": (
        "own_faults(); signal.signal(signal.SIGSEGV, lambda *_: None); own_faults()"
    ),
    "ignored before": "signal.signal(signal.SIGSEGV, signal.SIG_IGN); own_faults()",
    "ignored after, owned": (
        "own_faults(); signal.signal(signal.SIGSEGV, signal.SIG_IGN); own_faults()"
    ),
    "blocked, owned": (
        "own_faults(); signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV, signal.SIGBUS}); "
        "own_faults()"
    ),
}


@pytest.mark.parametrize("options", [(), ("-X", "dev")], ids=["plain", "dev"])
@pytest.mark.parametrize("before", _RECOVERED.values(), ids=list(_RECOVERED))
def test_a_copy_comes_back_and_a_crash_does_not(before: str, options: tuple[str, ...]):
    done = run(f"{before}\ncopy(); copy(); print('whole'); crash(); print('survived')", *options)
    assert (done.returncode, done.stdout) == (SEGV, "whole\n"), done.stderr


def test_who_takes_us_away_must_be_made_good_for():
    """Disabled after us but enabled before, faulthandler restores what was before: not us."""
    done = run("faulthandler.enable(); own_faults(); faulthandler.disable(); copy()")
    assert done.returncode == SEGV


@pytest.mark.parametrize(
    ("before", "n_traces"),
    [
        ("faulthandler.enable()", 1),
        ("own_faults(); faulthandler.enable()", 1),
        ("faulthandler.enable(); own_faults()", 1),
        ("own_faults(); faulthandler.enable(); own_faults()", 1),
        ("faulthandler.enable(); own_faults(); copy()", 1),
        ("own_faults(); faulthandler.enable(); own_faults(); copy()", 1),
        ("own_faults(); faulthandler.enable(); own_faults(); faulthandler.disable()", 0),
    ],
)
def test_faulthandler_tells_once_and_the_process_dies(before: str, n_traces: int):
    done = run(f"{before}\ncrash()")
    assert done.returncode == SEGV
    assert done.stderr.count(TRACE) == n_traces, done.stderr
    done = run(f"{before}\nbus()")
    assert done.returncode == BUS
    assert done.stderr.count("Fatal Python error: Bus error") == n_traces, done.stderr


def test_faulthandler_is_silent_when_it_is_not_asked_first():
    done = run("faulthandler.enable(); own_faults(); copy()")
    assert (done.returncode, done.stderr) == (0, "")


def test_in_a_thread():
    body = """
    own_faults(); faulthandler.enable(); own_faults()
    threads = [threading.Thread(target=copy) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    copy(); print("whole", flush=True)
    threading.Thread(target=crash).start()
    signal.pause()
    """
    done = run(body)
    assert (done.returncode, done.stdout) == (SEGV, "whole\n"), done.stderr


def test_a_thread_that_blocks_the_signal():
    body = """
    own_faults()
    def blocked():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV, signal.SIGBUS})
        own_faults()
        copy()
        print("whole", flush=True)
    thread = threading.Thread(target=blocked); thread.start(); thread.join()
    def killed():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV})
        copy()
        print("survived", flush=True)
    thread = threading.Thread(target=killed); thread.start(); thread.join()
    """
    done = run(body)
    assert (done.returncode, done.stdout) == (SEGV, "whole\n"), done.stderr


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS"])
@pytest.mark.parametrize(
    ("before", "dies"),
    [
        ("own_faults()", True),
        ("faulthandler.enable(); own_faults()", True),
        ("own_faults(); faulthandler.enable()", True),
        ("own_faults(); faulthandler.enable(); own_faults()", True),
        ("own_faults(); faulthandler.enable(); own_faults(); faulthandler.disable()", False),
        ("signal.signal(SIGNAL, signal.SIG_IGN); own_faults()", False),
        ("signal.signal(SIGNAL, HANDLER); own_faults()", False),
        ("own_faults(); signal.signal(SIGNAL, HANDLER); own_faults()", False),
    ],
)
def test_a_signal_that_somebody_sends(name: str, before: str, dies: bool):
    handler = "lambda *_: print('handled', end='')"
    before = before.replace("SIGNAL", f"signal.{name}").replace("HANDLER", handler)
    send = "os.kill(os.getpid(), signal.SIGSEGV)"
    if name == "SIGBUS":
        send = "signal.raise_signal(signal.SIGBUS)"
    done = run(f"{before}\ncopy(); print('whole', flush=True); {send}\nprint('survived')")
    if dies:
        answer = (-getattr(signal, name), "whole\n")
    else:
        answer = (0, f"whole\n{'handled' * ('handled' in before)}survived\n")
    assert (done.returncode, done.stdout) == answer, done.stderr


def test_a_signal_from_outside_while_nothing_happens():
    process = subprocess.Popen(
        [sys.executable, "-c", f"{_PRELUDE}own_faults(); print('up', flush=True); signal.pause()"],
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGSEGV)
        assert process.wait(60) == SEGV


def test_a_signal_from_outside_while_copies_run():
    body = """
    own_faults()
    big = ctypes.create_string_buffer(32 << 20)
    at = ctypes.addressof(big)
    print("up", flush=True)
    while True:
        safe_copy(at, at + (16 << 20), 16 << 20)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _PRELUDE + textwrap.dedent(body)], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGSEGV)
        assert process.wait(60) == SEGV


@pytest.mark.parametrize("before", ["own_faults()", "faulthandler.enable(); own_faults()"])
def test_a_stack_that_overflows(before: str):
    body = f"""
    {before}
    copy()
    callback = ctypes.CFUNCTYPE(None)
    @callback
    def deeper(): deeper()
    sys.setrecursionlimit(1 << 30)
    deeper()
    """
    assert run(body).returncode == SEGV


def test_a_handler_that_cures_the_fault():
    """A C handler is called as the kernel would: with the siginfo, and the signal blocked."""
    body = """
    faults = []
    @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    def cure(signo, info, context):
        faults.append(ctypes.c_uint64.from_address(info + 16).value - hva)
        faults.append(signal.SIGSEGV in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        libc.mprotect(ctypes.c_void_p(hva + 4096), ctypes.c_size_t(4096), 3)
    class Action(ctypes.Structure):
        _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_uint64 * 16),
                    ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]
    action = Action(ctypes.cast(cure, ctypes.c_void_p), flags=4)
    libc.sigaction(signal.SIGSEGV, ctypes.byref(action), None)
    own_faults()
    copy()
    assert not faults
    for n in range(3):
        libc.mprotect(ctypes.c_void_p(hva + 4096), ctypes.c_size_t(4096), 0)
        ctypes.string_at(hva + 4100 + n, 1)
    print(faults)
    """
    done = run(body)
    assert done.stdout == "[4100, True, 4101, True, 4102, True]\n", done.stderr


def test_own_faults_again_after_somebody_put_us_back_by_signal():
    """signal(2) restores the function, and not that it wants the siginfo."""
    body = """
    libc.signal.restype = libc.signal.argtypes = None
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    own_faults()
    ours = libc.signal(signal.SIGSEGV, None)
    libc.signal(signal.SIGSEGV, ours)
    own_faults()
    copy()
    print("whole")
    crash()
    """
    done = run(body)
    assert (done.returncode, done.stdout) == (SEGV, "whole\n"), done.stderr
