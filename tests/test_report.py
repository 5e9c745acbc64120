"""The report: one file that says what the records say, whatever state the campaign is in and whoever wrote its texts."""
from __future__ import annotations

import json
import re
from dataclasses import replace
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers_archive import entry, row, score
from helpers_campaign import campaign, noop_work
from helpers_drive import controller, drive, failing

from poise_hpc import archive, cli, config, derived, files, stats, views
from poise_hpc.campaign import Campaign
from poise_hpc.cluster.inline import InlineCluster
from poise_hpc.evaluation import metrics
from poise_hpc.report import board, confirmed, curves, evidence, gather, markup, opening, page, progress, svg, tree, words
from poise_hpc.transcript import Amount, Limit, Request, Transcript
from poise_hpc.types import Outcome, PoiseError

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;</td></svg>--><!-- \u202egnp \x07 javascript:alert(1) https://evil.example/x"


class Page(HTMLParser):
    """Fails on a tag that is not closed where it should be; collects what could reach outside or run."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.loads: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        named = dict(attributes)
        assert len(named) == len(attributes), (tag, attributes)
        assert not any(name.startswith("on") or name == "style" for name in named), (tag, attributes)
        self.tags.append(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.links += [named["href"]] if "href" in named else []
        self.loads += [(name, value) for name, value in attributes if name in ("src", "srcset", "data", "action", "poster", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:], self.getpos())
        self.open.pop()

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open[-1:]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(root: Path, *options: str) -> Page:
    """Made by the command, parsed, and checked for what holds of every report."""
    result = CliRunner().invoke(cli.main, ["report", str(root), "--json", *options])
    assert result.exit_code == 0, (result.output, result.exception)
    parsed = Page(Path(json.loads(result.stdout)["file"]).read_text())
    assert len(set(parsed.ids)) == len(parsed.ids)
    inner = [link[1:] for link in parsed.links if link.startswith("#")]
    assert set(inner) <= set(parsed.ids), set(inner) - set(parsed.ids)
    assert all(re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", link) for link in parsed.links if not link.startswith("#"))
    assert parsed.loads == [] and parsed.tags.count("script") == 1 and parsed.tags.count("style") == 1
    assert not {"img", "iframe", "object", "embed", "link", "base", "form"} & set(parsed.tags)
    return parsed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Eight candidates on three seeds, two of which fail, one confirmed and one ablated."""
    root = campaign(tmp_path_factory.mktemp("a <b>\"campaign\"") / "c", search={"candidates": 8, "train_seeds": [0, 1, 2]}).root
    drive(root, InlineCluster(failing("train", "c0003", Outcome.CANDIDATE_ERROR, "nonfinite-loss")))
    origin = Campaign.open(root)
    best = next(r["id"] for r in views.leaderboard(origin)["rows"] if r["id"] != "c0000")
    drive(derived.create("confirm", origin, best, 4, None).root)
    drive(derived.create("ablate", origin, best, None, None).root)
    drive(derived.create("rerun", origin, "c0000", None, None).root)
    return root


# --- what it says

def test_every_row_of_the_leaderboard_stands_there_as_the_view_prints_it(finished):
    text = read(finished).text
    for r in views.leaderboard(Campaign.open(finished))["rows"]:
        assert f"{r['id']} {r['name']}" in text
        if r["overall"] is None:
            assert f"failed: {r['cause']}" in text
        else:
            assert words.minus(views.interval(r["overall"], r["ci"])) in text
            assert r["id"] == "c0000" or words.minus(views.interval(r["delta"], r["delta_ci"], sign=True)) in text


def test_the_headline_names_the_winner_its_confirmation_and_its_luck(finished):
    f = gather.gather(Campaign.open(finished), 8)
    best, [made] = f.winner, f.of("confirm")
    row = next(r for r in made.report["rows"] if r["id"] == "c0001")
    text = read(finished).text
    opening = text[:text.index("Selected against confirmed")]
    assert best.id in opening and words.points(best.score.delta, sign=True) in opening
    assert words.points(row["delta"], sign=True) in opening and "4 fresh seeds, prompts that selection never saw" in opening
    for delta, ci in ((best.score.delta, best.score.delta_ci), (row["delta"], row["delta_ci"])):
        assert ci[0] < 0 and f"95 % interval {words.points(delta, ci, sign=True).partition(' ')[2]}" in opening  # not cut at 0, as a score's is
    lead = f.noise * stats.expected_best(len(f.scored))
    assert f"best of {len(f.scored)} scored candidates" in opening and f"seem {lead:.1f} points better" in opening
    confirmed = text[text.index("Selected against confirmed"):]
    assert confirmed.count(words.points(row["delta"], row["delta_ci"], sign=True)) >= 3  # dot's title, figure, table
    for e in derived.effects(Campaign.open(finished / "derived" / f"ablate-{best.id}-1")):
        assert f"{e['mechanism']} {words.points(e['effect'], e['ci'], sign=True)}" in confirmed
    assert "bit for bit" in confirmed


def test_details_hold_proposal_code_scores_by_seed_and_reflection(finished):
    f = gather.gather(Campaign.open(finished), 8)
    e = f.records[f.winner.id]
    text = read(finished).text
    body = text[text.index("Candidates in detail"):]
    for said in (e.proposal["hypothesis"], e.reflection["text"].splitlines()[-1], e.pick["explanation"][:40]):
        assert re.sub(r"\s+", " ", said) in text
    added = next(line for line in e.code["algorithm.py"].splitlines() if line.strip().startswith("mechanisms ="))
    assert "+" + re.sub(r"\s+", " ", added).strip()[:10] in body.replace("+ ", "+")
    for name, by_seed in gather.benchmarks(e, f.campaign).items():
        assert f"{name} " + " ".join(words.points(v) for v in by_seed.values()) in body
    assert "lost" in text and "nonfinite-loss in train" in text


def test_scores_by_seed_have_the_archived_mean(finished):
    f = gather.gather(Campaign.open(finished), 8)
    for e in (e for e in f.records.values() if e.score):
        found = {name: np.mean(list(by_seed.values())) for name, by_seed in gather.benchmarks(e, f.campaign).items()}
        assert found == pytest.approx(e.score["benchmarks"])


def test_an_empty_table_has_no_last_point():
    assert metrics.last_point(entry().evaluations[:0], config.Config().evaluate.benchmarks) == {}


# --- hostile texts

def test_texts_of_strangers_stay_texts(tmp_path):
    """Whatever a proposal, a reflection, a message, code, a check, an attempt or a person says comes out as it was, as text."""
    root = campaign(tmp_path / "c", search={"candidates": 0, "train_seeds": [0, 1]}).root
    drive(root)
    base = archive.read(root / "records" / "c0000.h5")
    proposal = dict.fromkeys(("name", "hypothesis", "description", "expected_effect", "proposer"), HOSTILE) | {
        "parents": ["c0000"], "mechanisms": [HOSTILE], "sources": [HOSTILE, "arXiv:2402.03300", "arXiv:2402.03300\" onclick=\"x"], "details": {}}
    hostile = replace(
        base, name=HOSTILE, parents=("c0000",), proposer=HOSTILE, proposal=proposal, code=base.code | {"x.py": HOSTILE},
        pick={"parent": "c0000", "explanation": HOSTILE, "terms": []}, attempts=[a | {"cause": HOSTILE} for a in base.attempts],
        checks=[{"name": HOSTILE, "passed": False, "message": HOSTILE, "seconds": 0.0}],
        reflection={"verdict": HOSTILE, "text": f"**{HOSTILE}** `{HOSTILE}`", "symptoms": [HOSTILE], "author": HOSTILE})
    archive.write(root / "records" / "c0001.h5", replace(hostile, id="c0001"))
    archive.write(root / "records" / "c0002.h5", replace(hostile, id="c0002", outcome=Outcome.CANDIDATE_ERROR, cause=HOSTILE, message=HOSTILE, score=None))
    files.append_line(root / "guidance.jsonl", {"order": "1", "from": 1, "kind": "idea", "text": HOSTILE, "off": False, "time": 0.0})
    parsed = read(root)
    assert parsed.text.count("<script>alert(1)</script>") >= 12
    assert "\u202e" not in parsed.text and "\x07" not in parsed.text
    assert parsed.links.count("https://arxiv.org/abs/2402.03300") >= 4


def test_only_what_h_made_is_markup():
    made = markup.h("p", "a < b", ["&", markup.h("b", "c")], title="\"quoted\"", hidden=False, open=True)
    assert made == '<p title="&quot;quoted&quot;" open>a &lt; b&amp;<b>c</b></p>'
    assert markup.text("x\u202ey\x00\ud800") == "x\ufffdy\ufffd\ufffd"
    assert markup.prose("**a<b** `c<d`") == '<div class="prose"><strong>a&lt;b</strong> <code>c&lt;d</code></div>'


def test_the_policy_allows_this_script_and_nothing_else(finished):
    html = page.page(gather.gather(Campaign.open(finished), 1), "now")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1].replace("&#x27;", "'")
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy and policy == page.policy(html)
    assert page.policy(html.replace("\"use strict\"", "\"use lax\"")) != policy


# --- states of a campaign

def test_just_created(tmp_path):
    text = read(campaign(tmp_path / "c").root).text
    assert "Just created." in text and "Nothing is archived yet: there is no result." in text


def test_running(tmp_path):
    """First the baseline alone, on its way; then the first candidates."""
    root = campaign(tmp_path / "c", search={"candidates": 3, "train_seeds": [0]}).root
    driven = controller(root)
    while len(driven.campaign.ids()) < 1:
        driven.step()
    with driven.campaign.lock():
        assert "In progress." in read(root).text
    text = read(root).text
    assert "Not finished, and nobody drives it now." in text and "Nothing is archived yet: there is no result." in text and "c0000 GRPO – check" in text
    while len(driven.campaign.ids()) < 2:
        driven.step()
    text = read(root).text
    assert "On their way" in text and "c0001" in text


def test_only_failures(tmp_path):
    root = campaign(tmp_path / "c", search={"candidates": 2, "train_seeds": [0, 1]}).root
    fails = {id: failing("train", id, Outcome.CANDIDATE_ERROR, "raised") for id in ("c0001", "c0002")}
    drive(root, InlineCluster(lambda attempt, job: fails.get(job["candidate"], noop_work)(attempt, job)))
    text = read(root).text
    assert "No candidate got a score: 2 failed." in text and "raised 2 100 %" in text


def test_a_failed_baseline(tmp_path):
    root = campaign(tmp_path / "c", search={"candidates": 2, "train_seeds": [0, 1]}).root
    with pytest.raises(PoiseError, match="the baseline c0000 failed"):
        drive(root, InlineCluster(failing("train", "c0000", Outcome.CANDIDATE_ERROR, "raised")))
    assert "The baseline failed (raised)" in read(root).text


def test_a_baseline_whose_record_is_lost(tmp_path):
    root = campaign(tmp_path / "c", search={"candidates": 3, "train_seeds": [0, 1]}).root
    drive(root)
    (root / "records" / "c0000.h5").write_bytes(b"")
    text = read(root).text
    assert "points over the baseline" in text and "c0000 : records/c0000.h5 is damaged" in text


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    root = campaign(tmp_path / "c", search={"candidates": 3, "train_seeds": [0]}).root
    drive(root)
    text = read(root).text
    assert "one training seed: no interval" in text and "nobody knows the noise" in text and "cannot be said without replicates" in text


def test_a_damaged_record_is_named_and_not_fatal(tmp_path):
    root = campaign(tmp_path / "c", search={"candidates": 3, "train_seeds": [0, 1]}).root
    drive(root)
    path = root / "records" / "c0002.h5"
    path.write_bytes(path.read_bytes()[:-1])
    parsed = read(root)
    assert "1 problem: this report goes on" in parsed.text and "c0002 : records/c0002.h5 is damaged" in parsed.text and "c0003" in parsed.ids
    (root / "candidates" / "c0003" / "attempts" / "check-1" / "result.json").write_text("{")
    (root / "records" / "c0003.h5").unlink()
    (root / "derived" / "confirm-c0001-1").mkdir(parents=True)
    (root / "derived" / "confirm-c0001-1" / "campaign.json").write_text("{")
    text = read(root).text
    assert "Its state could not be read." in text and "derived/confirm-c0001-1 : derived/confirm-c0001-1/campaign.json is not valid JSON" in text


def test_what_the_language_model_cost(tmp_path):
    root = campaign(tmp_path / "c", search={"candidates": 1, "train_seeds": [0]}).root
    drive(root)
    transcript = Transcript(root / "llm.jsonl", lambda: 0.0)
    request = Request("propose", "c0001", 0, ({"role": "user", "content": "secret prompt"},))
    call = transcript.begin(request, "m", False, Amount(9000, Decimal(9)), Limit())
    transcript.fail(call, request, "m", 500, "broken", Amount(1234, Decimal("0.25")))
    text = read(root).text
    assert "propose 1 1,234 0.25 all 1 1,234 0.25" in text and "language model 1 calls, 1,234 tokens, cost 0.25" in text and "secret prompt" not in text


# --- what is left out

def test_left_out_candidates_are_counted_and_come_back(finished):
    few = read(finished, "--candidates", "1")
    assert "--candidates N" in few.text and "c0004" not in few.ids
    all_of_them = read(finished, "--candidates", "9")
    assert {f"c{i:04d}" for i in range(9)} <= set(all_of_them.ids) and "--candidates N" not in all_of_them.text
    result = CliRunner().invoke(cli.main, ["report", str(finished), "--candidates", "1", "--out", str(finished / "x" / "r.html")])
    assert "left out (--candidates takes in more)" in result.output and (finished / "x" / "r.html").exists()


def test_a_large_archive_makes_a_small_page(tmp_path):
    """1,500 entries: the tree, the tables and the details keep to their limits, and say so."""
    root = campaign(tmp_path / "c", search={"candidates": 1500, "train_seeds": [0, 1]}).root
    view, rng = archive.ArchiveView(root), np.random.default_rng(0)
    for i in range(1500):
        parents = (f"c{rng.integers(max(i - 40, 0), i):04d}",) if i else ()
        data = score(30 + float(rng.normal()), seeds=2, benchmarks={
            "easy/acc@1": 50 + float(rng.normal()), "hard/acc@1": 10 + float(rng.normal()), "hard/pass@4": 20.0})
        failed = i % 10 == 9
        row = archive.summary(entry(i, parents=parents, score=None if failed else vars(replace(data, delta=data.overall - 30, delta_ci=(-5.0, 5.0))),
                                    outcome=Outcome.CANDIDATE_ERROR if failed else Outcome.SUCCEEDED, cause="raised" if failed else ""), "0" * 64)
        view.entries.append(view._remember(row))
        (root / "records" / f"{row.id}.h5").touch()
    view.write_index()
    for id in ("c0000", "c1499"):  # the index is believed if its ends are those of the records
        (root / "records" / f"{id}.h5").write_bytes(b"")
    f = gather.gather(Campaign.open(root), 5)
    html = page.page(f, "now")
    parsed = Page(html)
    assert len(f.entries) == 1500 and len(html) < 3e6
    rows = [e.id for e in tree.chosen(f)]
    assert tree.ROWS // 2 < len(rows) == len(set(rows)) <= tree.ROWS and {*f.line[:20], "c0000"} <= set(rows)
    assert "rows are left out" in parsed.text and "candidates are left out: shown are the best" in parsed.text


# --- figures and sums, by hand

def test_expected_best_by_hand():
    # E max of two standard normals is 1 / sqrt(pi), of three 3 / (2 sqrt(pi)).
    assert stats.expected_best(1) == pytest.approx(0, abs=1e-6)
    assert stats.expected_best(2) == pytest.approx(np.pi**-0.5, abs=1e-5)
    assert stats.expected_best(3) == pytest.approx(1.5 * np.pi**-0.5, abs=1e-5)


def test_paired_sd_by_hand():
    # Seeds differ by 10 for both, which pairing takes off. Rest +-0.5 in each of four cells: 4 * 0.25 / ((2 - 1) (2 - 1)) = 1.
    a, b = replace(score(0), by_seed={"0": 1.0, "1": 12.0}), replace(score(0), by_seed={"0": 2.0, "1": 11.0})
    assert stats.paired_sd([a, b]) == pytest.approx(1.0)
    assert stats.paired_sd([a]) is None and stats.paired_sd([replace(a, by_seed={"0": 1.0})] * 3) is None and stats.paired_sd([]) is None


def test_round_ticks():
    assert svg.round_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert svg.round_ticks(-0.3, 0.31, 3) == [-0.2, 0.0, 0.2]
    assert svg.tick_labels([-0.2, 0.0, 0.2], sign=True) == ["−0.2", "0.0", "+0.2"]
    assert svg.Scale(0.01, 10, 0, 300, log=True)(0.1) == pytest.approx(100) and svg.Scale(0.01, 10, 0, 1, log=True).ticks() == [0.01, 0.1, 1, 10]


def test_labels_are_kept_apart():
    at = svg.spread([10, 12, 50], 16)
    assert at[1] - at[0] >= 16 and at[2] > at[1] and sum(at) == pytest.approx(72)


def test_a_line_breaks_where_a_value_is_missing():
    assert svg.polyline([(0, 1), (1, float("nan")), (2, 3), (3, 4)], "x") == '<path d="M0 1M2 3L3 4" class="line x"/>'


def test_best_so_far_and_mechanisms_by_hand(finished):
    f = gather.gather(Campaign.open(finished), 8)
    rises = progress.best_so_far(f)
    assert [v for _, v in rises] == sorted(v for _, v in rises) and rises[-1][1] == f.winner.score.overall
    for m in evidence.tally(f):
        having = [e.score.delta for e in f.scored if m.name in e.mechanisms]
        lacking = [e.score.delta for e in f.scored if m.name not in e.mechanisms]
        assert m.with_it == (pytest.approx(np.median(having)) if having else None)
        assert m.without_it == (pytest.approx(np.median(lacking)) if lacking else None)
        assert m.unscored == sum(m.name in e.mechanisms for e in f.unscored)


def test_one_collapse_does_not_make_a_mechanism_bad_nor_a_copy_of_the_baseline_its_own_good(finished):
    deltas = {"c0001": (("kl", "group-std"), 2.0), "c0002": (("kl",), 4.0), "c0003": (("kl",), -60.0), "c0004": (("group-std",), 7.0), "c0005": (("x",), 1.0)}
    entries = {"c0000": row("c0000", 30.0, mechanisms=("group-std", "symmetric-clip"))} | {
        id: replace(row(id, 30.0 + d, ("c0005",), names), score=replace(score(30.0 + d), delta=d)) for id, (names, d) in deltas.items()}
    f = replace(gather.gather(Campaign.open(finished), 1), entries=entries, rows=[views.archived_row(e) for e in entries.values()])
    assert [m.name for m in evidence.tally(f)] == ["kl", "x"]
    kl = evidence.tally(f)[0]
    assert (kl.with_it, kl.without_it, kl.contrast) == (2.0, 4.0, -2.0) and kl.added == pytest.approx([1.0, 3.0, -61.0])
    assert "+1.0 (3)" in evidence.mechanisms(f) and "Median with" in evidence.mechanisms(f)


@pytest.mark.parametrize(("ci", "said"), [
    ((0.0, 0.0), "the same on every seed"), ((-1.0, 1.0), "not told apart from none"), ((1.0, 2.0), "it helps"), ((-2.0, -1.0), "it harms"),
    (None, "one seed: no interval")])
def test_what_an_ablation_says(ci, said):
    assert confirmed._needed({"effect": sum(ci or ()) / 2, "ci": ci}) == said


def test_the_verdict_is_said_to_be_on_the_scores(finished):
    text = read(finished).text
    assert "Verdict: on the scores, by the 95 % interval of the paired difference to the parent" in text and "on the hypothesis, most often" not in text


def test_the_tree_has_everybody_once_under_an_older_parent(finished):
    f = gather.gather(Campaign.open(finished), 8)
    ordered = tree.depth_first(list(f.entries.values()))
    assert sorted(e.id for e, _ in ordered) == sorted(f.entries)
    seen: dict[str, int] = {}
    for e, depth in ordered:
        assert depth == (seen[e.parents[0]] + 1 if e.parents else 0)
        seen[e.id] = depth


def test_long_curves_are_averaged_in_stretches():
    # 240 steps in 120 stretches of two: values 0, 1, 2, ... become 0.5, 2.5, ..., at steps 0.5, 2.5, ...
    x = svg.Scale(0, 240, 0, 240)
    drawn = curves._line(np.arange(240.0), x, x, "mine")
    assert drawn.startswith('<path d="M0.5 0.5L2.5 2.5L4.5 4.5') and drawn.count("L") == 119


def test_what_is_far_off_does_not_set_the_scale(finished):
    f = gather.gather(Campaign.open(finished), 8)
    near, far = board.window(f, [1.0, 2.0]), board.window(f, [1.0, 2.0, -1000.0])
    assert near[1] == far[1] and -1000 < far[0] < near[0] < 0 < 2 < near[1]


def test_a_place_that_cannot_be_written_is_named(finished):
    (finished / "plain").write_text("")
    with pytest.raises(PoiseError, match="cannot write .*plain/r.html.* Give another place with --out"):
        page.write(Campaign.open(finished), finished / "plain" / "r.html")


def test_nested_options_are_words():
    assert opening._options({"train": {"steps": 5, "at": [1, 2]}, "k": "v"}) == " (train.steps 5, train.at 1, 2, k v)"
