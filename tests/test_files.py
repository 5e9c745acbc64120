"""Whole files or none: kills, twins, torn lines, hostile names."""
import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from poise_hpc import files

NASTY = ["plain", "with space", "quote'\"", "new\nline", "ünï-ço∂é", "-dash"]


@pytest.mark.parametrize("name", NASTY)
def test_atomic_write_in_nasty_folders(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    files.write_json(folder / "a.json", {"x": [1, 2.5, None, "é"]})
    assert files.read_json(folder / "a.json") == {"x": [1, 2.5, None, "é"]}
    assert os.listdir(folder) == ["a.json"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"nan": float("nan")})
    with pytest.raises(TypeError):
        files.write_atomic(path, object())  # type: ignore[arg-type]
    assert files.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_is_named():
    # /dev/full fails every write with ENOSPC.
    with pytest.raises(OSError, match=r"No space left on device: 'a.json'") as error, files.naming("a.json"), open("/dev/full", "wb") as f:
        f.write(b"x" * 10)
        f.flush()
    assert files.full(error.value) and not files.full(OSError(errno.ENOENT, "no such file"))
    rust = Exception("Error while serializing: I/O error: No space left on device (os error 28)")  # safetensors 0.8
    assert files.full(rust) and files.full(RuntimeError("Disk quota exceeded (os error 122)")) and not files.full(Exception("os error 2)"))


def test_missing_is_none_and_corrupt_is_named(tmp_path):
    assert files.read_json(tmp_path / "nothing.json") is None
    bad = tmp_path / "bad.json"
    bad.write_text('{"a": ')
    with pytest.raises(files.CorruptFile, match="bad.json is not valid JSON"):
        files.read_json(bad)


def test_exclusive_creation_has_one_winner(tmp_path):
    path = tmp_path / "claim.json"
    assert [files.create_exclusive(path, {"n": n}) for n in range(5)] == [True, False, False, False, False]
    assert files.read_json(path) == {"n": 0}
    assert os.listdir(tmp_path) == ["claim.json"]


def test_a_link_that_the_server_made_and_denies_is_ours(tmp_path, monkeypatch):
    """NFS over a lossy network: the answer is lost, the repeated request finds the link of the first one."""
    link = os.link

    def answered_twice(source, target):
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    with monkeypatch.context() as lossy:
        lossy.setattr(os, "link", answered_twice)
        assert files.create_exclusive(tmp_path / "claim", {"n": 1})
    assert not files.create_exclusive(tmp_path / "claim", {"n": 2}) and files.read_json(tmp_path / "claim") == {"n": 1}
    assert os.listdir(tmp_path) == ["claim"]


def test_a_torn_line_costs_itself_only(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_line(path, {"n": 1})
    with open(path, "a") as f:
        f.write('{"n": 2')  # the writer was killed here
    files.append_line(path, {"n": 3})
    assert [row["n"] for row in files.read_lines(path)] == [1, 3]


WRITER = """
import sys, itertools
from pathlib import Path
from poise_hpc import files
for n in itertools.count():
    files.write_json(Path(sys.argv[1]), {"n": n, "pad": "x" * 20000})
"""


def test_kill_9_in_the_middle_of_writing_leaves_a_whole_file(tmp_path):
    for trial in range(5):
        path = tmp_path / f"{trial}.json"
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        while (files.read_json(path) or {"n": 0})["n"] < 3:  # whole while it is being replaced, too
            assert writer.poll() is None
        time.sleep(0.02 * trial)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert set(files.read_json(path)) == {"n", "pad"}


def test_a_process_is_told_from_its_successor(tmp_path):
    me = files.process_identity()
    assert files.same_host_alive(me) is True
    assert files.same_host_alive(me | {"start": me["start"] + 1}) is False   # the same pid, another process
    assert files.same_host_alive(me | {"host": "elsewhere"}) is None         # no news, never a failure
    child = subprocess.Popen(["sleep", "0"])
    child.wait()
    assert files.process_start(child.pid) is None
