"""Rollouts with vLLM, inside the training process: one engine per rank, or one per `tensor_parallel` ranks of a node.

A step: `load_weights` wakes the engine, copies the weights from the trainer's module parameter by parameter, without disk
or a second process, and compares the log-probs of fixed sequences with the trainer's; `generate`; `rest` gives the memory
back for the update. Log-probs are those the tokens were drawn at (`logprobs_mode`). Sample j of a prompt is drawn with a
seed of its own, a pure function of (key, j): repeatable, but other random numbers than the transformers engine's.

vLLM holds state per process, so there is one engine in a process: `engine` gives it out again.

Not covered: pipeline parallelism, quantized or LoRA weights, several engines in one process.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..types import CandidateError, PoiseError
from .base import RolloutEngine, Rollouts, stream_key
from .hf_engine import finish

Whole = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]  # inside, these parameters hold all their values

PROBE = (4, 24)                                  # sequences, tokens: what is scored after each sync
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}  # mean |difference| of the probe's log-probs, trainer against vLLM, in nats
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",       # the model is in this process, where its weights can be written
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",       # bound to "its" cores, every job of a node would take the same ones
    "VLLM_RPC_BASE_PATH": "/dev/shm",            # of sockets, whose path may have 107 characters: an attempt's own folder has more
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}

_engine: tuple[dict[str, Any], VLLMEngine] | None = None


def engine(folder: Path, dtype: str, tensor_parallel: int = 1, options: dict[str, Any] | None = None, share: float = 0.9) -> VLLMEngine:
    """This process's engine. `folder` is read when it is made; later callers, whose settings must be the same, get it
    with the weights that it has. `share` of the GPU's memory is vLLM's, also that of the first caller."""
    global _engine
    settings = {"dtype": dtype, "tensor_parallel": tensor_parallel, "options": options or {}}
    if _engine is None:
        _engine = settings, VLLMEngine(folder, **settings, share=share)
    elif _engine[0] != settings:
        raise PoiseError(f"this process has a vLLM engine with {_engine[0]} already; {settings} was wanted: one job cannot have both")
    return _engine[1]


class VLLMEngine(RolloutEngine):
    exact = False   # its kernels round differently from the trainer's
    copies = True

    def __init__(self, folder: Path, dtype: str, tensor_parallel: int = 1, options: dict[str, Any] | None = None, share: float = 0.9):
        vllm = _import()
        self.parallel, self.collective, self.dtype = tensor_parallel, tensor_parallel > 1, dtype
        # Memory that rests can be handed back on CUDA only.
        self.can_rest, self.resting = torch.cuda.is_available(), False
        self._before: tuple[Tensor, Tensor] | None = None  # the probe's log-probs at the last sync: trainer's, ours
        self.llm = vllm.LLM(**arguments(folder, dtype, tensor_parallel, options or {}, share))
        self._sampling = vllm.SamplingParams
        self.limit = self.llm.llm_engine.model_config.max_model_len

    # --- weights

    def load_weights(self, model: nn.Module, whole: Whole = lambda parameters: nullcontext()) -> None:
        """Copy `model`'s weights and prove it. `whole` gathers a parameter that is spread over ranks; it is a collective
        then, and so is this call."""
        if self.resting:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": each_weight(model, whole)})
        if self.resting:
            self.llm.wake_up(tags=["kv_cache"])
            self.resting = False
        self.llm.reset_prefix_cache()  # the old weights' keys and values
        self.check(model)

    def check(self, model: nn.Module) -> None:
        """Both score the same sequences; PoiseError if they disagree, or if ours did not move when the trainer's did."""
        sequences = probe(model.config.vocab_size, min(PROBE[1], self.limit - 1))
        theirs, ours = plain_scores(model, sequences), self.scores(sequences)
        if not torch.isfinite(theirs).all():
            raise CandidateError("nonfinite-weights", "the policy's log-probs are NaN or infinite: training has broken the weights")
        if self._before is not None and ours.equal(self._before[1]) and (theirs != self._before[0]).float().mean() > 0.25:
            raise PoiseError("vLLM still samples from the old weights: after the weight sync its log-probs of fixed sequences are bit by bit "
                             "those of before, while the trainer's have changed. On a CPU: is oneDNN's weight prepacking off?")
        gap = float((ours - theirs).abs().mean())
        if not gap <= TOLERANCE[self.dtype]:
            raise PoiseError(f"vLLM and the trainer disagree after the weight sync: log-probs of fixed sequences differ by {gap:.3g} on average "
                             f"(limit {TOLERANCE[self.dtype]:g} in {self.dtype}). Not all weights arrived, or vLLM computes this model "
                             "otherwise than transformers: `rollout.engine: hf` avoids it")
        self._before = theirs, ours

    def scores(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """(tokens,) log p(y_t | y_<t) of every token but each sequence's first, at temperature 1."""
        one = self._sampling(max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": list(s)} for s in sequences], one, use_tqdm=False)
        return torch.tensor([logp for out in outputs for logp in out.prompt_logprobs.logprobs])

    def rest(self) -> None:
        """Level 2 discards the weights, too: `load_weights` writes every one of them before the next use."""
        if self.can_rest and not self.resting:
            self.llm.sleep(level=2)
            self.resting = True

    # --- sampling

    def generate(self, prompts: Sequence[Sequence[int]], n: int, *, temperature: float, max_new_tokens: int,
                 eos_id: int, pad_id: int, keys: Sequence[int], first: int = 0) -> Rollouts:
        if len(prompts) != len(keys) or not prompts and not self.collective:
            raise ValueError(f"{len(prompts)} prompts and {len(keys)} keys: one key per prompt, and at least one, were wanted")
        if (longest := max(map(len, prompts), default=1)) + max_new_tokens > self.limit:
            raise PoiseError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed vLLM's {self.limit} positions: the model's, "
                             "or rollout.vllm: {max_model_len: ...}")
        if self.resting:
            raise RuntimeError("generate before load_weights: the engine rests, and has no weights")
        every, mine = self._shared(list(zip(prompts, keys, strict=True)))
        # A repeated call then computes what the first one did, to the bit. Prompts recur within a call: a group shares its.
        self.llm.reset_prefix_cache()
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt, _ in every for _ in range(n)],
            [self._sampling(temperature=temperature, max_tokens=max_new_tokens, seed=stream_key(key, j) >> 1, stop_token_ids=[eos_id],
                            ignore_eos=True,  # the model's own list of end tokens; the task's one counts
                            logprobs=0, flat_logprobs=True, detokenize=False) for _, key in every for j in range(first, first + n)],
            use_tqdm=False)
        rows = [out.outputs[0] for out in outputs[mine.start * n:mine.stop * n]]
        if not rows:
            empty = torch.zeros(0, dtype=torch.long)
            return Rollouts(empty[:, None], torch.zeros(0, 1), empty, empty.bool())
        tokens, logp = torch.full((len(rows), max_new_tokens), eos_id), torch.zeros(len(rows), max_new_tokens)
        for i, row in enumerate(rows):
            tokens[i, :len(row.token_ids)] = torch.tensor(row.token_ids)
            logp[i, :len(row.token_ids)] = torch.tensor(row.logprobs.logprobs)
        return finish(tokens, logp, eos_id, pad_id)

    def _shared(self, mine: list[Any]) -> tuple[list[Any], slice]:
        """All requests of the ranks that compute together, the same list on each, and where this rank's are in it."""
        if self.parallel == 1:
            return mine, slice(0, len(mine))
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        parts: list[Any] = [None] * self.parallel
        torch.distributed.all_gather_object(parts, mine, group=group.cpu_group)
        start = sum(len(part) for part in parts[:group.rank_in_group])
        return [request for part in parts for request in part], slice(start, start + len(mine))


def _import() -> Any:
    """vLLM, set up for what we do with it."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    try:
        import vllm
    except ImportError as error:
        raise PoiseError(f"the vLLM engine is not available here ({error}): pip install 'poise_hpc[vllm]', or `rollout.engine: hf`") from None
    if not torch.cuda.is_available():
        from vllm import _custom_ops
        from vllm.platforms import current_platform

        # oneDNN repacks float32 weights at load time, out of reach of every later update.
        _custom_ops._supports_onednn = False
        # One small function of the sampler would be compiled by g++ for a minute.
        type(current_platform).simple_compile_backend = "eager"
    return vllm


def arguments(folder: Path, dtype: str, tensor_parallel: int, options: dict[str, Any], share: float) -> dict[str, Any]:
    """Of `vllm.LLM`. `options` come from `rollout.vllm`; config.py keeps them off what is fixed here."""
    cuda, joined = torch.cuda.is_available(), torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    memory = {"gpu_memory_utilization": share} if cuda else {"kv_cache_memory_bytes": 256 << 20}
    return memory | {"enforce_eager": not cuda} | options | {
        "model": str(folder), "dtype": dtype, "tensor_parallel_size": tensor_parallel, "seed": 0,
        # Ranks of one job: each drives its own engine, within the process group that is there already.
        "distributed_executor_backend": "external_launcher" if joined else "uni",
        "skip_tokenizer_init": True, "logprobs_mode": "processed_logprobs", "enable_prefix_caching": True, "enable_sleep_mode": cuda}


def each_weight(model: nn.Module, whole: Whole) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of a transformers model, one whole parameter at a time; tied ones once."""
    for name, parameter in model.named_parameters():
        with whole([parameter]):
            yield name, parameter.detach()


def probe(vocabulary: int, length: int) -> list[list[int]]:
    """Fixed, arbitrary sequences of known tokens."""
    return [[stream_key("probe", i, t) % vocabulary for t in range(length)] for i in range(PROBE[0])]


@torch.no_grad()
def plain_scores(model: nn.Module, sequences: list[list[int]]) -> Tensor:
    """(tokens,) as `VLLMEngine.scores`, by one plain forward of the trainer's model."""
    x = torch.tensor(sequences, device=next(model.parameters()).device)
    logp = torch.log_softmax(model(input_ids=x, use_cache=False).logits[:, :-1].float(), -1)
    return logp.gather(2, x[:, 1:, None]).flatten().cpu()
