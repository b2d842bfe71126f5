"""tools/npt: what goes into the image, and a run of the machine where its parts are here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

TOOL = Path(__file__).resolve().parents[2] / "tools" / "npt"
MODULES = ("bytecode", "cpio", "host", "layer", "selection")


@pytest.fixture(scope="module")
def npt() -> Iterator[SimpleNamespace]:
    """The tool's modules; a script's own, so they are on the path and in sys.modules only here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOL))
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


def run_tool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | environment,
    )


def written(layer: Any, folder: Path) -> Path:
    archive = folder / "archive.cpio"
    with archive.open("wb") as out:
        layer.write(out)
    return archive


def members(archive: Path) -> dict[str, bytes]:
    """Read an archive back: content by path."""
    data, found, at = archive.read_bytes(), {}, 0
    while True:
        assert data[at : at + 6] == b"070701"
        numbers = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        length_bytes, name_bytes = numbers[6], numbers[11]
        name = data[at + 110 : at + 110 + name_bytes - 1].decode()
        at = (at + 110 + name_bytes + 3) & ~3
        if name == "TRAILER!!!":
            assert at == len(data)
            return found
        assert str(Path(name).parent) in {".", *found}, f"{name} comes before its directory"
        found[name] = data[at : at + length_bytes]
        at = (at + length_bytes + 3) & ~3


def test_links_on_the_way_are_mirrored(npt: SimpleNamespace, tmp_path: Path):
    real = tmp_path / "real"
    (real / "deep").mkdir(parents=True)
    (real / "deep" / "file").write_bytes(b"abcde")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "absolute").symlink_to(tmp_path / "link" / "deep")
    layer = npt.layer.Layer()
    assert layer.mirror(tmp_path / "absolute" / "file") == str(real / "deep" / "file")
    found = members(written(layer, tmp_path))
    top = str(tmp_path).lstrip("/")
    assert found[f"{top}/absolute"] == os.fsencode(tmp_path / "link" / "deep")
    assert found[f"{top}/link"] == b"real"
    assert found[f"{top}/real/deep/file"] == b"abcde"


def test_a_fingerprint_changes_with_a_file(npt: SimpleNamespace, tmp_path: Path):
    def fingerprint() -> str:
        layer = npt.layer.Layer()
        layer.mirror_tree(tmp_path, lambda _entry: True)
        return layer.fingerprint()

    (tmp_path / "a").write_text("1")
    first = fingerprint()
    assert fingerprint() == first
    (tmp_path / "a").write_text("22")
    second = fingerprint()
    (tmp_path / "b").touch()
    assert len({first, second, fingerprint()}) == 3


def test_bytecode_comes_along_and_is_taken_without_a_look_at_the_source(
    npt: SimpleNamespace, tmp_path: Path
):
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "thing.py").write_text("VALUE = 1\n")
    (folder / "template.py").write_text("no Python {{ at all }}\n")
    layer = npt.layer.Layer()
    layer.mirror_tree(folder, lambda _entry: True)
    compiled = {
        name: data for name, data in members(written(layer, tmp_path)).items() if "pycache" in name
    }
    tag = sys.implementation.cache_tag
    name = f"{str(folder).lstrip('/')}/__pycache__/thing.{tag}.pyc"
    assert set(compiled) == {name, str(Path(name).parent)}
    cache = folder / "__pycache__"
    cache.mkdir(exist_ok=True)
    (cache / Path(name).name).write_bytes(compiled[name])
    (folder / "thing.py").write_text("VALUE = 2\n")
    command = [sys.executable, "-c", "import thing; print(thing.VALUE)"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    assert shown.stdout == "1\n"


def test_pytest_takes_the_tests_rewritten_here(npt: SimpleNamespace, tmp_path: Path):
    from _pytest.assertion import rewrite

    source = tmp_path / "test_it.py"
    source.write_text("def test_it():\n    assert 1 + 1 == 2\n")
    made = dict(npt.bytecode.compiled(str(source), source.stat()))
    (name,) = (name for name in made if name.endswith(rewrite.PYC_TAIL))
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(made[name])
    assert rewrite._read_pyc(source, Path(name)) is not None


def test_missing_parts_are_named_with_their_packages():
    done = run_tool("check", PATH="/nonexistent")
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    assert any("apt-get install" in line and "qemu-system-x86" in line for line in lines)
    assert any("apt-get install" in line and "busybox-static" in line for line in lines)


@pytest.mark.slow
def test_a_status_and_the_output_come_out_as_they_are():
    if "KVMMM_TEST_NPT" in os.environ:
        pytest.skip("this is the machine itself")
    if run_tool("check").returncode:
        pytest.skip(run_tool("check").stderr.splitlines()[0])
    if shutil.disk_usage(TOOL).free < 1 << 30:
        pytest.skip("the image needs up to 1 GiB of disk")
    command = "test -c /dev/kvm && seq 3 && exit 77"
    done = run_tool("run", "--timeout", "90", "--shell-command", command)
    assert (done.returncode, done.stdout) == (77, "1\n2\n3\n"), done.stderr
    assert "KVM with nested paging is up" in done.stderr
