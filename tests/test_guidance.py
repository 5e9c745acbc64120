"""What persons say to a search: from which candidate on it holds, what selection makes of it, and the commands."""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers_agent import entry
from helpers_campaign import campaign, noop_work

from poise_hpc import cli, config, files, guidance
from poise_hpc.agent.base import Draft
from poise_hpc.agent.novelty import check_novelty
from poise_hpc.agent.offline import OfflineProposer
from poise_hpc.cluster.inline import InlineCluster
from poise_hpc.controller import Controller
from poise_hpc.selection.acquisition import choose_parent
from poise_hpc.selection.features import Table, pareto_strength


def say(folder, *lines):
    for i, (number, kind, text, *off) in enumerate(lines):
        guidance.note(folder, f"order-{i}", number, kind, text, bool(off), 0.0)


def test_each_word_holds_from_its_candidate_on(tmp_path):
    say(tmp_path, (3, "directive", "shorter"), (3, "idea", "a"), (5, "directive", ""), (4, "pin", "c0001"), (6, "pin", ""),
        (3, "veto", "kl-term"), (4, "veto", "c0002"), (6, "veto", "kl-term", "off"))
    seen = {n: guidance.at(tmp_path, n, "first", n) for n in range(2, 7)}
    assert [seen[n].directive for n in seen] == ["first", "shorter", "shorter", None, None]
    assert [seen[n].ideas for n in seen] == [(), ("a",), (), (), ()]
    assert [seen[n].pinned for n in seen] == [None, None, "c0001", "c0001", None]
    assert [sorted(seen[n].vetoed) for n in seen] == [[], ["kl-term"], ["c0002", "kl-term"], ["c0002", "kl-term"], ["c0002"]]
    assert seen[4].vetoed_mechanisms == {"kl-term"}


def test_an_idea_waits_for_a_proposal(tmp_path):
    """Candidates 3 and 4 came from persons: the idea meant for 3 is worked out by 5."""
    say(tmp_path, (3, "idea", "a"))
    assert guidance.at(tmp_path, 5, None, since=3).ideas == ("a",) and guidance.at(tmp_path, 6, None, since=6).ideas == ()


def test_an_order_carried_out_twice_says_it_once(tmp_path):
    for number in (3, 4):
        guidance.note(tmp_path, "the order", number, "idea", "a", False, 0.0)
    assert [line["from"] for line in files.read_lines(tmp_path / guidance.FILE)] == [3]


@pytest.mark.parametrize(("text", "named"), [
    ("keep accuracy, shorten outputs", ("length",)), ("more concise, and cheaper to train", ("length", "cost")),
    ("raise pass@32", ()), ("", ()), (None, ())])
def test_directives_name_objectives(text, named):
    assert guidance.objectives(text) == named


# --- selection

def archive():
    made = [entry("c0000", "GRPO", (), ("group-std",), 47.0), entry("c0001", "A", ("c0000",), ("long",), 52.0),
            entry("c0002", "B", ("c0000",), ("short",), 51.9)]
    for e, ratio in zip(made, (1.0, 2.0, 0.5), strict=True):
        e.behaviour["length_ratio"] = ratio
    return made


def chosen(entries, **more):
    return choose_parent(entries, (), config.Acquisition(), np.random.default_rng(0), **more)


def test_length_counts_in_u_pareto_where_the_directive_names_it():
    """B is dominated on the benchmarks alone; it is the shortest, so nothing dominates it once length counts."""
    table = Table.of(archive())
    assert table.objectives(("length",)).tolist() == [[-1.0], [-2.0], [-0.5]]
    assert table.objectives(("cost",)).tolist() == [[-60.0]] * 3
    values = np.array([[47.0], [52.0], [51.9]])
    assert pareto_strength(values).tolist() == [0.0, 1.0, 0.5]
    assert pareto_strength(np.concatenate([values, table.objectives(("length",))], axis=1)).tolist() == [0.5, 1.0, 1.0]
    terms = {t["id"]: t["pareto"] for t in chosen(archive(), objectives=("length",)).terms}
    assert terms["c0002"] == 1.0


def test_an_entry_without_the_figure_is_the_worst():
    lacking = archive()
    del lacking[2].behaviour["length_ratio"]
    assert Table.of(lacking).objectives(("length",))[2, 0] == -np.inf


def test_vetoes_keep_entries_from_being_parents_and_leave_the_baseline():
    entries, plain = archive(), chosen(archive()).parent
    said = guidance.Guidance(vetoed=frozenset({"long", "short", "group-std", "c0000"}))
    assert plain != "c0000" and guidance.barred(said, entries) == {"c0001", "c0002"}
    for strategy in ("poise", "greedy", "random", "islands"):
        assert chosen(entries, strategy=strategy, barred=guidance.barred(said, entries)).parent == "c0000"
    assert chosen(entries, barred=frozenset({plain})).parent not in (plain, None)


def test_vetoed_mechanisms_are_refused_before_any_compute():
    from dataclasses import replace

    from helpers_agent import context, proposal

    draft = Draft(proposal("NEW", ("one", "two")), {})
    assert check_novelty(draft, context()) is None
    assert check_novelty(draft, replace(context(), vetoed=frozenset({"two"}))) == "the researcher has ruled out two"


# --- commands

@pytest.fixture
def searched(tmp_path):
    opened = campaign(tmp_path / "c", search={"candidates": 2, "train_seeds": [0], "window": 1})
    driven = Controller(opened, InlineCluster(noop_work), OfflineProposer())
    while not driven.finished:
        driven.step()
    return opened


def command(*arguments):
    return CliRunner().invoke(cli.main, [str(a) for a in arguments])


def test_commands_reach_the_next_proposal(searched):
    for arguments in (("directive", searched.root, "shorter outputs"), ("pin", searched.root, "c0002"), ("veto", searched.root, "c0001")):
        done = command(*arguments)
        assert done.exit_code == 0, done.output
    assert "selection also weighs: length" in command("directive", searched.root, "shorter outputs").output
    searched.adopt(searched.config.model_copy(update={"search": searched.config.search.model_copy(update={"candidates": 4})}))
    driven = Controller(searched, InlineCluster(noop_work), OfflineProposer())
    while not driven.finished:
        driven.step()
    assert [e.parents[0] for e in driven.archive.entries[3:]] == ["c0002", "c0002"]
    assert files.read_json(searched.candidates / "c0003" / "pick.json")["explanation"] == "pinned by a person"
    assert "from c0003 on" in (searched.root / "events.log").read_text()


def test_what_is_ended_is_said_to_be_off(searched):
    for arguments, said in ((("pin", "c0002"), "pin  c0002  from"), (("pin", "--off"), "pin  off  from"), (("directive", ""), "directive  off  from")):
        assert said in re.sub(" {2,}", "  ", command(arguments[0], searched.root, *arguments[1:]).output)


@pytest.mark.parametrize(("arguments", "said"), [
    (("pin", "c0009"), "has no score in the archive"), (("pin",), "give a candidate, or --off"), (("veto", "c0000"), "something must remain"),
    (("idea", "x"), "only a language model can read an idea"), (("veto", "c0099"), "has no candidate c0099"),
    (("veto", "KL term"), "'KL term' can be no mechanism: they are lower-case slugs"), (("veto", "group-stdd"), "did you mean group-std"),
    (("veto", "quantum-leap"), "--new vetoes a name that nobody has used yet")])
def test_commands_refuse_what_cannot_be(searched, arguments, said):
    name, *rest = arguments
    done = command(name, searched.root, *rest)
    assert done.exit_code == 2 and said in done.output


def test_the_examples_of_a_veto_can_be_typed(searched):
    from poise_hpc.cli.steering import known_mechanism

    page = (Path(__file__).parents[1] / "docs" / "AGENT.md").read_text()
    examples = re.findall(r"veto CAMPAIGN ([a-z-]+)`", page) + re.findall(r"slugs like ([a-z-]+)", command("veto", searched.root, "KL term").output)
    assert len(examples) == 2
    for name in examples:
        known_mechanism(searched, name, new=False)


def test_a_veto_counts_known_names_and_is_noisy_about_new_ones(searched):
    inherited = {m for id in searched.ids() for m in searched.proposal(id).mechanisms}
    assert inherited and inherited | {"maxrl", "clip-higher"} <= guidance.mechanisms(searched)  # candidates', a seed's, the catalogue's
    assert command("veto", searched.root, "maxrl").exit_code == 0
    new = command("veto", searched.root, "quantum-leap", "--new")
    assert new.exit_code == 0 and "nobody has used 'quantum-leap' yet" in new.stderr
    assert guidance.at(searched.root, 99, None, 0).vetoed == {"maxrl", "quantum-leap"}
    assert command("veto", searched.root, "quantum-leap", "--off").exit_code == 0
    assert guidance.at(searched.root, 99, None, 0).vetoed == {"maxrl"}
