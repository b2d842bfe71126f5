"""The bundled guests as files: what the linker made of them, and what the manifest says."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).parents[2]
GUEST = ROOT / "guest"
MANIFEST = tomllib.loads((GUEST / "manifest.toml").read_text(encoding="utf-8"))
GUESTS: dict[str, dict[str, Any]] = {guest["name"]: guest for guest in MANIFEST["guest"]}

R, W, X = 4, 2, 1
ORDINARY = [R | X, R, R | W]
SEGMENTS = {"bench_first": [R | X], "straddle": [*ORDINARY, R | W | X]}
PAGE = 4096
OUTCOMES = {"exited", "fault", "deadline", "shutdown", "memory", "exception"}


def installed_images() -> Path | None:
    """Where the build puts the guests: beside the compiled core, also in an editable install."""
    core = find_spec("kvmmm._core")
    return Path(core.origin).parent / "_guests" if core is not None and core.origin else None


def source_of(name: str) -> Path:
    group, _, rest = name.partition("_")
    folder = GUEST / group / rest if group in {"bench", "user"} else GUEST / name
    return next(folder.glob("main.[cS]"))


def check_image(path: Path, flags: list[int]) -> None:
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        assert (elf.elfclass, elf["e_machine"], elf["e_type"]) == (64, "EM_X86_64", "ET_EXEC")
        kinds = {segment["p_type"] for segment in elf.iter_segments()}
        assert kinds <= {"PT_LOAD", "PT_GNU_STACK"}, "static, without an interpreter"
        loads = [s.header for s in elf.iter_segments("PT_LOAD")]
        assert [load["p_flags"] for load in loads] == flags
        assert loads[0]["p_vaddr"] == 0x200000
        end = 0
        for load in loads:
            assert load["p_memsz"] > 0
            assert load["p_vaddr"] % PAGE == 0, "a page has one permission"
            assert load["p_offset"] % PAGE == 0 or load["p_filesz"] == 0
            assert load["p_vaddr"] >= end
            end = load["p_vaddr"] + load["p_memsz"]
        text = loads[0]
        assert text["p_vaddr"] <= elf["e_entry"] < text["p_vaddr"] + text["p_filesz"]
        section = elf.get_section_by_name(".text")
        assert 0 <= elf["e_entry"] - section["sh_addr"] < section["sh_size"]
        for section in elf.iter_sections():
            assert section["sh_type"] not in {"SHT_RELA", "SHT_DYNAMIC"}, section.name


def check_program(path: Path) -> None:
    """What every program for ring 3 has: no interpreter, a note that says what it is, W or X."""
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        assert (elf.elfclass, elf["e_machine"]) == (64, "EM_X86_64")
        assert elf["e_type"] == ("ET_DYN" if "stack" in path.name else "ET_EXEC")
        kinds = {segment["p_type"] for segment in elf.iter_segments()}
        assert "PT_INTERP" not in kinds
        assert "PT_NOTE" in kinds
        loads = [s.header for s in elf.iter_segments("PT_LOAD")]
        assert [load["p_flags"] for load in loads] == [R, R | X, R, R | W]
        assert {s["p_flags"] for s in elf.iter_segments("PT_GNU_STACK")} == {R | W}


@pytest.mark.parametrize("name", GUESTS)
def test_installed_image(name: str) -> None:
    folder = installed_images()
    if folder is None or not (folder / f"{name}.elf").is_file():
        pytest.skip(f"{name}.elf is not built: pip install . (or make guests)")
    if GUESTS[name]["group"] == "user":
        check_program(folder / f"{name}.elf")
    else:
        check_image(folder / f"{name}.elf", SEGMENTS.get(name, ORDINARY))
    installed = tomllib.loads((folder / "manifest.toml").read_text(encoding="utf-8"))
    assert name in {guest["name"] for guest in installed["guest"]}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_command_of_the_readme(tmp_path: Path) -> None:
    text = (GUEST / "README.md").read_text(encoding="utf-8")
    kernel = re.search(r"```c\n(.*?)```", text, re.DOTALL)
    command = re.search(r"```sh\n(gcc .*?)```", text, re.DOTALL)
    assert kernel is not None
    assert command is not None
    (tmp_path / "kernel.c").write_text(kernel[1], encoding="utf-8")
    line = command[1].replace("$GUEST", shlex.quote(str(GUEST)))
    subprocess.run(
        ["sh", "-c", line.replace("gcc ", "gcc -Wall -Wextra -Werror ", 1)],
        cwd=tmp_path, check=True, timeout=60,
    )  # fmt: skip
    check_image(tmp_path / "kernel.elf", ORDINARY)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_command_for_programs_of_the_readme(tmp_path: Path) -> None:
    text = (GUEST / "README.md").read_text(encoding="utf-8")
    command = re.findall(r"```sh\n(gcc .*?)```", text, re.DOTALL)[1]
    shutil.copy(GUEST / "user" / "hello" / "main.c", tmp_path / "program.c")
    line = command.replace("$GUEST", shlex.quote(str(GUEST)))
    subprocess.run(
        ["sh", "-c", line.replace("gcc ", "gcc -Wall -Wextra -Werror ", 1)],
        cwd=tmp_path, check=True, timeout=60,
    )  # fmt: skip
    check_program(tmp_path / "program")


def test_manifest_is_complete() -> None:
    built = (ROOT / "kvmmm" / "_native" / "guests.cmake").read_text(encoding="utf-8")
    folders = {p.parent for p in GUEST.glob("*/main.*")} | {
        p.parent for group in ("bench", "user") for p in GUEST.glob(f"{group}/*/main.*")
    }
    assert {source_of(name).parent for name in GUESTS} == folders
    assert all(folder.name in built for folder in folders)


@pytest.mark.parametrize("name", GUESTS)
def test_manifest_entry(name: str) -> None:
    guest = GUESTS[name]
    assert guest["group"] in {"demo", "test", "user", "bench"}
    cases = [guest, *({**guest, **case} for case in guest.get("case", ()))]
    for case in cases:
        assert {"cmdline", "memory", "timeout", "property"} <= case.keys()
        expect = case["expect"]
        assert expect["outcome"] in OUTCOMES
        assert ("status" in expect) == (expect["outcome"] == "exited")
    first = source_of(name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"/* {name}: ")
    assert "Expected: " in first
