"""A tiny model, requests and the Hugging Face reference for the tests of the vLLM sampler."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from opdengine.rollout.vllm.http_client import JSONClient
from opdengine.rollout.vllm.opening import open_child
from opdengine.rollout.vllm.sampler import VLLMSampler
from opdengine.types import Completion, Request

WINDOW = 320
SPECIAL = ("<eos>", "<tool>")


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def save_model(folder: Path, tied: bool, family: str = "qwen3") -> str:
    """A random two-layer model in float32 and a byte-level tokenizer of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(folder)
    torch.manual_seed(int(tied))
    config = AutoConfig.for_model(
        family,
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        eos_token_id=fast.eos_token_id,
        **({} if family == "qwen3" else EXPERTS),
    )
    model = AutoModelForCausalLM.from_config(config).float()
    model.generation_config.eos_token_id = fast.eos_token_id
    model.save_pretrained(folder)
    return str(folder)


def open_sampler(path: str, **options: Any) -> VLLMSampler:
    settings = {"dtype": "float32", "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}
    return open_child(path, PreTrainedTokenizerFast.from_pretrained(path), **{**settings, **options})


class VLLMServer:
    """``opdengine vllm-serve`` on a given or free port, in a process group of its own."""

    def __init__(self, path: str, log: Path, port: int | None = None) -> None:
        if port is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, "-m", "opdengine", "vllm-serve", "--model", path, "--port", str(port)]
        options = ["--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "64"]
        root = str(Path(__file__).resolve().parents[2])
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *options],
                env={**os.environ, "PYTHONPATH": root},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float = 600) -> None:
        """Until it answers."""
        client, deadline = JSONClient(self.url), time.monotonic() + seconds
        while True:
            try:
                client.call("/health", timeout=5)
                return
            except RuntimeError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(self.log.read_text()[-3000:]) from None
                time.sleep(0.3)

    def members(self) -> list[int]:
        """Process ids of its group, oldest first."""
        return members_of(self.process.pid)

    def stop(self) -> None:
        """End all of it."""
        self.kill(self.process.pid)
        self.process.wait()

    @staticmethod
    def kill(group: int) -> None:
        """End every process of a server."""
        for pid in members_of(group):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def members_of(group: int) -> list[int]:
    """Process ids of a process group, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == group:
                found.append(int(entry.name))
        except ProcessLookupError:
            pass
    return sorted(found)


def requests(count: int = 4, length: int = 12) -> list[Request]:
    rng = np.random.default_rng(length)
    return [Request(f"p{i}", tuple(rng.integers(0, 256, length + 3 * i).tolist()), seed=100 + i) for i in range(count)]


@torch.no_grad()
def reference_logprobs(
    model: Any,
    prompt: Sequence[int],
    ids: np.ndarray,
    processors: Sequence[Callable[..., Any]] = (),
) -> np.ndarray:
    """float32 [T]: log-probs of ``ids`` by the Hugging Face model and its logits processors."""
    sequence = torch.tensor([*prompt, *ids.tolist()])
    logits = model(sequence[None]).logits[0]
    chosen = []
    for position in range(len(prompt), len(sequence)):
        row = logits[position - 1][None]
        for process in processors:
            row = process(sequence[None, :position], row)
        chosen.append(row.log_softmax(-1)[0, sequence[position]])
    return torch.stack(chosen).numpy()


def worst_gap(model: Any, prompts: Sequence[Request], results: list[list[Completion]]) -> float:
    """Largest difference between sampled log-probs and those of ``model``, in nats."""
    return max(
        float(np.abs(reference_logprobs(model, r.token_ids, c.token_ids) - c.logprobs).max())
        for r, completions in zip(prompts, results, strict=True)
        for c in completions
    )


def same(first: list[list[Completion]], second: list[list[Completion]]) -> bool:
    return all(
        np.array_equal(a.token_ids, b.token_ids) and np.allclose(a.logprobs, b.logprobs, atol=1e-5)
        for row_a, row_b in zip(first, second, strict=True)
        for a, b in zip(row_a, row_b, strict=True)
    )


def train(model: Any, seed: int = 0) -> Any:
    """One optimiser step that moves every weight that is not frozen."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = torch.randint(0, 256, (4, 24))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return model.eval()


def alive(pid: int | None) -> bool:
    try:
        os.kill(pid or 0, 0)
    except ProcessLookupError:
        return False
    return True


def after(seconds: float, act: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer
