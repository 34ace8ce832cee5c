"""Tokens per second of the samplers on a real language model, beside ``model.generate``.

    python benchmarks/real_rollout.py [--model models/smollm2] [--prompts 16] [--tokens 64] [--rounds 3] [--save]

All sample greedily after the same prompts, so that they give the same completions but where rounding decides, and take
turns, with a warm-up each. vLLM takes part where it is installed (`make .venv-vllm/.ready`, and its Python). One thread
each (``OMP_NUM_THREADS=1``), by the clock: vLLM works in a process of its own. ``--save`` writes
``benchmarks/results/real/rollout.json``.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from conftest import real_model_parser, save_results
from real_rows import PROMPTS

from opdengine.models.backbone import load_model
from opdengine.models.chat import encode_chat, load_tokenizer
from opdengine.rollout.transformers import TransformersSampler
from opdengine.types import Request, SamplingParams

Answers = list[list[int]]
KV_BYTES = 512 << 20
WINDOW = 512


def generate(model: Any, tokenizer: Any, requests: list[Request], tokens: int, stop: list[int]) -> Answers:
    """What ``model.generate`` answers in one batch, padded on the left, up to the end that it gives itself."""
    width = max(len(request.token_ids) for request in requests)
    ids = torch.full((len(requests), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.token_ids) :] = torch.tensor(request.token_ids)
        mask[row, width - len(request.token_ids) :] = 1
    with torch.no_grad():
        found = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens,
            eos_token_id=stop, pad_token_id=tokenizer.pad_token_id,
        )[:, width:].tolist()  # fmt: skip
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop), len(row)) for row in found]
    return [row[:end] for row, end in zip(found, ends, strict=True)]


def main(arguments: list[str]) -> int:
    """Measure, print, and keep the results where that is asked for."""
    parser = real_model_parser(__doc__, prompts=16, tokens=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    tokenizer, model = load_tokenizer(options.model), load_model(options.model, dtype="float32").eval()
    requests = [
        Request(str(i), encode_chat(tokenizer, [{"role": "user", "content": text}]))
        for i, text in enumerate(PROMPTS[: options.prompts])
    ]
    params, own = SamplingParams(max_tokens=options.tokens, temperature=0.0), TransformersSampler(model, tokenizer)

    def of(sampler: Any) -> Callable[[], Answers]:
        return lambda: [c.token_ids.tolist() for row in sampler.generate(requests, params) for c in row]

    stop = sorted(own.stop_ids)
    ways: dict[str, Callable[[], Answers]] = {
        "transformers": of(own),
        "generate": lambda: generate(model, tokenizer, requests, options.tokens, stop),
    }
    with ExitStack() as stack:
        if importlib.util.find_spec("vllm") is None:
            print("vLLM is not installed in this Python: it takes no part")
        else:
            from opdengine.rollout.vllm.opening import open_child

            bounds = {"kv_cache_memory_bytes": KV_BYTES, "max_model_len": WINDOW}
            child = open_child(options.model, tokenizer, dtype="float32", stop_ids=stop, **bounds)
            ways["vllm"] = of(stack.enter_context(child))
        answers = {name: way() for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    results: dict[str, Any] = {"prompts": len(requests), "tokens": options.tokens, "rounds": options.rounds, "ways": {}}
    for name, found in answers.items():
        median, tokens = statistics.median(seconds[name]), sum(map(len, found))
        same = sum(a == b for a, b in zip(found, answers["generate"], strict=True))
        against = statistics.median(a / b for a, b in zip(seconds["generate"], seconds[name], strict=True))
        row = {"seconds": median, "completion_tokens": tokens, "tokens_per_second": tokens / median}
        results["ways"][name] = {**row, "speed_over_generate": against, "same_as_generate": same}
        print(f"{name:14}{tokens / median:8.1f} tokens/s   {against:.2f} of generate   {same}/{len(requests)} the same")
    if options.save:
        save_results(ROOT / "benchmarks" / "results" / "real" / "rollout.json", results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
