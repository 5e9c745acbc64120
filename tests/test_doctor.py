"""What the doctor makes of what it sees. Slurm's commands are a function; the nodes' reports are written by hand."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from llm_server import LLMServer, Raw

from poise_hpc import config, files, probe, site
from poise_hpc.campaign import versions
from poise_hpc.doctor import here, nodes, slurm
from poise_hpc.doctor.finding import Finding
from poise_hpc.jobs import Place
from poise_hpc.scheduler import SchedulerSilent

CONFIG = """MaxArraySize            = 1001
MaxJobCount             = 10000
JobRequeue              = 1
KillWait                = 30 sec
PreemptMode             = REQUEUE
SLURM_VERSION           = 23.02.7
SlurmctldParameters     = enable_configless,preempt_send_user_signal
"""
PARTITIONS = ("PartitionName=gpu State=UP Default=YES MaxTime=2-00:00:00 MaxNodes=4 GraceTime=0 PreemptMode=OFF\n"
              "PartitionName=scavenger State=DRAIN Default=NO MaxTime=04:00:00 MaxNodes=UNLIMITED GraceTime=0 PreemptMode=REQUEUE\n")


def fake(**answers):
    """`answers`: command, its dashes as underscores -> output, or an exception."""
    def call(arguments):
        key = next((k for k in ("show_config", "show_partition", "ping") if " ".join(arguments).endswith(k.replace("_", " ").removeprefix("show "))), arguments[0])
        answer = answers.get(key, {"show_config": CONFIG, "show_partition": PARTITIONS}.get(key, ""))
        if isinstance(answer, Exception):
            raise answer
        return answer

    return call


@pytest.fixture
def slurm_on_path(tmp_path, monkeypatch):
    for name in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def found(settings: dict, **answers) -> dict[str, Finding]:
    """Findings that are not ok, by name."""
    findings = slurm.scheduling(site.parse(settings), config.Config(), fake(**answers))
    return {f.name: f for f in findings if f.level != "ok"}


def test_a_good_site_has_nothing_to_cure(slurm_on_path):
    assert found({"partitions": ["gpu"]}) == {}


@pytest.mark.parametrize(("settings", "answers", "name", "level", "words", "cure"), [
    ({"partitions": ["gpus"]}, {}, "train: partition", "fail", "there is no gpus; there are gpu, scavenger", "partitions"),
    ({"stages": {"train": {"time_min": 3000}}}, {}, "train: partition", "fail", "gpu allows 2880 min, time_min is 3000", "stages.train.time_min: 2880"),
    ({"partitions": ["gpu"], "nodes": 8}, {}, "train: partition", "fail", "allows 4 nodes", "nodes: 4"),
    ({"max_array": 1001}, {}, "arrays", "fail", "MaxArraySize 1001", "max_array: 1000"),
    ({"max_submit": 20000}, {}, "jobs", "fail", "MaxJobCount 10000", "max_submit: 1000"),
    ({"max_submit": 200}, {"sacctmgr": "lab|\nlab|50\n"}, "jobs", "warn", "may have 50 jobs", "max_submit: 47"),
    ({"max_submit": 48, "account": "lab"}, {"sacctmgr": "other|5\nlab|50\n"}, "jobs", "warn", "may have 50 jobs", "max_submit: 47"),
    ({"max_submit": 48, "stages": {"check": {"qos": "small"}}}, {"sacctmgr": "|40|\n"}, "jobs", "warn", "may have 40 jobs", "max_submit: 37"),
    ({"stages": {"controller": {"partitions": ["nowhere"]}}}, {}, "controller: partition", "fail", "there is no nowhere", "stages.controller"),
    ({"stages": {"serve": {"partitions": ["nowhere"]}}}, {}, "serve: partition", "warn", "there is no nowhere", "stages.serve"),
    ({}, {"show_config": CONFIG.replace("= 1\n", "= 0\n")}, "requeue", "warn", "JobRequeue is 0", "requeue: false"),
    ({}, {"show_config": CONFIG.replace("preempt_send_user_signal", "x")}, "preemption", "warn", "KillWait 30 sec", "checkpoint_every"),
    ({"partitions": ["gpu", "scavenger"]}, {}, "train: partition", "warn", "a GraceTime of 0 s", "checkpoint_every"),
    ({}, {"sacct": SchedulerSilent("Slurm accounting storage is disabled")}, "accounting", "warn", "disabled", "read from files"),
    ({}, {"sbatch": SchedulerSilent("allocation failure: Invalid account or account/partition combination specified")}, "check: accepted", "fail", "Invalid account", "partitions"),
    ({}, {"sbatch": SchedulerSilent("allocation failure: Invalid qos specification")}, "train: accepted", "fail", "Invalid qos", "qos:"),
    ({}, {"sbatch": SchedulerSilent("sbatch: error: Invalid generic resource (gres) specification")}, "train: accepted", "fail", "gres", "request: gres"),
    ({}, {"show_config": SchedulerSilent("Unable to contact slurm controller")}, "slurm", "fail", "Unable to contact", "slurmctld"),
])
def test_each_fault_is_named_with_its_cure(slurm_on_path, settings, answers, name, level, words, cure):
    finding = found(settings, **answers)[name]
    assert finding.level == level and words in finding.text and cure in finding.cure


def test_no_slurm_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not on PATH: sbatch" in found({})["slurm"].text


@pytest.mark.parametrize(("text", "expected"), [("2-00:00:00", 2880), ("04:30:00", 270), ("UNLIMITED", None), ("INFINITE", None)])
def test_walltimes(text, expected):
    assert slurm.minutes(text) == expected


# --- storage


def test_storage_that_works_and_that_does_not(tmp_path, monkeypatch):
    assert [f.level for f in here.storage(tmp_path) if "free" in f.text][0] in ("ok", "warn")  # room depends on this machine
    assert next(iter(here.storage(tmp_path / "not there"))).level == "fail"
    monkeypatch.setattr(files.os, "link", lambda a, b: None)  # a file system where both win
    assert "exclusive creation does not hold" in next(iter(here.storage(tmp_path))).text


def test_file_system_of_the_longest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text("a / ext4 rw\nb /scratch lustre rw\nc /scratch/me nfs rw\nd /scra tmpfs rw\n")
    assert [here.filesystem(Path(p), mounts) for p in ("/home/x", "/scratch/you", "/scratch/me/x")] == ["ext4", "lustre", "nfs"]


# --- what the nodes said


def report(rank: int = 0, **change):
    return {"rank": rank, "host": f"n{rank}", "versions": {"python": sys.version.split()[0], **versions()}, "clock_offset_s": 0.1, "see_others_s": 1.0,
            "link_won": rank == 0, "hdf5": True, "scratch": {"path": "/tmp/x", "free_gb": 9.0}, "walls": {"network": True, "files": True},
            "problems": True, "gpus": [], "all_reduce": {"sum": 2, "backend": "gloo", "seconds": 1.0}} | change


def test_two_healthy_nodes():
    assert {f.level for f in nodes.judge([report(0), report(1)], site.parse({}), 0.0)} == {"ok"}


@pytest.mark.parametrize(("change", "name", "level", "words"), [
    ({"versions": {"error": "ImportError: x"}}, "versions", "fail", "n1: ImportError: x"),
    ({"clock_offset_s": 42.0}, "clocks", "warn", "42.0 s apart"),
    ({"see_others_s": 70.0}, "visibility", "warn", "after 70 s"),
    ({"see_others_s": {"error": "TimeoutError"}}, "visibility", "fail", "n1: TimeoutError"),
    ({"link_won": True}, "exclusive creation", "fail", "2 nodes created"),
    ({"hdf5": {"error": "OSError: unable to lock file"}}, "hdf5", "fail", "unable to lock"),
    ({"all_reduce": {"error": "DistNetworkError"}}, "all-reduce", "fail", "n1: DistNetworkError"),
    ({"all_reduce": {"sum": 1, "backend": "gloo", "seconds": 1}}, "all-reduce", "fail", "the sum of 2 ones"),
    ({"problems": {"error": "PoiseError: no such set"}}, "model and data", "fail", "no such set"),
    ({"walls": {"network": True, "files": False}}, "isolation there", "warn", "no Landlock"),
    ({"scratch": {"error": "PermissionError"}}, "job cache", "fail", "PermissionError")])
def test_each_fault_of_a_node(change, name, level, words):
    findings = {f.name: f for f in nodes.judge([report(0), report(1, **change)], site.parse({}), 0.0) if f.level != "ok"}
    assert set(findings) == {name} and findings[name].level == level and words in findings[name].text and findings[name].cure


def test_other_versions_and_missing_gpus():
    other = report(1)
    other["versions"] |= {"torch": "1.0", "python": "3.9.1"}
    findings = {f.name: f for f in nodes.judge([report(0), other], site.parse({"gpus": {"per_node": 4}}), 0.0)}
    assert "n1: torch 1.0, here" in findings["versions"].text and "n1: python 3.9.1" in findings["versions"].text
    assert findings["gpus"].level == "fail" and "n0, n1" in findings["gpus"].text


# --- the job


def test_set_up_lines_that_fail_are_named(tmp_path):
    """A job's script goes on after them. What a sourced script does inside is its own business."""
    folder = tmp_path / "my folder"
    folder.mkdir()
    (folder / "activate").write_text("false\nexport INSIDE=1\n")
    setup = ["export A=1", "module load no/such", f"source '{folder}/activate'", f"source '{folder}/none'"]
    (folder / "job.sh").write_text("\n".join([*nodes.notice_failures(setup, folder / nodes.SETUP), "false", 'echo "$A$INSIDE"']))
    done = subprocess.run(["bash", folder / "job.sh"], capture_output=True, text=True)
    assert done.stdout == "11\n"
    (folder / "log.out").write_text(done.stderr)
    (finding,) = nodes.set_up(folder)
    assert finding.level == "warn" and f"failed in the job: module load no/such; source '{folder}/none'" in finding.text and "module: command not found" in finding.text
    assert list(nodes.set_up(tmp_path)) == nodes.notice_failures([], folder) == []


def test_waiting_ends_with_the_reports_or_with_the_job(tmp_path):
    files.write_json(tmp_path / "node-0.json", {"rank": 0})
    slept = []
    gone = nodes.wait(tmp_path, 2, "7", 10, fake(squeue=SchedulerSilent("Invalid job id specified")), 60, slept.append)
    assert gone == [{"rank": 0}] and len(slept) == 15 + 60  # the job is gone: a minute more for its files
    slept.clear()
    assert nodes.wait(tmp_path, 2, "7", 2, fake(squeue="PENDING\n"), 60, slept.append) == [{"rank": 0}] and len(slept) == 120
    files.write_json(tmp_path / "node-1.json", {"rank": 1})
    assert len(nodes.wait(tmp_path, 2, "7", 10, fake(), 60, slept.append)) == 2


def test_a_probe_of_one_node_answers_everything(tmp_path, monkeypatch):
    from poise_hpc.archive import rebuild

    (tmp_path / "records").mkdir()
    rebuild(tmp_path)
    files.write_json(tmp_path / "asked.json", {"config": config.Config().dump()})
    monkeypatch.setenv("POISE_JOB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe.jobs, "place", lambda: Place(0, 1, 0, "7", 0, ("127.0.0.1",)))
    probe.main(tmp_path)
    said = json.loads((tmp_path / "node-0.json").read_text())
    assert {k: v for k, v in said.items() if isinstance(v, dict) and "error" in v} == {}
    assert said["all_reduce"]["sum"] == 1 and said["link_won"] and said["problems"] is True and not (tmp_path / "cache").exists()
    assert sum(f.level == "fail" for f in nodes.judge([said], site.parse({}), 0.0)) == 0


def test_agent_is_asked_only_when_there_is_one(monkeypatch):
    from poise_hpc import llm
    from poise_hpc.types import PoiseError

    assert list(here.agent(config.Config())) == []
    settings = config.parse({"search": {"proposer": "llm"}, "agent": {"models": {"default": ["a", "b"]}, "budget_tokens": 1}})

    def judged(answer):
        def served(_):
            if isinstance(answer, Exception):
                raise answer
            return answer
        monkeypatch.setattr(llm, "served_models", served)
        return [(f.level, f.text) for f in here.agent(settings)]

    free = config.parse({"search": {"proposer": "llm"}, "agent": {"models": {"default": ["a"]}, "api_key_file": "/no/such/key"}})
    assert [(f.level, "neither agent.budget_cost nor" in f.text) for f in here.agent(free)] == [("warn", True), ("fail", False)]
    assert judged(["a", "b", "c"])[0][0] == "ok"
    assert judged(["a"]) == [("warn", "the endpoint does not list b; it lists a")]
    assert judged(PoiseError("no route")) == [("fail", "no route")]
    monkeypatch.undo()
    keyless = config.parse({"search": {"proposer": "llm"}, "agent": {"models": {"default": ["a"]}, "api_key_file": "/no/such/key", "budget_tokens": 1}})
    (finding,) = here.agent(keyless)
    assert "/no/such/key cannot be read" in finding.text and "chmod 600" in finding.cure and "internet" not in finding.cure


def test_a_web_page_instead_of_an_endpoint_is_a_finding():
    with LLMServer([], models=Raw(b"<html>Welcome to the proxy</html>")) as server:
        settings = config.parse({"search": {"proposer": "llm"}, "agent": {"models": {"default": ["a"]}, "base_url": server.url, "budget_tokens": 1}})
        (finding,) = here.agent(settings)
    assert finding.level == "fail" and "Welcome to the proxy" in finding.text and "agent.base_url (it ends in /v1)" in finding.cure


def test_a_narrow_search_on_many_slots_is_said():
    def found(**search):
        return list(here.slots(site.Site(scheduler="local"), config.Config.model_validate({"search": search, "jobs": {"max_parallel": 8}})))

    (finding,) = found()
    assert finding.level == "warn" and "4 candidates with 2 seeds" in finding.text and "search.asynchronous: true" in finding.cure
    assert found(asynchronous=True) == found(window=2) == []  # somebody has chosen
    assert list(here.slots(site.Site(scheduler="local"), config.Config())) == []  # the lab's two slots
