"""The virtual cluster, on the real Slurm daemons: what the pipeline relies on when it talks about preemption and loss."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_slurm import REPO, SCRIPT, VirtualCluster, needs_slurm, processes, survivors, until, virtual_cluster

# Writes each signal it gets to a file named by its first argument; after that many seconds it ends by itself.
LISTENER = """
import os, signal, sys, time
def note(text): open(sys.argv[1], "a").write(text + "\\n")
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda n, frame: (note(signal.Signals(n).name), sys.argv[3] == "leaves" and sys.exit(0)))
note("start " + os.environ.get("SLURM_RESTART_COUNT", "0"))
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end: time.sleep(0.05)
note("end")
"""


def script(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["/bin/bash", str(SCRIPT), *arguments], text=True, capture_output=True, env=os.environ | env, timeout=60)


@pytest.mark.parametrize(("options", "words"), [
    (["--nodes", "0"], "--nodes: 1 to 64 wanted, got '0'"),
    (["--nodes", "four"], "--nodes: 1 to 64 wanted"),
    (["--port", "20000"], "--port: 1024 to 19993 wanted, got '20000'"),
    (["--dir", "/tmp/" + "x" * 80], "at most 64 characters wanted"),
    (["--dir", "/tmp/it's"], "quotes"),
    (["--dir", "/tmp/a b", "--accounting"], "MariaDB"),
    (["--colour"], "start|stop|status|env"),
])
def test_bad_options_are_refused(options: list[str], words: str):
    done = script("start", *options)
    assert done.returncode == 2 and words in done.stderr


def test_missing_programs_are_named_with_the_command_that_installs_them(tmp_path: Path):
    for name in ("bash", "dirname", "id", "realpath", "sed"):  # a host without Slurm
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    text = SCRIPT.read_text().replace("export PATH=$PATH:/usr/sbin:/sbin", "")
    done = subprocess.run(["/bin/bash", "-c", text, "virtual_cluster", "start", "--dir", str(tmp_path / "c")[:60]],
                          env={"PATH": str(tmp_path)}, text=True, capture_output=True)
    assert done.returncode == 2
    assert "apt-get install --no-install-recommends munge slurmctld slurmd slurm-client" in done.stderr


class TestReal:
    pytestmark = needs_slurm

    def test_start_and_stop_twice(self):
        with virtual_cluster(nodes=2) as cluster:
            pids = [cluster.pid(name) for name in ("slurmctld", "slurmd.127.0.1.1", "slurmd.127.0.1.2")]
            assert cluster.script("start").returncode == 0
            assert [cluster.pid(name) for name in ("slurmctld", "slurmd.127.0.1.1", "slurmd.127.0.1.2")] == pids
            assert cluster.script("status").returncode == 0
            first = int(cluster.sbatch("--wait", "--wrap=true"))
            cluster.sbatch("--wrap=sleep 600")
            assert cluster.script("stop").returncode == 0
            assert survivors(cluster.conf) == []
            assert cluster.script("status").returncode == 3
            assert cluster.script("stop").returncode == 0
            assert cluster.script("start", "--nodes", "1").returncode == 0
            assert cluster.node_states() == ["idle"]
            assert int(cluster.sbatch("--wrap=true")) > first  # a job id is never used twice

    def test_a_job_in_folders_with_spaces(self):
        with virtual_cluster(nodes=1, name="a cluster") as cluster:
            shown = cluster.script("env").stdout
            assert subprocess.run(["bash", "-c", shown + 'printf %s "$SLURM_CONF"'], capture_output=True, text=True).stdout == str(cluster.conf)
            work = cluster.folder / "my work"
            work.mkdir()
            (work / "job.sh").write_text("#!/bin/bash\npwd\nsrun pwd\n")
            cluster.sbatch("--wait", "--output=out put.txt", "job.sh", cwd=work)
            assert (work / "out put.txt").read_text().splitlines() == [str(work)] * 2

    def test_four_ranks_on_two_nodes_find_their_head(self):
        with virtual_cluster(nodes=2) as cluster:
            code = ("import os, socket; from poise_hpc.jobs import place; p = place(); socket.gethostbyname(p.nodes[0]); "
                    "print(p.rank, p.ranks, p.local_rank, p.nodes[0], os.environ['SLURMD_NODENAME'])")
            out = cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, "-c", code, cwd=REPO)
            assert sorted(out.splitlines()) == ["0 4 0 127.0.1.1 127.0.1.1", "1 4 1 127.0.1.1 127.0.1.1",
                                                "2 4 0 127.0.1.1 127.0.1.2", "3 4 1 127.0.1.1 127.0.1.2"]

    @pytest.mark.skipif(not Path("/dev/tty13").exists(), reason="no /dev/tty10 to 13 to pretend GPUs with")
    def test_pretended_gpus_are_given_out(self):
        with virtual_cluster(nodes=1) as cluster:
            for option in ("--gpus-per-node=2", "--gres=gpu:2"):
                assert cluster.run("srun", option, "bash", "-c", "echo $CUDA_VISIBLE_DEVICES") == "0,1"

    def test_a_warned_job_that_leaves_in_time_is_completed_not_requeued(self, tmp_path: Path):
        with virtual_cluster(nodes=1) as cluster:
            low = listener(cluster, tmp_path, "leaves")
            high = cluster.sbatch("--partition=high", "--cpus-per-task=8", "--wrap=true")
            cluster.wait_for(high, "COMPLETED")
            cluster.wait_for(low, "COMPLETED")
            assert (tmp_path / "heard").read_text().split("\n")[:2] == ["start 0", "SIGUSR2"]

    @pytest.mark.slow
    def test_a_job_that_stays_is_requeued_after_the_grace_time(self, tmp_path: Path):
        with virtual_cluster(nodes=1) as cluster:
            low = listener(cluster, tmp_path, "stays")
            cluster.wait_for(cluster.sbatch("--partition=high", "--cpus-per-task=8", "--wrap=true"), "COMPLETED")
            until(lambda: "start 1" in (tmp_path / "heard").read_text(), "the job did not start again")
            heard = (tmp_path / "heard").read_text().split()
            assert heard[:3] == ["start", "0", "SIGUSR2"] and "SIGTERM" in heard and cluster.state(low) == "RUNNING"

    def test_a_job_outlives_its_slurmd_and_start_brings_the_node_back(self, tmp_path: Path):
        with virtual_cluster(nodes=2) as cluster:
            job = cluster.sbatch("--nodelist=127.0.1.1", f"--wrap=while [ ! -e '{tmp_path}/go' ]; do sleep 0.1; done")
            cluster.wait_for(job, "RUNNING")
            os.kill(cluster.pid("slurmd.127.0.1.1"), signal.SIGKILL)
            until(lambda: cluster.script("status").returncode == 1, "status sees no missing slurmd")
            assert "slurmd.127.0.1.1 not running" in cluster.script("status").stdout
            assert cluster.script("start").returncode == 0
            (tmp_path / "go").touch()
            cluster.wait_for(job, "COMPLETED")

    @pytest.mark.slow
    def test_a_lost_node_is_down_its_job_is_requeued_and_nothing_of_it_survives_stop(self):
        with virtual_cluster(nodes=2) as cluster:
            job = cluster.sbatch("--nodelist=127.0.1.1", "--requeue", "--wrap=sleep 600")
            cluster.wait_for(job, "RUNNING")
            os.kill(cluster.pid("slurmd.127.0.1.1"), signal.SIGKILL)
            until(lambda: sorted(s.rstrip("*") for s in cluster.node_states()) == ["down", "idle"], "the node is not down")
            cluster.wait_for(job, "PENDING")
            # The job's processes are still there: nobody told them. `stop`, at the end of this test, ends them too.
            assert any("sleep 600" in line for line in processes(cluster.conf))

    def test_a_job_outlives_a_restart_of_slurmctld(self, tmp_path: Path):
        with virtual_cluster(nodes=1) as cluster:
            job = cluster.sbatch(f"--wrap=while [ ! -e '{tmp_path}/go' ]; do sleep 0.1; done")
            cluster.wait_for(job, "RUNNING")
            os.kill(cluster.pid("slurmctld"), signal.SIGTERM)  # it saves its state; killed, it may have forgotten the start
            until(lambda: "slurmctld not running" in cluster.script("status").stdout, "slurmctld does not end")
            assert cluster.script("start").returncode == 0
            assert cluster.state(job) == "RUNNING"
            (tmp_path / "go").touch()
            cluster.wait_for(job, "COMPLETED")

    def test_two_clusters_side_by_side(self):
        with virtual_cluster(nodes=1) as one, virtual_cluster(nodes=2) as two:
            assert (len(one.node_states()), len(two.node_states())) == (1, 2)
            sleeper = one.sbatch("--wrap=sleep 600")
            one.wait_for(sleeper, "RUNNING")
            two.script("stop")
            assert one.state(sleeper) == "RUNNING" and one.script("status").returncode == 0


def listener(cluster: VirtualCluster, folder: Path, mode: str) -> str:
    """A job on a whole node in the preemptable partition that notes what it hears; returned when it listens."""
    (folder / "listener.py").write_text(LISTENER)
    heard = folder / "heard"
    job = cluster.sbatch("--partition=low", "--cpus-per-task=8", "--time=20", "--signal=USR2@120", "--requeue",
                         f"--wrap=srun --cpus-per-task=8 {sys.executable} '{folder}/listener.py' '{heard}' 300 {mode}")
    until(lambda: heard.exists() and "start 0" in heard.read_text(), "the job did not start")
    return job
