import json

import pytest
from click.testing import CliRunner

from poise_hpc import cli
from poise_hpc.agent import listing
from poise_hpc.agent.catalogue import SLOTS, parts
from poise_hpc.types import UsageError


def printed(*words):
    return CliRunner().invoke(cli.main, ["catalogue", *words], catch_exceptions=False).output


def test_every_part_is_in_it_with_formula_and_source():
    lines, rows = printed().splitlines(), json.loads(printed("--json"))
    assert {r["name"] for r in rows} == set(parts()) and len(rows) == len(parts())
    for part in parts().values():
        at = lines.index(f"  {part.tag or 'GRPO':<11}{part.name}: {part.formula}")
        assert part.source in [line.strip() for line in lines[at:at + 5]]
        for name in part.implies.values():
            assert lines[at + 2].strip() == f"comes with {name}: {parts()[name].formula}"
    assert [r["name"] for r in rows if r["grpo"]] == [own for _, own in SLOTS.values() if own]


def test_a_tag_means_one_part():
    tags = [p.tag for p in parts().values() if p.tag]
    assert len(set(tags)) == len(tags) and not [t for t in tags if "-" in t or t == "GRPO" or t != t.upper()]


@pytest.mark.parametrize(("word", "names"), [
    ("KIMILEN", ["kimi-length"]), ("qae", ["quantile-baseline"]), ("quantile-baseline", ["quantile-baseline"]),
    ("RLOO-OPMASK-GRPO", ["leave-one-out", "off-policy-mask"]),
    ("GRPO", ["group-mean", "group-std", "token-ratio", "symmetric-clip", "sequence-mean"]),
])
def test_what_a_name_means(word, names):
    assert [r["name"] for r in listing.rows([word])] == names


def test_cards_are_found_by_their_preprint():
    assert listing.rows(["QAE"])[0]["cards"] == ["Quantile baseline"]


def test_an_unknown_name_is_corrected():
    with pytest.raises(UsageError, match="did you mean KIMILEN"):
        listing.rows(["KIMLEN"])
    assert "poise-hpc catalogue" in printed("xyzzy")
