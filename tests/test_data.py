"""Problem sets: import, lock, verification, the command line."""
from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from helpers_text import generated, write_rows

from poise_hpc import data
from poise_hpc.cli import main
from poise_hpc.types import PoiseError, UsageError


def put(folder, name, rows, **options):
    source = folder / "upstream" / f"{name}.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    return data.import_file(name, write_rows(source, rows), folder, **options)


def test_publishers_columns_become_canonical():
    rows = data.canonical([
        {"ID": "a-1", "Problem": " What is $1+1$? ", "Answer": 2, "extra": 0},
        {"question": "What is $2+2$?", "final_answer": ["$4$"], "level": "Level 5"},
        {"problem": "What is $x$?", "final_answer": ["1", "2"], "level": "Level ?"},
        {"problem": "What is $3+3$?", "solution": r"It is \boxed{5}, no, \boxed{6}.", "level": 1},
        {"problem": "What is $4+4$?", "answer": 8.0, "unique_id": "test/8.json"},
        {"problem": "What is $5+5$?", "solution": r"So $x = \boxed 9$, no, $x=\boxed 10$."}], "here")
    assert rows == [data.Row("a-1", "What is $1+1$?", "2"), data.Row("00001", "What is $2+2$?", "4", 5), data.Row("00002", "What is $x$?", "1, 2"),
                    data.Row("00003", "What is $3+3$?", "6", 1), data.Row("test/8.json", "What is $4+4$?", "8"),
                    data.Row("00005", "What is $5+5$?", "10")]


def test_ids_that_repeat_are_replaced():
    rows = data.canonical([{"id": 0, "problem": "a", "answer": "1"}, {"id": 0, "problem": "b", "answer": "2"}], "here")
    assert [row.id for row in rows] == ["00000", "00001"]


@pytest.mark.parametrize(("row", "message"), [
    ({"problem": "x"}, "row 0 has no answer; its columns are problem"), ({"answer": "1"}, "row 0 has no problem"),
    ({"problem": "x", "solution": "no box"}, "has no answer"), ("text", "no object but str")])
def test_rows_that_lack_something(row, message):
    with pytest.raises(UsageError, match=message):
        data.canonical([row], "here")


def test_import_pins_and_read_gives_back(tmp_path):
    rows = generated(5, 0, level=3)
    entry = put(tmp_path, "own", rows)
    assert entry["count"] == 5 and entry["source"] == "file:own.jsonl" and data.lock(tmp_path) == {"own": entry}
    assert [(r.problem, r.answer, r.level) for r in data.read(tmp_path, "own")] == [(r["problem"], r["answer"], 3) for r in rows]
    assert put(tmp_path, "own", rows) == entry                       # again: the same bytes
    shuffled = [dict(reversed(row.items())) for row in rows]
    assert put(tmp_path, "own", shuffled) == entry                   # key order is nothing


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_line_ends_of_unicode_are_text(tmp_path, kind):
    rows = [{"problem": "One line\u2028and\u0085another: $1+1$?", "answer": "2"}]
    (tmp_path / f"a.{kind}").write_text(json.dumps(rows if kind == "json" else rows[0], ensure_ascii=False) + "\r\n")
    assert data.import_file("a", tmp_path / f"a.{kind}", tmp_path / "sets")["count"] == 1
    assert [row.problem for row in data.read(tmp_path / "sets", "a")] == [rows[0]["problem"]]


def test_json_and_jsonl_are_one(tmp_path):
    rows = generated(4, 0)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert data.import_file("a", tmp_path / "a.json", tmp_path)["sha256"] == put(tmp_path, "b", rows)["sha256"]


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    rows = generated(4, 0)
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    assert data.import_file("a", tmp_path / "a.parquet", tmp_path)["sha256"] == put(tmp_path, "b", rows)["sha256"]


def test_other_content_needs_replace(tmp_path):
    put(tmp_path, "own", generated(5, 0))
    with pytest.raises(UsageError, match="--replace replaces it"):
        put(tmp_path, "own", generated(5, 1))
    put(tmp_path, "own", generated(6, 1), replace=True)
    assert len(data.read(tmp_path, "own")) == 6


def test_a_published_set_must_be_whole(tmp_path):
    with pytest.raises(UsageError, match="aime24 has 30 problems, .* has 29"):
        put(tmp_path, "aime24", generated(29, 0))
    assert not data.lock(tmp_path) and not (tmp_path / "aime24.jsonl").exists()
    assert put(tmp_path, "aime24", generated(30, 0))["licence"] == data.manifest()["aime24"]["licence"]


def test_a_published_hash_is_held(tmp_path, monkeypatch):
    monkeypatch.setitem(data.manifest(), "aime24", data.manifest()["aime24"] | {"sha256": "0" * 64})
    with pytest.raises(UsageError, match="not the aime24 of the manifest"):
        put(tmp_path, "aime24", generated(30, 0))


def test_a_changed_file_is_refused(tmp_path):
    put(tmp_path, "own", generated(5, 0))
    path = tmp_path / "own.jsonl"
    path.write_text(path.read_text().replace("answer", "answes", 1))
    with pytest.raises(PoiseError, match="could not be compared"):
        data.read(tmp_path, "own")
    path.unlink()
    with pytest.raises(PoiseError, match="cannot be read"):
        data.read(tmp_path, "own")
    with pytest.raises(UsageError, match="data fetch other"):
        data.read(tmp_path, "other")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", "{", "not what its name says"), ("a.json", '{"a": 1}', "a list of problems was wanted, got dict"), ("a.txt", "", "was wanted"),
    ("a.jsonl", None, "cannot be read"), ("a.json", "\udcff", "not what its name says")])
def test_files_that_are_not_what_they_say(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=message):
        data.import_file("own", tmp_path / name, tmp_path)


@pytest.mark.parametrize("name", ["", "../evil", "Own", "a b", "-x"])
def test_names_that_are_no_names(tmp_path, name):
    with pytest.raises(UsageError, match="a set's name"):
        data.write(name, [], tmp_path, "here", replace=False)


def test_verify_counts_duplicates_and_overlaps(tmp_path):
    a, b = generated(6, 0), generated(4, 1)
    spaced = {"problem": "  " + a[0]["problem"].upper().replace(" ", "  ").replace("\\TIMES", "\\times"), "answer": "0"}
    put(tmp_path, "a", [*a, spaced])
    put(tmp_path, "b", [*b, a[1], a[2]])
    report = data.verify(tmp_path)
    assert report["sets"]["a"]["duplicates"] == 1 and report["sets"]["b"]["duplicates"] == 0
    assert report["overlaps"] == [{"sets": ["a", "b"], "count": 2}] and report["faults"] == []


def test_different_signs_are_different_problems():
    assert data.Row("1", "What is $1+1$?", "2").key != data.Row("1", "What is $1-1$?", "0").key


def test_the_manifest_is_complete():
    counts = {name: entry["count"] for name, entry in data.manifest().items()}
    assert counts == {"math-train": 7500, "math-test": 5000, "math500": 500, "aime24": 30, "aime25": 30, "amc": 83, "minerva": 272,
                      "olympiadbench": 674}
    for entry in data.manifest().values():
        assert entry.keys() == {"title", "repository", "revision", "files", "count", "licence", "sha256"} and entry["licence"] and entry["files"]


def test_fetch_without_internet_says_how_to_go_on(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*arguments, **options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(PoiseError, match="cannot reach the Hugging Face hub for HuggingFaceH4/aime_2024.*data import aime24 FILE"):
        data.fetch("aime24", tmp_path)
    with pytest.raises(UsageError, match="no published set 'aime26'"):
        data.fetch("aime26", tmp_path)


def test_fetch_takes_all_files_from_one_commit(tmp_path, monkeypatch):
    import huggingface_hub

    asked, rows = [], generated(272, 0)

    def download(repository, file, repo_type, revision):
        asked.append((repository, file, revision))
        path = tmp_path / "cache" / "snapshots" / "c0ffee" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(write_rows(path, rows[:100] if file == "a.jsonl" else rows[100:]))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setitem(data.manifest(), "minerva", data.manifest()["minerva"] | {"files": ["a.jsonl", "b.jsonl"]})
    entry = data.fetch("minerva", tmp_path / "sets")
    assert asked == [("math-ai/minervamath", "a.jsonl", None), ("math-ai/minervamath", "b.jsonl", "c0ffee")]
    assert entry["source"] == "hub:math-ai/minervamath@c0ffee" and len(data.read(tmp_path / "sets", "minerva")) == 272


def test_the_commands(tmp_path):
    runner, folder = CliRunner(), str(tmp_path / "sets")
    source = write_rows(tmp_path / "own.jsonl", generated(3, 0))
    done = runner.invoke(main, ["data", "import", "own", str(source), folder])
    assert done.exit_code == 0 and done.output.startswith("own: 3 problems  sha256 ")
    done = runner.invoke(main, ["data", "verify", folder, "--json"])
    assert done.exit_code == 0 and json.loads(done.output)["sets"]["own"]["count"] == 3
    (tmp_path / "sets" / "own.jsonl").write_text("{}")
    done = runner.invoke(main, ["data", "verify", folder])
    assert done.exit_code == 1 and "fault:" in done.output
    assert runner.invoke(main, ["data", "verify", str(tmp_path)]).exit_code == 1  # nothing there
    assert runner.invoke(main, ["data", "import", "own", str(tmp_path / "none.jsonl"), folder]).exit_code == 2
