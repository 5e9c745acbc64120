"""A campaign as one file, and back."""
from __future__ import annotations

import json
import os
import subprocess

import pytest
from click.testing import CliRunner
from helpers_campaign import campaign
from helpers_drive import archive_of, drive

from poise_hpc import cli, derived
from poise_hpc.campaign import Campaign
from poise_hpc.pack import pack
from poise_hpc.types import PoiseError


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Campaign:
    root = campaign(tmp_path_factory.mktemp("a") / "my search", search={"candidates": 1, "train_seeds": [0]}).root
    drive(root)
    drive(derived.create("confirm", Campaign.open(root), "c0001", 2, None).root)
    (root / "llm.jsonl").write_text("")
    (root / "site.yaml").write_text("scheduler: local\n")
    return Campaign.open(root)


def test_there_and_back(finished, tmp_path):
    done = CliRunner().invoke(cli.main, ["archive", "pack", str(finished.root), str(tmp_path / "c.tar"), "--json"])
    assert done.exit_code == 0 and json.loads(done.output)["records"] == 4, done.output
    subprocess.run(["tar", "xf", "c.tar"], cwd=tmp_path, check=True)
    back = tmp_path / "my search"
    assert archive_of(back) == archive_of(finished.root) and archive_of(back / "derived/confirm-c0001-1") == archive_of(finished.root / "derived/confirm-c0001-1")
    shown = CliRunner().invoke(cli.main, ["leaderboard", str(back)])
    assert shown.exit_code == 0 and "c0001" in shown.output
    assert not {"llm.jsonl", "site.yaml", "candidates", "prepare"} & {p.name for p in back.rglob("*")}


def test_the_same_bytes_again_whenever_and_whoever(finished, tmp_path):
    first = pack(finished, tmp_path / "1.tar", transcript=False)
    os.utime(finished.records / "c0000.h5", (1, 1))
    assert pack(finished, tmp_path / "2.tar", transcript=False)["sha256"] == first["sha256"]
    assert pack(finished, tmp_path / "3.tar", transcript=True)["sha256"] != first["sha256"]


def test_a_damaged_record_or_a_file_that_is_there_stops_it(finished, tmp_path):
    (tmp_path / "there.tar").write_text("precious")
    with pytest.raises(PoiseError, match="there.tar exists"):
        pack(finished, tmp_path / "there.tar", transcript=False)
    assert (tmp_path / "there.tar").read_text() == "precious"
    path = finished.records / "c0001.h5"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    try:
        with pytest.raises(PoiseError, match="(?s)nothing was packed.*c0001.h5"):
            pack(finished, tmp_path / "new.tar", transcript=False)
    finally:
        path.write_bytes(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["there.tar"]
