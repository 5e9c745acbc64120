"""What a job and a campaign still take, by hand; and as a real worker and `status` tell it."""
from __future__ import annotations

import pytest
from helpers_campaign import campaign
from helpers_drive import ShuffledCluster, controller

from poise_hpc import eta, files, views, worker
from poise_hpc.types import Stage


def test_start_up_is_no_step():
    """A job that loaded for 6 s and has made step 1: nothing to go by. Then 30 steps in 3 s, so 17 more take 1.7 s."""
    assert eta.job_left({}) is eta.job_left({"step": 5, "total": 9}) is None  # no progress, or a job of an older version
    assert eta.job_left({"step": 1, "total": 48, "since": {"step": 1, "seconds": 0.0}}) is None
    assert eta.job_left({"step": 31, "total": 48, "since": {"step": 1, "seconds": 3.0}}) == pytest.approx(1.7)


def test_a_worker_says_since_when_it_is_at_its_stage(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(worker, "_attempt", tmp_path)
    monkeypatch.setattr(worker, "_since", worker._since)
    monkeypatch.setattr(worker, "_last_write", 0.0)
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    told = []
    for now[0], stage, step in ((100.0, "load", 0), (106.0, "train", 13), (106.2, "train", 14), (108.0, "train", 17)):
        worker.progress(stage, step, 48)
        told.append(files.read_json(tmp_path / "progress.json")["since"])
    assert told == [{"step": 0, "seconds": 0.0}, {"step": 13, "seconds": 0.0}, {"step": 13, "seconds": 0.0}, {"step": 13, "seconds": 2.0}]
    assert eta.read_progress(tmp_path)["step"] == 17
    for text in ("{", "[]"):
        (tmp_path / "progress.json").write_text(text)
        assert eta.read_progress(tmp_path) == {}


def test_what_is_left_by_hand():
    # Two slots, a candidate costs 40 s. One has spent 30 s, and its job says 5 s more: 10. One is slower than usual: 50 spent, 20 more.
    assert eta.left(40.0, [(30.0, 5.0), (50.0, 20.0)], fresh=3, slots=2) == (3 * 40 + 10 + 20) / 2
    assert eta.left(40.0, [(30.0, 5.0)], fresh=0, slots=2, jobs=[9.0]) == 9.0  # the last job is not split over two slots
    assert eta.left(40.0, [], fresh=0, slots=2) == 0.0


def test_a_campaign_knows_before_its_first_record(tmp_path):
    """The baseline's first run has taken 12 s and needs 5 s more, the second 10 s and 7 s: with 1.6 s for the check, 35.6 s a
    candidate. It needs 12 s more, three others all of it; two jobs at a time."""
    driven = controller(campaign(tmp_path / "c", search={"candidates": 3, "train_seeds": [0, 1]}).root, ShuffledCluster(0))
    opened = driven.campaign
    while not [a for _, a in driven.in_flight() if a.stage == Stage.TRAIN]:
        assert views.status(opened)["budget"]["eta_s"] is None
        driven.step()
    for _, attempt in driven.in_flight():
        late = attempt.seed == 1
        files.write_json(attempt.folder / "claim-0.json", {"time": 1000.0 + 2 * late})
        files.write_json(attempt.folder / "progress.json", {
            "stage": "train", "step": 21, "total": 71 if not late else 91, "figures": {}, "since": {"step": 1, "seconds": 2.0}})
    check = opened.candidates / "c0000" / "attempts" / "check-1" / "result.json"
    files.write_json(check, files.read_json(check) | {"run_seconds": 1.6})
    data = views.status(opened, now=1012.0)
    assert [r["eta_s"] for r in data["running"]] == [5.0, 7.0]
    assert data["budget"]["eta_s"] == pytest.approx((12 + 3 * 35.6) / 2)
    assert "min since creation; campaign ETA 1.0 min" in views.status_text(data)
