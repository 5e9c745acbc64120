"""Configuration: strict, typed, explained."""
from pathlib import Path

import pytest

from poise_hpc import config, site
from poise_hpc.types import UsageError


@pytest.mark.parametrize(("data", "message"), [
    ({"rollout": {"grup_size": 8}}, "unknown key 'rollout.grup_size'; did you mean 'rollout.group_size'?"),
    ({"trian": {}}, "unknown key 'trian'; did you mean 'train'?"),
    ({"rollout": {"group_size": 1}}, "'rollout.group_size'.*greater than or equal to 2, got 1"),
    ({"train": {"steps": 0}}, "'train.steps'.*greater than or equal to 1, got 0"),
    ({"train": {"steps": "many"}}, "'train.steps'.*integer, got 'many'"),
    ({"train": {"steps": 10.5}}, "'train.steps'.*integer"),
    ({"train": {"learning_rate": -1.0}}, "'train.learning_rate'.*greater than 0"),
    ({"train": {"zero_stage": 4}}, "'train.zero_stage'"),
    ({"train": {"deepspeed": {"zero_optimization": {"stage": 2}}}}, "'train.deepspeed': 'stage' is generated: set train.zero_stage instead"),
    ({"train": {"deepspeed": {"bf16": {"enabled": True}}}}, "'bf16' is generated: set model.dtype instead"),
    ({"rollout": {"prompts": 15}}, r"rollout.prompts \(15\) must be a multiple of train.minibatches \(2\)"),
    ({"evaluate": {"at": [0.5]}}, "'at' must rise and end with 1.0"),
    ({"evaluate": {"at": [0.33333331, 0.33333333, 1.0]}}, "'at' holds points that are one to six digits"),
    ({"evaluate": {"benchmarks": {"a": {"split": "easy", "problems": 4, "samples": 2, "metrics": {"pass@8": 1.0}}}}}, "needs 8 samples"),
    ({"evaluate": {"benchmarks": {"a": {"split": "easy", "problems": 4, "samples": 2, "metrics": {"acc@1": 0.5}}}}}, "must add up to 1"),
    ({"search": {"train_seeds": [1, 1]}}, "all distinct"),
    ({"search": {"train_seeds": []}}, "at least one seed"),
    ({"model": {"source": "path"}}, "'path' is needed"),
    ({"train": {"learning_rate": float("inf")}}, "'train.learning_rate': a finite number below 1e.15 was wanted, got inf"),
    ({"task": {"options": {"a": [1.0, float("nan")]}}}, "'task.options.a.1': a finite number .* got nan"),
    ({"jobs": {"train_min": 1e308}}, "'jobs.train_min': a finite number .* got 1e.308"),
    ({"rollout": {"weight_cap": 10**400}}, "'rollout.weight_cap': a finite number .* got 1000"),
    ({"train": {"steps": 10**22}}, "'train.steps': a finite number below 1e.15 was wanted, got 10000000000000000000000"),
    ({"train": {"steps": 10**9}}, "'train.steps'.*less than or equal to 10000000"),
    ({"jobs": {"memory_gb": 1e9}}, "'jobs.memory_gb'.*less than or equal to 1000000"),
    ({"search": {"seed": -1}}, "'search.seed'.*greater than or equal to 0"),
    ({"search": {"train_seeds": [2**31]}}, "'search.train_seeds.0'.*less than 2147483648"),
    ({"evaluate": {"benchmarks": {"a": {"split": "easy", "problems": 10**8, "samples": 2, "metrics": {"acc@1": 1.0}}}}},
     "'evaluate.benchmarks.a.problems'.*less than or equal to 1000000"),
    *(({"evaluate": {"benchmarks": {name: {"split": "easy", "problems": 4, "samples": 2, "metrics": {"acc@1": 1.0}}}}},
       "can be no benchmark's name") for name in ("a/b ../x", "..", ".a", "", "a\n", "a@1", "x" * 33)),
    ([1, 2], "a mapping of sections was wanted, got list"),
])
def test_bad_values_are_named(data, message):
    with pytest.raises(UsageError, match=message):
        config.parse(data)


def test_yaml_errors_and_missing_files(tmp_path):
    with pytest.raises(UsageError, match="none.yaml: no such file$"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="is a folder; a YAML file was wanted"):
        config.load(tmp_path)
    (tmp_path / "over.yaml").write_text("base: none.yaml")
    with pytest.raises(UsageError, match="none.yaml: no such file; .*over.yaml names it as its 'base'"):
        config.load(tmp_path / "over.yaml")
    bad = tmp_path / "bad name.yaml"
    for text in ("train: [", "train: {steps: 2020-13-45}"):
        bad.write_text(text)
        with pytest.raises(UsageError, match="not valid YAML"):
            config.load(bad)


def test_a_fault_is_shown_where_it_stands(tmp_path):
    (tmp_path / "a.yaml").write_text("train:\n\tsteps: 3\n")
    with pytest.raises(UsageError, match=r"found character '\\t' that cannot start any token\n.*line 2, column 1:\n.*steps: 3"):
        config.load(tmp_path / "a.yaml")


def test_a_key_given_twice_is_refused_with_both_lines(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train:\n  steps: 10\n  epochs: 1\n\n  'steps': 20\n")
    with pytest.raises(UsageError, match="a.yaml: not valid YAML: the key 'steps' stands there twice, in lines 2 and 5. Keep one"):
        config.load(path)
    path.write_text("train: &t {steps: 10}\nrollout: {prompts: 8}\n")  # the same key elsewhere, anchors and merges are fine
    assert config.load(path).train.steps == 10
    path.write_text("train: {<<: {steps: 10, epochs: 1}, steps: 20}\n")
    assert (config.load(path).train.steps, config.load(path).train.epochs) == (20, 1)


def test_base_is_overlaid_section_by_section(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {steps: 10, epochs: 3}\nsearch: {train_seeds: [5]}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntrain: {steps: 20}\n")
    loaded = config.load(tmp_path / "b.yaml")
    assert (loaded.train.steps, loaded.train.epochs, loaded.search.train_seeds) == (20, 3, (5,))


def test_of_several_bases_the_later_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {steps: 10, epochs: 3, deepspeed: {x: {a: 1, b: 1}}}\n")
    (tmp_path / "b.yaml").write_text("train: {steps: 20, deepspeed: {x: {b: 2}}}\n")
    (tmp_path / "c.yaml").write_text("base: [a.yaml, b.yaml]\ntrain: {minibatches: 4}\n")
    train = config.load(tmp_path / "c.yaml").train
    assert (train.steps, train.epochs, train.minibatches, train.deepspeed) == (20, 3, 4, {"x": {"a": 1, "b": 2}})


def test_a_base_that_leads_back_to_itself(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UsageError, match="leads back to itself"):
        config.load(tmp_path / "a.yaml")


def test_the_resolved_config_parses_to_itself(tmp_path):
    from poise_hpc.campaign import dump_yaml

    frozen = tmp_path / "config.yaml"
    frozen.write_text(dump_yaml(config.Config()))
    assert config.load(frozen) == config.Config()


CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_survives_freezing(path):
    loaded = config.load(path)
    assert config.parse(loaded.dump()) == loaded


@pytest.mark.parametrize("path", sorted((CONFIGS / "sites").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_site_loads_and_renders(path):
    loaded = site.load(path)
    assert site.parse(loaded.model_dump(mode="json")) == loaded
    for stage in site.Stages.model_fields if loaded.scheduler == "slurm" else ():
        assert site.sbatch_parameters(loaded, stage)["time"] == site.use(loaded, stage).time_min
