"""Campaigns made from an archive entry: taken up again, compared to the bit; and for real, on two ranks."""
from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner
from helpers_campaign import campaign, noop_work
from helpers_drive import archive_of, drive, failing, write_package
from helpers_kill import TINY, left_over

from poise_hpc import archive, cli, derived, files, reading, views
from poise_hpc.campaign import Campaign
from poise_hpc.cluster.base import for_campaign
from poise_hpc.cluster.inline import InlineCluster
from poise_hpc.types import Outcome, UsageError


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    root = campaign(tmp_path_factory.mktemp("origin") / "c", search={"candidates": 2, "train_seeds": [0, 1]}).root
    drive(root)
    return Campaign.open(root)


def test_the_same_request_is_taken_up_again_and_another_one_is_not(origin):
    first = derived.create("confirm", origin, "c0001", 2, None)
    assert derived.create("confirm", origin, "c0001", 2, None).root == first.root
    assert derived.create("confirm", origin, "c0001", 3, None).root != first.root
    assert derived.create("confirm", origin, "c0002", 2, None).root != first.root
    assert first.root.parent == origin.root / "derived"


def test_confirm_uses_fresh_seeds_and_unseen_prompts_and_pairs_with_the_baseline(origin):
    target = derived.create("confirm", origin, "c0002", 3, None)
    assert target.config.search.train_seeds == (1000, 1001, 1002)
    assert target.config.evaluate.purpose == "confirmation" and target.config.search.candidates == 0
    drive(target.root)
    names = [e["name"] for e in archive_of(target.root).values()]
    assert names == ["GRPO", archive.read(origin.records / "c0002.h5").name]
    row = next(r for r in derived.report("confirm", target)["rows"] if r["id"] == "c0001")
    assert row["seeds"] == 3 and row["delta_ci"]
    data, searched = derived.report("confirm", target), archive.read(origin.records / "c0002.h5").score
    found = data["found"]
    assert (found["id"], found["effect"], list(found["ci"]), found["searched"]) == ("c0002", row["delta"], row["delta_ci"], searched["delta"])
    then, now = (views.interval(*pair, sign=True) for pair in ((searched["delta"], searched["delta_ci"]), (row["delta"], row["delta_ci"])))
    assert re.fullmatch(rf"confirmed c0002 \S+ \(here c0001\): {re.escape(now)} against c0000 on 3 fresh seeds and unseen prompts; the search had said "
                        rf"{re.escape(then)}: (better than|worse than|not told apart from) GRPO", derived.report_text(data).splitlines()[-1])


def test_what_could_not_be_confirmed_says_why(origin):
    target = derived.create("confirm", origin, "c0002", 6, None)
    assert derived.report_text(derived.report("confirm", target)).endswith("is not confirmed: nothing is archived yet")
    drive(target.root, InlineCluster(failing("train", "c0001", Outcome.CANDIDATE_ERROR, "raised")))
    assert re.search(r"^c0002 \S+ is not confirmed: it failed: raised$", derived.report_text(derived.report("confirm", target)), re.MULTILINE)


def test_ablate_runs_the_entry_without_each_of_its_mechanisms(origin):
    entry = archive.read(origin.records / "c0001.h5")
    target = derived.create("ablate", origin, "c0001", None, None)
    drive(target.root)
    found = archive_of(target.root)
    without = [f"{entry.name}-without-{m}" for m in entry.proposal["mechanisms"]]
    assert without and [e["name"] for e in found.values()] == ["GRPO", entry.name, *without]
    assert found["c0001"]["code"] == entry.code
    assert all(found[f"c{2 + i:04d}"]["code"]["algorithm.py"].endswith(f"ALGORITHM = ALGORITHM.without({m!r})\n")
               for i, m in enumerate(entry.proposal["mechanisms"]))
    assert all(" switched off: {'" in found[f"c{2 + i:04d}"]["proposal"]["description"] for i in range(len(without)))  # with the values that do it
    data, whole = derived.report("ablate", target), found["c0001"]["score"]["by_seed"]
    assert [e["mechanism"] for e in data["effects"]] == list(entry.proposal["mechanisms"])
    for e in data["effects"]:
        part = found[e["id"]]["score"]["by_seed"]
        assert e["effect"] == pytest.approx(sum(whole[s] - part[s] for s in whole) / len(whole)) and e["ci"][0] < e["effect"] < e["ci"][1]
        assert f"{e['mechanism']}  {e['effect']:+.1f}" in derived.report_text(data)


def test_what_has_nothing_to_switch_off_is_not_ablated(tmp_path):
    """The baseline is a person's package; what its second mechanism is without is left out alone."""
    package, (first, second) = write_package(tmp_path / "own", seed="grpo") / "algorithm.py", (', off={"divide_by_std": False}', ', off={"clip": 1e9}')
    package.write_text(package.read_text().replace(second, ""))
    root = campaign(tmp_path / "half", search={"candidates": 0, "train_seeds": [0], "baseline": str(package.parent)}).root
    drive(root)
    half = derived.plan("ablate", Campaign.open(root), "c0000", None, None).entry
    assert half.proposal["mechanisms"] == ["group-std", "symmetric-clip"] and derived.parts(half) == ["group-std"]
    package.write_text(package.read_text().replace(first, ""))
    root = campaign(tmp_path / "none", search={"candidates": 0, "train_seeds": [0], "baseline": str(package.parent)}).root
    drive(root)
    said = call("ablate", root, "c0000", code=2).stderr
    assert "c0000 declares no mechanism that can be switched off" in said and "mechanisms = (Mechanism(" in said and not (root / "derived").exists()


@pytest.mark.parametrize("id", ["c0001", "c0000"])
def test_control_trains_on_random_rewards_and_shows_both_beside_the_untrained_policy(origin, id):
    target = derived.create("control", origin, id, None, None)
    assert target.config.train.reward == "random" and target.config.search.train_seeds == (0, 1) and origin.config.train.reward == "task"
    drive(target.root)
    data = derived.report("control", target)
    assert [e["id"] for e in data["control"]] == ["c0000", "c0001"][:1 + (id != "c0000")]
    for e in data["control"]:
        assert e["task"] == archive.read(origin.records / f"{e['id']}.h5").score["overall"] and e["untrained"] is not None
        assert e["random"] is not None and f"{e['task']:.1f}" in derived.report_text(data)


def test_a_rerun_says_what_came_again(origin):
    """The noop jobs' numbers depend on the candidate's id, which is c0000 in the rerun: the baseline's come again, others differ."""
    for id, same in (("c0000", True), ("c0001", False)):
        target = derived.create("rerun", origin, id, None, None)
        drive(target.root)
        data = derived.report("rerun", target)
        assert data["comparison"]["identical_scores"] is data["comparison"]["identical_curves"] is same
        assert ("bit for bit" in derived.report_text(data)) is same
        assert f"{id} again" in derived.report_text(data)
        assert "baseline" not in derived.report_text(data) and "against" not in derived.report_text(data)
    assert "numbers differ: overall" in derived.report_text(data)


def test_a_rerun_is_compared_without_the_difference_to_a_baseline_that_it_is_itself(origin):
    old = archive.read(origin.records / "c0001.h5")
    assert old.score["delta"] is not None
    new = replace(old, score=old.score | {"delta": None, "delta_ci": None})
    assert derived.compare(old, new)["identical_scores"]
    assert not derived.compare(old, replace(new, score=new.score | {"final": 0.5}))["identical_scores"]


def test_a_rerun_names_another_machine(origin):
    """Another CPU explains other numbers. What one record does not say is no change."""
    old = archive.read(origin.records / "c0001.h5")
    assert old.versions["cpu"] == "model A" and old.versions["torch"] == "9"  # as the training job said, not the controller's own
    compared = derived.compare(old, replace(old, versions=old.versions | {"cpu": "model B", "more": "1"}))
    assert compared["versions_changed"] == {"cpu": ["model A", "model B"]}


def test_a_rerun_with_other_weights_is_not_called_identical(origin):
    def work(attempt, job):
        result = noop_work(attempt, job)
        if job["kind"] == "train":
            result["payload"]["weights_sha256"] = "9" * 64
        return result

    target = derived.create("rerun", origin, "c0000", 1, None)
    drive(target.root, InlineCluster(work))
    data = derived.report("rerun", target)
    assert "weights-s0" in data["comparison"]["hashes_changed"] and "bit for bit" not in derived.report_text(data)


def test_a_killed_creation_leaves_nothing_that_counts(origin, monkeypatch):
    def die(*arguments):
        raise KeyboardInterrupt

    before = sorted((origin.root / "derived").glob("[!.]*"))
    monkeypatch.setattr(derived, "_write_package", die)
    with pytest.raises(KeyboardInterrupt):
        derived.create("ablate", origin, "c0002", 4, None)
    monkeypatch.undo()
    assert sorted((origin.root / "derived").glob("[!.]*")) == before
    assert (derived.create("ablate", origin, "c0002", 4, None).root / "inbox" / "000" / "algorithm.py").exists()


def test_jobs_run_where_the_origin_ran(origin):
    site = origin.root / "site.yaml"
    site.write_text("partitions: [gpu]\n")
    target = derived.create("confirm", origin, "c0002", 7, None)
    site.unlink()
    assert (target.root / "site.yaml").read_text() == "partitions: [gpu]\n"
    assert not for_campaign(target).on_this_host


def test_an_entry_that_is_not_there(origin):
    with pytest.raises(UsageError, match="c0077 has no archive entry"):
        derived.create("rerun", origin, "c0077", None, None)


def test_what_has_no_score_can_only_be_repeated(tmp_path):
    root = campaign(tmp_path / "c", search={"candidates": 1, "train_seeds": [0]}).root
    drive(root, InlineCluster(failing("train", "c0001", Outcome.CANDIDATE_ERROR, "raised")))
    with pytest.raises(UsageError, match=r"c0001 has no score \(raised\): there is nothing to confirm"):
        derived.plan("confirm", Campaign.open(root), "c0001", 1, None)
    assert derived.plan("rerun", Campaign.open(root), "c0001", None, None).entry.cause == "raised"


def call(*arguments, code=0):
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def test_records_alone_can_be_listed_verified_and_run_again(origin, tmp_path):
    """A colleague's: no campaign.json, no config.yaml, no candidates."""
    root = tmp_path / "theirs"
    shutil.copytree(origin.records, root / "records")
    assert "every record is whole" in call("archive", "verify", root).output
    assert json.loads(call("leaderboard", root, "--json").stdout)["rows"] == views.leaderboard(origin)["rows"]
    assert json.loads(call("show", root, "c0001", "--json").stdout)["proposal"] == files.read_json(
        origin.candidates / "c0001" / "proposal.json")
    assert "3 records indexed" in call("archive", "rebuild", root).output
    made = derived.create("confirm", *reading.origin(root, "c0001"), 2, None)
    assert made.root == root / "derived" / "confirm-c0001-1"
    drive(made.root)
    assert [e["name"] for e in archive_of(made.root).values()] == ["GRPO", archive.read(origin.records / "c0001.h5").name]
    assert "which entry of" in call("rerun", root, code=2).stderr


def test_one_record_can_be_verified_and_run_again_under_any_name(origin, tmp_path):
    path = tmp_path / "best of all.h5"
    shutil.copyfile(origin.records / "c0000.h5", path)
    call("archive", "verify", path, code=1)  # it says that it was renamed
    target = derived.create("rerun", *reading.origin(path, None), None, None)
    assert target.root == tmp_path / "derived" / "rerun-c0000-1"
    drive(target.root)
    assert "bit for bit" in derived.report_text(derived.report("rerun", target))
    assert derived.create("rerun", *reading.origin(path, "c0000"), None, None).root == target.root
    assert "holds c0000, not c0001" in call("rerun", path, "c0001", code=2).stderr


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_of_an_archive_is_run_again_beside_the_archive(origin, tmp_path, whole):
    root = tmp_path / "theirs"
    shutil.copytree(origin.root if whole else origin.records, root if whole else root / "records")
    made = derived.plan("rerun", *reading.origin(root / "records" / "c0001.h5", None), None, None)
    assert made.root.parent == root / "derived" and made.entry.id == "c0001"
    assert made.root == derived.plan("rerun", *reading.origin(root, "c0001"), None, None).root


def test_a_campaign_without_its_candidates_can_be_looked_at(origin, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(origin.root, root, ignore=lambda folder, names: [n for n in names if n in ("candidates", "inbox", "derived")])
    data = json.loads(call("status", root, "--json").stdout)
    assert [c["id"] for c in data["candidates"]] == ["c0000", "c0001", "c0002"]
    shown, before = (json.loads(call("show", r, "c0001", "--json").stdout) for r in (root, origin.root))
    before["reflection"].pop("written")
    assert {k: v for k, v in shown.items() if k not in ("folder", "record", "attempts")} == {
        k: v for k, v in before.items() if k not in ("folder", "record", "attempts")}
    assert {a["name"] for a in shown["attempts"]} == {a["name"] for a in before["attempts"]} and shown["folder"] is None
    assert "record       " in call("show", root, "c0001").output and "has no candidate c0009" in call("show", root, "c0009", code=2).stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_for_real_on_two_ranks(tmp_path):
    """A campaign whose training jobs have two ranks; its entry is rerun (to the bit), confirmed and ablated."""
    data = {"base": str(TINY), "search": {"candidates": 1, "train_seeds": [0], "seed": 1}, "jobs": {"ranks": 2}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    root = tmp_path / "it's a \"campaign\"\nin $HOME"

    call("run", root, "--config", tmp_path / "config.yaml", "--cache-dir", tmp_path / "cache")
    assert left_over(root) == []
    trained = next(root.glob("candidates/c0001/attempts/train-s0-1"))
    assert {p.name for p in trained.glob("log*.out")} == {"log.out", "log-1.out"}
    again = json.loads(call("rerun", root, "c0001", "--json").stdout)["comparison"]
    assert all(value for key, value in again.items() if key.startswith("identical")), again
    assert again["hashes_changed"] == [] and again["versions_changed"] == {}
    confirmed = json.loads(call("confirm", root, "c0001", "--seeds", 1, "--json").stdout)
    assert sorted(r["id"] for r in confirmed["rows"] if r["outcome"] == "succeeded") == ["c0000", "c0001"]
    mechanisms = archive.read(root / "records" / "c0001.h5").proposal["mechanisms"]
    ablated = json.loads(call("ablate", root, "c0001", "--json").stdout)
    assert len([r for r in ablated["rows"] if r["outcome"] == "succeeded"]) == 2 + len(mechanisms), ablated["rows"]
