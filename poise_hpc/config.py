"""The campaign's configuration: typed, strict (section.py), every default in this file, the agent's in agent_config.py. Units
stand in the names. `dump` writes out every default, so that a campaign's frozen `config.yaml` holds the whole truth.
"""
from __future__ import annotations

import re
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from . import settings
from .agent_config import Agent
from .section import Fraction, Positive, Section, Seed, Tuple, validate

NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,31}"  # becomes part of file names, and 32 bytes in a record


class Task(Section):
    name: str = "chain"                 # a module of poise_hpc.tasks, or "package.module:Class"
    options: dict[str, Any] = {}        # the task's own settings, checked by the task


class Model(Section):
    source: Literal["task", "path"] = "task"  # the task's own warm-started model, or a Hugging Face folder
    path: str | None = None                   # source "path": the folder
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model
    options: dict[str, Any] = {}              # for source "task": size and warm-start recipe, checked by the task

    @model_validator(mode="after")
    def _path(self) -> Model:
        if (self.source == "path") != (self.path is not None):
            raise ValueError("'path' is needed with source 'path', and only then")
        return self


# Arguments of vllm.LLM on which the meaning of the results rests.
VLLM_FIXED = frozenset({"model", "dtype", "tensor_parallel_size", "seed", "distributed_executor_backend", "skip_tokenizer_init",
                        "logprobs_mode", "enable_prefix_caching", "enable_sleep_mode"})


class Rollout(Section):
    engine: Literal["hf", "vllm"] = "hf"  # that samples: the trained model itself, or vLLM (docs/VLLM.md)
    prompts: Positive = 16              # per training step, over all ranks
    group_size: Annotated[int, Field(ge=2)] = 8          # completions of a prompt
    temperature: Annotated[float, Field(gt=0)] = 1.0     # of sampling; log-probabilities are taken at it, too
    max_rounds: Positive = 1            # dynamic sampling: generation rounds a step at most (1: dropped groups are not replaced)
    weight_cap: Annotated[float, Field(ge=1)] = 2.0  # truncated importance weight, sampler against trainer
    tensor_parallel: Positive = 1       # engine vllm: ranks of one node that hold one sampler together
    vllm: dict[str, Any] = {}           # engine vllm: further arguments of vllm.LLM, e.g. gpu_memory_utilization

    @field_validator("vllm")
    @classmethod
    def _vllm(cls, value: dict[str, Any]) -> dict[str, Any]:
        if fixed := sorted(value.keys() & VLLM_FIXED):
            raise ValueError(f"{', '.join(fixed)} cannot be given: the engine sets it")
        return value


GENERATED = {"stage": "train.zero_stage", "bf16": "model.dtype", "fp16": "model.dtype", "gradient_clipping": "train.gradient_clip",
             "optimizer": "train.learning_rate, betas and weight_decay"}  # keys of DeepSpeed's config -> ours


class Train(Section):
    steps: Annotated[int, Field(ge=1, le=10**7)] = 48  # each of `rollout.prompts` prompts
    epochs: Positive = 2                # passes over each rollout batch
    minibatches: Positive = 2           # optimizer steps per pass
    microbatch_tokens: Positive = 65536  # prompt + completion tokens in one forward, at most (one completion always fits)
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4  # of AdamW, constant after the warm-up
    warmup_steps: Annotated[int, Field(ge=0)] = 0        # training steps over which it rises
    betas: Annotated[tuple[float, float], Tuple] = (0.9, 0.99)  # of AdamW
    weight_decay: Annotated[float, Field(ge=0)] = 0.0    # of AdamW
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0   # largest norm of the gradient
    zero_stage: Literal[0, 1, 2, 3] = 0  # of DeepSpeed: what is divided over the ranks
    deepspeed: dict[str, Any] = {}      # merged over the generated DeepSpeed config
    gradient_checkpointing: bool = False  # layers keep their inputs only: a third more arithmetic, far less memory
    checkpoint_every: Positive = 8      # steps
    share_prompt: bool = True           # compute a prompt once per group in the update
    reward: Literal["task", "random"] = "task"  # random: a coin for each completion, the control that asks what training alone does
    skip_zero_advantage: bool = True    # where the algorithm promises zero_advantage_zero_loss

    @field_validator("deepspeed")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        zero = value.get("zero_optimization")
        given = {*value, *(zero if isinstance(zero, dict) else ())}
        for key, instead in GENERATED.items():
            if key in given:
                raise ValueError(f"{key!r} is generated: set {instead} instead")
        return value


class Benchmark(Section):
    split: str                          # of the task
    problems: Annotated[int, Field(ge=1, le=10**6)]   # of the split
    samples: Annotated[int, Field(ge=1, le=10**5)]    # completions of a problem
    temperature: Annotated[float, Field(ge=0)] = 1.0  # 0: greedy
    metrics: dict[str, float]           # "acc@1", "avg@N", "pass@K" -> weight in Overall

    @model_validator(mode="after")
    def _metrics(self) -> Benchmark:
        for name, weight in self.metrics.items():
            kind, _, k = name.partition("@")
            if kind not in ("acc", "avg", "pass") or not k.isdigit() or int(k) < 1:
                raise ValueError(f"metric {name!r} is not acc@1, avg@N or pass@K")
            if int(k) > self.samples:
                raise ValueError(f"metric {name!r} needs {k} samples a problem, 'samples' is {self.samples}")
            if weight < 0:
                raise ValueError(f"weight of {name!r} is negative")
        return self


class Evaluate(Section):
    at: tuple[Fraction, ...] = (0.25, 0.5, 1.0)  # fractions of the training steps
    purpose: Literal["selection", "confirmation"] = "selection"  # which of the task's prompts
    engine: Literal["hf", "vllm"] | None = None  # that samples; None: rollout.engine
    score: Literal["curve", "final"] = "curve"   # Overall of all points averaged, or of the last
    chunk_completions: Positive = 1024  # of a benchmark that are computed together, at most: bounds memory, and what a kill loses
    benchmarks: dict[str, Benchmark] = {         # name -> what is asked; the weights of all metrics add up to 1
        "easy": Benchmark(split="easy", problems=96, samples=4, metrics={"acc@1": 0.2}),
        "medium": Benchmark(split="medium", problems=96, samples=4, metrics={"acc@1": 0.3}),
        "hard": Benchmark(split="hard", problems=48, samples=32, metrics={"acc@1": 0.3, "pass@32": 0.2}),
    }

    @field_validator("at", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(float(v) if isinstance(v, int) else v for v in value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if list(self.at) != sorted(set(self.at)) or not self.at or self.at[-1] != 1.0:
            raise ValueError(f"'at' must rise and end with 1.0, got {list(self.at)}")
        if len({f"{at:g}" for at in self.at}) < len(self.at):  # so they name folders and elements
            raise ValueError(f"'at' holds points that are one to six digits: {list(self.at)}")
        if wrong := [name for name in self.benchmarks if not re.fullmatch(NAME, name)]:
            raise ValueError(f"{wrong[0]!r} can be no benchmark's name: up to 32 of letters, digits, '_', '-' and '.', not '.' first, were wanted")
        total = sum(w for b in self.benchmarks.values() for w in b.metrics.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the metrics' weights must add up to 1, they give {total:g}")
        return self


class Acquisition(Section):
    pareto: float = 1.0                 # weight of U_pareto; docs/SELECTION.md
    performance: float = 1.0            # weight of U_perf
    diversity: float = 0.5              # weight of U_div
    descendant: float = 1.0             # weight of the GP-UCB term
    ucb_beta: float = 1.0               # standard deviations of optimism
    discount: Fraction = 0.7            # per generation, of a descendant's gain
    top_k: Positive = 3                 # descendants that count
    pool: Positive = 256                # entries compared at most


class References(Section):
    """Entries that a proposal is shown besides the parent, by tier; what a tier cannot fill, the others do. docs/SELECTION.md."""

    pareto: Annotated[int, Field(ge=0)] = 2         # best on some benchmark
    complementary: Annotated[int, Field(ge=0)] = 1  # better than the parent where it is weak
    exploratory: Annotated[int, Field(ge=0)] = 1    # unlike the parent


class Search(Section):
    seed: Seed = 0                      # of proposals and choices of parents; training has train_seeds
    proposer: Literal["offline", "llm"] = "offline"  # rules and chance, or a language model (docs/AGENT.md)
    baseline: str = "grpo"              # a seed algorithm, or a package folder: what everything is paired with
    candidates: Annotated[int, Field(ge=0)] = 7  # that the proposer makes; the baseline and added ones come on top
    train_seeds: Annotated[tuple[Seed, ...], Tuple] = (0, 1)  # paired: every candidate trains on the same ones
    window: Positive | None = None      # candidates in flight at most; None: 4, if asynchronous what keeps the slots busy
    asynchronous: bool = False          # False: candidate k waits for 1 .. k - window and sees exactly those, on any machine;
                                        # True: it waits for nobody and sees what is archived then, so the order of jobs counts
    per_parent: Positive = 3            # candidates in a row from one chosen parent; the paper has 63 from 21 choices
    strategy: Literal["poise", "greedy", "random", "islands"] = "poise"  # how parents are chosen
    acquisition: Acquisition = Acquisition()
    references: References = References()
    directive: str | None = None        # a researcher's sentence

    @field_validator("train_seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"needs at least one seed, all distinct, got {list(value)}")
        return value

    def width(self, slots: int) -> int:
        """Candidates in flight at most, where `slots` jobs run at once. Half as many again as fill them: some are being checked or reflected on."""
        filling = ceil(1.5 * slots / len(self.train_seeds)) if self.asynchronous else 0
        return self.window or max(4, filling)


class Rung(Section):
    """A point of the training that a candidate must pass to be trained further. Rules: screening.py, docs/SCREENING.md."""

    at: Fraction                        # a point of evaluate.at before the last
    seeds: Positive = 1                 # of search.train_seeds, the first ones: trained so far at this rung
    rule: Literal["below_start", "behind"] = "below_start"            # worse than the untrained policy, or than the baseline
    margin: Annotated[float, Field(ge=0)] = 0.0                # points
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.8    # "behind": of the one-sided bound; 0.5 is the difference itself

    @model_validator(mode="after")
    def _interval(self) -> Rung:
        if self.rule == "behind" and self.seeds == 1 and self.confidence > 0.5:
            raise ValueError("one seed gives no interval: 'behind' needs at least 2 seeds, or confidence 0.5")
        return self


class Screen(Section):
    """What a candidate passes before its training is whole; empty: nothing. See docs/SCREENING.md."""

    rungs: Annotated[tuple[Rung, ...], Tuple] = ()  # in the order of the training


class Budget(Section):
    """None: without limit. Reached: nothing new is proposed, what runs is finished."""

    wall_clock_min: Annotated[float, Field(gt=0)] | None = None  # since creation; ends proposing only, as the others do
    run_hours: Annotated[float, Field(gt=0)] | None = None   # job run time x ranks, all attempts


class Jobs(Section):
    ranks: Positive = 1                 # training processes of one job
    threads: Positive = 1               # OMP threads of one rank
    max_parallel: Positive = 2          # jobs in flight (local executor)
    check_min: Annotated[float, Field(gt=0)] = 5.0      # time limits, run time only: of a check
    train_min: Annotated[float, Field(gt=0)] = 60.0     # of one seed's training
    evaluate_min: Annotated[float, Field(gt=0)] = 30.0  # of an evaluation
    prepare_min: Annotated[float, Field(gt=0)] = 30.0   # of the job that makes the start model ready
    memory_gb: Annotated[float, Field(gt=0, le=1e6)] = 8.0     # per rank
    infra_retries: Annotated[int, Field(ge=0)] = 3      # per stage and seed; then HELD
    retry_wait_s: Annotated[float, Field(ge=0)] = 60.0  # before the second repeat, doubling; the first is at once
    heartbeat_s: Annotated[float, Field(gt=0)] = 5.0    # between two signs of life of a job
    silent_min: Annotated[float, Field(gt=0)] = 10.0    # no progress for so long: the watchdog ends the job
    # who evaluates: the training job itself (start-up costs more than a small model's evaluation), one job per training
    # seed, one per (point, benchmark) of it, or one per chunk of evaluate.chunk_completions of that. The scores are the same.
    evaluate_by: Literal["train", "seed", "element", "chunk"] = "train"
    isolation: Literal["auto", "none"] = "auto"         # the strongest the kernel allows, or none


class Config(Section):
    task: Task = Task()
    model: Model = Model()
    rollout: Rollout = Rollout()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    search: Search = Search()
    screen: Screen = Screen()
    agent: Agent = Agent()
    budget: Budget = Budget()
    jobs: Jobs = Jobs()

    @model_validator(mode="after")
    def _llm(self) -> Config:
        if self.search.proposer == "llm" and "default" not in self.agent.models:
            raise ValueError("search.proposer 'llm' needs agent.models.default: [model, fallback, ...]")
        return self

    @model_validator(mode="after")
    def _batch(self) -> Config:
        if self.rollout.prompts % self.train.minibatches:
            raise ValueError(f"rollout.prompts ({self.rollout.prompts}) must be a multiple of train.minibatches "
                             f"({self.train.minibatches})")
        if self.rollout.prompts % self.jobs.ranks:
            raise ValueError(f"rollout.prompts ({self.rollout.prompts}) must be a multiple of jobs.ranks ({self.jobs.ranks})")
        return self

    @model_validator(mode="after")
    def _rungs(self) -> Config:
        rungs, points = self.screen.rungs, self.evaluate.at[:-1]
        if wrong := [r.at for r in rungs if r.at not in points]:
            raise ValueError(f"screen.rungs: {wrong[0]:g} is no point of evaluate.at before the last; those are {[*points]}")
        if wrong := [r.at for r in rungs if round(r.at * self.train.steps) >= self.train.steps]:
            raise ValueError(f"screen.rungs: {wrong[0]:g} of {self.train.steps} training steps is all of them")
        if wrong := [r.seeds for r in rungs if r.seeds > len(self.search.train_seeds)]:
            raise ValueError(f"screen.rungs: {wrong[0]} seeds, but search.train_seeds has {len(self.search.train_seeds)}")
        if any(a.at > b.at or a.seeds > b.seeds for a, b in zip(rungs, rungs[1:])):
            raise ValueError("screen.rungs: neither 'at' nor 'seeds' may fall from one rung to the next")
        return self

    @property
    def evaluation_engine(self) -> str:
        return self.evaluate.engine or self.rollout.engine

    @model_validator(mode="after")
    def _engines(self) -> Config:
        parallel = self.rollout.tensor_parallel
        if parallel > 1 and self.rollout.engine != "vllm":
            raise ValueError(f"rollout.tensor_parallel {parallel} needs rollout.engine vllm")
        if self.jobs.ranks % parallel:
            raise ValueError(f"jobs.ranks ({self.jobs.ranks}) must be a multiple of rollout.tensor_parallel ({parallel})")
        # Rank 0 evaluates alone then, with the engine that it has sampled with; a vLLM engine is made by all ranks together.
        if (self.evaluation_engine == "vllm" and self.jobs.evaluate_by == "train" and self.jobs.ranks > 1
                and (parallel > 1 or self.rollout.engine != "vllm")):
            raise ValueError("evaluation on vLLM within the training job needs rollout.engine vllm with tensor_parallel 1; give "
                             "jobs.evaluate_by: seed (or element, or chunk), or evaluate.engine: hf")
        return self

    def dump(self) -> dict[str, Any]:
        """Every value, defaults included, JSON-able."""
        return self.model_dump(mode="json")


def parse(data: Any, where: str = "config") -> Config:
    """Config from plain data; UsageError naming the key otherwise."""
    return validate(Config, data, where)


def load(path: Path) -> Config:
    """Config from a YAML file. What its key `base` names (a file, or a list of files, relative to it) is read first and overlaid."""
    return parse(settings.read(path), str(path))
