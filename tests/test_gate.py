"""The static gate: what a package may not say, and what it must be able to say."""
from __future__ import annotations

import subprocess
import sys

import pytest

from poise_hpc.algorithms import gate, seeds

HEAD = """import math
import torch
import torch.nn.functional as F
from dataclasses import dataclass
from poise_hpc.algorithms.base import Algorithm, Mechanism
"""
TAIL = """
@dataclass(frozen=True)
class X(Algorithm):
    clip: float = 0.2

    def token_loss(self, batch, state):
        {inside}
        return -batch.advantage * batch.logp

ALGORITHM = X()
"""


def package(outside: str = "", inside: str = "pass") -> dict[str, str]:
    return {"algorithm.py": HEAD + outside + TAIL.format(inside=inside)}


def rules(files: dict[str, str]) -> set[str]:
    return {finding.rule for finding in gate.check_files(files)}


@pytest.mark.parametrize("statement", [
    "import os", "import torch.distributed", "from torch import load", "from torch.utils import data", "import numpy",
    "from poise_hpc import files", "from poise_hpc.algorithms.load import load", "from poise_hpc.algorithms import checks",
    "from torch import *", "from .missing import x", "from ..algorithms import base", "from dataclasses import sys", "import importlib"])
def test_imports_outside_the_list_are_refused(statement):
    assert rules(package(outside=statement + "\n")) & {"import", "reach"}


def test_what_is_refused_says_why_and_what_to_write():
    said = [str(f) for f in gate.check_files(package("from .ops import ratio\nfrom .nothing import x\nfrom .load import load\n", "self.__class__"))]
    assert any(line.endswith("`.ops.ratio` is no module of the package; write `from poise_hpc.algorithms.ops import ...`") for line in said)
    assert any(line.endswith("`.nothing.x` is no module of the package") for line in said)
    assert any(line.endswith("`.load.load` is no module of the package") for line in said)  # nor may ours be imported
    assert any("dunder: `.__class__`: such names lead to other classes" in line for line in said)


@pytest.mark.parametrize("expression", [
    "open('/etc/passwd')", "eval('1')", "exec('1')", "compile('1', '', 'exec')", "__import__('os')", "globals()", "vars(self)",
    "input()", "breakpoint()", "print(1)", "setattr(batch, 'logp', 1)", "getattr(batch, name)", "getattr(batch, '__class__')",
    "().__class__.__bases__", "torch.save(1, 'x')", "torch.load('x')", "torch.distributed.barrier()", "torch.ops.aten", "torch.hub.list('x')",
    "torch.utils.data", "torch.classes.load_library('x')", "torch.rand(3)", "torch.manual_seed(0)", "batch.logp.normal_()",
    "torch.set_num_threads(9)", "F.dropout(batch.logp)", "batch.logp.data.zero_()", "batch.logp.backward()", "(torch).load('x')"])
def test_expressions_with_effects_are_refused(expression):
    assert gate.check_files(package(inside=expression))


@pytest.mark.parametrize("alias", ["t = torch; t.load('x')", "f = torch.load", "[torch][0].save(1, 'x')"])
def test_a_module_under_another_name_is_refused(alias):
    assert gate.check_files(package(inside=alias))


@pytest.mark.parametrize("statement", ["raise SystemExit", "raise KeyboardInterrupt", "try: pass\n        except: pass",
                                       "try: pass\n        except BaseException: pass"])
def test_nothing_ends_the_job_or_hides_its_end(statement):
    assert rules(package(inside=statement)) == {"name"}


@pytest.mark.parametrize(("outside", "rule"), [
    ("CACHE = {}\n", "global-state"), ("SEEN = []\n", "global-state"), ("T = torch.zeros(3)\n", "global-state"),
    ("def f(x, seen=[]):\n    return x\n", "global-state"), ("class Y:\n    seen = {}\n", "global-state"),
    ("def f():\n    global N\n    N = 1\n", "global-state"), ("torch.zeros(3)\n", "side-effect"), ("for i in range(3): pass\n", "side-effect"),
    ("torch.e = 3\n", "attribute-assignment"), ("if True:\n    import math\n", "side-effect"), ("@torch.compile\ndef f(x):\n    return x\n", "decorator")])
def test_modules_hold_definitions_and_constants_only(outside, rule):
    assert rule in rules(package(outside=outside))


@pytest.mark.parametrize("outside", [
    "EPS = 1e-6\n", "BOUNDS = (0.5, 2.0)\n", "NAMES = frozenset({'a', 'b'})\n", "LIMIT = math.log(20.0)\n", "HALF = -EPS / 2\n",
    "from typing import Any\nState = dict[str, Any]\n", "def helper(x):\n    return torch.where(x > 0, F.softplus(x), 0.0)\n",
    "from __future__ import annotations\n", "from poise_hpc.algorithms.ops import group_mean, ratio\n", "from torch.nn import functional\n"])
def test_definitions_and_constants_pass(outside):
    assert gate.check_files(package(outside=outside)) == []


@pytest.mark.parametrize("inside", [
    "w = getattr(batch, 'logp_ref')", "state['x'] = 1.0", "with torch.no_grad(): pass", "x = [i for i in range(3)]", "w = self._helper(batch)",
    "if batch.logp_ref is None: raise ValueError('no reference')", "y = batch.logp.clone(); y[0] = 0.0", "z = torch.sigmoid(batch.logp).detach()"])
def test_ordinary_code_passes(inside):
    assert gate.check_files(package(inside=inside)) == []


@pytest.mark.parametrize("last", ["ALGORITHM = ALGORITHM.without('clip')", "ALGORITHM = X(clip=0.3)"])
def test_algorithm_may_be_assigned_again(last):
    files = package()
    assert gate.check_files({"algorithm.py": files["algorithm.py"] + last + "\n"}) == []


@pytest.mark.parametrize("name", seeds.SEEDS)
def test_seeds_pass(name):
    assert gate.check_files({"algorithm.py": seeds.source(name)}) == []


def test_modules_of_the_package_pass():
    files = package(outside="from .helper import f\nfrom . import helper\n") | {"helper.py": "def f(x):\n    return x\n"}
    assert gate.check_files(files) == []


def test_every_file_is_read():
    files = package() | {"helper.py": "import os\n"}
    assert [(f.file, f.line, f.rule) for f in gate.check_files(files)] == [("helper.py", 1, "import")]


@pytest.mark.parametrize("text", ["def f(:\n", "x = '\0'\n", "ALGORITHM = " + "(" * 500 + ")" * 500])
def test_what_does_not_parse_is_a_finding(text):
    assert "syntax" in rules({"algorithm.py": text})


def test_the_entry_and_its_algorithm_are_wanted():
    assert rules({"other.py": ""}) == {"missing"}
    assert rules({"algorithm.py": "X = 1\n"}) == {"no-algorithm"}


def test_a_finding_reads_as_one_line_with_its_place():
    text = str(gate.check_files(package(outside="import os\n"))[0])
    assert text.startswith(f"algorithm.py:{HEAD.count(chr(10)) + 1} import: `import os`") and "\n" not in text


def test_the_gate_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from poise_hpc.algorithms import gate, load; print(gate.check_files({'algorithm.py': 'ALGORITHM = 1'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "[]\n", done.stderr
