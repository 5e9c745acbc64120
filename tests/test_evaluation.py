"""Metrics by hand, and the evaluation job on a tiny model."""
from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers_lab import tiny
from poise_hpc import files, worker
from poise_hpc.config import Benchmark
from poise_hpc.evaluation import chunks, job, metrics, parts
from poise_hpc.settings import overlay
from poise_hpc.tasks.base import Grade, load_task
from poise_hpc.types import CandidateError, PoiseError

# --- metrics


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_k_subsets_with_a_correct_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert metrics.pass_at(k, n, c) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert metrics.pass_at(5000, 10000, 1) == pytest.approx(0.5)  # the one correct sample is among half of them
    assert metrics.pass_at(1, 10000, 3) == pytest.approx(0.0003)


@pytest.mark.parametrize("k, n, c", [(0, 4, 1), (5, 4, 1), (1, 4, 5), (1, 4, -1)])
def test_pass_at_k_refuses_the_impossible(k, n, c):
    with pytest.raises(ValueError, match="pass@"):
        metrics.pass_at(k, n, c)


def test_metrics_are_points_averaged_over_problems():
    # c = 0, 1, 4 of 4:  means 0, 1/4, 1;  pass@2: 0, 1 - C(3,2)/C(4,2) = 1/2, 1
    assert metrics.metric("acc@1", 4, [0, 1, 4]) == pytest.approx(100 * 1.25 / 3)
    assert metrics.metric("avg@4", 4, [0, 1, 4]) == pytest.approx(100 * 1.25 / 3)
    assert metrics.metric("pass@2", 4, [0, 1, 4]) == pytest.approx(50.0)


def element(at: str, name: str, n: int, correct: list[int], **over: list) -> dict:
    m = len(correct)
    return {"at": at, "benchmark": name, "n": n, "correct": correct, "valid": [n] * m, "truncated": [0] * m, "mean_length": [10.0] * m} | over


BENCHMARKS = {
    "easy": Benchmark(split="easy", problems=2, samples=2, metrics={"acc@1": 0.4}),
    "hard": Benchmark(split="hard", problems=1, samples=4, metrics={"acc@1": 0.4, "pass@2": 0.2}),
}


def test_merge_by_hand():
    merged = metrics.merge([
        element("1.0", "hard", 4, [1], valid=[2], truncated=[1], mean_length=[4.0]),   # acc 25, pass@2 50
        element("1.0", "easy", 2, [1, 2]),                                             # acc 75
        element("0.5", "easy", 2, [0, 1]), element("0.5", "hard", 4, [0])], BENCHMARKS)  # acc 25, 0, 0
    assert list(merged["points"]) == ["0.5", "1.0"]
    last = merged["points"]["1.0"]
    assert last["benchmarks"] == {"easy/acc@1": 75.0, "hard/acc@1": 25.0, "hard/pass@2": pytest.approx(50.0)}
    assert last["overall"] == pytest.approx(0.4 * 75 + 0.4 * 25 + 0.2 * 50) == merged["final"]
    assert merged["points"]["0.5"]["overall"] == pytest.approx(10.0)
    assert merged["curve"] == pytest.approx((10 + 50) / 2)
    # Over all 8 samples: valid 2+2+2 of 8, truncated 1 of 8, length (4 * 10 + 4 * 4) / 8
    assert (last["valid"], last["truncated"], last["length"]) == (pytest.approx(75.0), pytest.approx(12.5), pytest.approx(7.0))


def test_merge_does_not_depend_on_the_order_of_elements():
    elements = [element(at, name, 4, [i]) for i, (at, name) in enumerate(itertools.product(("0.5", "1.0"), BENCHMARKS))]
    assert metrics.merge(elements, BENCHMARKS) == metrics.merge(elements[::-1], BENCHMARKS)


@pytest.mark.parametrize("elements, missing", [([], "everything"), ([element("1.0", "easy", 2, [1])], "1.0-hard")])
def test_an_incomplete_evaluation_has_no_score(elements, missing):
    with pytest.raises(PoiseError, match=missing):
        metrics.merge(elements, BENCHMARKS)


def test_behaviour_by_hand():
    # 4 steps: windows of one step.
    rows = [{"reward": r, "entropy": e, "length": n, "gradient_norm": g, "kl_old": k, "clip_fraction": 0.5, "zero_variance": 0.25}
            for r, e, n, g, k in [(0.1, 2.0, 8, 1, 0.0), (0.5, 1.0, 8, 3, 0.2), (0.9, 0.2, 12, 1, 0.1), (0.3, 0.5, 16, 1, 0.1)]]
    assert metrics.behaviour(rows) == pytest.approx({
        "entropy_min": 0.2, "entropy_ratio": 0.25, "length_ratio": 2.0, "kl_max": 0.2,
        "gradient_norm_mean": 1.5, "gradient_norm_max": 3.0, "clip_fraction_mean": 0.5, "zero_variance_mean": 0.25,
        "reward_gain_early": 0.4, "reward_gain_late": -0.2, "reward_drop_max": 0.6})


def test_behaviour_smooths_long_curves():
    # 20 steps, windows of two: a single bad step is halved.
    rows = [{"reward": 0.0 if i == 10 else 1.0} for i in range(20)]
    assert metrics.behaviour(rows)["reward_drop_max"] == pytest.approx(0.5)


@pytest.mark.parametrize("rows", [[], [{}], [{"reward": 1.0}], [{"reward": None, "entropy": float("nan")}], [{"entropy": 0.0}]])
def test_behaviour_leaves_out_what_it_cannot_know(rows):
    assert not metrics.behaviour(rows).keys() & {"reward_drop_max", "kl_max", "length_ratio"}


# --- the job


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    load_task(tiny()).make_model(folder, lambda *a, **k: None)
    return folder


def spec(weights: Path, **over) -> dict:
    return {"config": tiny().dump(), "weights": {"0.5": str(weights), "1.0": str(weights)}, "purpose": "selection"} | over


def read(attempt: Path) -> dict[str, dict]:
    return {p.stem: json.loads(p.read_text()) for p in sorted((attempt / "elements").glob("*.json"))}


def timeless(elements: dict[str, dict]) -> dict[str, dict]:
    return {key: {k: v for k, v in e.items() if k != "seconds"} for key, e in elements.items()}


@pytest.fixture(scope="module")
def evaluated(weights, tmp_path_factory):
    attempt = tmp_path_factory.mktemp("attempt")
    return attempt, job.run(spec(weights), attempt)


def test_one_element_per_point_and_benchmark(evaluated):
    attempt, payload = evaluated
    assert payload["elements"] == [f"elements/{at}-{name}.json" for at in ("0.5", "1.0") for name in ("easy", "hard")]
    easy = read(attempt)["0.5-easy"]
    assert (easy["n"], len(easy["problem_ids"]), len(easy["correct"])) == (2, 8, 8)
    assert all(0 <= c <= v <= 2 for c, v in zip(easy["correct"], easy["valid"]))
    assert any(easy["valid"])
    assert 0 <= metrics.merge(read(attempt).values(), tiny().evaluate.benchmarks)["curve"] <= 100


def test_counts_can_be_graded_again_from_the_raw_completions(evaluated):
    attempt, _ = evaluated
    task, found = load_task(tiny()), read(attempt)["1.0-hard"]
    completions = job.unpack(attempt / "elements/1.0-hard.npz")
    problems = [p for p in task.problems("hard", "selection", 4) for _ in range(4)]
    truncated = [c[-1] != task.eos_id for c in completions]
    again = parts.figures(job.count(4, completions, truncated, task.grade(problems, completions, truncated)), 4)
    assert again == {k: found[k] for k in again}


def test_common_random_numbers(evaluated):
    # The same weights at two points: the same answers, whatever the point is called.
    found = read(evaluated[0])
    for name in ("easy", "hard"):
        assert found[f"0.5-{name}"]["npz_sha256"] == found[f"1.0-{name}"]["npz_sha256"]


def test_confirmation_asks_other_problems(weights, tmp_path, evaluated):
    job.run(spec(weights, purpose="confirmation"), tmp_path)
    assert not set(read(tmp_path)["0.5-easy"]["problem_ids"]) & set(read(evaluated[0])["0.5-easy"]["problem_ids"])


def generated(monkeypatch) -> list[str]:
    """Elements that are really computed from now on."""
    computed, real = [], job.element
    monkeypatch.setattr(job, "element", lambda *a: (computed.append(a[-2]), real(*a))[1])
    return computed


@pytest.mark.parametrize("harm, again", [
    (lambda e: None, []),
    (lambda e: (e / "0.5-hard.json").unlink(), ["0.5-hard"]),
    (lambda e: (e / "0.5-hard.json").write_text('{"at": "0.5"'), ["0.5-hard"]),
    (lambda e: (e / "1.0-easy.npz").unlink(), ["1.0-easy"]),
    (lambda e: (e / "1.0-easy.npz").write_bytes((e / "1.0-easy.npz").read_bytes()[:-1]), ["1.0-easy"]),
])
@pytest.mark.parametrize("where", ["same attempt", "later attempt"])
def test_a_killed_evaluation_goes_on_where_it_was(weights, evaluated, tmp_path, monkeypatch, harm, again, where):
    first = tmp_path / "first"
    shutil.copytree(evaluated[0], first)
    harm(first / "elements")
    attempt = first if where == "same attempt" else tmp_path / "second"
    attempt.mkdir(exist_ok=True)
    computed = generated(monkeypatch)
    assert job.run(spec(weights, resume=[str(first)]), attempt) == evaluated[1]
    assert computed == again
    assert timeless(read(attempt)) == timeless(read(evaluated[0]))


def test_elements_of_other_weights_or_settings_are_not_taken_over(weights, evaluated, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(weights)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    computed = generated(monkeypatch)
    for name, change in {"weights": {"weights": {"1.0": str(tmp_path / "other")}}, "purpose": {"purpose": "confirmation"}}.items():
        computed.clear()
        (tmp_path / name).mkdir()
        job.run(spec(weights, resume=[str(evaluated[0])]) | change, tmp_path / name)
        assert {"1.0-easy", "1.0-hard"} <= set(computed)


def test_a_stop_request_is_obeyed_between_elements(weights, tmp_path, monkeypatch):
    computed = generated(monkeypatch)
    monkeypatch.setattr(worker, "stop_requested", lambda: len(computed) == 1)
    with pytest.raises(worker.Stopped, match="1 of 4"):
        job.run(spec(weights), tmp_path)
    assert list(read(tmp_path)) == ["0.5-easy"]


def sampled(monkeypatch) -> list[list[str]]:
    """Ids of the problems that are really sampled from now on, by chunk."""
    asked, real = [], job.sample
    monkeypatch.setattr(job, "sample", lambda *a: (asked.append([a[3][i].id for i in a[4].problems]), real(*a))[1])
    return asked


def chunked(completions: int) -> dict:
    """The tiny config, with chunks of that many completions."""
    return overlay(tiny().dump(), {"evaluate": {"chunk_completions": completions}})


@pytest.mark.parametrize("harm, again", [
    (lambda chunks: None, 3),
    (lambda chunks: (chunks / "0.5-easy-0.npz").unlink(), 4),
    (lambda chunks: (chunks / "0.5-easy-0.npz").write_bytes((chunks / "0.5-easy-0.npz").read_bytes()[:-50]), 4),
    (lambda chunks: shutil.copy(chunks / "0.5-easy-0.npz", chunks / "0.5-easy-1.npz"), 3),  # of other problems
], ids=["as it was", "chunk lost", "chunk cut short", "chunk of other problems"])
@pytest.mark.parametrize("where", ["same attempt", "later attempt"])
def test_a_benchmark_goes_on_in_the_middle(weights, tmp_path, monkeypatch, harm, again, where):
    """8 problems with 2 samples each, in chunks of 2 problems; the job is stopped after a quarter of them."""
    whole, first = tmp_path / "whole", tmp_path / "first"
    whole.mkdir()
    first.mkdir()
    one = spec(weights, only=[["0.5", "easy"]], config=chunked(4))
    job.run(one, whole)
    asked = sampled(monkeypatch)
    with monkeypatch.context() as stopped, pytest.raises(worker.Stopped, match="4 of 16 completions of 0.5-easy"):
        stopped.setattr(worker, "stop_requested", lambda: len(asked) > 0)
        job.run(one, first)
    assert not read(first)
    harm(first / "chunks")
    attempt = first if where == "same attempt" else tmp_path / "second"
    attempt.mkdir(exist_ok=True)
    asked.clear()
    job.run(one | {"resume": [str(first)]}, attempt)
    assert len(asked) == again
    assert timeless(read(attempt)) == timeless(read(whole))  # the hash of the raw completions is among it
    assert not list((attempt / "chunks").iterdir())


def test_chunks_are_of_similar_length_and_hold_every_problem_once():
    assert [c.problems for c in parts.cut([5, 3, 9, 3, 5], 2, 5)] == [(1, 3), (0, 4), (2,)]
    assert parts.cut([4, 4, 4], 2, 10) == [parts.Chunk((0, 1, 2), 0, 2)] and parts.cut([], 2, 10) == []
    # More samples than a chunk holds: those of one problem are cut.
    assert parts.cut([9, 3], 5, 2) == [parts.Chunk((i,), first, n) for i in (0, 1) for first, n in ((0, 2), (2, 2), (4, 1))]
    assert parts.Chunk((1,), 2, 2).rows(5) == [7, 8]


@pytest.mark.parametrize("problems, samples, most", list(itertools.product((1, 2, 7), (1, 3, 8), (1, 3, 4, 100))))
def test_chunks_are_counted_without_the_problems(problems, samples, most):
    cut = parts.cut([3] * problems, samples, most)
    assert parts.count(problems, samples, most) == len(cut)
    assert sorted(row for chunk in cut for row in chunk.rows(samples)) == list(range(problems * samples))
    assert all(len(chunk.problems) * chunk.n <= most for chunk in cut)


@pytest.mark.parametrize("completions, of", [(4, 4), (3, 8), (1, 16)], ids=["two problems", "a problem", "a sample"])
def test_parts_make_up_the_element_that_one_job_would_have_made(weights, tmp_path, completions, of):
    """Of 8 problems with 2 samples each: counts, figures and raw completions, to the bit, in whatever order the parts come."""
    whole, apart = tmp_path / "whole", tmp_path / "apart"
    one = spec(weights, only=[["0.5", "easy"]], config=chunked(completions))
    for folder in (whole, apart):
        folder.mkdir()
    job.run(one, whole)
    for k in reversed(range(of)):
        assert job.run(one | {"only": [["0.5", "easy", k]]}, apart) == {"elements": [f"elements/0.5-easy@{k}.json"]}
    found = read(apart)
    assert len(found) == of and parts.merge(list(found.values())[1:]) is None, "one is missing"
    expected = read(whole)["0.5-easy"]
    for order in (list(found), list(found)[::-1]):
        merged = parts.merge([found[key] for key in order])
        assert merged | {"npz_sha256": expected["npz_sha256"], "seconds": expected["seconds"]} == expected
    loaded = [(parts.rows(part), np.load(apart / f"elements/{key}.npz")) for key, part in found.items()]
    with np.load(whole / "elements/0.5-easy.npz") as data:
        for ours, theirs in zip(chunks.join(loaded), (data["tokens"], data["offsets"]), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_part_of_an_earlier_attempt_is_taken_over(weights, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    one = spec(weights, only=[["0.5", "easy", 1]], config=chunked(4))
    job.run(one, first)
    asked = sampled(monkeypatch)
    job.run(one | {"resume": [str(first)]}, second)
    assert not asked and read(second) == read(first)
    job.run(one | {"only": [["0.5", "easy", 2]], "resume": [str(first)]}, second)
    assert len(asked) == 1, "another part is another question"


def test_means_are_rounded_once():
    """0.1 + 0.2 + 0.3, in floating point, depends on where it is cut; the exact sum of the three doubles does not."""
    counts = {"correct": [1], "valid": [3], "truncated": [0], "length": [10]}
    at_once = parts.figures(counts | {"components": {"x": parts.total([0.1, 0.2, 0.3])}}, 3)
    cut = [counts | {"of": 2, "n": 3, "places": [0], "problem_ids": ["p"], "seconds": 1.0, "components": {"x": parts.total(x)}} for x in ([0.1], [0.2, 0.3])]
    assert parts.merge(cut)["components"] == at_once["components"] == {"x": 0.2} and (0.1 + 0.2 + 0.3) / 3 != 0.2
    assert at_once["mean_length"] == [10 / 3]


def test_a_chunk_answers_its_own_question_only(tmp_path):
    drawn = [[1, 70000], [], [2]], [False, True, False]
    chunks.write(tmp_path / "x.npz", {"n": 3}, drawn)
    assert chunks.read(tmp_path / "x.npz", {"n": 3}) == drawn
    assert chunks.read(tmp_path / "x.npz", {"n": 4}) is None and chunks.read(tmp_path / "y.npz", {"n": 3}) is None


def test_weights_with_nan_are_the_candidates_fault(weights, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(weights)
    model.transformer.wpe.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(CandidateError, match="nonfinite-weights.*wpe"):
        job.run(spec(tmp_path / "nan"), tmp_path)


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("transformer.wpe.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("harm", [shutil.rmtree, cut_short, drop_a_tensor, lambda f: (f / "model.safetensors").unlink()])
def test_missing_or_broken_weights_are_not_the_candidates_fault(weights, tmp_path, harm):
    folder = tmp_path / "broken"
    shutil.copytree(weights, folder)
    harm(folder)
    with pytest.raises(Exception) as caught:
        job.run(spec(folder), tmp_path)
    assert not isinstance(caught.value, CandidateError)
    assert read(tmp_path) == {}


def test_pack_keeps_large_vocabularies_and_empty_rows(tmp_path):
    completions = [[1, 70000], [], [2]]
    files.write_atomic(tmp_path / "x.npz", job.pack(completions, [False] * 3, [Grade(0.0, {}, False, False)] * 3))
    assert job.unpack(tmp_path / "x.npz") == completions
