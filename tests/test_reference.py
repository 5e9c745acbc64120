import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from poise_hpc import cli, config, reference, strict_yaml
from poise_hpc.section import Section

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SECTIONS = [c for c in Section.__subclasses__() if c.__module__ in ("poise_hpc.config", "poise_hpc.agent_config")]


def printed(*words):
    done = CliRunner().invoke(cli.main, ["config", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("path", [None, *CONFIGS], ids=lambda path: path.stem if path else "defaults")
def test_what_is_printed_is_the_same_config(path):
    want = config.load(path) if path else config.Config()
    assert config.parse(strict_yaml.load(printed(*[path] if path else []))) == want


def test_texts_that_yaml_could_misread_come_back():
    odd = config.parse({"search": {"directive": "two lines:\n  - # no comment, 'quoted'"}, "train": {"learning_rate": 1e-7},
                        "task": {"options": {"x": [True, None, "yes", "1e5"]}}})
    assert config.parse(strict_yaml.load(reference.text(odd))) == odd


def test_every_key_is_there_with_its_type_and_meaning():
    keys = reference.keys(config.Config())
    assert len({k.key for k in keys}) == len(keys)
    inner = sum(len(c.model_fields) for c in SECTIONS) - len(config.Config.model_fields) - 2  # sections are no keys: those of Config, acquisition, references
    assert len(keys) == inner
    assert not [k.key for k in keys if not k.comment or not k.type]
    lines = reference.text(config.Config()).splitlines()
    assert all(any(line.strip().lstrip("# ").startswith(f"{k.key.rpartition('.')[2]}: ") and k.comment in line for line in lines) for k in keys)


def test_types_limits_and_comments_are_those_of_the_source():
    found = {k.key: k for k in reference.keys(config.parse({"train": {"steps": 7}}))}
    assert dataclasses.astuple(found["train.checkpoint_every"]) == ("train.checkpoint_every", 8, 8, "integer >= 1", "steps", False)
    assert (found["train.steps"].value, found["train.steps"].default) == (7, 48)
    assert found["train.betas"].type == "list of 2: number" and found["search.acquisition.discount"].type == "number > 0, <= 1"
    assert found["rollout.engine"].type == "one of hf, vllm" and found["evaluate.engine"].type == "one of hf, vllm or null"
    assert found["evaluate.benchmarks.*.split"].required and found["screen.rungs.*.seeds"].default == 1
    lines = found["search.asynchronous"].comment.split("; ")  # on two lines of the source
    assert lines[0].startswith("false: candidate k waits") and lines[1].startswith("true: it waits for nobody")
    assert found["jobs.evaluate_by"].comment.startswith("who evaluates: the training job itself")  # above it


def test_a_value_that_is_no_default_shows_both(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {steps: 7}\n")
    line = next(line for line in printed(tmp_path / "mine.yaml").splitlines() if line.startswith("  steps:"))
    assert line.startswith("  steps: 7  # integer >= 1, <= 1e+07 (default 48); ")


def test_json_has_the_same_keys():
    rows = json.loads(printed("--json"))["keys"]
    assert [row["key"] for row in rows] == [k.key for k in reference.keys(config.Config())]
    assert set(rows[0]) == {"key", "value", "default", "type", "comment", "required"}
