import hashlib
import json
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from helpers_archive import entry

from poise_hpc import archive, hdf5
from poise_hpc.entry import Entry, curve_table, evaluation_tables
from poise_hpc.archive import ArchiveView
from poise_hpc.files import CorruptFile, dumps
from poise_hpc.types import Outcome, PoiseError


@pytest.fixture
def campaign(tmp_path):
    (tmp_path / "records").mkdir()
    return tmp_path


def record(campaign, number=7):
    return campaign / "records" / f"c{number:04d}.h5"


def fill(campaign, count):
    """Entries c0000 ... of which c0000 has no parent."""
    for i in range(count):
        archive.write(record(campaign, i), entry(i, parents=("c0000",) if i else ()))


def flip(path, at, bit=0):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def assert_same(a, b):
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), f.name
        else:
            assert type(x) is type(y) and dumps(x) == dumps(y), f.name  # a tuple inside a dict comes back as a list


# --- one record

def test_what_is_written_is_read(campaign):
    written = entry()
    digest = archive.write(record(campaign), written)
    assert_same(archive.read(record(campaign)), written)
    assert archive.verify(record(campaign)) == []
    assert archive.summary(written).record_sha256 == digest


def test_a_record_of_an_earlier_version_is_read(campaign, monkeypatch):
    """It lacks what was added since: these fields are empty, and nothing is wrong with it."""
    added = ("vocabulary",)
    with monkeypatch.context() as before:
        before.setattr(archive, "SCALARS", tuple(name for name in archive.SCALARS if name not in added))
        written = archive.write(record(campaign), entry())
    assert_same(archive.read(record(campaign)), entry(vocabulary={}))
    assert archive.identity(record(campaign)) == written != archive.summary(archive.read(record(campaign))).record_sha256
    assert archive.verify(record(campaign)) == [] and ArchiveView.load(campaign).entries[0].id == "c0007"


def test_a_failed_candidate_without_curves(campaign):
    failed = entry(outcome=Outcome.CANDIDATE_ERROR, cause="raised", score=None, **{
        name: f.default_factory() for name, f in Entry.__dataclass_fields__.items() if isinstance(f.type, str) and f.type == "np.ndarray"})
    archive.write(record(campaign), failed)
    back = archive.read(record(campaign))
    assert_same(back, failed)
    assert archive.summary(back).score is None and archive.summary(back).cause == "raised"


def test_equal_entries_have_equal_bytes(campaign):
    for number in (1, 2):
        archive.write(campaign / f"{number}.h5", entry())
    assert (campaign / "1.h5").read_bytes() == (campaign / "2.h5").read_bytes()


def test_written_once(campaign):
    digest = archive.write(record(campaign), entry())
    before = record(campaign).stat()
    assert archive.write(record(campaign), entry()) == digest
    with pytest.raises(PoiseError, match="write-once"):
        archive.write(record(campaign), entry(name="another"))
    assert record(campaign).stat().st_mtime_ns == before.st_mtime_ns
    assert_same(archive.read(record(campaign)), entry())


def test_every_flipped_byte_and_every_truncation_is_noticed(campaign):
    path = record(campaign)
    archive.write(path, entry())
    raw = path.read_bytes()
    random = np.random.default_rng(0)
    for at in [*range(0, 600, 20), *random.integers(0, len(raw), 200)]:
        path.write_bytes(raw)
        flip(path, int(at), int(random.integers(8)))
        assert len(archive.verify(path)) == 1
    for length in [0, 1, 511, 512, 513, *random.integers(0, len(raw), 30)]:
        path.write_bytes(raw[:length])
        assert len(archive.verify(path)) == 1
    path.write_bytes(raw + b"x")
    assert len(archive.verify(path)) == 1


def test_a_damaged_record_is_not_overwritten(campaign):
    archive.write(record(campaign), entry())
    flip(record(campaign), 5000)
    with pytest.raises(CorruptFile, match="delete the file and run the campaign again"):
        archive.write(record(campaign), entry())


def test_code_that_is_not_the_code_that_ran_is_noticed(campaign):
    """A record that is whole and wrong: written by a version that did not compare."""
    ran = entry().hashes
    archive.write(record(campaign), entry(code={"algorithm.py": "x = 2\n"}, hashes=ran))
    assert archive.verify(record(campaign)) == [
        f"code/{name} is not the code that was checked and trained: its hash is another" for name in ("algorithm.py", "parts/helper.py")]
    assert archive.verify_campaign(campaign)["c0007"][0].startswith("code/algorithm.py is not the code")


def test_figures_must_be_finite(campaign):
    with pytest.raises(PoiseError, match="c0007: cannot be archived"):
        archive.write(record(campaign), entry(behaviour={"kl": float("nan")}))
    assert not record(campaign).exists()


def test_an_unwritable_place_is_named(tmp_path):
    with pytest.raises(PoiseError, match="cannot write .*nothing is lost"):
        archive.write(tmp_path / "no" / "such" / "c0007.h5", entry())


def test_killed_writers_leave_whole_records_or_none(campaign):
    source = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\nfrom helpers_archive import entry\n"
              f"from poise_hpc import archive\nfor i in range(10**4):\n"
              f"    archive.write(Path({str(campaign / 'records')!r}) / f'{{sys.argv[1]}}-{{i}}.h5', entry(i)); print(flush=True)\n")
    reported = 0
    for trial in range(0, 25, 5):
        writers = [subprocess.Popen([sys.executable, "-c", source, str(trial + i)], stdout=subprocess.PIPE) for i in range(5)]
        for i, writer in enumerate(writers):  # killed wherever it is after its (i+1)th record or so
            reported += sum(writer.stdout.readline() == b"\n" for _ in range(i + 1))
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer.stdout.close()
    found = [p for p in (campaign / "records").iterdir() if p.suffix == ".h5"]
    assert len(found) >= reported == 75
    for path in found:
        archive.read(path)


# --- tables

def test_curves_by_hand():
    names, steps, values = curve_table({3: [{"step": 1, "b": 2.0, "a": 1}, {"step": 3, "b": 4.0}], 5: [{"step": 2, "a": None}]})
    assert names == ("a", "b") and steps.tolist() == [1, 2, 3]
    nan = float("nan")
    np.testing.assert_equal(values, [[[1, nan, nan], [2, nan, 4]], [[nan] * 3, [nan] * 3]])


def test_evaluations_and_completions_by_hand():
    e = entry()
    assert e.evaluations[1].tolist() == (0, 1.0, b"hard", b"9", 3, 3, 3, 0, 4.0, 3)
    i = e.evaluations[3]["first"] + 2  # seed 1: tokens 1 .. 12, of which sample 2 of problem 9 has the last four
    assert e.completion_tokens[e.completion_offsets[i]:e.completion_offsets[i + 1]].tolist() == [9, 10, 11, 12]
    assert e.completion_tokens.dtype == np.uint16
    element = {"at": "1", "benchmark": "hard", "problem_ids": [1], "n": 1, "correct": [1], "valid": [1], "truncated": [0], "mean_length": [1.0]}
    table, wide, _ = evaluation_tables([(0, element, np.array([70000]), np.array([0, 1])), (0, element, None, None)])
    assert wide.tolist() == [70000] and table["first"].tolist() == [0, -1]
    with pytest.raises(PoiseError, match="at most 32 bytes"):
        evaluation_tables([(0, element | {"benchmark": "x" * 33}, None, None)])


# --- index

def test_index_gives_what_the_records_give(campaign):
    fill(campaign, 5)
    from_records = archive.rebuild(campaign).entries
    assert [e.id for e in from_records] == [f"c{i:04d}" for i in range(5)]
    assert from_records == [archive.summary(archive.read(record(campaign, i))) for i in range(5)]
    assert ArchiveView.load(campaign).entries == from_records
    assert from_records[3].run_seconds == 15.5 and from_records[3].mechanisms == ("validity masking", "analytic variance")


def test_odd_characters_survive_the_index(campaign):
    view = ArchiveView.load(campaign)
    view.add(entry(0, name="a\u2028b\x0b\nc"))  # line separators of other kinds: str.splitlines would split at them
    view.write_index()
    assert [e.name for e in ArchiveView.load(campaign).entries] == ["a\u2028b\x0b\nc"]
    assert len(archive._index_lines(campaign)) == 1


def test_records_newer_than_the_index_are_seen(campaign):
    fill(campaign, 3)
    archive.rebuild(campaign)
    archive.write(record(campaign, 12345), entry(12345))
    archive.write(record(campaign, 3), entry(3))
    assert [e.id for e in ArchiveView.load(campaign).entries] == ["c0000", "c0001", "c0002", "c0003", "c12345"]


def test_the_view_grows_with_what_is_added(campaign):
    view = ArchiveView.load(campaign)
    for i in (1, 0, 2):
        view.add(entry(i))
    view.add(entry(1))  # again, as after a crash
    assert [e.id for e in view.entries] == ["c0000", "c0001", "c0002"]
    assert repr(ArchiveView.load(campaign).entries) == repr(view.entries)
    archive.rebuild(campaign)
    assert repr(ArchiveView.load(campaign).entries) == repr(view.entries)


def test_the_index_is_written_now_and_then(campaign, monkeypatch):
    monkeypatch.setattr(archive, "INDEX_LAG", 3)
    view = ArchiveView.load(campaign)
    written = []
    for i in range(7):
        view.add(entry(i))
        written.append((campaign / "index.h5").exists() and len(archive._index_lines(campaign)))
    assert written == [False, False, 3, 3, 3, 6, 6]


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"x" * 2000), lambda p: flip(p, 3000),
                                    lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.unlink()])
def test_a_damaged_index_costs_nothing_but_time(campaign, damage):
    fill(campaign, 4)
    want = archive.rebuild(campaign).entries
    damage(campaign / "index.h5")
    assert ArchiveView.load(campaign).entries == want
    assert archive.verify_campaign(campaign) == {}


def test_a_foreign_index_is_not_believed(campaign, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "records").mkdir()
    for i in range(3):
        archive.write(record(other, i), entry(i, name="other", parents=()))
    archive.rebuild(other)
    fill(campaign, 3)
    (campaign / "index.h5").write_bytes((other / "index.h5").read_bytes())
    assert {e.name for e in ArchiveView.load(campaign).entries} == {"VM-AV-GRPO"}


def test_damaged_and_missing_records_are_listed(campaign):
    fill(campaign, 4)
    archive.rebuild(campaign)
    flip(record(campaign, 1), 5000)
    record(campaign, 2).unlink()
    archive.write(record(campaign, 9), replace(entry(8), parents=("c0077",)))
    (campaign / "records" / ".c0003.h5.12.34.tmp").write_bytes(b"left by a killed writer")
    found = archive.verify_campaign(campaign)
    assert set(found) == {"c0001", "c0002", "c0009"}
    assert "damaged" in found["c0001"][0] and "missing" in found["c0002"][0]
    assert "holds c0008" in found["c0009"][0]
    view = ArchiveView.load(campaign)
    assert "c0002" in view.problems and "c0002" in {e.id for e in view.entries}
    rebuilt = archive.rebuild(campaign)
    assert set(rebuilt.problems) >= {"c0001"} and "c0001" not in {e.id for e in rebuilt.entries}


def test_an_unreadable_parent_is_a_problem(campaign):
    archive.write(record(campaign, 1), entry(1, parents=("c0000",)))
    assert archive.verify_campaign(campaign) == {"c0001": ["parent c0000 has no record"]}


def test_a_reader_that_cannot_write_goes_without(campaign, monkeypatch):
    fill(campaign, 4)
    monkeypatch.setattr(archive, "INDEX_LAG", 2)

    def refuse(*a, **k):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(archive.files, "write_atomic", refuse)
    assert len(ArchiveView.load(campaign).entries) == 4


def test_no_campaign_says_so(tmp_path):
    with pytest.raises(PoiseError, match="no campaign"):
        ArchiveView.load(tmp_path)


# --- the format's own page

def test_the_script_of_the_format_page_reads_a_record(campaign):
    page = (Path(__file__).parents[1] / "archive_store" / "README.md").read_text()
    script = re.search(r"```python\n(.*?)```", page, re.S)[1]
    archive.write(record(campaign), entry())
    out = subprocess.run([sys.executable, "-c", script, str(record(campaign))], capture_output=True, text=True, check=True).stdout
    assert out.startswith("c0007 VM-AV-GRPO succeeded from ['c0000']\noverall 50.0")
    assert "entropy at the last step, by seed: [0.9 nan]" in out and "12 completions" in out


def test_the_format_page_names_every_dataset_and_field(campaign):
    import h5py

    page = (Path(__file__).parents[1] / "archive_store" / "README.md").read_text()
    archive.write(record(campaign), entry())
    names = []
    with h5py.File(record(campaign), "r", locking=False) as f:
        f.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        names += json.loads(f["entry"][()].tobytes())
        assert f.userblock_size == hdf5.USER_BLOCK
    for name in names:
        assert f"`{'code/<file>' if name.startswith('code/') else name}`" in page, name
    raw = record(campaign).read_bytes()
    assert hashlib.sha256(raw[512:]).hexdigest().encode() in raw[:512]
