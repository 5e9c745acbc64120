"""What a model is, as far as memory and arithmetic care: read from its config.json, without its weights."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..types import UsageError


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal LM. Counts are numbers, not bytes."""

    architecture: str
    parameters: int     # N, all of them; tied ones once
    looked_up: int      # of them: rows of tables that are read, not multiplied with (an untied input embedding, positions)
    layers: int
    hidden: int         # h
    intermediate: int   # I, of the feed-forward part
    heads: int
    kv_heads: int       # heads of keys and values; fewer with grouped-query attention
    head_dim: int       # d
    vocabulary: int     # V
    gated: bool         # RMSNorm and a gated feed-forward part (Llama, Qwen2), or LayerNorm and GELU (GPT-2)

    @property
    def width(self) -> int:
        """Of the queries of all heads together; the keys' and values' once they are repeated for their heads."""
        return self.heads * self.head_dim

    @property
    def kv_per_token(self) -> int:
        """Numbers that a cache keeps of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def read(folder: Path) -> Shape:
    """Of a Hugging Face folder, or of a config.json alone."""
    from transformers import AutoConfig

    path = folder / "config.json" if folder.is_dir() else folder
    if not path.is_file():
        raise UsageError(f"{folder} is no Hugging Face model folder (it has no config.json): give model.path, or --model with a folder or a "
                         "config.json; weights are not needed")
    try:
        config = AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, OSError) as error:
        raise UsageError(f"{path} cannot be read as a transformers config: {str(error).splitlines()[0]}") from None
    return of_config(config)


def of_config(config: Any) -> Shape:
    """Of a transformers config: the model is built on the meta device, which holds shapes and no numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UsageError(f"no causal language model: {str(error).splitlines()[0]}") from None
    return of_model(model)


def of_model(model: Any) -> Shape:
    from torch import nn

    config = model.config.get_text_config()
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        tables.pop(id(head.weight), None)  # tied: it is multiplied with, too
    hidden, heads = config.hidden_size, config.num_attention_heads
    names = [name for name, _ in model.named_parameters()]
    return Shape(
        architecture=type(model).__name__, parameters=sum(p.numel() for p in model.parameters()), looked_up=sum(tables.values()),
        layers=config.num_hidden_layers, hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden,
        heads=heads, kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads, vocabulary=config.vocab_size,
        gated=any("gate" in name for name in names))


def of_campaign(config: Config, model: Path | None = None) -> Shape:
    """Of the model that a campaign with this config starts from; `model` (folder or config.json) stands in for it."""
    if model is not None:
        return read(model)
    if config.model.path is not None:
        return read(Path(config.model.path))
    from ..tasks.base import load_task
    from ..tasks.chain import Chain

    task = load_task(config)
    if not isinstance(task, Chain):
        raise UsageError(f"task {task.name!r} makes its own model, whose size is known once it is made: give --model with its config.json")
    import torch

    from ..tasks.chain_model import new_model

    with torch.device("meta"):
        return of_model(new_model(task.model_options))
