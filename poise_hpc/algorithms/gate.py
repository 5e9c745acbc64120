"""The static gate: reads a package's syntax trees, imports nothing, needs no torch.

It stops accidents (a forgotten file access, global state, randomness) and lazy cheating before any job. It is no
sandbox: Python cannot be made safe by looking at it. Isolation is the job's (no network, no keys, no writable files).
"""
from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import syntax
from .load import read_package

MODULES = frozenset({"__future__", "dataclasses", "math", "torch", "torch.nn.functional", "typing"})
OURS = "poise_hpc.algorithms"
NOT_OURS = frozenset({"checks", "gate", "load", "probes", "response", "seeds"})  # they read files and import
NAMES = frozenset((
    "open exec eval compile globals locals vars input breakpoint print setattr delattr exit quit help id hash memoryview "
    "BaseException SystemExit KeyboardInterrupt GeneratorExit").split())
# What torch, dataclasses, typing and our own modules let one reach: other modules, files, processes, global switches.
REACHED = frozenset((
    "abc accelerator ao autograd backends builtins classes collections compile compiler copy cpp cpu ctypes cuda contextlib "
    "distributed export from_file from_numpy frombuffer functools futures fx glob hub importlib import_ir_module "
    "import_ir_module_from_buffer inspect itertools jit keyword library load monitor mps mtia multiprocessing np operator ops "
    "optim os overrides package platform profiler quantization re serialization save sparse storage sys testing "
    "textwrap threading torch torch_version types utils version warnings windows xpu fork").split())
RANDOM = frozenset((
    "bernoulli bernoulli_ cauchy_ distributions dropout exponential_ geometric_ initial_seed log_normal_ manual_seed multinomial "
    "normal normal_ poisson quasirandom rand rand_like randint randint_like randn randn_like random random_ randperm seed "
    "uniform_").split())
ATTRIBUTES = frozenset((
    "backward data data_ptr dump f_back f_globals f_locals gi_frame grad_fn numpy register_hook requires_grad_ share_memory_ "
    "tb_frame tofile untyped_storage").split())
DECORATORS = frozenset({"dataclass", "property", "staticmethod", "classmethod"})
CALLS = frozenset({"frozenset", "tuple", "float", "int", "field", "replace"})  # whose result may stand at module or class level
UNDER = "such names lead to other classes, modules and globals; an algorithm needs none of them"
FIX = "keep it in a dataclass field, or in `state`"


@dataclass(frozen=True)
class Finding:
    file: str
    line: int
    rule: str     # slug
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.rule}: {self.message}"


def check_package(package_dir: Path) -> list[Finding]:
    return check_files(read_package(package_dir))


def check_files(files: Mapping[str, str]) -> list[Finding]:
    """Findings of all files, by file and line; none means passed."""
    if "algorithm.py" not in files:
        return [Finding("algorithm.py", 0, "missing", f"a package needs algorithm.py; there is {', '.join(sorted(files)) or 'nothing'}")]
    siblings = frozenset(name.removesuffix(".py") for name in files)
    return [found for name in sorted(files) for found in _check(name, files[name], siblings)]


def _check(file: str, text: str, siblings: frozenset[str]) -> list[Finding]:
    try:
        tree = syntax.parse(text)
        found = {(getattr(node, "lineno", 0), rule, message) for rules in (
            _imports(tree, siblings), _names(tree), _attributes(tree), _level(tree, "module", _classes(tree)), _defaults(tree))
            for node, rule, message in rules}
    except (SyntaxError, ValueError) as error:
        return [Finding(file, getattr(error, "lineno", 0) or 0, "syntax", getattr(error, "msg", str(error)))]
    except (RecursionError, MemoryError):
        return [Finding(file, 0, "syntax", "nested too deeply to be read")]
    if file == "algorithm.py" and not any(_targets(n) == ["ALGORITHM"] for n in tree.body):
        found.add((len(text.splitlines()), "no-algorithm", "must end with `ALGORITHM = X()`"))
    return [Finding(file, *f) for f in sorted(found)]


Rules = Iterator[tuple[ast.AST, str, str]]


def _imports(tree: ast.Module, siblings: frozenset[str]) -> Rules:
    allowed = f"allowed: {', '.join(sorted(MODULES))}, {OURS}.*, modules of the package (from .name import ...)"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name not in MODULES and not _ours(alias.name):
                    yield node, "import", f"`import {alias.name}`; {allowed}"
                elif _ours(alias.name) and not alias.asname:
                    yield node, "import", f"write `from {OURS} import ...`: `import {alias.name}` binds all of poise_hpc"
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}".lstrip(".")
                if alias.name == "*":
                    yield node, "import", "`import *` hides what is imported; name it"
                elif node.level:
                    if node.level > 1 or full.split(".")[0] not in siblings:
                        yield node, "import", f"`{'.' * node.level}{full}` is no module of the package" + _absolute(module)
                elif full in MODULES or (module == OURS and _ours(full)):
                    pass
                elif not (module in MODULES or _ours(module)):
                    yield node, "import", f"`from {module} import {alias.name}`; {allowed}"
                elif why := _reached(alias.name):
                    yield node, *why


def _ours(module: str) -> bool:
    return module.startswith(f"{OURS}.") and not NOT_OURS & set(module.split(".")[2:])


def _absolute(module: str) -> str:
    """What is meant by `from .ops import ...`, in a copy of a file of ours."""
    first = module.split(".")[0]
    ours = _ours(f"{OURS}.{first}") and (Path(__file__).parent / f"{first}.py").is_file()
    return f"; write `from {OURS}.{module} import ...`" if ours else ""


def _reached(name: str) -> tuple[str, str] | None:
    if name in RANDOM:
        return "random", f"`{name}`: an algorithm draws no random numbers; the same batch must give the same values"
    if name in REACHED or name.endswith("Storage") or name.startswith(("set_", "use_deterministic", "_")):
        return "reach", f"`{name}` leads to files, processes, other modules or global switches"
    return None


def _names(tree: ast.Module) -> Rules:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in NAMES:
            yield node, "name", f"`{node.id}`: algorithms are pure, without input, output, reflection or execution of text"
        elif isinstance(node, ast.Name) and _dunder(node.id):
            yield node, "dunder", f"`{node.id}`: {UNDER}"
        elif isinstance(node, ast.FunctionDef) and _dunder(node.name) and node.name != "__post_init__":
            yield node, "dunder", f"`def {node.name}`: only __post_init__ may be defined"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node, "name", "`except:` also catches the end of the job; name the exception"
        elif isinstance(node, ast.Global):
            yield node, "global-state", f"`global {', '.join(node.names)}`; {FIX}"
        elif isinstance(node, ast.AsyncFunctionDef | ast.Await):
            yield node, "async", "nothing to wait for here"


def _attributes(tree: ast.Module) -> Rules:
    modules = _module_names(tree)
    bases = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    getattr_names = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and _literal_getattr(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if _dunder(node.attr):
                yield node, "dunder", f"`.{node.attr}`: {UNDER}"
            elif node.attr in ATTRIBUTES or (node.attr in RANDOM and node.attr.endswith("_")):
                yield node, "attribute", f"`.{node.attr}`: tensors are read, not rewired, dumped or filled with random numbers"
            elif _root(node) in modules and (why := _reached(node.attr)):
                yield node, *why
            elif not isinstance(node.ctx, ast.Load):
                yield node, "attribute-assignment", f"`.{node.attr} = ...` changes an object that others hold; {FIX}"
        elif isinstance(node, ast.Name) and node.id in modules and id(node) not in bases and isinstance(node.ctx, ast.Load):
            yield node, "reach", f"the module `{node.id}` as a value"
        elif isinstance(node, ast.Name) and node.id == "getattr" and id(node) not in getattr_names:
            yield node, "name", "`getattr` takes a literal name here"


def _literal_getattr(node: ast.Call) -> bool:
    if not (isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) >= 2):
        return False
    name = node.args[1]
    return (isinstance(name, ast.Constant) and isinstance(name.value, str) and not name.value.startswith("_")
            and name.value not in ATTRIBUTES | REACHED | RANDOM)


def _module_names(tree: ast.Module) -> set[str]:
    """Names that are bound to a module by an import."""
    names = {a.asname or a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    return names | {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names
                    if f"{n.module}.{a.name}" in MODULES or n.module == OURS or (n.level and not n.module)}


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


# -- module and class level: definitions and constants only ------------------------------------------------------------

def _level(node: ast.Module | ast.ClassDef, where: str, classes: frozenset[str]) -> Rules:
    for statement in node.body:
        match statement:
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                pass
            case ast.Import() | ast.ImportFrom() if where == "module":
                pass
            case ast.FunctionDef():
                yield from _decorators(statement)
            case ast.ClassDef():
                yield from _decorators(statement)
                yield from _level(statement, "class", classes)
            case ast.Assign(value=value) | ast.AnnAssign(value=value):
                if value is not None and not _constant(value, classes):
                    yield statement, "global-state", (f"`{ast.unparse(statement):.60}` at {where} level is no constant (number, string, "
                                                      f"tuple, frozenset, an instance of an Algorithm or Mechanism); {FIX}")
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=[]) if all(isinstance(s, ast.Import | ast.ImportFrom)
                                                                             for s in statement.body):
                pass
            case _:
                yield statement, "side-effect", f"`{ast.unparse(statement):.60}` runs at {where} level; only definitions stand there"


def _decorators(node: ast.FunctionDef | ast.ClassDef) -> Rules:
    for decorator in node.decorator_list:
        name = ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator).split(".")[-1]
        if name not in DECORATORS:
            yield decorator, "decorator", f"`@{name}`; allowed: {', '.join(sorted(DECORATORS))}"


def _classes(tree: ast.Module) -> frozenset[str]:
    """Classes that may be called at module level: defined here, or imported from algorithm modules."""
    defined = {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
    imported = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) and (n.level or _ours(n.module or ""))
                for a in n.names if a.name[:1].isupper()}
    return frozenset(defined | imported)


def _constant(node: ast.expr, classes: frozenset[str]) -> bool:
    match node:
        case ast.Constant() | ast.Name() | ast.Subscript():  # a subscript is a type alias, or an element of a constant
            return True
        case ast.Attribute():
            return bool(_root(node))
        case ast.Tuple(elts=parts):
            return all(_constant(p, classes) for p in parts)
        case ast.Starred(value=value) | ast.UnaryOp(operand=value):
            return _constant(value, classes)
        case ast.BinOp(left=left, right=right):
            return _constant(left, classes) and _constant(right, classes)
        case ast.Call(func=ast.Name(id=name)):
            return name in CALLS or name in classes
        case ast.Call(func=ast.Attribute(value=ast.Name(id="math" | "dataclasses"))):
            return True
        case ast.Call(func=ast.Attribute(value=ast.Name(id="ALGORITHM"), attr="without")):  # an ablation
            return True
    return False


def _defaults(tree: ast.Module) -> Rules:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
                if isinstance(default, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp | ast.Call):
                    yield default, "global-state", f"a mutable default value, `{ast.unparse(default):.60}`, outlives the call; {FIX}"


def _targets(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [t.id for t in targets if isinstance(t, ast.Name)]
