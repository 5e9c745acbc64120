"""Where vLLM is not installed: said before anything is submitted, and what is installed is what the engine was written for."""
from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers_lab import tiny
from helpers_vllm import needs_vllm

from poise_hpc import config, files
from poise_hpc.cli import main
from poise_hpc.doctor import here
from poise_hpc.rollout.base import check_installed
from poise_hpc.settings import overlay
from poise_hpc.types import UsageError


@pytest.fixture
def without(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else real(name, *a))


def wants(**sections: dict) -> config.Config:
    return config.parse(overlay(tiny().dump(), sections))


@pytest.mark.parametrize("sections", [{"rollout": {"engine": "vllm"}}, {"evaluate": {"engine": "vllm"}}])
def test_a_missing_vllm_is_named_with_its_extra(without, sections):
    with pytest.raises(UsageError, match=r"poise_hpc\[vllm\]"):
        check_installed(wants(**sections))
    check_installed(wants())


def test_run_refuses_before_a_campaign_is_there(without, tmp_path):
    (tmp_path / "c.yaml").write_text(files.dumps(wants(rollout={"engine": "vllm"}).dump()))
    done = CliRunner().invoke(main, ["run", str(tmp_path / "campaign"), "--config", str(tmp_path / "c.yaml")])
    assert done.exit_code != 0 and not (tmp_path / "campaign").exists()
    assert "poise_hpc[vllm]" in done.output + str(done.exception)


def test_doctor_misses_what_the_config_wants(monkeypatch):
    monkeypatch.setattr("poise_hpc.campaign.versions", lambda: {"torch": "2", "vllm": None})
    assert [f.level for f in here.machine(wants())] == ["ok"]
    finding, = here.machine(wants(rollout={"engine": "vllm"}))
    assert finding.level == "fail" and "vllm" in finding.text and "poise_hpc[vllm]" in finding.cure


def test_the_engine_that_evaluates_is_the_one_that_trains_unless_told():
    assert [wants(rollout={"engine": a}, evaluate={"engine": b}).evaluation_engine for a in ("hf", "vllm") for b in (None, "hf", "vllm")] \
        == ["hf", "hf", "vllm", "vllm", "hf", "vllm"]


@pytest.mark.parametrize("sections, message", [
    ({"rollout": {"tensor_parallel": 2}}, "needs rollout.engine vllm"),
    ({"rollout": {"engine": "vllm", "tensor_parallel": 2}}, "multiple of rollout.tensor_parallel"),
    ({"rollout": {"engine": "vllm", "tensor_parallel": 2}, "jobs": {"ranks": 2}}, "evaluate_by: seed"),
    ({"evaluate": {"engine": "vllm"}, "jobs": {"ranks": 2}}, "evaluate_by: seed"),
    ({"rollout": {"engine": "vllm", "vllm": {"seed": 1}}}, "seed cannot be given"),
])
def test_settings_that_cannot_be(sections, message):
    with pytest.raises(UsageError, match=message):
        wants(**sections)


def test_settings_that_can_be():
    wants(rollout={"engine": "vllm", "tensor_parallel": 2, "vllm": {"max_model_len": 64}}, jobs={"ranks": 2, "evaluate_by": "seed"})
    wants(rollout={"engine": "vllm"}, jobs={"ranks": 2})


@needs_vllm
def test_the_installed_vllm_takes_what_it_is_given():
    """Signatures that the engine rests on, read without starting anything."""
    import vllm
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.logprobs import FlatLogprobs
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher
    from vllm.v1.worker.gpu_worker import Worker

    from poise_hpc.rollout import vllm_engine

    def parameters(function: object) -> set[str]:
        return set(inspect.signature(function).parameters)

    assert vllm_engine.arguments(Path("m"), "float32", 1, {}, 0.5).keys() <= parameters(EngineArgs) | {"model"}
    assert {"gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len", "enable_sleep_mode"} <= parameters(EngineArgs)
    assert {"temperature", "max_tokens", "seed", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs", "flat_logprobs",
            "detokenize"} <= parameters(vllm.SamplingParams)
    assert {"level"} <= parameters(vllm.LLM.sleep) and {"tags"} <= parameters(vllm.LLM.wake_up)
    assert {"method", "kwargs"} <= parameters(vllm.LLM.collective_rpc) and {"use_tqdm"} <= parameters(vllm.LLM.generate)
    assert callable(vllm.LLM.reset_prefix_cache) and callable(parallel_state.get_tp_group)
    assert hasattr(FlatLogprobs(), "logprobs") and hasattr(Worker, "reload_weights")
    runner = importlib.import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    assert "weights_iterator" in parameters(runner.reload_weights)
    assert "external_launcher" in (ExecutorWithExternalLauncher.__doc__ or "") + inspect.getsource(importlib.import_module("vllm.config.parallel"))
