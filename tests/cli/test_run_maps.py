"""`kvmmm run --maps`: a picture or a text of what was mapped, however the run ends."""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from tests.vmm.user_program import Program

from .conftest import last_line

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Command

SVG = "{http://www.w3.org/2000/svg}"


def texts(path: Path) -> list[str]:
    """What an SVG says."""
    root = ET.parse(path).getroot()  # noqa: S314
    assert root.tag == f"{SVG}svg"
    return [element.text or "" for element in root.iter(f"{SVG}text")]


@pytest.mark.kvm
class TestPictures:
    @pytest.mark.npt
    def test_of_a_kernel(self, kvmmm: Command, tmp_path: Path):
        path = tmp_path / "touch.svg"
        done = kvmmm("run", "touch", "--stats", "--maps", str(path))
        assert done.returncode == 0, done.stderr
        said = texts(path)
        assert "touch.elf" in said
        assert "the guest exited with status 0" in said
        assert "a guest kernel in 64 MiB of memory; addresses are guest-physical" in said
        assert {"[image]", "[memory]", "r-xp", "rw-p"} <= set(said)
        stats = re.search(rb"(\d+) vma look-ups", done.stderr)
        assert stats is not None
        assert any(text.endswith(f"{stats[1].decode()} faults") for text in said)

    @pytest.mark.npt
    def test_of_a_program(self, kvmmm: Command, tmp_path: Path):
        path = tmp_path / "fork.svg"
        assert kvmmm("run", "user_fork", "--maps", str(path), "--", "pages=50").returncode == 0
        said = texts(path)
        assert "process 1, which has ended with status 0" in said
        assert {"user_fork.elf", "[stack]", "128 TiB unmapped"} <= set(said)
        assert any("copied on write" in text for text in said)

    def test_of_processes_that_live(self, kvmmm: Command, tmp_path: Path):
        program, path = tmp_path / "program", tmp_path / "maps.html"
        program.write_bytes(Program().fork(Program().spin()).spin().elf())
        done = kvmmm("run", "--user", str(program), "--timeout", "500ms", "--maps", str(path))
        assert done.returncode == 73
        page = path.read_text()
        assert "process 2, a child of 1" in page
        assert page.count("<table>") == 2
        assert "the deadline passed (exit code 73)" in page
        ET.fromstring(page.split("\n", 1)[1])  # noqa: S314

    @pytest.mark.parametrize(
        ("args", "code"),
        [
            (("user_fault",), 67),
            (("user_fault", "--", "kind=code"), 67),
            (("user_fault", "--", "kind=kernel"), 67),
            (("ro",), 67),
            (("nox",), 67),
            (("hog", "--arena", "16M"), 72),
        ],
    )
    def test_after_a_fault(self, kvmmm: Command, tmp_path: Path, args: tuple[str, ...], code: int):
        path = tmp_path / "fault.SVG"
        done = kvmmm("run", "--maps", str(path), *args)
        assert done.returncode == code, done.stderr
        headline = next(
            line for line in done.stderr.decode().splitlines() if line.startswith("guest ")
        )
        assert headline in texts(path)

    def test_after_ctrl_c(self, kvmmm: Command, tmp_path: Path):
        path = tmp_path / "spin.svg"
        with kvmmm.begin("run", "spin", "--timeout", "60s", "--maps", str(path)) as process:
            assert process.stdout.readline().startswith(b"spin:")
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == 75
        assert last_line(stderr) == "kvmmm: stopped by Ctrl-C (exit code 75)"
        assert "stopped by Ctrl-C (exit code 75)" in texts(path)

    def test_after_an_error(self, kvmmm: Command, tmp_path: Path):
        path = tmp_path / "straddle.svg"
        with kvmmm.begin("run", "straddle", "--maps", str(path)) as process:
            assert process.stdout.readline()
            process.stdout.close()
            stderr = process.stderr.read()
        assert process.returncode == 74
        assert b"Traceback" not in stderr
        assert "nobody reads the guest's console any more" in texts(path)


@pytest.mark.kvm
class TestTexts:
    def test_as_in_proc(self, kvmmm: Command, tmp_path: Path):
        path = tmp_path / "maps.txt"
        assert kvmmm("run", "user_hello", "--maps", str(path)).returncode == 0
        text = path.read_text()
        assert re.search(r"^VmRSS:\t +\d+ kB$", text, re.MULTILINE)
        assert re.search(r"^0{0,4}400000-\w+ r-.p .* user_hello.elf$", text, re.MULTILINE)
        mapped = re.findall(r"^[0-9a-f]+-[0-9a-f]+ .*$", text, re.MULTILINE)
        assert len(mapped) == 2 * len(set(mapped)) == 2 * text.count("VmFlags:")

    def test_a_table(self, kvmmm: Command):
        done = kvmmm("run", "hello", "--maps", "-")
        assert done.returncode == 0
        assert b"address" not in done.stdout
        lines = done.stderr.decode().splitlines()
        assert lines[0] == "hello.elf: the guest exited with status 0"
        assert lines[-1] == "kvmmm: the guest exited with status 0"
        assert any(line.split()[:2] == ["address", "perms"] for line in lines)
        assert any(line.endswith("[image]") for line in lines)
        assert len({line.index("r") for line in lines if " r-xp " in line}) == 1


class TestBeforeTheRun:
    @pytest.mark.parametrize(
        ("name", "taught"),
        [
            ("picture.png", ".svg or .html"),
            ("picture", ".svg or .html"),
            (".svg", ".svg or .html"),
            ("none/picture.svg", "there is no directory"),
            ("taken.svg", "it is a directory"),
            ("leads/nowhere.svg/x.svg", "there is no directory"),
            ("dangling.svg", "it leads nowhere"),
        ],
    )
    def test_what_cannot_be_written(
        self, kvmmm_without_kvm: Command, tmp_path: Path, name: str, taught: str
    ):
        (tmp_path / "taken.svg").mkdir()
        (tmp_path / "dangling.svg").symlink_to(tmp_path / "none" / "picture.svg")
        done = kvmmm_without_kvm("run", "hello", "--maps", str(tmp_path / name))
        assert done.returncode == 64
        assert b"--maps" in done.stderr
        assert taught in done.stderr.decode()

    def test_where_one_may_not_write(self, kvmmm_without_kvm: Command, tmp_path: Path):
        if os.geteuid() == 0:
            pytest.skip("root may")
        tmp_path.chmod(0o500)
        done = kvmmm_without_kvm("run", "hello", "--maps", str(tmp_path / "x.svg"))
        assert done.returncode == 64
        assert b"you may not write in" in done.stderr

    def test_an_old_picture_stays_until_there_is_a_new_one(
        self, kvmmm_without_kvm: Command, tmp_path: Path
    ):
        path = tmp_path / "old.svg"
        path.write_text("old")
        assert kvmmm_without_kvm("run", "hello", "--maps", str(path)).returncode == 69
        assert path.read_text() == "old"

    def test_help_says_what_it_writes(self, kvmmm: Command):
        text = re.sub(r"\s+", " ", kvmmm("run", "--help").stdout.decode())
        assert "--maps FILE" in text
        assert "FILE.svg is a picture" in text


@pytest.mark.kvm
def test_a_disk_that_is_full(kvmmm: Command, tmp_path: Path):
    path = tmp_path / "full.svg"
    path.symlink_to("/dev/full")
    done = kvmmm("run", "hello", "--maps", str(path))
    assert done.returncode == 71
    assert b"No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr
