"""The static gate: what a candidate package may say, by its syntax trees. Nothing is imported or executed; no torch here.

A gate against accidents and lazy cheating (reading the data, seeding the clock, patching torch), not a sandbox: whoever
means to get around it can. What really holds is the isolation of the job that runs the code (`isolation.py`).
"""
from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ENTRY = "algorithm.py"
FILE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\.py")

MODULES = frozenset({"torch", "torch.nn.functional", "math", "dataclasses", "typing", "__future__", "poise_hpc.algorithms"})
OWN = "poise_hpc.algorithms"
NOT_OWN = frozenset({"load", "gate", "checks", "seeds"})  # the machinery, not the mathematics

# Refused as names, wherever they stand.
NAMES = {name: why for why, names in {
    "algorithms read and write nothing": "open print input breakpoint help",
    "code is not made at run time": "exec eval compile",
    "attributes are written as obj.name": "setattr delattr",
    "scopes are not inspected": "globals locals vars",
    "only Exception and its kinds are raised or caught": "BaseException SystemExit KeyboardInterrupt GeneratorExit exit quit",
}.items() for name in names.split()}

# Refused as attributes of anything (`torch.load`, `t.load`) and as imported names (`from torch import load`).
ATTRIBUTES = {name: why for why, names in {
    "algorithms read and write nothing": "load save from_file tofile fromfile hub serialization package export onnx",
    "the framework owns ranks and devices": "distributed multiprocessing cuda backends",
    "algorithms are plain tensor formulas": "ops classes library jit compile utils overrides register_hook",
    "algorithms are deterministic": "rand rand_like randn randn_like randint randint_like randperm bernoulli bernoulli_ multinomial normal normal_ "
                                    "uniform_ exponential_ random_ manual_seed seed random Generator dropout alpha_dropout",
    "torch's settings are the framework's": "use_deterministic_algorithms set_default_dtype set_default_device set_grad_enabled "
                                            "set_num_threads set_num_interop_threads set_printoptions set_flush_denormal set_rng_state",
    "other modules are not reached through this one": "sys os builtins importlib inspect modules",
}.items() for name in names.split()}

DECORATORS = frozenset({"dataclass", "property", "staticmethod", "classmethod", "no_grad"})
CONSTANT_CALLS = frozenset({"frozenset", "tuple", "float", "int", "range", "Mechanism", "TypeVar", "log", "sqrt", "exp", "field"})
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Pass)


@dataclass(frozen=True)
class Finding:
    file: str
    line: int      # from 1; 0: the file as a whole
    rule: str      # "syntax" | "package" | "import" | "name" | "attribute" | "state" | "top-level"
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}: {self.message}"


def check_files(files: Mapping[str, str]) -> list[Finding]:
    """What the gate has against a package, file name -> text; [] if nothing."""
    found = [] if ENTRY in files else [Finding(ENTRY, 0, "package", f"there is no {ENTRY}; it must define ALGORITHM")]
    for name, text in sorted(files.items()):
        if not FILE_NAME.fullmatch(name):
            found.append(Finding(name, 0, "package", "a file is named like a Python module: letters, digits and _, then .py"))
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ValueError: null bytes
            found.append(Finding(name, getattr(error, "lineno", None) or 0, "syntax", getattr(error, "msg", None) or str(error)))
            continue
        modules = {n.removesuffix(".py") for n in files}
        found += sorted({Finding(name, line, rule, message) for line, rule, message in _findings(tree, modules)},
                        key=lambda f: (f.line, f.rule, f.message))
        if name == ENTRY and not any(_target(node) == "ALGORITHM" for node in tree.body):
            found.append(Finding(name, 0, "package", "ALGORITHM is not assigned at the top level; end the file with ALGORITHM = YourClass()"))
    return found


Found = tuple[int, str, str]


def _findings(tree: ast.Module, modules: set[str]) -> Iterator[Found]:
    yield from _definitions(tree.body, "top-level")
    for node in ast.walk(tree):
        for rule, message in _node(node, modules):
            yield node.lineno, rule, message


def _node(node: ast.AST, modules: set[str]) -> Iterator[tuple[str, str]]:
    match node:
        case ast.Import(names=names):
            yield from (("import", _refused(a.name)) for a in names if not _allowed(a.name))
        case ast.ImportFrom():
            yield from (("import", message) for message in _import_from(node, modules))
        case ast.Name(id=name):
            if name in NAMES:
                yield "name", f"{name} may not be used: {NAMES[name]}"
            elif name.startswith("__"):
                yield "name", f"{name} may not be used: double underscores are Python's own"
        case ast.Attribute():
            yield from _attribute(node)
        case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
            if message := _bad_attribute(name):
                yield "attribute", message
        case ast.Call(func=ast.Name(id="getattr")):
            yield "name", "getattr needs a literal name"
        case ast.Global(names=names):
            yield "state", f"global {', '.join(names)}: what lasts belongs into the `state` dict"
        case ast.ExceptHandler(type=None):
            yield "name", "a bare except hides everything; name the exception"
        case ast.FunctionDef(args=arguments) | ast.Lambda(args=arguments):
            if any(isinstance(d, MUTABLE) for d in [*arguments.defaults, *arguments.kw_defaults]):
                yield "state", "a mutable default argument lasts between calls; what lasts belongs into the `state` dict"
        case ast.ClassDef(body=body):
            for line, rule, message in _definitions(body, "class body"):
                yield rule, f"line {line}: {message}" if line != node.lineno else message
        case ast.AsyncFunctionDef() | ast.Await():
            yield "name", "algorithms are not asynchronous"


# -- imports -----------------------------------------------------------------------------------------------------------

def _allowed(module: str) -> bool:
    head, _, own = module.rpartition(".")
    return module in MODULES or (head == OWN and own not in NOT_OWN)


def _refused(module: str) -> str:
    return (f"{module} may not be imported; allowed are torch, torch.nn.functional, math, dataclasses, typing, __future__, "
            f"{OWN}.* and the package's own files")


def _import_from(node: ast.ImportFrom, modules: set[str]) -> Iterator[str]:
    names = [a.name for a in node.names]
    if "*" in names:
        yield "name what is imported: import * hides it"
    if node.level:
        for target in [node.module] if node.module else names:
            if node.level > 1 or target not in modules:
                yield f"{'.' * node.level}{target} is no file of this package"
        return
    module = node.module or ""
    for name in names:
        full = f"{module}.{name}"
        if not _allowed(module) and not _allowed(full):
            yield _refused(module)
        elif module == OWN and name in NOT_OWN:
            yield _refused(full)
        elif module != OWN and (message := _bad_attribute(name)) and module != "__future__":
            yield message


# -- attributes --------------------------------------------------------------------------------------------------------

def _attribute(node: ast.Attribute) -> Iterator[tuple[str, str]]:
    if not isinstance(node.ctx, ast.Load):
        yield "state", f"{ast.unparse(node)} is assigned; objects stay as they are, what lasts belongs into the `state` dict"
    if ast.unparse(node) == f"{OWN}.ops":
        return
    if message := _bad_attribute(node.attr, own=ast.unparse(node.value) in ("self", "cls")):
        yield "attribute", message


def _bad_attribute(name: str, own: bool = False) -> str | None:
    if name.startswith("__"):
        return f"{name} may not be used: double underscores are Python's own"
    if name.startswith("_") and not own:
        return f"{name} is private to its owner"
    return f"{name} may not be used: {ATTRIBUTES[name]}" if name in ATTRIBUTES else None


# -- definitions -------------------------------------------------------------------------------------------------------

def _definitions(body: list[ast.stmt], where: str) -> Iterator[Found]:
    """A module and a class hold definitions and constants, nothing that runs and nothing that lasts."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            for decorator in node.decorator_list:
                called = decorator.func if isinstance(decorator, ast.Call) else decorator
                if (name := ast.unparse(called).rpartition(".")[2]) not in DECORATORS:
                    yield node.lineno, "top-level", f"decorator {name}; allowed are {', '.join(sorted(DECORATORS))}"
        if isinstance(node, DEFINITIONS) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        if isinstance(node, ast.AnnAssign) and node.value is None:  # a field without a default
            continue
        target = _target(node)
        if target is None:
            yield node.lineno, "top-level", f"`{ast.unparse(node).splitlines()[0][:60]}` runs when the {where.split()[0]} is read; only definitions may stand here"
        elif not (target == "ALGORITHM" and where == "top-level") and not _constant(node.value):
            yield node.lineno, "state", f"{target} is no constant; use a tuple or frozenset, or the `state` dict for what lasts"


def _target(node: ast.AST) -> str | None:
    """The name that an assignment gives, if it gives one."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
            return name
    return None


def _constant(value: ast.expr) -> bool:
    """Literals, tuples and names, and calls that make something immutable of them."""
    if isinstance(value, ast.Call):
        called = ast.unparse(value.func).rpartition(".")[2]
        return called in CONSTANT_CALLS
    if isinstance(value, MUTABLE):
        return False
    return all(_constant(child) for child in ast.iter_child_nodes(value) if isinstance(child, ast.expr))
