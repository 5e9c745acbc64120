"""The sbatch wrappers of slurm/, on the virtual cluster. `poise-hpc` and vLLM are stand-ins here: what is tested is
what the shell does with their exit codes, signals and files."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from helpers_slurm import REPO, VirtualCluster, needs_slurm, until, virtual_cluster

SLURM = REPO / "slurm"
SITE = REPO / "configs" / "sites" / "virtual.yaml"

# A Python whose `-m poise_hpc.cli step|run CAMPAIGN` adds a line to CAMPAIGN/steps and exits with the code in CAMPAIGN/code;
# the campaign is done after CAMPAIGN/enough lines; it waits while CAMPAIGN/wait is there. Everything else is the real Python.
STAND_IN = """#!/bin/bash
if [ "${1:-} ${2:-}" = "-m poise_hpc.cli" ]; then
  campaign=$4
  case $3 in
    status) echo "{\\"done\\": $([ $(wc -l <"$campaign/steps") -ge $(cat "$campaign/enough") ] && echo true || echo false),
      \\"held\\": $(cat "$campaign/held" 2>/dev/null || echo '[]'), \\"running\\": []}" ;;
    *) while [ -e "$campaign/wait" ]; do sleep 0.1; done; echo "$3 $# ${SLURM_MEM_PER_NODE:-clean} ${HF_HUB_OFFLINE:-}" >>"$campaign/steps"; exit "$(cat "$campaign/code" 2>/dev/null || echo 0)" ;;
  esac
else exec PYTHON "$@"; fi
""".replace("PYTHON", sys.executable)

# Rank program: saves at USR1 and asks to be repeated (75), ends well in its second life.
RANKS = """
import os, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
life, rank = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ["SLURM_PROCID"]
def save(number, frame):
    (out / f"saved-{life}-{rank}").touch()
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
(out / f"began-{life}-{rank}").write_text(" ".join(sys.argv[1:2]))
while life == "0": time.sleep(0.05)
"""

VLLM = """
import http.server, os, sys
def value(name): return sys.argv[sys.argv.index(name) + 1]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        allowed = self.path == "/health" or self.headers.get("Authorization") == "Bearer " + os.environ["VLLM_API_KEY"]
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(" ".join(sys.argv[1:]).encode())
    def log_message(self, *_): pass
http.server.HTTPServer((value("--host"), int(value("--port"))), Handler).serve_forever()
"""


@pytest.mark.parametrize("path", sorted([*SLURM.glob("*.sh"), *SLURM.glob("*.sbatch"), *(REPO / "scripts").glob("virtual_cluster.sh")]), ids=lambda p: p.name)
def test_shell_is_well_formed(path: Path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    if shutil.which("shellcheck"):
        shown = subprocess.run(["shellcheck", "-x", path.name], cwd=path.parent, capture_output=True, text=True).stdout
        assert shown == ""


def submit(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SLURM / "submit.sh"), *arguments], text=True, capture_output=True,
                          env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **env})


def test_dry_run_prints_the_command_and_the_set_up():
    done = submit("--dry-run", str(SITE), "slurm/train.sbatch", "my pack", "--out", "x")
    assert done.returncode == 0
    command = done.stdout.splitlines()[0]
    assert command.startswith("sbatch --cpus-per-task=1 ") and "--nodes=2 --ntasks-per-node=2 --partition=low --requeue" in command
    assert "--job-name=poise-train-my_pack-" in command and command.endswith("train.sbatch my\\ pack --out x ")
    assert "export HF_HUB_OFFLINE=1" in done.stdout


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "slurm/submit.sh [--dry-run] SITE WRAPPER"),
    ([str(SITE), "slurm/other.sbatch", "x"], "no wrapper of this folder: slurm/other.sbatch"),
    (["/no/site.yaml", "train.sbatch", "x"], "/no/site.yaml: no such"),
])
def test_wrong_calls_submit_nothing(arguments: list[str], words: str):
    done = submit(*arguments)
    assert done.returncode == 2 and words in done.stderr and "Submitted" not in done.stdout


class TestReal:
    pytestmark = needs_slurm

    def test_a_chain_of_steps_drives_a_campaign_and_ends(self, tmp_path: Path):
        with virtual_cluster(nodes=1) as cluster:
            campaign = new_campaign(tmp_path, enough=3, wait="")
            mine = {"SQUEUE_PARTITION": "high", "SCANCEL_STATE": "RUNNING"}  # of somebody who looks at that one only
            start(cluster, tmp_path, "controller-step.sbatch", campaign, **mine)
            until(lambda: len(jobs(cluster)) == 2, "the first link adds no second")
            start(cluster, tmp_path, "controller-step.sbatch", campaign, **mine)  # started twice by mistake: still one chain
            (campaign / "wait").unlink()  # only now: else the chain may be over before its twin starts
            until(lambda: jobs(cluster) == [], "the chain does not end")
            assert steps(campaign) == ["step 6 clean 1"] * 3
            assert sorted(states(cluster)) == ["CANCELLED"] + ["COMPLETED"] * 3  # no link was ever added twice

    def test_a_chain_ends_where_only_a_person_can_go_on(self, tmp_path: Path):
        with virtual_cluster(nodes=1) as cluster:
            for name, files in {"held": {"code": "3", "held": '["c0001"]'}, "usage": {"code": "2"}}.items():
                campaign = new_campaign(tmp_path, enough=9, name=name, **files)
                start(cluster, tmp_path, "controller-step.sbatch", campaign)
                until(lambda: jobs(cluster) == [], f"the chain does not end: {name}")
                assert len(steps(campaign)) == 1

    def test_one_node_without_poise_does_not_end_the_chain_three_in_a_row_do(self, tmp_path: Path):
        with virtual_cluster(nodes=1) as cluster:
            campaign = new_campaign(tmp_path, enough=9, code="127")
            start(cluster, tmp_path, "controller-step.sbatch", campaign)
            until(lambda: jobs(cluster) == [], "the chain does not end")
            assert len(steps(campaign)) == 3 and not list(tmp_path.glob("*.failed"))

    def test_a_refused_link_is_tried_again(self, tmp_path: Path):
        """sbatch takes the first job, refuses its first link, and takes what follows."""
        stand_in = tmp_path / "bin" / "sbatch"
        stand_in.parent.mkdir()
        real = shutil.which("sbatch")
        stand_in.write_text(f"""#!/bin/bash\necho x >>"{tmp_path}/calls"\n[ "$(wc -l <"{tmp_path}/calls")" != 2 ] || exit 1\nexec {real} "$@"\n""")
        stand_in.chmod(0o755)
        with virtual_cluster(nodes=1) as cluster:
            campaign = new_campaign(tmp_path, enough=2)
            start(cluster, tmp_path, "controller-step.sbatch", campaign, PATH=f"{stand_in.parent}:{os.environ['PATH']}", POISE_LINK_PAUSE_S="0")
            until(lambda: jobs(cluster) == [], "the chain does not end")
            assert len(steps(campaign)) == 2
            assert "Slurm takes no further link now" in next(tmp_path.glob("poise-drive-*.out")).read_text()

    def test_a_killed_link_is_followed_by_the_next(self, tmp_path: Path):
        with virtual_cluster(nodes=1) as cluster:
            campaign = new_campaign(tmp_path, enough=2)
            (tmp_path / "python").write_text(STAND_IN.replace("exit \"$(cat", "[ $(wc -l <\"$campaign/steps\") -gt 1 ] || sleep 600; exit \"$(cat"))
            first = start(cluster, tmp_path, "controller-step.sbatch", campaign)
            until(lambda: len(steps(campaign)) == 1, "the first link does not step")
            cluster.run("scancel", "--signal=KILL", "--full", first)
            until(lambda: jobs(cluster) == [], "the chain does not end")
            assert len(steps(campaign)) == 2

    def test_the_long_controller_is_asked_to_leave_and_followed(self, tmp_path: Path):
        with virtual_cluster(nodes=1) as cluster:
            campaign = new_campaign(tmp_path, enough=2)
            (tmp_path / "python").write_text(STAND_IN.replace("exit \"$(cat", "[ $(wc -l <\"$campaign/steps\") -gt 1 ] || exec sleep 600; exit \"$(cat"))
            first = start(cluster, tmp_path, "controller.sbatch", campaign)
            until(lambda: len(steps(campaign)) == 1, "the controller does not run")
            cluster.run("scancel", "--signal=USR1", "--batch", first)
            until(lambda: first not in jobs(cluster), "the controller stays")
            waiting = jobs(cluster)
            assert len(waiting) == 1
            cluster.run("scontrol", "update", f"JobId={waiting[0]}", "StartTime=now")  # it would begin 5 min after the first
            until(lambda: jobs(cluster) == [], "the chain does not end")
            assert [line.split()[0] for line in steps(campaign)] == ["run", "run"]

    def test_warned_training_saves_requeues_and_resumes(self, tmp_path: Path):
        with virtual_cluster(nodes=2) as cluster:
            package = tmp_path / "modules" / "poise_hpc"
            package.mkdir(parents=True)
            (package / "standalone.py").write_text(RANKS)
            for name in ("__init__.py", "types.py", "isolation.py", "section.py", "settings.py", "strict_yaml.py", "site.py"):
                shutil.copy(REPO / "poise_hpc" / name, package)
            out = tmp_path / "out put"
            out.mkdir()
            job = start(cluster, tmp_path, "train.sbatch", tmp_path / "my pack", "--out", str(out), PYTHONPATH=str(package.parent))
            names = [f"{word}-{life}-{rank}" for life, word in ((0, "began"), (0, "saved"), (1, "began")) for rank in range(4)]
            until(lambda: len(list(out.glob("began-0-*"))) == 4, "four ranks did not begin")
            cluster.run("scancel", "--signal=USR1", "--batch", job)  # what Slurm does before the walltime and at preemption
            cluster.wait_for(job, "COMPLETED")
            assert sorted(path.name for path in out.iterdir()) == sorted(names)
            assert (out / "began-1-0").read_text() == "train"

    def test_the_server_writes_its_address_when_it_answers_and_takes_it_back(self, tmp_path: Path):
        with virtual_cluster(nodes=1) as cluster:
            package = tmp_path / "modules" / "vllm" / "entrypoints" / "openai"
            package.mkdir(parents=True)
            (package / "api_server.py").write_text(VLLM)
            home = tmp_path / "ser ver"
            job = start(cluster, tmp_path, "vllm-server.sbatch", tmp_path / "mo del", str(home), "--max-model-len", "4096",
                        PYTHONPATH=str(tmp_path / "modules"))
            until((home / "url").exists, "no address")
            url, key = (home / "url").read_text().strip(), (home / "api_key").read_text().strip()
            assert (home / "api_key").stat().st_mode & 0o777 == 0o600 and len(key) == 64
            request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
            said = urllib.request.urlopen(request, timeout=60).read().decode()
            assert f"--model {tmp_path}/mo del " in said and said.endswith("--max-model-len 4096") and key not in said
            cluster.run("scancel", job)
            until(lambda: not (home / "url").exists(), "the address stays")

    def test_slurm_accepts_what_a_gpu_site_asks_for(self, tmp_path: Path):
        site = tmp_path / "gpu site.yaml"
        with virtual_cluster(nodes=2) as cluster:
            for request in ("gpus_per_node", "gres") if Path("/dev/tty13").exists() else ():
                site.write_text(json.dumps({"nodes": 2, "ranks_per_node": 4, "gpus": {"per_node": 4, "request": request},
                                            "mem_gb_per_rank": 2, "cpus_per_rank": 2, "partitions": ["low", "main"]}))
                options = cluster.run(sys.executable, "-m", "poise_hpc.site", "options", str(site), "train", cwd=REPO).splitlines()
                shown = cluster.run("srun", *[o for o in options if not o.startswith(("--signal", "--requeue"))], "printenv", "CUDA_VISIBLE_DEVICES")
                assert shown.split() == ["0,1,2,3"] * 8


def new_campaign(folder: Path, enough: int, name: str = "my campaign", **files: str) -> Path:
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    campaign = folder / name
    campaign.mkdir()
    for file, text in {"enough": str(enough), "steps": "", **files}.items():
        (campaign / file).write_text(text)
    return campaign


def start(cluster: VirtualCluster, folder: Path, wrapper: str, *arguments: str | Path, **env: str) -> str:
    """Through submit.sh, as a user does; steps follow each other at once."""
    python = folder / "python" if (folder / "python").exists() else Path(sys.executable)
    out = cluster.run(str(SLURM / "submit.sh"), str(SITE), wrapper, *map(str, arguments), cwd=folder,
                      POISE_HOST_PYTHON=str(python), POISE_STEP_MIN="0", **env)
    return out.split()[-1]


def jobs(cluster: VirtualCluster) -> list[str]:
    return cluster.run("squeue", "--noheader", "--format=%A").split()


def states(cluster: VirtualCluster) -> list[str]:
    return cluster.run("squeue", "--noheader", "--states=all", "--format=%T").split()


def steps(campaign: Path) -> list[str]:
    return (campaign / "steps").read_text().splitlines()
