"""The counters of scripts/bench_slurm.py: a command behind them does what it did, and is noted."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_slurm  # noqa: E402


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Commands of the scheduler's names: each prints its arguments, a line each, and ends with code 3."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in bench_slurm.COMMANDS:
        (folder / name).write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 3\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_counted_command_keeps_its_arguments_output_and_exit_code(commands, tmp_path):
    with bench_slurm.counted(tmp_path):
        done = subprocess.run(["squeue", "-j", "1 2", "*"], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("-j\n1 2\n*\n", 3)


def test_each_call_is_a_line_of_name_begin_and_end(commands, tmp_path):
    with bench_slurm.counted(tmp_path) as log:
        for name in ("sbatch", "squeue", "squeue"):
            subprocess.run([name], capture_output=True, check=False)
    subprocess.run(["squeue"], capture_output=True, check=False)  # no longer counted
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [name for name, _, _ in lines] == ["sbatch", "squeue", "squeue"]
    assert all(0 < float(begun) <= float(ended) for _, begun, ended in lines)
    assert float(lines[0][2]) <= float(lines[1][1])


def test_the_table_has_a_column_a_system():
    rows = [{"system": "a", "candidates": 3, "sbatch_ms": {"p50": 1.5, "p95": 20.0}}, {"system": "b", "candidates": 12, "version": "1.0"}]
    assert bench_slurm.text(rows).splitlines() == [
        "system      a                b",
        "candidates  3                12",
        "sbatch_ms   p50 1.5, p95 20",
        "version                      1.0"]
