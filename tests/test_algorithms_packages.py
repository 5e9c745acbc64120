"""Candidate packages: loading, and the static gate."""
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_algorithms import rolled

from poise_hpc import packages, standalone
from poise_hpc.algorithms import gate
from poise_hpc.algorithms.load import MAX_BYTES, load, manifest, read_package, write_seed_package
from poise_hpc.algorithms.seeds import SEEDS, seed, source
from poise_hpc.types import CandidateError

PACKAGE = '''from poise_hpc.algorithms.grpo import GRPO
from .helper import CLIP
ALGORITHM = GRPO(clip=CLIP)
'''


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


# -- the document ------------------------------------------------------------------------------------------------------

def test_the_example_in_the_document_is_what_it_says(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "ALGORITHMS.md").read_text()
    for name, body in re.findall(r"`my_median/([\w.]+)`:\n```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(body)
    data = standalone.check(tmp_path)
    assert data["outcome"] == "succeeded" and [c["name"] for c in data["checks"] if not c["passed"]] == []
    proposal, algorithm = packages.read_package(tmp_path).proposal, load(tmp_path)
    assert proposal.name == "MEDIAN-GRPO" and [m.name for m in algorithm.mechanisms] == list(proposal.mechanisms) == ["median-baseline"]
    # One right of four: median 0, mean 1/4, std 1/2.
    rollouts = rolled([[1.0, 0, 0, 0]])
    torch.testing.assert_close(algorithm.advantages(rollouts, {}).value, torch.tensor([2.0, 0, 0, 0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(algorithm.without("median-baseline").advantages(rollouts, {}).value, torch.tensor([1.5, -0.5, -0.5, -0.5]), rtol=1e-5, atol=0)


# -- load --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SEEDS)
def test_every_seed_stands_alone(tmp_path, name):
    folder = tmp_path / "a folder with 'quotes'"
    write_seed_package(name, folder)
    algorithm = load(folder)
    assert repr(algorithm) == repr(seed(name)) and type(algorithm) is not type(seed(name))
    assert gate.check_package(folder) == []


def test_packages_with_equal_module_names_live_side_by_side(tmp_path):
    one = load(write(tmp_path / "c0001", algorithm=PACKAGE, helper="CLIP = 0.1\n"))
    two = load(write(tmp_path / "c0002", algorithm=PACKAGE, helper="CLIP = 0.3\n"))
    assert (one.clip, two.clip) == (0.1, 0.3)


def test_an_edited_package_is_read_again(tmp_path):
    folder = write(tmp_path, algorithm=PACKAGE, helper="CLIP = 0.1\n")
    load(folder)
    assert load(write(folder, helper="CLIP = 0.5\n")).clip == 0.5
    assert not list(folder.rglob("*.pyc"))


def test_an_import_inside_a_function_works_later(tmp_path):
    late = "from .helper import CLIP\n".join(("from poise_hpc.algorithms.grpo import GRPO\nclass Late(GRPO):\n    def f(self):\n        ",
                                               "        return CLIP\nALGORITHM = Late()\n"))
    assert load(write(tmp_path, algorithm=late, helper="CLIP = 7\n")).f() == 7


def test_a_failing_import_shows_the_candidates_lines(tmp_path):
    folder = write(tmp_path, algorithm=PACKAGE, helper="def f():\n    return 1 / 0\nCLIP = f()\n")
    with pytest.raises(CandidateError) as error:
        load(folder)
    assert error.value.cause == "import-failed"
    assert error.value.message.splitlines() == [
        "ZeroDivisionError: division by zero", "  algorithm.py:2 in <module>: from .helper import CLIP",
        "  helper.py:3 in <module>: CLIP = f()", "  helper.py:2 in f: return 1 / 0"]


@pytest.mark.parametrize(("text", "cause", "says"), [
    ("x = = 1\n", "import-failed", r"invalid syntax \(algorithm.py, line 1\)"),
    ("import sys\nsys.exit(3)\n", "import-failed", "SystemExit: 3"),
    ("from .nothing import x\n", "import-failed", "nothing"),
    ("x = 1\n", "no-algorithm", "its ALGORITHM is None"),
    ("ALGORITHM = 3\n", "no-algorithm", "its ALGORITHM is 3"),
    ("from poise_hpc.algorithms.grpo import GRPO\nALGORITHM = GRPO\n", "no-algorithm", "an instance")])
def test_what_is_no_algorithm(tmp_path, text, cause, says):
    with pytest.raises(CandidateError, match=says) as error:
        load(write(tmp_path, algorithm=text))
    assert error.value.cause == cause


def test_manifest_hashes_the_modules_and_nothing_else(tmp_path):
    write(tmp_path, algorithm="# ü\n", helper="")
    (tmp_path / "proposal.json").write_text("{}")
    assert manifest(tmp_path) == {"algorithm.py": hashlib.sha256("# ü\n".encode()).hexdigest(), "helper.py": hashlib.sha256(b"").hexdigest()}


def unreadable(tmp_path, name, prepare):
    folder = write(tmp_path / "c0001", algorithm=source("grpo"))
    prepare(folder)
    with pytest.raises(CandidateError) as error:
        read_package(folder)
    assert error.value.cause == "unreadable-package" and name in error.value.message
    return error.value.message


def test_odd_packages_are_named_as_such(tmp_path):
    secret = tmp_path / "secret.py"
    secret.write_text("x = 1\n")
    assert "no module name" in unreadable(tmp_path / "1", "my-file.py", lambda f: (f / "my-file.py").write_text(""))
    assert "no module name" in unreadable(tmp_path / "2", "a\\nb.py", lambda f: (f / "a\nb.py").write_text(""))
    assert "leads out" in unreadable(tmp_path / "3", "link.py", lambda f: (f / "link.py").symlink_to(secret))
    assert "not UTF-8" in unreadable(tmp_path / "4", "latin.py", lambda f: (f / "latin.py").write_bytes(b"# \xfc\n"))
    assert "200001 bytes" in unreadable(tmp_path / "5", "huge.py", lambda f: (f / "huge.py").write_text("#" * (MAX_BYTES + 1)))
    assert "not a file" in unreadable(tmp_path / "6", "dir.py", lambda f: (f / "dir.py").mkdir())
    assert "33 Python files" in unreadable(tmp_path / "7", "33", lambda f: [(f / f"m{i}.py").touch() for i in range(32)])
    assert "missing" in unreadable(tmp_path / "8", "other.py", lambda f: (f / "algorithm.py").rename(f / "other.py"))
    assert "missing" in unreadable(tmp_path / "9", "no Python file", lambda f: (f / "algorithm.py").unlink())


def test_a_package_reached_through_a_link_is_fine(tmp_path):
    write_seed_package("grpo", tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert load(tmp_path / "link").clip == 0.2


# -- gate --------------------------------------------------------------------------------------------------------------

ALLOWED = [
    "import math", "import torch", "import torch.nn.functional as F", "from torch import Tensor", "from torch.nn import functional as F",
    "from poise_hpc.algorithms import ops", "from poise_hpc.algorithms.base import Advantages, Algorithm", "from .helper import f",
    "from . import helper", "from dataclasses import dataclass, field, replace", "from typing import TYPE_CHECKING, Any",
    "if TYPE_CHECKING:\n    from torch import Tensor",
    "LIMIT = 20.0", "TABLE = (1, 2, -3)", 'KINDS = frozenset({"a", "b"})', "HALF = math.log(2) / 2", "Rules = tuple[int, ...]",
    "PAIR: tuple[int, int] = (1, 2)", "f = None", "'a docstring'", "def f(x, y=(), z=None): return torch.where(x > 0, x, 0.0).exp()",
    "class A:\n    x: int = 3\n    y: dict = field(default_factory=dict)\n    def __post_init__(self): pass",
    'def f(x):\n    a = {}\n    a["k"] = [x]\n    return getattr(x, "shape", None), F.softplus(x), torch.special.expit(x), torch.linalg.norm(x)',
    'def f(state):\n    state["n"] = state.get("n", 0) + 1\n    with torch.no_grad():\n        return state["n"]',
    "def f(x): return x.detach().cumsum(-1).clamp_(min=0), torch.quantile(x, 0.5), torch.finfo(x.dtype).eps",
]

FORBIDDEN = {
    "import": ["import os", "import sys", "import numpy as np", "import torch.distributed", "import poise_hpc.files", "from os import path",
               "from torch.utils import data", "from poise_hpc import files", "from poise_hpc.algorithms import load",
               "from poise_hpc.algorithms.checks import run", "from .. import x", "from .absent import x", "from math import *",
               "import poise_hpc.algorithms.ops", "import builtins", "import importlib",
               "def f():\n    import subprocess"],
    "reach": ["from torch import save", "from poise_hpc.algorithms.ops import torch",
              "from torch import distributed as d", "from dataclasses import sys", "torch.load('x')", "torch.os",
              "torch.ops.x", "torch.hub.load()", "torch.utils.cpp_extension", "torch.classes", "import torch as t\nx = t.save",
              "F.torch", "torch.nn.functional.importlib", "f(torch)", "torch._C", "torch.set_grad_enabled(True)", "torch.UntypedStorage",
              "from poise_hpc.algorithms import ops\nops._sum", "torch.cuda", "torch.jit.load", "torch.multiprocessing", "math.sys",
              "x = torch", "torch.from_file('x')"],
    "random": ["torch.rand(3)", "torch.manual_seed(0)", "from torch import randn", "F.dropout(x)", "torch.bernoulli(x)", "torch.distributions"],
    "attribute": ["x.normal_()", "x.data", "x.backward()", "x.numpy()", "x.register_hook(f)", "x.untyped_storage()", "e.f_globals"],
    "name": ["open('x')", "exec('x')", "eval('1')", "compile('', '', 'exec')", "globals()", "vars(x)", "locals()", "input()", "breakpoint()",
             "print(1)", "setattr(x, 'y', 1)", "delattr(x, 'y')", "getattr(x, name)", "getattr(x, '__class__')", "g = getattr", "o = open",
             "getattr(torch, 'load')", "hash('x')", "id(x)", "exit()"],
    "dunder": ["x.__class__", "x.__dict__['y'] = 1", "__import__('os')", "__builtins__", "object.__setattr__(x, 'y', 1)", "().__class__.__bases__",
               "def f():\n    def __getattr__(s, n): pass", "__file__"],
    "global-state": ["CACHE = {}", "SEEN = []", "S = set()", "T = torch.zeros(3)", "PAIR = ([], 1)", "class A:\n    cache = {}", "global x",
                     "def f(x, seen=[]): pass", "def f(x, *, seen={}): pass", "D = dict(a=1)", "L = [i for i in x]", "f = lambda x, y=[]: x"],
    "side-effect": ["for i in x: pass", "if x: pass", "f(3)", "while True: pass", "try:\n    pass\nexcept E: pass", "with x: pass", "x += 1",
                    "assert x", "class A:\n    for i in x: pass", "del x"],
    "attribute-assignment": ["torch.exp = f", "def f(s):\n    s.x = 1", "def f(b):\n    b.logp += 1", "def f(b):\n    del b.logp"],
    "decorator": ["@cache\ndef f(): pass", "@torch.compile\ndef f(): pass", "class A:\n    @register\n    def f(self): pass"],
    "async": ["async def f(): pass"],
    "syntax": ["x = = 1", "def f(:", "x = '\0'"],
}
INSIDE = {"import", "reach", "random", "attribute", "name", "dunder", "global-state", "attribute-assignment", "syntax"}


def findings(snippet):
    text = f"import math\nimport torch\nimport torch.nn.functional as F\nfrom dataclasses import field\n{snippet}\nALGORITHM = x\n"
    return gate.check_files({"algorithm.py": text, "helper.py": ""})


@pytest.mark.parametrize("snippet", ALLOWED)
def test_the_gate_lets_pass(snippet):
    assert findings(snippet) == []


@pytest.mark.parametrize(("rule", "snippet"), [(rule, s) for rule, snippets in FORBIDDEN.items() for s in snippets])
def test_the_gate_refuses(rule, snippet):
    found = findings(snippet)
    assert rule in {f.rule for f in found}, found
    assert all(f.file == "algorithm.py" and f.message for f in found)


@pytest.mark.parametrize("rule", sorted({"reach", "random", "attribute", "name"}))
def test_the_gate_refuses_inside_functions_too(rule):
    for snippet in FORBIDDEN[rule]:
        if not snippet.startswith(("from", "import")):
            assert rule in {f.rule for f in findings(f"def f(self):\n    {snippet}")}, snippet


def test_findings_come_with_file_and_line():
    found = gate.check_files({"algorithm.py": "import os\n\n\nx = open('y')\nALGORITHM = x\n", "b.py": "import sys\n"})
    assert [(f.file, f.line, f.rule) for f in found] == [
        ("algorithm.py", 1, "import"), ("algorithm.py", 4, "global-state"), ("algorithm.py", 4, "name"), ("b.py", 1, "import")]
    assert str(found[0]).startswith("algorithm.py:1 import: `import os`; allowed: ")


def test_a_package_without_algorithm():
    assert [f.rule for f in gate.check_files({"helper.py": ""})] == ["missing"]
    assert [f.rule for f in gate.check_files({"algorithm.py": "x = 1\n"})] == ["no-algorithm"]


@pytest.mark.parametrize("text", ["(" * 5000 + ")" * 5000, "1" + "+1" * 2_000, "1" + "+1" * 50_000, "-" * 50_000 + "1", "f" + "()" * 50_000])
def test_a_deeply_nested_file_is_a_finding_not_a_crash(text):
    assert [f.rule for f in gate.check_files({"algorithm.py": f"x = {text}\n"})] == ["syntax"]


def test_gate_and_manifest_need_no_torch(tmp_path):
    write_seed_package("grpo", tmp_path)
    code = ("import sys; sys.modules['torch'] = None\nfrom pathlib import Path\nfrom poise_hpc.algorithms import gate, load, seeds\n"
            f"assert not gate.check_package(Path({str(tmp_path)!r})) and load.manifest(Path({str(tmp_path)!r}))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
