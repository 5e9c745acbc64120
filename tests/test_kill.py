"""kill -9 in a real campaign, at random moments: the archive is that of an undisturbed one. scripts/kill_test.py does more."""
import pytest
from helpers_drive import archive_of
from helpers_kill import SCREEN, TINY, differences, killed_run, left_over, progress, start

from poise_hpc.types import Outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("config", [TINY, SCREEN], ids=["tiny", "screen"])
def test_controller_and_jobs_killed_at_random_moments(tmp_path, config):
    options = ("--max-candidates", "4", "--config", str(config))
    cache, plain, root = tmp_path / "cache", tmp_path / "undisturbed", tmp_path / "killed"
    assert start(plain, cache, *options).wait() == 0, plain.with_name("undisturbed.log").read_text()
    wanted = archive_of(plain)
    assert len(wanted) == 5 and left_over(plain) == []
    ended = {e["outcome"] for e in wanted.values()}
    assert ended == ({Outcome.SUCCEEDED, Outcome.SCREENED_OUT} if config is SCREEN else {Outcome.SUCCEEDED})
    killed = killed_run(root, cache, progress(plain), kills=3, seed=0, options=options)
    assert {name.split()[0] for moment in killed for name in moment["killed"]} >= {"controller"}, killed
    assert left_over(root) == []
    assert differences(wanted, archive_of(root)) == [], killed
