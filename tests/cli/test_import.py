"""`import kvmmm` costs next to nothing, and gives every name that it promises."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvmmm


def test_every_public_name_is_there():
    for name in kvmmm.__all__:
        assert getattr(kvmmm, name) is not None
    assert set(kvmmm.__all__) <= set(dir(kvmmm))
    assert "__version__" in dir(kvmmm)


def test_what_the_type_checker_sees_is_what_is_imported():
    tree = ast.parse(Path(kvmmm.__file__).read_text())
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("kvmmm.")
        for alias in node.names
    }
    assert seen == kvmmm._HOME_OF
    assert set(seen) == set(kvmmm.__all__)


def test_unknown_names_raise():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kvmmm.nothing


def test_importing_it_imports_nothing_of_its_own():
    code = "import sys, kvmmm; print(*[m for m in sys.modules if m.startswith('kvmmm.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert not done.stdout.strip()


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["run", "--help"]])
def test_help_imports_no_machine(args: list[str]):
    code = (
        "import sys\nfrom kvmmm.cli import main\n"
        f"sys.argv = ['kvmmm', *{args!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "slow = ('kvmmm.vmm', 'kvmmm.platform', 'rich', 'capstone')\n"
        "print([m for m in sys.modules if m.startswith(slow)], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stderr.strip() == "[]"
