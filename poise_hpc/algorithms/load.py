"""A candidate package: its files, their hashes, and its algorithm.

A package is a folder with `algorithm.py`, which defines ALGORITHM, and further modules beside it (`from .helpers import f`).
Whatever else lies in the folder is not part of it. `load` executes candidate code: in jobs only.
"""
from __future__ import annotations

import hashlib
import importlib
import itertools
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..types import CandidateError
from . import gate

if TYPE_CHECKING:
    from .base import Algorithm  # torch: not on the login node

MAX_FILES, MAX_BYTES = 32, 256 * 1024  # per package; per file
FRAMES = 6                             # of a traceback that are shown

_number = itertools.count()  # of packages loaded by this process


def manifest(package: Path) -> dict[str, str]:
    """SHA-256 of each of the package's files, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(package.glob("*.py")) if path.is_file()}


def sources(package: Path) -> dict[str, str]:
    """The package's files, name -> text; CandidateError if it has other than ordinary UTF-8 files of a reasonable size."""
    paths = sorted(package.glob("*.py"))
    if len(paths) > MAX_FILES:
        raise CandidateError("package", f"{package} has {len(paths)} Python files; at most {MAX_FILES} are allowed")
    return {path.name: _read(path) for path in paths}


def _read(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        raise CandidateError("package", f"{path.name} is no ordinary file; copy what it stands for into the package")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise CandidateError("package", f"{path.name} has {size} bytes; at most {MAX_BYTES} are allowed")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CandidateError("package", f"{path.name} is not UTF-8 ({error}); save it as UTF-8") from None


def load(package: Path) -> Algorithm:
    """The package's ALGORITHM; CandidateError if the gate refuses it or its code fails.

    Each call makes modules of its own, so that several packages, or two versions of one, live in one process.
    """
    from .base import Algorithm

    files = sources(package)
    if found := gate.check_files(files):
        raise CandidateError("gate", "\n".join(map(str, found)))
    name = f"poise_candidate_{next(_number)}"
    finder = Package(name, package, files)
    sys.meta_path.append(finder)  # stays: an import inside a function comes later
    try:
        algorithm = importlib.import_module(f"{name}.{gate.ENTRY.removesuffix('.py')}").ALGORITHM
    except Exception as error:
        sys.meta_path.remove(finder)
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[module]
        raise CandidateError("import", f"{package.name} cannot be imported: {explain(error)}") from error
    if not isinstance(algorithm, Algorithm):
        raise CandidateError("import", f"ALGORITHM is of type {type(algorithm).__name__}; an instance of a subclass of "
                             "poise_hpc.algorithms.base.Algorithm was wanted")
    return algorithm


class Package(MetaPathFinder, InspectLoader):
    """Imports one package's modules from the text that the gate has read: no byte code, no other file, no second look."""

    def __init__(self, name: str, folder: Path, files: Mapping[str, str]):
        self.name, self.folder = name, folder
        self.files = {f"{name}.{file.removesuffix('.py')}": (file, text) for file, text in files.items()}

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name and fullname not in self.files:
            return None
        return spec_from_loader(fullname, self, origin=self.get_filename(fullname), is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        return fullname == self.name

    def get_filename(self, fullname: str) -> str:
        return str(self.folder) if fullname == self.name else str(self.folder / self.files[fullname][0])

    def get_source(self, fullname: str) -> str:
        return "" if fullname == self.name else self.files[fullname][1]

    def get_code(self, fullname: str) -> object:
        return self.source_to_code(self.get_source(fullname), self.get_filename(fullname))


def explain(error: BaseException) -> str:
    """An exception of candidate code: what it is, and where, without the frames of those who called."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen") and Path(f.filename) not in CALLERS]
    where = "".join(f"\n  {Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in frames[-FRAMES:])
    return f"{type(error).__name__}: {error}{where}"


CALLERS = (Path(__file__), Path(__file__).with_name("checks.py"), Path(importlib.__file__))
