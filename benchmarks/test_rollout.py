"""What sampling through the engine costs beside vLLM itself (``pytest benchmarks -k rollout -m vllm``).

Bare vLLM runs in a process of its own with the same settings, model and requests, and the two take
turns, so that the ratio holds on a busy machine too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.metrics import write_jsonl
from opdengine.rollout.vllm.engine import engine_environment
from opdengine.rollout.vllm.opening import open_child
from opdengine.rollout.vllm.sampler import VLLMSampler, _seed
from opdengine.training.run import train
from opdengine.training.writer import read_metrics
from opdengine.types import Request, SamplingParams

pytestmark = pytest.mark.vllm

ROUNDS = 7
PROMPTS, SAMPLES, NEW_TOKENS = 32, 4, 64
KV_BYTES = 256 << 20
WINDOW = 512
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

BARE = """
import json, sys, time
model, kv_bytes, window = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
import torch
from vllm.platforms import current_platform
cpu = current_platform.is_cpu()
if cpu:
    import torch._dynamo
    torch._dynamo.config.disable = True
from vllm import LLM, SamplingParams
llm = LLM(model=model, dtype="float32", enforce_eager=cpu, kv_cache_memory_bytes=kv_bytes, max_model_len=window,
          max_num_seqs=256, enable_chunked_prefill=False if cpu else None, logprobs_mode="processed_logprobs")
print("ready", flush=True)
for line in sys.stdin:
    requests, tokens = json.loads(line)
    prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
    params = [SamplingParams(seed=seed, max_tokens=tokens, ignore_eos=False, logprobs=0, flat_logprobs=True,
                             top_k=0, detokenize=False) for _, seed in requests]
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    print("answer", json.dumps([seconds, [list(o.outputs[0].token_ids) for o in outputs]]), flush=True)
"""


def save_model(folder: Path, seed: int) -> str:
    """A random Qwen3 of about 5 million parameters with a byte-level tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(fast),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        initializer_range=0.1,
        eos_token_id=fast.eos_token_id,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("student"), seed=0)


@pytest.fixture(scope="module")
def sampler(model: str):
    tokenizer = AutoTokenizer.from_pretrained(model)
    with open_child(model, tokenizer, dtype="float32", kv_cache_memory_bytes=KV_BYTES, max_model_len=WINDOW) as opened:
        yield opened


def test_rollout_throughput(model: str, sampler: VLLMSampler, record, interleaved) -> None:
    """Tokens per second of our sampler against bare vLLM on the same requests: at least 95 %."""
    params = SamplingParams(max_tokens=NEW_TOKENS, n=SAMPLES, seed=1)
    rng = np.random.default_rng(0)
    requests = [Request(f"p{i}", tuple(rng.integers(0, 200, 48).tolist()), seed=i) for i in range(PROMPTS)]
    rows = [(list(r.token_ids), _seed(params, r, i)) for r in requests for i in range(SAMPLES)]
    bare = subprocess.Popen(
        [sys.executable, "-c", BARE, model, str(KV_BYTES), str(WINDOW)],
        env=engine_environment(model, None, None),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert bare.stdin is not None and bare.stdout is not None
    with bare:

        def answer(mark: str) -> str:
            """The next line with this mark; vLLM prints lines of its own."""
            while not (line := bare.stdout.readline()).startswith(mark):
                assert line, "bare vLLM has ended"
            return line.removeprefix(mark)

        answer("ready")
        own_clock: list[float] = []
        sampled: dict[str, Any] = {}

        def theirs() -> None:
            bare.stdin.write(json.dumps([rows, NEW_TOKENS]) + "\n")
            bare.stdin.flush()
            seconds, sampled["theirs"] = json.loads(answer("answer "))
            own_clock.append(seconds)  # without the pipe, which is none of its business

        def ours() -> None:
            sampled["ours"] = [c.token_ids.tolist() for row in sampler.generate(requests, params) for c in row]

        seconds = interleaved({"bare": theirs, "ours": ours}, rounds=ROUNDS)
        bare.stdin.close()
    assert sampled["ours"] == sampled["theirs"]
    tokens = sum(map(len, sampled["ours"]))
    pairs = [theirs / ours for theirs, ours in zip(own_clock[1:], seconds["ours"], strict=True)]
    record(
        "throughput",
        {
            "requests": len(rows),
            "tokens": tokens,
            "tokens_per_second": {
                "bare_vllm": tokens / float(np.median(own_clock[1:])),
                "ours": tokens / float(np.median(seconds["ours"])),
            },
            "ratio": float(np.median(pairs)),
            "ratios": sorted(round(pair, 3) for pair in pairs),
        },
    )


def test_rollout_weight_sync(model: str, sampler: VLLMSampler, record, interleaved) -> None:
    """Seconds of a weight update per million parameters, writing and loading."""
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    versions = iter(range(1, 1000))
    seconds = interleaved({"sync": lambda: sampler.load_policy(next(versions), weights.items())}, rounds=2 * ROUNDS)
    millions = sum(w.numel() for w in weights.values()) / 1e6
    median = float(np.median(seconds["sync"]))
    record(
        "weight_sync", {"parameters_millions": millions, "seconds": median, "seconds_per_million": median / millions}
    )


def test_rollout_share_of_a_step(model: str, tmp_path: Path, record) -> None:
    """Share of a training run's steps outside rollout, debate, scoring and update: under 3 %."""
    file = tmp_path / "train.jsonl"
    write_jsonl(file, [{"id": str(i), "prompt": f"What comes after {i}?"} for i in range(64)])
    config = from_mapping(
        TrainConfig,
        {
            "model": model,
            "teachers": [{"model": save_model(tmp_path / name, seed)} for name, seed in (("a", 1), ("b", 2))],
            "train_data": [str(file)],
            "output_dir": str(tmp_path / "run"),
            "method": "mt_opd",
            "use_vllm": True,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "max_prompt_length": 128,
            "max_completion_length": NEW_TOKENS,
            "per_device_train_batch_size": 32,
            "max_steps": 8,
        },
    )
    train(config, progress=False)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")[2:]  # the first ones warm up
    phases = {
        name: float(np.median([row[f"timing/{name}"] for row in rows]))
        for name in ("rollout", "debate", "score", "update", "sync", "step")
    }
    work = [sum(row[f"timing/{name}"] for name in ("rollout", "debate", "score", "update")) for row in rows]
    outside = [1 - part / row["timing/step"] for part, row in zip(work, rows, strict=True)]
    without_sync = [share - row["timing/sync"] / row["timing/step"] for share, row in zip(outside, rows, strict=True)]
    record(
        "step",
        {
            "prompts": 32,
            "seconds": phases,
            "share_outside": float(np.median(outside)),
            "share_outside_without_sync": float(np.median(without_sync)),
        },
    )
