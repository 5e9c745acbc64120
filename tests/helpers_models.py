"""Tiny random-weight models of the stock classes, for tests of rollouts and training."""
from __future__ import annotations

import torch


def tiny_model(kind: str, vocab: int = 16, hidden: int = 16, layers: int = 2, seed: int = 0) -> torch.nn.Module:
    """A random causal LM ("gpt2", "llama" or "qwen2") with clearly non-uniform predictions."""
    import transformers as tf

    torch.manual_seed(seed)
    if kind == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=vocab, n_embd=hidden, n_layer=layers, n_head=4, n_positions=64,
                                                 bos_token_id=2, eos_token_id=1, pad_token_id=0))
    else:
        config, model_class = {"llama": (tf.LlamaConfig, tf.LlamaForCausalLM), "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM)}[kind]
        model = model_class(config(vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                                   num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                                   bos_token_id=2, eos_token_id=1, pad_token_id=0))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn_like(p) * 0.3)
    return model.eval()
