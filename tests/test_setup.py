"""scripts/setup.sh with a Python that makes no environment and whose pip writes down what it was asked for."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "scripts" / "setup.sh"
PYTHON = """#!/bin/bash
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip")
    printf '%s ' "${@:5}" >>"$LOG"; echo >>"$LOG"
    while [ $# -gt 0 ]; do [ "$1" = --report ] && cp "$REPORT" "$2"; shift; done ;;
  "-c import torch") exit 1 ;;
  *) exec "$REAL" "$@" ;;
esac
"""
CUDA = 'nvidia-cublas==13.1; platform_system == "Linux"'


@pytest.fixture
def setup(tmp_path):
    """Call it with extras; (exit code, pip's calls, what was said)."""
    tools, log = tmp_path / "tools", tmp_path / "log"
    tools.mkdir()
    (tools / "python").write_text(PYTHON)
    (tools / "python").chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k != "TORCH_INDEX_URL"} | {
        "PYTHON": str(tools / "python"), "REAL": sys.executable, "VENV": str(tmp_path / "a venv"), "LOG": str(log), "REPORT": str(tmp_path / "report"),
        "PATH": f"{tools}:/usr/bin:/bin"}

    def call(*extras, needs=("filelock",), gpu=False, **more):
        log.write_text("")
        (tmp_path / "report").write_text(json.dumps({"install": [{"metadata": {"requires_dist": [*needs, 'x; extra == "cuda"']}}]}))
        if gpu:
            (tools / "nvidia-smi").write_text("#!/bin/sh\n")
            (tools / "nvidia-smi").chmod(0o755)
        done = subprocess.run(["bash", SETUP, *extras], env=env | more, capture_output=True, text=True)
        return done.returncode, [line.strip() for line in log.read_text().splitlines()], done.stdout + done.stderr

    return call


def installs(calls):
    return [c for c in calls if "--dry-run" not in c and "--target" not in c]


def test_torch_first_then_the_package(setup):
    code, calls, said = setup("test", "math")
    assert code == 0, said
    torch, package = installs(calls)
    assert torch.startswith("install -c constraints.txt torch==") and package == "install -c constraints.txt -e .[math,test]"


def test_cuda_is_not_fetched_for_a_machine_without_a_gpu(setup):
    code, calls, said = setup(needs=("filelock", CUDA))
    assert code == 1 and installs(calls) == [] and "TORCH_INDEX_URL=..." in said
    code, calls, _ = setup(needs=(CUDA,), TORCH_INDEX_URL="https://there/cpu")
    assert code == 0 and "--index-url https://there/cpu torch==" in calls[0] and "--index-url" not in calls[1]


@pytest.mark.parametrize("how", [{"gpu": True}, {"TORCH_INDEX_URL": "any"}, {"needs": ('nvidia-cublas; platform_machine == "none"',)}])
def test_cuda_is_fetched_where_it_is_wanted(setup, how):
    code, calls, said = setup(**{"needs": (CUDA,), **how})
    assert code == 0 and len(installs(calls)) == 2 and "--index-url" not in " ".join(calls), said


def test_extras_that_are_there_stay_and_nothing_is_done_twice(setup):
    """demo.sh (none) and test.sh (two) in turn."""
    assert installs(setup("test", "math")[1])
    for extras in ((), ("math",), ("math", "test"), ("test",)):
        assert setup(*extras)[1] == []
    assert installs(setup("bench")[1])[1].endswith(".[bench,math,test]")
    assert setup("test")[1] == setup()[1] == []
