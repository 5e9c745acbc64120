"""Generated mathematics problems, and a tiny Qwen2 folder with a real tokenizer trained on the spot."""
from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from poise_hpc import data

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def generated(count: int, seed: int, level: int | None = None) -> list[dict[str, Any]]:
    """Distinct sums and products, with answers."""
    rng, rows = random.Random(f"generated {seed}"), {}
    while len(rows) < count:
        a, b, times = rng.randrange(1000), rng.randrange(1000), rng.random() < 0.5
        text = f"What is ${a} {chr(92) + 'times' if times else '+'} {b}$?"
        rows[text] = {"problem": text, "answer": str(a * b if times else a + b)} | ({} if level is None else {"level": f"Level {level}"})
    return list(rows.values())


def parities(count: int, seed: int, level: int | None = None) -> list[dict[str, Any]]:
    """Distinct questions with the answer 0 or 1: who guesses is right half the time."""
    numbers = random.Random(f"parities {seed}").sample(range(100_000), count)
    return [{"problem": f"Is ${a}$ odd?", "answer": str(a % 2)} | ({} if level is None else {"level": f"Level {level}"}) for a in numbers]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problem_sets(folder: Path) -> Path:
    """Sets of the user's own names: "drill" (levels 1 to 5, 20 each), "exam" (12) and "holdout" (10, 4 of them from the exam)."""
    drill = [row for level in range(1, 6) for row in generated(20, level, level)]
    exam = generated(12, 100)
    folder.mkdir(exist_ok=True)
    for name, rows in (("drill", drill), ("exam", exam), ("holdout", exam[:4] + generated(6, 200))):
        data.import_file(name, write_rows(folder / f"{name}.raw.jsonl", rows), folder)
    return folder


def math_options(folder: Path, **change: Any) -> dict[str, Any]:
    return {"data": str(folder), "train": {"set": "drill", "levels": [3, 4, 5], "problems": 50}, "max_new_tokens": 16,
            "splits": {"exam": {"selection": "exam", "confirmation": "holdout"}}, "verifier": "rules"} | change


TEMPLATE = "{problem}\n"  # what a model of `model_folder(taught=...)` was taught with


def model_folder(path: Path, vocab: int = 400, taught: int = 0, problems: Callable[[int, int], list[dict[str, Any]]] = generated) -> Path:
    """Random weights of the Qwen2 architecture; a byte-level BPE tokenizer of the kind Qwen2 has. `taught` steps of
    cross-entropy teach it to box some number after one of `problems`, and to stop."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    corpus = [row["problem"] + " \\boxed{" + row["answer"] + "}" for row in problems(200, 7)]
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(SPECIAL), show_progress=False,
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=bpe.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(taught):
        rows = [tokenizer(TEMPLATE.format(**row) + "\\boxed{" + row["answer"] + "}<|endoftext|>")["input_ids"] for row in problems(16, 1000 + step)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return path
