"""The command line: exit codes, errors that say how to go on, --json everywhere. Jobs are run by other tests."""
from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers_campaign import campaign
from helpers_drive import drive, failing, write_package

from poise_hpc import cli, files
from poise_hpc.algorithms.seeds import source
from poise_hpc.campaign import Campaign
from poise_hpc.cli.driving import Progress
from poise_hpc.cluster.inline import InlineCluster
from poise_hpc.lock import LOCK, LOCK_STALE_S
from poise_hpc.types import Outcome

SITES = Path(__file__).parents[1] / "configs" / "sites"
SMALL = {"search": {"candidates": 2, "train_seeds": [0]}}


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = campaign(tmp_path_factory.mktemp("it's \"a\"\ncampaign") / "c", **SMALL).root
    drive(root)
    return root


@pytest.fixture
def held(tmp_path):
    root = campaign(tmp_path / "held", **SMALL).root
    drive(root, InlineCluster(failing("train", "c0001", Outcome.INFRA_ERROR, "worker-died")))
    return root


# --- what it prints

def test_status_is_the_interface_that_scripts_read(finished):
    data = json.loads(run("status", finished, "--json").stdout)
    assert data["campaign"] == str(finished) and data["done"] is True and data["held"] == [] and data["running"] == []
    assert data["budget"]["candidates"] == data["budget"]["proposed"] == 2 and data["budget"]["archived"] == 3
    assert [c["id"] for c in data["candidates"]] == ["c0000", "c0001", "c0002"]
    assert {"id", "name", "parents", "stage", "outcome", "overall", "ci"} <= data["candidates"][0].keys()
    assert "3 archived" in run("status", finished).output


def test_status_says_who_drives_it(held):
    """Nobody; this process; another host's, at work and silent for longer than its lock counts."""
    goes_on = f"`poise-hpc run {shlex.quote(str(held))}` goes on"
    assert json.loads(run("status", held, "--json").stdout)["driver"] is None
    assert f"nobody drives it: {goes_on}" in run("status", held).output
    with Campaign.open(held).lock() as lock:
        me = json.loads(run("status", held, "--json").stdout)["driver"]
        assert (me["host"], me["pid"]) == (lock.mine["host"], os.getpid()) and me["refreshed_s"] < 60
        assert f"driven by process {os.getpid()} on {me['host']} (lock refreshed" in run("status", held).output
    path = held / LOCK
    files.write_json(path, {"host": "another-host", "pid": 77, "start": 1, "taken": 0.0})
    assert "driven by process 77 on another-host" in run("status", held).output
    then = path.stat().st_mtime - LOCK_STALE_S - 60
    os.utime(path, (then, then))
    assert json.loads(run("status", held, "--json").stdout)["driver"] is None
    assert re.search(rf"nobody drives it \(process 77 on another-host is gone; lock refreshed 9\d\d s ago\): {re.escape(goes_on)}",
                     run("watch", held, code=3).output)
    files.write_json(path, {"host": me["host"], "pid": os.getpid(), "start": 1, "taken": 0.0})  # a pid that another process has now
    assert f"nobody drives it (process {os.getpid()} on" in run("status", held).output


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    opened = campaign(tmp_path / "c", **SMALL)
    lines, before = [], {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        cli.driving.stop_on_signal(cli.build(opened, say=lines.append))
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert left.value.code == 143 and lines[-1].endswith("by signal 15; 0 jobs asked to save and stop. The same command goes on")


@pytest.mark.parametrize("command", [
    ["status"], ["leaderboard"], ["show", "c0001"], ["logs", "c0001"], ["watch"], ["archive", "verify"], ["archive", "rebuild"],
    ["retry"], ["drain"], ["drain", "--off"]])
def test_every_printing_command_has_json_and_text(finished, command):
    head, place = (command[:2], command[2:]) if command[0] == "archive" else (command[:1], command[1:])
    assert isinstance(json.loads(run(*head, finished, *place, "--json").stdout), dict)
    assert run(*head, finished, *place).output.strip()


def test_the_baseline_shows_its_mechanisms(finished):
    assert "mechanisms   group-std, symmetric-clip" in run("show", finished, "c0000").output


def test_show_says_the_verdict_once_in_plain_text_and_none_of_the_baseline(finished):
    base, own = run("show", finished, "c0000").output, run("show", finished, "c0001").output
    assert "verdict" not in base and "ndecided" not in base and "Overall" in base
    assert len(re.findall("^verdict ", own, re.MULTILINE)) == 1 and "ndecided." not in own and "**" not in own and "`" not in own


def test_show_tells_why_the_parent_was_chosen(finished):
    data = json.loads(run("show", finished, "c0002", "--json").stdout)
    assert data["pick"]["parent"] == data["parents"][0] and data["pick"]["explanation"]
    assert data["score"]["overall"] == data["overall"] and data["reflection"]["verdict"]


def test_a_drained_campaign_is_done(tmp_path):
    root = campaign(tmp_path / "c", search={"candidates": 50, "train_seeds": [0]}).root
    run("drain", root)
    drive(root)
    data = json.loads(run("status", root, "--json").stdout)
    assert data["done"] and data["budget"]["proposed"] == 0
    why = f"draining: `poise-hpc drain --off {root}` ends it; 50 of 50 candidates are not proposed"
    assert f"ended early: {why}" in run("watch", root).output and "Ended early." in page(root)
    assert run("run", root).output.endswith(f"nothing new is proposed: {why}\n")


def page(root):
    run("report", root)
    return (root / "report" / "report.html").read_text()


def test_run_says_why_it_did_nothing(finished):
    raises = f"all 2 candidates are proposed; `poise-hpc run {shlex.quote(str(finished))} --max-candidates N` raises it"
    assert run("run", finished).output.endswith(f"nothing new is proposed: {raises}\n")
    assert f"done: {raises}" in run("status", finished).output
    result = run("run", finished, "--json")
    assert json.loads(result.stdout)["rows"] and f"nothing new is proposed: {raises}" in result.stderr


def test_an_empty_archive_says_where_to_look(tmp_path):
    root = campaign(tmp_path / "c", **SMALL).root
    assert f"nothing is archived yet; `poise-hpc status {root}`" in run("leaderboard", root).output


def test_held_is_exit_code_3(held, tmp_path):
    data = json.loads(run("status", held, "--json").stdout)
    assert data["held"] == ["c0001"] and not data["done"]
    result = run("run", held, code=3)
    assert "held: c0001 at train: worker-died" in result.stderr
    assert re.match(r"--- \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\n.*held: c0001", run("watch", held, code=3).output)  # a pipe


def test_orders_are_carried_out_when_nobody_drives(held):
    assert json.loads(run("retry", held, "c0001", "--json").stdout) == {"carried_out": True, "by": "this command"}
    assert json.loads(run("status", held, "--json").stdout)["held"] == []
    assert "c0001 is not held but at train: there is nothing to retry" in run("retry", held, "c0001", code=2).stderr
    run("hold", held, "c0001")
    assert "c0001 is held already: there is nothing to hold" in run("hold", held, "c0001", code=2).stderr
    assert json.loads(run("status", held, "--json").stdout)["held"] == ["c0001"]


def test_orders_wait_for_the_controller_at_work(held):
    files.write_json(held / "controller.lock", {"host": "another-host", "pid": 1, "start": 1, "taken": 0.0})
    assert json.loads(run("retry", held, "--json").stdout)["carried_out"] is False
    assert len(list((held / "inbox").iterdir())) == 1


def test_an_error_while_carrying_out_an_order_is_not_called_a_running_controller(held):
    (held / "candidates" / "c0001" / "attempts" / "check-1" / "result.json").write_text("{")
    result = run("retry", held, code=1)
    assert "result.json is not valid JSON" in result.stderr and "running" not in result.output


# --- wrong calls: exit code 2, and nothing is created

BAD = [
    ("train: {stepz: 3}", "unknown key 'train.stepz'; did you mean 'train.steps'?"),
    ("trian: {steps: 3}", "unknown key 'trian'; did you mean 'train'?"),
    ("train: {steps: many}", "'train.steps': input should be a valid integer, got 'many'"),
    ("train: {learning_rate: 3e-4}", "'train.learning_rate': input should be a valid number, got '3e-4': in YAML that is a text, write 0.0003"),
    ("train: {learning_rate: 1e-7}", "in YAML that is a text, write 1.0e-07"),
    ("train: {learning_rate: much}", "input should be a valid number, got 'much'\n"),
    ("train: null", "'train': a mapping of settings was wanted, got None"),
    ("[" * 20000, "nested too deeply"),
    ("train: {steps: 0}", "'train.steps': input should be greater than or equal to 1, got 0"),
    ("rollout: {group_size: 1}", "'rollout.group_size': input should be greater than or equal to 2, got 1"),
    ("search: {train_seeds: [0, 0]}", "all distinct"),
    ("search: {baseline: grpoo}", "no seed algorithm 'grpoo'; did you mean 'grpo'?"),
    ("task: {name: chian}", "there is no task 'chian'; did you mean 'chain'?"),
    ("task: {options: {trian: 1}}", "unknown key 'task.options.trian'"),
    ("model: {source: path, path: /no/such/model}", "model.path: /no/such/model is no Hugging Face model folder"),
    ("evaluate: {benchmarks: {easy: {split: esay, problems: 1, samples: 1, metrics: {acc@1: 1.0}}}}", "has no split 'esay'; did you mean 'easy'?"),
    ("train: [", "not valid YAML"),
    ("- 1", "a mapping of sections was wanted, got list"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_config_is_named_and_nothing_is_created(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    result = run("run", tmp_path / "new", "--config", tmp_path / "bad.yaml", "--cache-dir", tmp_path / "cache", code=2)
    assert message in result.stderr and "Traceback" not in result.output
    assert os.listdir(tmp_path) == ["bad.yaml"]


@pytest.mark.parametrize("key", ["api_key_file: {d}/no-key", "api_key_env: POISE_TEST_NO_SUCH_KEY"])
def test_without_the_key_no_campaign_is_created(tmp_path, key):
    (tmp_path / "llm.yaml").write_text(f"search: {{proposer: llm}}\nagent: {{models: {{default: [m]}}, {key.format(d=tmp_path)}}}")
    assert "agent.api_key_" in run("run", tmp_path / "new", "--config", tmp_path / "llm.yaml", "--cache-dir", tmp_path / "cache", code=2).stderr
    assert os.listdir(tmp_path) == ["llm.yaml"]


def test_a_changed_config_is_refused(finished, tmp_path):
    (tmp_path / "other.yaml").write_text("train: {steps: 5}\nsearch: {window: 3}")
    result = run("run", finished, "--config", tmp_path / "other.yaml", code=2)
    assert "search.window: (default) -> 3\n" in result.stderr and "metrics.pass@4: 0.2 -> (none)\n" in result.stderr and "None" not in result.stderr
    assert "train.steps: 4 -> 5" in result.stderr and "start another campaign" in result.stderr


@pytest.mark.parametrize("arguments", [
    ["status", "/no/such/campaign"], ["show", "{c}", "c0099"], ["logs", "{c}", "../c0001"], ["hold", "{c}", "c0099"], ["rerun", "{c}", "c0099"],
    ["add", "{c}", "/no/such/folder"], ["run", "{c}", "--max-candidates", "-1"], ["frobnicate"], ["logs", "{c}", "c0001", "--lines", "0"],
    ["watch", "{c}", "--every", "-1"], ["confirm", "{c}", "c0001", "--seeds", "0"], ["transfer", "{c}", "c0001"], ["add", "{c}", "{c}"]])
def test_wrong_calls_are_exit_code_2(finished, arguments):
    result = run(*(a.format(c=finished) for a in arguments), code=2)
    assert result.stderr.strip() and "Traceback" not in result.output


@pytest.mark.parametrize(("arguments", "message"), [
    (["run", "{c}", "--config", "{d}/no.yaml"], "File '{d}/no.yaml' does not exist"),
    (["run", "{c}", "--site", "{d}/no.yaml"], "File '{d}/no.yaml' does not exist"),
    (["run", "{c}", "--site", "{d}"], "File '{d}' is a directory"),
    (["run", "{c}", "--config", "{d}/binary"], "{d}/binary: cannot be read as UTF-8"),
    (["status", "{d}/binary"], "Directory '{d}/binary' is a file"),
    (["status", "{d}"], "{d} is no campaign: it has no campaign.json. `poise-hpc run '{d}'` creates one"),
    (["check", "{d}/binary"], "{d}/binary is no algorithm package: a folder with algorithm.py was wanted, or one .py file"),
    (["show", "{c}", "3"], "'3' is no candidate; did you mean c0003?"),
    (["show", "{c}", "grpo"], "'grpo' is no candidate; c0003 would be one"),
    (["show", "{c}", "c0077"], "has no candidate c0077: it has c0000 to c0002"),
    (["confirm", "{c}", "c0077"], "c0077 has no archive entry"),
    (["confirm", "{c}", "c0000"], "c0000 is the baseline: it would be compared with itself"),
    (["run", "{c}", "--dry-run", "--config", "{d}/path.yaml"], "config.yaml is frozen and the given config differs"),
    (["run", "{d}/new", "--dry-run", "--config", "{d}/path.yaml"], "nowhere is no Hugging Face model folder"),
    (["run", "{d}", "--cache-dir", "{d}"], "{d} is there and no campaign"),
    (["hold", "{c}", "prepare"], "prepare is archived: there is nothing to hold"),
    (["hold", "{c}", "c0001"], "c0001 is archived: there is nothing to hold")])
def test_an_error_says_what_came_and_how_to_go_on(finished, tmp_path, arguments, message):
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (folder / "path.yaml").write_text("model: {source: path, path: nowhere}")
    result = run(*(a.format(c=finished, d=folder) for a in arguments), code=2)
    assert message.format(d=folder) in result.stderr


def test_the_second_controller_names_the_first_and_changes_nothing(held):
    before = (held / "config.yaml").read_bytes()
    files.write_json(held / "controller.lock", {"host": "another-host", "pid": 77, "start": 1, "taken": 0.0})
    result = run("run", held, "--max-candidates", 50, code=1)
    assert "is driven by process 77 on another-host" in result.stderr
    assert (held / "config.yaml").read_bytes() == before


# --- packages of a person

def not_utf8(folder):
    (folder / "algorithm.py").write_bytes(b"ALGORITHM = '\xff'")


def without_algorithm(folder):
    (folder / "algorithm.py").rename(folder / "main.py")


def huge(folder):
    (folder / "algorithm.py").write_text("#" * 300_000)


def proposal(text):
    return lambda folder: (folder / "proposal.json").write_text(text)


@pytest.mark.parametrize(("spoil", "message"), [
    (not_utf8, "algorithm.py is not UTF-8"), (without_algorithm, "algorithm.py is missing"), (huge, "at most 200000 are read"),
    (proposal("{"), "proposal.json is not valid JSON"), (proposal("[1]"), "a mapping was wanted"),
    (proposal('{"nmae": "x"}'), "unknown keys ['nmae']"), (proposal('{"mechanisms": 3}'), "mechanisms: Input should be a valid tuple, got 3")])
def test_what_is_no_package_is_refused_before_it_enters(finished, tmp_path, spoil, message):
    spoil(write_package(tmp_path / "own"))
    result = run("add", finished, tmp_path / "own", code=2)
    assert message in result.stderr
    assert not any((finished / "inbox").iterdir())


def test_a_good_package_enters_whole(held, tmp_path):
    data = json.loads(run("add", held, write_package(tmp_path / "own"), "--parent", "c0000", "--json").stdout)
    assert sorted(os.listdir(data["inbox"])) == ["algorithm.py", "proposal.json"]
    assert files.read_json(held / "inbox" / os.path.basename(data["inbox"]) / "proposal.json")["parents"] == ["c0000"]


def test_code_that_a_candidate_has_already_is_named_and_taken(held, tmp_path):
    package = write_package(tmp_path / "own", seed="grpo")
    result = run("add", held, package, "--json")
    assert json.loads(result.stdout)["same_code_as"] == "c0000" and "warning: c0000 has exactly this code" in result.stderr
    (package / "algorithm.py").write_text((package / "algorithm.py").read_text() + "# mine\n")
    result = run("add", held, package, "--json")
    assert json.loads(result.stdout)["same_code_as"] is None and "warning" not in result.stderr and len(list((held / "inbox").iterdir())) == 2


def test_the_static_gate_reads_a_package_before_it_enters_and_runs_nothing(finished, tmp_path):
    package = write_package(tmp_path / "own")
    code = (package / "algorithm.py").read_text()
    (package / "algorithm.py").write_text(f"import os\n{code}\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    result = run("add", finished, package, code=2)
    last = code.count("\n") + 3
    assert "algorithm.py:1 import: `import os`" in result.stderr and f"algorithm.py:{last} side-effect" in result.stderr
    assert not any((finished / "inbox").iterdir()) and not (tmp_path / "ran").exists()


def test_check_takes_a_file_and_says_one_fault_once(tmp_path):
    package = write_package(tmp_path / "own", seed="grpo") / "algorithm.py"
    own = package.rename(tmp_path / "my own.py")
    shown = run("check", own).output
    assert "passes: it may enter a campaign" in shown and "hint" not in shown
    own.write_text(own.read_text().replace("R, g = rollouts.reward, rollouts.group", "R, g = reward, rollouts.group"))
    shown = run("check", own, code=1).output
    assert shown.count("NameError: name 'reward' is not defined") == 1 and "pass  declared" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("FAIL")]
    failed = [c["name"] for c in json.loads(run("check", own, "--json", code=1).stdout)["checks"] if not c["passed"]]
    assert len(failed) > 5 and line.startswith(f"FAIL  {', '.join(failed)}: raised NameError")


def test_check_refuses_the_proposal_that_add_would_refuse(finished, tmp_path):
    package = write_package(tmp_path / "own", seed="grpo")
    assert "pass  proposal.json" in run("check", package).output
    for text, fault in (('{"nam": "MINE"}', "unknown keys ['nam']; known: name,"), ('{"parents": "c0000"}', "parents: Input should be"), ("{", "proposal.json")):
        (package / "proposal.json").write_text(text)
        shown = run("check", package, code=1).output
        assert "pass  direction" in shown and "FAIL  proposal.json: " in shown and fault in shown and "fails (proposal)" in shown
        assert fault in run("add", finished, package, code=2).stderr


def test_add_takes_a_file_as_check_does(held, finished, tmp_path):
    own = (write_package(tmp_path / "own") / "algorithm.py").rename(tmp_path / "my_rloo.py")
    data = json.loads(run("add", held, own, "--json").stdout)
    folder = held / "inbox" / os.path.basename(data["inbox"])
    assert files.read_json(folder / "proposal.json")["name"] == "my_rloo" and (folder / "algorithm.py").read_text() == own.read_text()
    own.write_text("import os\n" + own.read_text())
    assert "my_rloo does not pass the static gate" in run("add", finished, own, code=2).stderr
    assert "a folder with algorithm.py was wanted, or one .py file" in run("add", finished, finished / "config.yaml", code=2).stderr


def test_check_hints_that_ablate_will_have_nothing_to_do(tmp_path):
    package = write_package(tmp_path / "own", seed="grpo") / "algorithm.py"
    package.write_text(re.sub(r", off=\{.*?\}", "", package.read_text()))
    shown = run("check", package.parent).output
    assert "hint: it has no mechanism that can be switched off" in shown and "passes: it may enter a campaign" in shown


# --- submissions, shown

@pytest.mark.parametrize("command", [["confirm", "c0001"], ["ablate", "c0001"], ["rerun", "c0001"], ["step"]])
def test_a_dry_run_shows_and_changes_nothing(finished, command):
    before = sorted(p for p in finished.rglob("*"))
    data = json.loads(run(command[0], finished, *command[1:], "--dry-run", "--json").stdout)
    assert set(data["scripts"]) == {"prepare", "check", "train"}
    assert (finished / "derived" in Path(data["campaign"]).parents) == (command[0] != "step")
    assert sorted(p for p in finished.rglob("*")) == before


def test_a_dry_run_on_a_cluster_shows_what_sbatch_would_read(finished):
    shown = run("confirm", finished, "c0001", "--site", SITES / "gpu_account.yaml", "--dry-run").output
    assert "### train\n#!/bin/bash" in shown and "#SBATCH --partition=" in shown
    assert "derived/confirm-c0001-1/candidates/cNNNN/attempts/train-s1000-1" in shown
    assert not (finished / "derived" / "confirm-c0001-1").exists()


def test_a_site_of_this_host_can_be_kept_and_read_again(tmp_path):
    opened = campaign(tmp_path / "c", **SMALL)
    opened.set_site(SITES / "local.yaml")
    assert cli.build(opened, say=print).cluster.on_this_host


# --- damage

def test_a_damaged_record_is_named_and_comes_back(finished, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    (root / "index.h5").unlink(missing_ok=True)
    record = root / "records" / "c0001.h5"
    whole = record.read_bytes()
    record.write_bytes(whole[:-9])
    assert "c0001" in json.loads(run("status", root, "--json").stdout)["problems"][0]
    assert "move a damaged record away" in run("archive", "verify", root, code=1).output
    drive(root)
    assert record.read_bytes() == whole
    run("archive", "verify", root)


def test_a_record_that_rots_behind_the_index_comes_back_as_verify_says(finished, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    run("archive", "rebuild", root)
    record = root / "records" / "c0001.h5"
    whole = record.read_bytes()
    record.write_bytes(whole[:-9])
    run("archive", "verify", root, code=1)
    (root / "index.h5").rename(root / "index")  # without it, the damage is found at once, and said wherever an entry is missing
    assert f"problem: c0001: {record} is damaged" in run("leaderboard", root).output
    (root / "index").rename(root / "index.h5")
    record.unlink()
    drive(root)
    assert record.read_bytes() == whole


def test_a_locale_of_another_encoding_changes_nothing(finished):
    """As on old clusters, whose LANG is en_US or POSIX. The page has letters that ASCII lacks."""
    old = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))} | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-m", "poise_hpc.cli", "report", str(finished)], env=old, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    page = (finished / "report" / "report.html").read_bytes()
    assert not page.isascii() and page.decode("utf-8")


# --- disks

@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root and the permission to mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_stops_with_its_name_and_loses_nothing(small_disk, tmp_path):
    root = campaign(small_disk / "c", **SMALL).root
    with pytest.raises(OSError, match="No space left") as error:
        drive(root)
    assert str(small_disk) in str(error.value)
    (small_disk / "ballast").write_bytes(b"")
    result = run("step", root, code=1)
    assert re.fullmatch(rf"error: No space left on device: {small_disk}\S+ cannot be written. Make room there and give the same command again: "
                        "nothing is lost\n", result.stderr), result.stderr
    (package := tmp_path / "package").mkdir()
    (package / "algorithm.py").write_text(source("rloo"))
    assert "No space left on device" in run("add", root, package, code=1).stderr
    assert list((root / "inbox").iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    drive(root)
    assert len(json.loads(run("leaderboard", root, "--json").stdout)["rows"]) == 3


def test_a_step_of_a_misspelt_campaign_creates_none(tmp_path):
    """Only with a config; from cron, every five minutes, a wrong path must not start another search."""
    assert "is no campaign" in run("step", tmp_path / "c", "--site", "configs/sites/local.yaml", code=2).stderr
    run("step", tmp_path / "c", "--config", "configs/tiny.yaml", "--dry-run")
    assert not (tmp_path / "c").exists()


def test_a_campaign_that_cannot_be_created_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot create the campaign folder" in run("run", tmp_path / "file" / "c", "--cache-dir", tmp_path / "cache", code=1).stderr
    assert "cannot create the cache folder" in run("run", tmp_path / "c", "--cache-dir", tmp_path / "file" / "x", code=1).stderr
    assert not (tmp_path / "c").exists()


def test_a_read_only_campaign_can_be_looked_at(finished, tmp_path):
    place = tmp_path / "ro"
    place.mkdir()
    mount = ["unshare", "--mount", "--user", "--map-root-user", "sh", "-c",
             'mount --bind "$1" "$2" && mount -o remount,bind,ro "$2" && shift 2 && exec "$@"', "sh", str(finished), str(place)]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    command = [*mount, sys.executable, "-m", "poise_hpc.cli"]
    assert subprocess.run([*command, "status", str(place), "--json"], capture_output=True).returncode == 0
    done = subprocess.run([*command, "run", str(place)], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: Read-only file system: {place / LOCK} cannot be written. Make that place writable and give the same command again" in done.stderr
    done = subprocess.run([*command, "archive", "rebuild", str(place)], capture_output=True, text=True)
    assert done.returncode == 1 and f"Read-only file system: {place / 'index.h5'} cannot be written" in done.stderr and done.stdout == ""


def test_a_line_of_progress_says_when_nothing_runs(finished, capsys):
    shown = Progress(Campaign.open(finished), quiet=False, every_s=0.0)
    shown()
    assert capsys.readouterr().out.endswith("  |  no job is running\n")
