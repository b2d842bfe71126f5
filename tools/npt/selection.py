"""What goes into the machine: which parts of the standard library, the environment, the project."""

from __future__ import annotations

import fnmatch
import re
import site
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

_CACHE = "__pycache__"
_STDLIB_PRUNED = (
    "config-*", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "test", "tests", "tkinter", "turtle.py", "turtledemo", "_test*", "_tkinter*", "xxlimited*",
)  # fmt: skip
# Compilers, linters, installers and what draws pictures, by the first word of a file's name.
_PACKAGES_PRUNED = (
    "pip", "setuptools", "_distutils_hack", "distutils", "pkg_resources", "wheel", "build", "uv",
    "cmake", "ninja", "scikit_build_core", "pathspec", "ruff", "mypy", "mypyc", "*__mypyc",
    "mypy_extensions", "librt", "ast_serialize", "*_stubs", "types_*", "construct_typing",
    "construct_typed", "import_linter", "importlinter", "grimp", "codespell", "codespell_lib",
    "arrow", "dateutil", "python_dateutil", "tzdata", "six", "numpy", "scipy", "pandas",
    "matplotlib", "mpl_toolkits", "pillow", "PIL", "contourpy", "cycler", "fonttools", "fontTools",
    "kiwisolver", "dask", "distributed", "selenium", "unicorn", "pyparsing",
    # What distributed and selenium bring.
    "cloudpickle", "fsspec", "jinja2", "locket", "markupsafe", "msgpack", "partd", "psutil",
    "tblib", "tlz", "toolz", "tornado", "urllib3", "yaml", "zict",
    "h11", "outcome", "sniffio", "trio", "trio_websocket", "websocket",
    "wsproto",
)  # fmt: skip
_PACKAGE_FILES_PRUNED = (".a", ".c", ".exe", ".h", ".o", ".pyi")
_PROJECT_PRUNED = ("build", "dist", "node_modules", _CACHE)


def environment() -> list[Path]:
    """Return the folders in which this interpreter finds installed packages."""
    folders = site.getsitepackages()
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in folders if Path(folder).is_dir()]


def keep_stdlib(entry: os.DirEntry[str]) -> bool:
    """Tell whether a file or folder of the standard library is taken."""
    name = entry.name
    return name != _CACHE and not any(fnmatch.fnmatch(name, one) for one in _STDLIB_PRUNED)


def keep_package(entry: os.DirEntry[str]) -> bool:
    """Tell whether a file or folder of an installed package is taken."""
    if entry.name == _CACHE or entry.name.endswith(_PACKAGE_FILES_PRUNED):
        return False
    if not _is_top(Path(entry.path)):
        return True
    first = re.sub(r"-stubs$", "_stubs", entry.name)
    first = re.split(r"[-.]", first)[0]
    return not (is_ours(entry) or any(fnmatch.fnmatchcase(first, one) for one in _PACKAGES_PRUNED))


def is_ours(entry: os.DirEntry[str]) -> bool:
    """Tell whether this is of the installed kvmmm: package, metadata, editable finder."""
    if not _is_top(Path(entry.path)):
        return entry.name != _CACHE
    return "kvmmm" in entry.name.lower()


def keep_project(entry: os.DirEntry[str]) -> bool:
    """Tell whether a file or folder of the repository is taken: no caches, no environment."""
    if entry.name.startswith(".") or entry.name in _PROJECT_PRUNED:
        return False
    return not (Path(entry.path) / "pyvenv.cfg").exists()


def _is_top(path: Path) -> bool:
    return path.parent.name in {"site-packages", "dist-packages"}
