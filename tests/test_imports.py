"""Imports point inward, heavy dependencies have one home, the login node needs no torch."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "poise_hpc"
HOMES = {
    "submitit": {"cluster/submission.py"}, "h5py": {"hdf5.py"}, "openai": {"llm.py"}, "deepspeed": {"training/engine.py"},
    "vllm": {"rollout/vllm_engine.py"}}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text())


def imported(name, tree):
    """Absolute names of everything a module imports, inside functions too."""
    package = ["poise_hpc", *Path(name).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("dependency", sorted(HOMES))
def test_one_home_per_heavy_dependency(dependency):
    users = {name for name, tree in modules() for i in imported(name, tree) if i.split(".")[0] == dependency}
    assert users <= HOMES[dependency]


@pytest.mark.parametrize(("layer", "forbidden"), [
    ("types.py", ("poise_hpc",)), ("files.py", ("poise_hpc.config", "poise_hpc.campaign", "poise_hpc.controller")),
    ("algorithms/", ("poise_hpc.training", "poise_hpc.rollout", "poise_hpc.tasks", "poise_hpc.controller", "poise_hpc.agent")),
    ("selection/", ("poise_hpc.training", "poise_hpc.controller", "poise_hpc.archive", "poise_hpc.campaign")),
    ("stats.py", ("poise_hpc.archive", "poise_hpc.campaign", "poise_hpc.controller")),
    ("training/", ("poise_hpc.controller", "poise_hpc.cluster", "poise_hpc.archive", "poise_hpc.campaign")),
    ("evaluation/", ("poise_hpc.controller", "poise_hpc.cluster", "poise_hpc.archive", "poise_hpc.campaign")),
    ("tasks/", ("poise_hpc.controller", "poise_hpc.cluster", "poise_hpc.training", "poise_hpc.archive")),
    ("", ("poise_hpc.cli",))])
def test_imports_point_inward(layer, forbidden):
    for name, tree in modules():
        if name.startswith(layer) and not name.startswith("cli/"):
            bad = [i for i in imported(name, tree) if i.startswith(forbidden)]
            assert not bad, f"{name} imports {bad}"


def test_the_login_node_needs_no_torch(tmp_path):
    code = ("import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; sys.modules['deepspeed'] = None\n"
            "import poise_hpc.cli, poise_hpc.controller, poise_hpc.views, poise_hpc.derived, poise_hpc.agent.offline, poise_hpc.cluster.base, poise_hpc.doctor\n"
            "import poise_hpc.recording, poise_hpc.proposing, poise_hpc.selection.acquisition, poise_hpc.tasks.base, poise_hpc.report.page\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
