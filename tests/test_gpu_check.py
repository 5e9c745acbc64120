"""scripts/gpu_check.sh at its small size, on the CPU: the same path as on a GPU."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def call(*arguments, cwd=None):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run([ROOT / "scripts/gpu_check.sh", *arguments], env=environment, check=False, capture_output=True, text=True, cwd=cwd)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_small_size_on_a_cpu(tmp_path):
    done = call("--size", "tiny", "--device", "cpu", "--no-trl", "--out", tmp_path / "out put", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out put/gpu_check-tiny-cpu.json").read_text())
    assert found["resume"] == {"killed_by_signal": 9, "after_step": 2, "curves_equal": True, "weights_equal": True}
    assert found["speed"]["update_tokens_per_second"] > 0 and found["speed"]["mfu"] is None
    assert found["estimate"]["tensors"] > 0
    text = (tmp_path / "out put/gpu_check-tiny-cpu.md").read_text()
    assert "bit by bit" in text and "TRL | not installed" in text


def test_without_a_gpu_it_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = call("--size", "tiny")
    assert done.returncode == 2 and "torch sees no GPU" in done.stderr
