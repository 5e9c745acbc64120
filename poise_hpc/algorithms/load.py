"""Candidate packages: a flat folder of Python files, `algorithm.py` first, which defines a module-level `ALGORITHM`.

Needs no torch before `load`: the controller writes manifests, jobs load. Other files in the folder (proposal, status,
attempts) are not the package's. The text that was read is what is run: no bytecode cache is read or written.
"""
from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import itertools
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import inside, syntax
from ..files import CorruptFile, read_listed
from ..types import RESTORE_CODE, CandidateError
from . import seeds

if TYPE_CHECKING:
    from .base import Algorithm

MAX_FILES = 32
MAX_BYTES = 200_000  # of one file
DECLARE = ('declare what can be switched off in the algorithm\'s class, as `mechanisms = (Mechanism("clip", "clipping", off={"clip": 1e9}),)`: '
           "`off` gives the hyperparameters' values without it (docs/ALGORITHMS.md)")
_serial = itertools.count()


def read_package(package_dir: Path) -> dict[str, str]:
    """File name -> text of every module of the package; CandidateError for what is not one."""
    paths = sorted(package_dir.glob("*.py"))
    if not (package_dir / "algorithm.py").exists():
        found = ", ".join(repr(p.name) for p in paths[:5]) or "no Python file"
        raise _unreadable(f"algorithm.py is missing in {package_dir}; found {found}")
    if len(paths) > MAX_FILES:
        raise _unreadable(f"{len(paths)} Python files; at most {MAX_FILES} make a package")
    return {path.name: _read(path, package_dir.resolve()) for path in paths}


def manifest(package_dir: Path) -> dict[str, str]:
    """File name -> sha256 of its bytes."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in read_package(package_dir).items()}


def verify(package_dir: Path, wanted: Mapping[str, str] | None) -> None:
    """CorruptFile unless the package is the one of that manifest (None: any will do). An edit is nobody's algorithm, so no CandidateError."""
    if wanted is not None:
        read_listed(package_dir, wanted, RESTORE_CODE)
        if more := sorted({p.name for p in package_dir.glob("*.py")} - wanted.keys()):
            raise CorruptFile(f"{package_dir / more[0]} does not belong to the package: its manifest has {', '.join(sorted(wanted))}. Remove it")


def declared_mechanisms(files: Mapping[str, str]) -> tuple[str, ...]:
    """Names in the package's `mechanisms = (Mechanism("name", ...), ...)`, read and not run; () where they are not written out."""
    return tuple(_mechanisms(files))


def switchable(files: Mapping[str, str]) -> frozenset[str]:
    """Of `declared_mechanisms` those that `without` can switch off: `off` says how."""
    return frozenset(name for name, off in _mechanisms(files).items() if off is not None and not (isinstance(off, ast.Dict) and not off.keys))


def off_text(files: Mapping[str, str], mechanism: str) -> str:
    """The values that `without` sets, as the code has them: what goes off together with the mechanism is among them. "" if it does not say."""
    off = _mechanisms(files).get(mechanism)
    return ast.unparse(off) if off is not None else ""


def _mechanisms(files: Mapping[str, str]) -> dict[str, ast.expr | None]:
    """Name -> its `off`, as written."""
    try:
        tree = syntax.parse(files["algorithm.py"])
    except (SyntaxError, ValueError):  # a finding of the gate's, not ours
        return {}
    written = [node.value for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
               and any(isinstance(t, ast.Name) and t.id == "mechanisms" for t in getattr(node, "targets", None) or [node.target])]
    calls = [call for value in written[-1:] for call in ast.walk(value) if isinstance(call, ast.Call)
             and isinstance(call.func, ast.Name) and call.func.id == "Mechanism" and call.args]
    offs = [(c.args[0], [*c.args[2:3], *(k.value for k in c.keywords if k.arg == "off")]) for c in calls]
    return {name.value: off[0] if off else None for name, off in offs if isinstance(name, ast.Constant) and isinstance(name.value, str)}


def write_seed_package(name: str, package_dir: Path) -> None:
    """A seed as a candidate package of its own."""
    package_dir.mkdir(parents=True, exist_ok=True)
    (package_dir / "algorithm.py").write_text(seeds.source(name), encoding="utf-8")


def load(package_dir: Path, wanted: Mapping[str, str] | None = None) -> Algorithm:
    """The package's ALGORITHM; of the package that the manifest `wanted` describes, if it is given. Imports run; whatever they
    raise is a CandidateError with the candidate's own frames.

    Every call makes modules of its own, so that two packages, or two versions of one, live side by side.
    """
    from .base import Algorithm

    verify(package_dir, wanted)
    package = f"poise_candidate_{next(_serial)}"
    finder = _Finder(package, package_dir.resolve(), read_package(package_dir))
    sys.modules[package] = root = types.ModuleType(package)
    root.__path__ = []  # a package, whose modules only the finder knows
    sys.meta_path.insert(0, finder)
    try:
        with inside.candidate_code():
            module = importlib.import_module(f"{package}.algorithm")
    except (Exception, SystemExit) as error:  # candidate code ran: the blame is set here
        raise CandidateError("import-failed", blame(error, package_dir)) from error
    algorithm = getattr(module, "ALGORITHM", None)
    if not isinstance(algorithm, Algorithm):
        raise CandidateError("no-algorithm", "algorithm.py must end with `ALGORITHM = X()`, an instance of a subclass of "
                                             f"poise_hpc.algorithms.base.Algorithm; its ALGORITHM is {algorithm!r:.100}")
    return algorithm


def blame(error: BaseException, package_dir: Path) -> str:
    """The exception and the candidate's own lines that led to it, outermost first."""
    folder = package_dir.resolve()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == folder]
    lines = [f"  {Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in frames[-6:]]
    return "\n".join([f"{type(error).__name__}: {error}"[:2000], *lines])


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports the modules of one package from text that was read before."""

    def __init__(self, package: str, folder: Path, files: Mapping[str, str]):
        self.files = {f"{package}.{name.removesuffix('.py')}": (str(folder / name), text) for name, text in files.items()}

    def find_spec(self, fullname: str, path: Sequence[str] | None = None,
                  target: types.ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in self.files else None

    def get_source(self, fullname: str) -> str:
        return self.files[fullname][1]

    def get_code(self, fullname: str) -> types.CodeType:
        filename, text = self.files[fullname]
        return compile(text, filename, "exec", dont_inherit=True)

    def is_package(self, fullname: str) -> bool:
        return False


def _read(path: Path, folder: Path) -> str:
    if not path.stem.isidentifier():
        raise _unreadable(f"{path.name!r} is no module name; letters, digits and underscores are")
    if path.resolve().parent != folder:
        raise _unreadable(f"{path.name} leads out of the package, to {path.resolve()}")
    if not path.is_file():
        raise _unreadable(f"{path.name} is not a file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise _unreadable(f"{path.name} has {size} bytes; at most {MAX_BYTES} are read")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(f"{path.name} is not UTF-8: {error}. Save it as UTF-8") from None
    if text.startswith("\ufeff"):
        raise _unreadable(f"{path.name} begins with a byte order mark, as some editors write it. Save it as UTF-8 without one")
    return text


def _unreadable(message: str) -> CandidateError:
    return CandidateError("unreadable-package", message)
