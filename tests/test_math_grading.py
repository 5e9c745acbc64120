"""Answers: extraction, rules, and math-verify behind a killable process."""
from __future__ import annotations

import random
import sys
from fractions import Fraction
from importlib.util import find_spec

import pytest

from poise_hpc.tasks import grading
from poise_hpc.tasks.grading import MAX_ANSWER, RULES, Grader, Pool, Verdict
from poise_hpc.tasks.grading_rules import boxed, normalise, number, same
from poise_hpc.types import PoiseError, UsageError

needs_math_verify = pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed (pip install 'poise_hpc[math]')")


@pytest.mark.parametrize(("text", "answer"), [
    (r"so \boxed{42}.", "42"), (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\fbox{7}", "7"), (r"\boxed {8}", "8"), ("42", None), (r"\boxed{}", None), (r"\boxed{1} then \boxed{\frac{1}{2}", None),
    (r"\boxed{a\}", None)])
def test_the_last_box_counts(text, answer):
    assert boxed(text) == answer


@pytest.mark.parametrize(("a", "b"), [
    (r"\dfrac12", r"\frac{1}{2}"), (r"\left( 1, 2 \right)", "(1,2)"), (r"5\text{ cm}", "5"), (r"12~\mathrm{cm}^2", "12"), (r"x = 5", "5"),
    (r"90^\circ", "90"), (r"\$18", "18"), (r"\text{Evelyn}", "Evelyn"), (r"\sqrt3", r"\sqrt{3}"), (r"1{,}234", "1,234"), ("7.", "7"),
    (r"\frac{1}2", r"\frac{1}{2}"), (r"\frac12\text{ inches}", r"\frac{1}{2}")])
def test_one_spelling(a, b):
    assert normalise(a) == normalise(b)


@pytest.mark.parametrize(("text", "value"), [
    ("12", Fraction(12)), ("-0.5", Fraction(-1, 2)), (".5", Fraction(1, 2)), ("+3/4", Fraction(3, 4)), (r"-\frac{3}{4}", Fraction(-3, 4)),
    (r"\frac{-3}{4}", Fraction(-3, 4)), (r"\frac{1}{0}", None), ("1,234,567", Fraction(1234567)), ("12,34", None), ("6.3e-2", Fraction(63, 1000)),
    (r"6.3\times10^{-2}", Fraction(63, 1000)), ("10^3", Fraction(1000)), ("x", None), ("", None), ("1e9999", None)])
def test_numbers_are_exact(text, value):
    assert number(text) == value


@pytest.mark.parametrize(("gold", "answer", "verdict"), [
    ("33", "033", True), ("142.0", "142", True), (r"\frac{1}{2}", "0.5", True), ("2/4", r"\dfrac{1}{2}", True), ("3", "4", False),
    (r"\frac{1}{3}", r"\frac{1}{4}", False), ("0.5", "0.6", False), (r"\frac{1}{3}", "0.33333", None),  # rounding: not the rules' to judge
    ("50\\%", "50", True), ("50\\%", "0.5", None), ("100,200", "100200", True), ("1,2", "2,1", None), ("x^2", "x*x", None)])
def test_the_rules_know_what_they_know(gold, answer, verdict):
    assert same(gold, answer) is verdict
    assert same(answer, gold) is verdict


def test_every_way_to_write_a_fraction_is_equal():
    rng = random.Random(0)
    for _ in range(200):
        value = Fraction(rng.randint(-50, 50), rng.choice((1, 2, 4, 5, 8, 10)))
        n, d = value.numerator, value.denominator
        ways = [f"{n}/{d}", rf"\frac{{{n}}}{{{d}}}", f"{float(value)}", rf"$ \dfrac{{{3 * n}}}{{{3 * d}}} $", f"x={n}/{d}"]
        gold, other = rng.choice(ways), rng.choice(ways)
        assert same(gold, other) is True
        assert same(gold, f"{n + d}/{d}") is False  # one more


def test_without_math_verify_the_rest_is_wrong_and_said_so(monkeypatch):
    monkeypatch.setattr(grading, "_installed", lambda: None)
    grader = Grader("auto", 1, 1.0)
    assert grader.version == RULES
    assert grader.verdicts([("4", "4"), ("4", "5"), ("x^2", "x*x"), ("4", "1" * (MAX_ANSWER + 1))]) == [
        Verdict.EQUAL, Verdict.DIFFERENT, Verdict.UNDECIDED, Verdict.TOO_LONG]
    with pytest.raises(UsageError, match="not installed"):
        Grader("math-verify", 1, 1.0)


# A stand-in for math-verify's process: same protocol, verdicts without sympy.
STAND_IN = '''
import json, os, signal, sys, time
print('"1.0"', flush=True)
for line in sys.stdin:
    gold, answer = json.loads(line)
    if answer == "hang":
        signal.setitimer(signal.ITIMER_PROF, 0.05)
        while True: pass
    if answer == "crash":
        os._exit(3)
    print(json.dumps(gold == answer + "!"), flush=True)
'''


@pytest.fixture
def pool(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(grading, "WORKER", "stand_in")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = Pool(2, 1.0)
    yield pool
    pool.close()


def test_a_hanging_answer_costs_its_process_and_nothing_else(pool):
    pairs = [("a!", "a"), ("b!", "hang"), ("c!", "c"), ("d!", "crash"), ("e!", "hang"), ("f!", "x"), ("g!", "g")]
    wanted = [Verdict.EQUAL, Verdict.TIMEOUT, Verdict.EQUAL, Verdict.DIED, Verdict.TIMEOUT, Verdict.DIFFERENT, Verdict.EQUAL]
    assert pool.verdicts(pairs) == wanted
    assert pool.verdicts(pairs * 2) == wanted * 2
    assert pool.verdicts([]) == []


def test_processes_are_reused(pool):
    pool.verdicts([("a!", "a")] * 5)
    first = {p.pid for p in pool._idle}
    pool.verdicts([("b!", "b")] * 5)
    assert {p.pid for p in pool._idle} == first and len(first) == 2


def test_a_checker_that_does_not_start_is_our_fault(monkeypatch):
    monkeypatch.setattr(grading, "WORKER", "there.is.no.such.module")
    with pytest.raises(PoiseError, match="does not start"):
        Pool(1, 1.0).verdicts([("a", "b")])


def test_verdicts_are_cached(monkeypatch):
    asked = []

    class Counting:
        def verdicts(self, pairs):
            asked.extend(pairs)
            return [Verdict.EQUAL] * len(pairs)

    grader = Grader("rules", 1, 1.0)
    grader._pool = Counting()
    pairs = [("x", "y"), ("x", "y"), ("1", "1")]
    assert grader.verdicts(pairs) == grader.verdicts(pairs) == [Verdict.EQUAL] * 3
    assert asked == [("x", "y")]  # once; "1" never: the rules knew


@needs_math_verify
def test_math_verify_decides_what_the_rules_cannot():
    grader = Grader("math-verify", 2, 1.0)
    pairs = {("x^2+2x+1", "(x+1)^2"): Verdict.EQUAL, (r"2\sqrt{3}", r"\sqrt{12}"): Verdict.EQUAL, ("2,3", "3,2"): Verdict.EQUAL,
             (r"\pi", "3.14159"): Verdict.DIFFERENT, ("5", r"9^{9^{9^{9}}}"): Verdict.TIMEOUT, ("5", "(((("): Verdict.DIFFERENT}
    assert grader.verdicts(list(pairs)) == list(pairs.values())
    grader.close()
    assert "math-verify" in grader.version and sys.modules.get("math_verify") is None  # never in this process
