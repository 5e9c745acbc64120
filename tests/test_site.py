"""Site files: what is refused and how it is said, and the sbatch text that submitit makes of the worked examples.

The golden texts are read by people: after a change, `UPDATE_GOLDEN=1 pytest tests/test_site.py`, then `git diff`.
"""
from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from poise_hpc import site
from poise_hpc.types import UsageError

SITES = Path(__file__).parents[1] / "configs" / "sites"
GOLDEN = Path(__file__).parent / "golden" / "sites"
EXAMPLES = sorted(path.stem for path in SITES.glob("*.yaml"))


def rendered(found: site.Site, stage: str, ranks: int) -> str:
    from submitit.slurm.slurm import _make_sbatch_string

    command = site.python_command(found).replace(shlex.quote(sys.executable), "PYTHON") + " -u -m submitit.core._submit FOLDER"
    return _make_sbatch_string(command=command, folder="/scratch/my runs/c0007/attempts/train-s0-1/submitit", job_name="poise-c0007",
                               **site.sbatch_parameters(found, stage, ranks))


def test_examples_are_those_expected():
    assert EXAMPLES == ["apptainer_scavenger", "cpu_only", "gpu_account", "gres_modules", "local", "virtual"]


@pytest.mark.parametrize("stage", ["train", "check", "controller", "serve"])
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "local"])
def test_examples_render_to_the_golden_text(name: str, stage: str):
    found = site.load(SITES / f"{name}.yaml")
    text = rendered(found, stage, found.nodes * found.ranks_per_node if stage == "train" else 1)
    path = GOLDEN / f"{name}-{stage}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def refusal(data: Any) -> str:
    with pytest.raises(UsageError) as error:
        site.parse(data)
    return str(error.value)


@pytest.mark.parametrize(("data", "words"), [
    ({"partition": ["gpu"]}, "did you mean 'partitions'?"),
    ({"stages": {"train": {"time_minutes": 60}}}, "did you mean 'stages.train.time_min'?"),
    ({"stages": {"trian": {"time_min": 60}}}, "did you mean 'stages.train'?"),
    ({"stages": {"train": {"time_min": 0}}}, "'stages.train.time_min': input should be greater than or equal to 1, got 0"),
    ({"stages": {"train": {"time_min": "4:00:00"}}}, "'stages.train.time_min': input should be a valid integer, got '4:00:00'"),
    ({"stages": {"train": 60}}, "'stages.train'"),
    ({"stages": {"train": {"constraint": "a b"}}}, "'stages.train.constraint"),
    ({"stages": {"check": {"cpus": 0}}}, "'stages.check.cpus'"),
    ({"account": 4711}, "'account': input should be a valid string, got 4711"),
    ({"account": "a b"}, "'account'"),
    ({"constraint": "a\n#SBATCH --uid=0"}, "'constraint'"),
    ({"ranks_per_node": 8, "gpus": {"per_node": 4}}, "ranks_per_node (8) must not exceed gpus.per_node (4)"),
    ({"gpus": {"per_node": 0}}, "'gpus.per_node'"),
    ({"nodes": 0}, "'nodes'"),
    ({"mem_gb_per_rank": 0}, "'mem_gb_per_rank'"),
    ({"poll_s": 0}, "'poll_s'"),
    ({"signal_lead_s": 600}, "stages.check.time_min: 10 min is over before work begins"),
    ({"environment": {"OPENAI_API_KEY": "x"}}, "OPENAI_API_KEY sounds like a secret"),
    ({"environment": {"A-B": "x"}}, "'A-B' is not a variable's name"),
    ({"environment": {"OMP_NUM_THREADS": 4}}, "'environment.OMP_NUM_THREADS': input should be a valid string, got 4"),
    ({"sbatch": {"time": "10"}}, "'time' is set by the site's 'stages'"),
    ({"sbatch": {"gpus_per_node": 1}}, "'gpus_per_node' is set by the site's 'gpus'"),
    ({"sbatch": {"array": "0-3"}}, "'array' is set by the pipeline itself"),
    ({"sbatch": {"--mail-type": "FAIL"}}, "without dashes in front"),
    ({"sbatch": {"comment": "a\nb"}}, "one line"),
    ({"setup": ["a\nb"]}, "'setup.0'"),
    ({"scheduler": "local", "account": "x"}, "scheduler 'local' has no use for: account"),
    ({"scheduler": "pbs"}, "'scheduler'"),
    (["gpu"], "a mapping of sections was wanted, got list"),
])
def test_refused(data: Any, words: str):
    assert words in refusal(data)


def test_every_error_names_the_file(tmp_path: Path):
    path = tmp_path / "my site.yaml"
    path.write_text("acount: x\nnodes: zero\n")
    with pytest.raises(UsageError) as error:
        site.load(path)
    assert [line.startswith(f"{path}: ") for line in str(error.value).splitlines()] == [True, True]


def test_a_site_may_start_from_another(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {SITES / 'gpu_account.yaml'}\naccount: mine\nstages: {{train: {{time_min: 60}}}}\n")
    mine, base = site.load(path), site.load(SITES / "gpu_account.yaml")
    assert (mine.account, mine.stages.train.time_min) == ("mine", 60)
    assert (mine.partitions, mine.stages.check) == (base.partitions, base.stages.check)


def test_layout_fills_nodes_equally():
    found = site.parse({"nodes": 3, "ranks_per_node": 4})
    assert [site.layout(found, ranks) for ranks in (1, 4, 6, 8, 9, 12)] == [(1, 1), (1, 4), (2, 3), (2, 4), (3, 3), (3, 4)]
    for ranks in (7, 11, 13):
        with pytest.raises(UsageError, match=f"{ranks} ranks do not fit this site: 3 node"):
            site.layout(found, ranks)


def test_ranks_that_hold_one_sampler_are_on_one_node():
    found = site.parse({"nodes": 3, "ranks_per_node": 4})
    for ranks, together in ((4, 4), (8, 2), (12, 4)):
        site.check_ranks(found, ranks, together)
    for ranks, together in ((8, 8), (6, 2), (12, 3)):  # 4, 3 and 4 on each node
        with pytest.raises(UsageError, match="rollout.tensor_parallel"):
            site.check_ranks(found, ranks, together)
    with pytest.raises(UsageError, match="13 ranks do not fit this site"):
        site.check_ranks(found, 13, 1)
    site.check_ranks(site.parse({"scheduler": "local"}), 8, 4)


def test_memory_and_gpus_are_for_the_ranks_of_one_node():
    found = site.parse({"nodes": 2, "ranks_per_node": 4, "gpus": {"per_node": 8, "type": "a100"}, "mem_gb_per_rank": 1.5})
    parameters = site.sbatch_parameters(found, "train", ranks=6)  # 2 nodes x 3 ranks
    assert (parameters["nodes"], parameters["ntasks_per_node"]) == (2, 3)
    assert parameters["mem"] == "4608M"                           # 3 * 1.5 * 1024
    assert parameters["gpus_per_node"] == "a100:3"
    assert "gpus_per_node" not in site.sbatch_parameters(found, "check")


def test_a_server_gets_the_resources_of_a_whole_nodes_ranks():
    found = site.parse({"ranks_per_node": 4, "gpus": {"per_node": 4}, "mem_gb_per_rank": 10, "cpus_per_rank": 3})
    parameters = site.sbatch_parameters(found, "serve")
    assert (parameters["ntasks_per_node"], parameters["cpus_per_task"]) == (1, 12)
    assert (parameters["mem"], parameters["gpus_per_node"]) == ("40960M", "4")


def test_submitit_accepts_the_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import submitit

    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in EXAMPLES:
        if name != "local":
            executor = submitit.SlurmExecutor(tmp_path / name)
            executor.update_parameters(**site.sbatch_parameters(site.load(SITES / f"{name}.yaml"), "evaluate"))
            assert isinstance(executor.parameters["time"], int)


def test_no_wckey_unless_the_site_names_one():
    assert site.sbatch_parameters(site.parse({}), "check")["wckey"] is None
    assert "wckey" not in rendered(site.parse({}), "check", 1)
    assert "#SBATCH --wckey=w" in rendered(site.parse({"wckey": "w"}), "check", 1)


def test_flags_without_a_value_and_left_out():
    text = rendered(site.parse({"sbatch": {"get-user-env": True, "contiguous": False, "nice": 100}}), "check", 1)
    assert "#SBATCH --get-user-env\n" in text and "#SBATCH --nice=100\n" in text and "contiguous" not in text


def test_local_submits_nothing_to_slurm():
    with pytest.raises(UsageError, match="scheduler 'local'"):
        site.sbatch_parameters(site.load(SITES / "local.yaml"), "train")


def test_unknown_stage():
    with pytest.raises(UsageError, match="unknown stage 'trian'; known: check, prepare, train"):
        site.sbatch_parameters(site.parse({}), "trian")


def test_setup_lines_set_caches_and_literal_values(tmp_path: Path):
    found = site.parse({"setup": ["greeting=hello"], "cache_dir": "$BASE/job cache", "environment": {"A": "$HOME 'x' \"y\""}})
    script = "\n".join([*site.setup_lines(found), 'printf "%s\\n" "$greeting" "$A" "$TRITON_CACHE_DIR" "$HF_HUB_OFFLINE"'])
    shown = subprocess.run(["bash", "-eu", "-c", script], env={"BASE": str(tmp_path), "PATH": os.environ["PATH"]},
                           capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["hello", "$HOME 'x' \"y\"", f"{tmp_path}/job cache/triton", "1"]
    assert (tmp_path / "job cache").stat().st_mode & 0o777 == 0o700


def test_options_for_the_wrappers(capsys: pytest.CaptureFixture[str]):
    assert site.main(["options", str(SITES / "gpu_account.yaml"), "train"]) == 0
    options = capsys.readouterr().out.splitlines()
    assert {"--account=ml-research", "--nodes=2", "--ntasks-per-node=8", "--requeue", "--signal=B:USR1@300",
            "--mail-type=FAIL", "--wckey=poise"} <= set(options)
    assert site.main(["options", str(SITES / "gpu_account.yaml"), "controller"]) == 0
    assert {"--partition=cpu", "--qos=long", "--nodes=1", "--ntasks-per-node=1"} <= set(capsys.readouterr().out.splitlines())
    assert site.main(["options", "/no/such/file.yaml", "train"]) == 2
    assert "no such" in capsys.readouterr().err
