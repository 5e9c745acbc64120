"""The wire protocol against servers that others wrote, with a tiny random model: `transformers serve`, and vLLM's as
slurm/vllm-server.sbatch starts it (`vllm serve` fails in the CPU build)."""
from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from poise_hpc.agent_config import Agent
from poise_hpc.llm import Client
from poise_hpc.replay import Replay
from poise_hpc.transcript import Request, Transcript

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SERVERS = {
    "transformers": (("fastapi", "uvicorn", "accelerate"), "'transformers[serving]'",
                     ["-m", "transformers.cli.transformers", "serve", "{model}", "--port", "{port}", "--device", "cpu"]),
    "vllm": (("vllm",), "'poise_hpc[vllm]'",
             ["-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--host", "127.0.0.1", "--port", "{port}",
              "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)]),
}
KEY = "known-to-the-server-only"

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def make_model(folder: Path) -> None:
    """A small random Llama with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>",
                            chat_template=TEMPLATE).save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), hidden_size=64, intermediate_size=32, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
                                 eos_token_id=0, pad_token_id=0, bos_token_id=0)).save_pretrained(folder)


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    modules, package, arguments = SERVERS[request.param]
    if not all(map(importlib.util.find_spec, modules)):
        pytest.skip(f"needs {', '.join(modules)}: pip install {package}")
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = folder / "server.log"
    command = [sys.executable, *(a.format(model=folder, port=port) for a in arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_API_KEY": KEY, "VLLM_NO_USAGE_STATS": "1",
                                "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        for _ in range(5000):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(60)


def test_chat_completion_with_and_without_a_schema(server, tmp_path):
    url, model = server
    settings = Agent(base_url=url, models={"default": (model,)}, max_tokens=8, timeout_s=300.0, max_attempts=1, api_key_env="KEY")
    transcript = Transcript(tmp_path / "llm.jsonl", lambda: 0.0)
    client, replies = Client(settings, transcript, environ={"KEY": KEY}), []
    for turn, schema in enumerate([None, {"type": "object", "properties": {}, "required": [], "additionalProperties": False}]):
        request = Request("propose", "c0001", turn, ({"role": "user", "content": "hello"},), schema)
        replies.append(client.complete(request))
        assert Replay(settings, Transcript(transcript.path, lambda: 0.0)).complete(request) == replies[-1]
    assert all(r.text and r.finish in ("length", "stop") and 1 <= r.completion_tokens <= 8 for r in replies)
    assert transcript.spent()["propose"].tokens == sum(r.prompt_tokens + r.completion_tokens for r in replies)
