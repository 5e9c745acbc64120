"""Candidate packages: what is read, what is refused, what an import error says."""
from __future__ import annotations

import hashlib

import pytest

from poise_hpc.algorithms.load import MAX_BYTES, MAX_FILES, declared_mechanisms, load, manifest, read_package, switchable, write_seed_package
from poise_hpc.algorithms.seeds import SEEDS, seed, source
from poise_hpc.files import CorruptFile
from poise_hpc.types import CandidateError

TWO_FILES = {
    "algorithm.py": "from dataclasses import dataclass\nfrom poise_hpc.algorithms.grpo import GRPO\nfrom .helper import CLIP\n\n\n"
                    "@dataclass(frozen=True)\nclass X(GRPO):\n    clip: float = CLIP\n\n"
                    "    def initial_state(self):\n        from .late import START\n        return {'x': START}\n\n\nALGORITHM = X()\n",
    "helper.py": "CLIP = 0.3\n", "late.py": "START = 7\n"}


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def refused(folder, call=load):
    with pytest.raises(CandidateError) as error:
        call(folder)
    return error.value


@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_is_a_package_as_it_stands(name, tmp_path):
    write_seed_package(name, tmp_path / "package")
    loaded = load(tmp_path / "package")
    assert repr(loaded) == repr(seed(name)) and type(loaded) is not type(seed(name))


def test_package_modules_import_each_other_early_and_late(tmp_path):
    algorithm = load(write(tmp_path, TWO_FILES))
    assert algorithm.clip == 0.3 and algorithm.initial_state() == {"x": 7}


def test_two_versions_live_in_one_process(tmp_path):
    first = load(write(tmp_path, TWO_FILES))
    second = load(write(tmp_path, TWO_FILES | {"helper.py": "CLIP = 0.5\n", "late.py": "START = 8\n"}))
    assert (first.clip, second.clip) == (0.3, 0.5)
    assert (first.initial_state(), second.initial_state()) == ({"x": 7}, {"x": 8})  # late imports find their own package


def test_an_ablation_is_the_algorithm_without_it(tmp_path):
    folder = write(tmp_path, {"algorithm.py": source("dapo") + "\nALGORITHM = ALGORITHM.without('clip-higher')\n"})
    assert load(folder) != load(write(tmp_path / "whole", {"algorithm.py": source("dapo")}))
    assert load(folder).clip_high == load(folder).clip_low


def test_nothing_is_written_into_the_folder(tmp_path):
    load(write(tmp_path, TWO_FILES))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(TWO_FILES)


def test_manifest_is_sha256sum_of_the_files(tmp_path):
    write(tmp_path, TWO_FILES | {"proposal.json": "{}"})
    assert manifest(tmp_path) == {name: hashlib.sha256(text.encode()).hexdigest() for name, text in TWO_FILES.items()}


def test_other_files_are_no_part_of_the_package(tmp_path):
    write(tmp_path, TWO_FILES | {"notes.md": "x", "status.json": "{}"})
    write(tmp_path / "attempts", {"extra.py": "raise SystemExit"})
    assert set(read_package(tmp_path)) == set(TWO_FILES)


@pytest.mark.parametrize(("files", "says"), [
    ({"other.py": ""}, "algorithm.py is missing"),
    (TWO_FILES | {"my-helper.py": ""}, "my-helper.py"),
    (TWO_FILES | {"latin.py": "# é".encode("latin-1")}, "latin.py is not UTF-8"),
    (TWO_FILES | {"notepad.py": "\ufeffx = 1\n"}, "notepad.py begins with a byte order mark"),
    (TWO_FILES | {"big.py": b"#" * (MAX_BYTES + 1)}, f"big.py has {MAX_BYTES + 1} bytes"),
    (TWO_FILES | {f"m{i}.py": "" for i in range(MAX_FILES)}, f"at most {MAX_FILES}")])
def test_odd_packages_are_refused_before_anything_runs(files, says, tmp_path):
    error = refused(write(tmp_path, files))
    assert error.cause == "unreadable-package" and says in error.message


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    package = write(tmp_path / "package", TWO_FILES)
    write(tmp_path, {"secret.py": "SECRET = 1\n"})
    (package / "inside.py").symlink_to(tmp_path / "secret.py")
    error = refused(package)
    assert error.cause == "unreadable-package" and "leads out of the package" in error.message


def test_a_folder_named_like_a_module_is_refused(tmp_path):
    (write(tmp_path, TWO_FILES) / "folder.py").mkdir()
    assert "folder.py is not a file" in refused(tmp_path).message


@pytest.mark.parametrize("text", ["def f(:\n", "import nowhere\n", "1 / 0\n", "raise SystemExit(3)\n", "from .missing import x\n"])
def test_what_fails_at_import_is_the_candidates_fault(text, tmp_path):
    assert refused(write(tmp_path, {"algorithm.py": text})).cause == "import-failed"


def test_an_import_error_shows_the_candidates_lines_only(tmp_path):
    error = refused(write(tmp_path, {"algorithm.py": "from .helper import f\nALGORITHM = f()\n", "helper.py": "def f():\n    return 1 / 0\n"}))
    assert error.message.splitlines() == [
        "ZeroDivisionError: division by zero", "  algorithm.py:2 in <module>: ALGORITHM = f()", "  helper.py:2 in f: return 1 / 0"]


@pytest.mark.parametrize(("edit", "says"), [
    ({"algorithm.py": "import nowhere\n"}, "algorithm.py is not what its manifest says"), ({"helper.py": None}, "helper.py is missing"),
    ({"torch.py": ""}, "torch.py does not belong to the package")])
def test_an_edited_package_is_no_fault_of_the_candidates(tmp_path, edit, says):
    """With a manifest, only its package is loaded; and what a person did to it is not the candidate's error."""
    proposed = manifest(write(tmp_path, TWO_FILES))
    assert load(tmp_path, proposed).clip == 0.3
    for name, text in edit.items():
        (tmp_path / name).unlink() if text is None else write(tmp_path, {name: text})
    with pytest.raises(CorruptFile, match=says):
        load(tmp_path, proposed)


@pytest.mark.parametrize("text", ["X = 1\n", "ALGORITHM = 3\n", "from poise_hpc.algorithms.grpo import GRPO\nALGORITHM = GRPO\n"])
def test_an_instance_is_wanted(text, tmp_path):
    assert refused(write(tmp_path, {"algorithm.py": text})).cause == "no-algorithm"


def test_mechanisms_are_read_without_running_the_package():
    for name in SEEDS:
        assert declared_mechanisms({"algorithm.py": source(name)}) == tuple(m.name for m in seed(name).mechanisms), name
    assert declared_mechanisms({"algorithm.py": "raise SystemExit\nmechanisms: tuple = (Mechanism('a-b', 'kl'), other)"}) == ("a-b",)
    assert declared_mechanisms({"algorithm.py": "mechanisms = (("}) == ()


def test_what_can_be_switched_off_is_read_too():
    for name in SEEDS:
        assert switchable({"algorithm.py": source(name)}) == {m.name for m in seed(name).mechanisms if m.off}, name
    text = "mechanisms = (Mechanism('a', 'kl'), Mechanism('b', 'kl', {}), Mechanism('c', 'kl', off={'x': 0}), Mechanism('d', 'kl', OFF))"
    assert switchable({"algorithm.py": text}) == {"c", "d"}
