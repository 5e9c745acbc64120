"""The campaign folder: created whole, driven by one, config frozen."""
from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from helpers_campaign import campaign

from poise_hpc import config as configuration
from poise_hpc import files
from poise_hpc.campaign import Campaign
from poise_hpc.lock import LOCK_STALE_S, CampaignBusy, Lock
from poise_hpc.settings import overlay
from poise_hpc.types import PoiseError, UsageError

DEAD = {"host": socket.gethostname(), "pid": 2**22 + 1, "start": 1, "taken": 0.0}  # above the largest pid
ELSEWHERE = {"host": "another-host", "pid": 1, "start": 1, "taken": 0.0}


# --- creation

def test_a_locale_without_umlauts_changes_no_text(tmp_path):
    """Files are UTF-8 whatever the login node's locale is; what its terminal cannot show is escaped."""
    (tmp_path / "c.yaml").write_text("search: {directive: 'k\u00fcrzer, \u03b5'}\n", encoding="utf-8")
    code = ("from pathlib import Path\nfrom poise_hpc import cli, config\nfrom poise_hpc.campaign import Campaign\n"
            f"root = Path({str(tmp_path)!r})\n"
            "made = Campaign.create(root / 'c', config.load(root / 'c.yaml'), cache_dir='')\n"
            "made.log('campaign', 'directive', made.config.search.directive)\n"
            "assert Campaign.open(root / 'c').config == made.config\n"
            "cli.main(['config', str(root / 'c.yaml')])\n")
    plain = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, encoding="latin-1")
    assert done.returncode == 0 and "k\u00fcrzer, \\u03b5" in done.stdout, done.stderr
    assert "k\u00fcrzer, \u03b5" in (tmp_path / "c" / "events.log").read_text(encoding="utf-8")


def test_a_folder_that_is_there_already_is_refused_and_left_alone(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine").write_text("precious")
    with pytest.raises(UsageError, match="is there and no campaign: it has other files"):
        campaign(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"] and (tmp_path / "c" / "mine").read_text() == "precious"


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "c").write_text("")
    for root in (tmp_path / "c", tmp_path / "c" / "below"):
        with pytest.raises(PoiseError, match="cannot create the campaign folder"):
            campaign(root)
    assert os.listdir(tmp_path) == ["c"]


def test_what_is_no_campaign_is_named(tmp_path):
    with pytest.raises(UsageError, match="has no campaign.json. `poise-hpc run"):
        Campaign.open(tmp_path)
    created = campaign(tmp_path / "c")
    meta = created.root / "campaign.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(UsageError, match="has campaign format 9; this version reads 1"):
        Campaign.open(created.root)
    meta.write_text("{")
    with pytest.raises(files.CorruptFile, match="campaign.json is not valid JSON.* Restore it from a copy"):
        Campaign.open(created.root)


@pytest.mark.parametrize("text", ["[]", "1", '{"format": 1}', '{"format": "1", "created": 1.0, "versions": {}, "cache_dir": "/c"}'])
def test_what_is_json_and_no_campaign_is_named(tmp_path, text):
    root = campaign(tmp_path / "c").root
    (root / "campaign.json").write_text(text)
    with pytest.raises(files.CorruptFile, match="campaign.json is JSON, but not what was written there: an object with format, created, .* Restore it"):
        Campaign.open(root)


def test_a_damaged_frozen_config_is_named(tmp_path):
    root = campaign(tmp_path / "c").root
    path = root / "config.yaml"
    path.write_text(path.read_text().replace("group_size", "grup_size"))
    with pytest.raises(UsageError, match="config.yaml: unknown key 'rollout.grup_size'; did you mean 'rollout.group_size'"):
        Campaign.open(root)


# --- config under an existing campaign

def changed(opened, **change):
    return configuration.parse(overlay(opened.config.dump(), change))


def test_what_would_make_scores_incomparable_is_refused_by_name(tmp_path):
    opened = campaign(tmp_path / "c")
    before = (opened.root / "config.yaml").read_bytes()
    with pytest.raises(UsageError) as error:
        opened.adopt(changed(opened, train={"steps": 5, "learning_rate": 1e-3}, jobs={"max_parallel": 9}))
    assert "train.steps: 4 -> 5" in str(error.value) and "train.learning_rate: 0.0003 -> 0.001" in str(error.value)
    assert "max_parallel" not in str(error.value) and "start another campaign" in str(error.value)
    assert (opened.root / "config.yaml").read_bytes() == before


def test_operational_changes_are_taken_over_and_logged(tmp_path):
    opened = campaign(tmp_path / "c")
    opened.adopt(changed(opened, search={"candidates": 30}, jobs={"max_parallel": 9, "ranks": 2}, budget={"run_hours": 2.0}))
    assert Campaign.open(opened.root).config.search.candidates == 30 and Campaign.open(opened.root).config.jobs.ranks == 2
    assert "search.candidates: 7 -> 30" in (opened.root / "events.log").read_text()


# --- the lock

def test_a_second_controller_is_refused_by_name(tmp_path):
    opened = campaign(tmp_path / "c")
    other = subprocess.Popen([sys.executable, "-c", "import sys, pathlib; from poise_hpc.campaign import Campaign\n"
                              "with Campaign.open(pathlib.Path(sys.argv[1])).lock(): print('have it', flush=True); sys.stdin.read()",
                              str(opened.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "have it\n"
    with pytest.raises(CampaignBusy, match=f"is driven by process {other.pid} on {socket.gethostname()}"), opened.lock():
        pass
    other.kill()  # -9: its lock stays behind, and is nobody's
    other.communicate()
    assert (opened.root / "controller.lock").exists()
    with opened.lock():
        pass
    assert not (opened.root / "controller.lock").exists()


@pytest.mark.parametrize(("content", "age", "taken"), [
    (DEAD, 0, True), (ELSEWHERE, 0, False), (ELSEWHERE, LOCK_STALE_S - 60, False), (ELSEWHERE, LOCK_STALE_S + 60, True), (None, 0, True)])
def test_stale_locks_are_taken_over(tmp_path, content, age, taken):
    path = tmp_path / "controller.lock"
    path.write_text("" if content is None else files.dumps(content))
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    lock = Lock(path)
    if taken:
        lock.take()
        assert files.read_json(path)["pid"] == os.getpid()
    else:
        with pytest.raises(CampaignBusy, match="process 1 on another-host"):
            lock.take()
        assert files.read_json(path) == content
    assert os.listdir(tmp_path) == ["controller.lock"]


def test_a_lock_that_was_taken_away_is_noticed_and_not_released(tmp_path):
    """A suspended laptop wakes up: another host has found its lock stale."""
    lock = Lock(tmp_path / "controller.lock")
    lock.take()
    lock.touch()
    files.write_json(lock.path, ELSEWHERE)
    with pytest.raises(CampaignBusy, match="process 1 on another-host has taken it"):
        lock.touch()
    lock.release()
    assert files.read_json(lock.path) == ELSEWHERE
    lock.path.unlink()
    with pytest.raises(CampaignBusy, match="it is gone"):
        lock.touch()
