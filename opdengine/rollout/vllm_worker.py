"""The engine process behind :class:`opdengine.rollout.vllm.VLLMSampler`.

vLLM replaces torch functions, reseeds the global generator and creates a process group wherever it
runs, so it gets a process of its own. The process answers one request at a time over a pipe and
leaves when its parent does.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from opdengine.models.chat import text_of_completion
from opdengine.rollout.policy_file import StoredPolicy
from opdengine.rollout.vllm_extension import WORKER_EXTENSION, EngineInfo

PROBE_TOKENS = 16
MIN_CPU_KV_BYTES, MAX_CPU_KV_BYTES = 64 << 20, 2 << 30


class Cancelled(Exception):
    """The parent does not want the answer any more."""


class Engine:
    """vLLM in this process.

    Args:
        config: arguments of :class:`~opdengine.rollout.vllm.VLLMSampler`, by name.
        connection: looked at between engine steps for a cancellation.
    """

    def __init__(self, config: Mapping[str, Any], connection: Connection) -> None:
        from vllm.platforms import current_platform

        self.is_cpu = current_platform.is_cpu()
        if self.is_cpu:
            _disable_dynamo()
        from vllm import LLM

        self.connection = connection
        self.version = 0
        self.asleep = False
        self.leaving = False
        eager = config["enforce_eager"]
        kv_bytes = config["kv_cache_memory_bytes"]
        if self.is_cpu and kv_bytes is None:
            kv_bytes = _cpu_kv_bytes(config)
        self.llm = LLM(
            model=config["model"],
            dtype=config["dtype"],
            seed=config["seed"],
            max_model_len=config["max_model_len"],
            max_num_seqs=config["max_num_seqs"],
            gpu_memory_utilization=config["gpu_memory_utilization"],
            tensor_parallel_size=config["tensor_parallel_size"],
            trust_remote_code=config["trust_remote_code"],
            kv_cache_memory_bytes=kv_bytes,
            enforce_eager=self.is_cpu if eager is None else eager,
            # A prompt that is cut in two crashes the CPU build when its request has a seed.
            enable_chunked_prefill=False if self.is_cpu else None,
            enable_sleep_mode=config["enable_sleep_mode"] and not self.is_cpu,
            logprobs_mode="processed_logprobs",
            worker_extension_cls=WORKER_EXTENSION,
        )
        self.tokenizer = self.llm.get_tokenizer()
        self.model_config = self.llm.llm_engine.model_config
        self.info = EngineInfo(**self.llm.collective_rpc("describe_engine")[0])

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[Sequence[int]],
        sampling: Mapping[str, Any],
    ) -> tuple[int, list[tuple[np.ndarray, np.ndarray, str, str]]]:
        """Sample once per (prompt, seed), prompts outermost.

        Every sample is a request of its own: vLLM seeds child i of one request with seed + i, which
        would make neighbouring seeds share samples.

        Returns:
            The version of the weights and one (token ids, log-probs, reason, text) per sample.
        """
        from vllm import SamplingParams

        inputs, parameters = [], []
        for ids, row in zip(prompts, seeds, strict=True):
            prompt = {"prompt_token_ids": ids.tolist()}
            for seed in row:
                inputs.append(prompt)
                parameters.append(
                    SamplingParams(
                        seed=seed,
                        logprobs=0,
                        flat_logprobs=True,
                        # Stop strings may be special tokens; the text is decoded at the end.
                        detokenize=bool(sampling["stop"]),
                        skip_special_tokens=False,
                        **sampling,
                    )
                )
        outputs = [output.outputs[0] for output in self._run(inputs, parameters)]
        stop_ids = sampling["stop_token_ids"]
        texts = [text_of_completion(self.tokenizer, list(output.token_ids), stop_ids) for output in outputs]
        return self.version, [
            (
                np.array(output.token_ids, dtype=np.int64),
                np.array(output.logprobs.logprobs, dtype=np.float32),
                str(output.finish_reason),
                text,
            )
            for output, text in zip(outputs, texts, strict=True)
        ]

    def _run(self, inputs: list[Any], parameters: list[Any]) -> list[Any]:
        """All outputs in order; whatever ends this early leaves no request behind."""
        engine = self.llm.llm_engine
        finished: list[Any] = []
        try:
            self.llm.enqueue(inputs, parameters, use_tqdm=False)
            while engine.has_unfinished_requests():
                finished += [output for output in engine.step() if output.finished]
                if self.connection.poll():
                    self.leaving = self.connection.recv()[0] == "exit"
                    raise Cancelled
        except BaseException:
            left = list(engine.output_processor.request_states)
            engine.abort_request(left, internal=True)
            raise
        return sorted(finished, key=lambda output: int(output.request_id))

    def load(self, policy: StoredPolicy) -> None:
        """Replace the weights and forget everything computed with the old ones."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self._load_file(policy.path, dict(policy.names), policy.low_rank)
        self.version = policy.version

    def _load_file(self, *stored: Any) -> None:
        self.llm.collective_rpc("load_policy_file", args=stored)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM refused to reset its prefix cache after a weight update")

    def dry_sync(self) -> None:
        """Reload the checkpoint as an update would be and see that no log-prob changes."""
        before = self._probe()
        self._load_file()
        gap = float(np.abs(self._probe() - before).max())
        bound = 1e-3 if str(self.model_config.dtype) == "torch.float32" else 0.1
        if not gap <= bound:
            raise RuntimeError(
                f"reloading its own checkpoint changed the engine's log-probs by {gap:.3g} nats "
                f"(bound {bound}); this architecture or quantisation cannot be updated in place"
            )

    def _probe(self) -> np.ndarray:
        from vllm import SamplingParams

        count = min(PROBE_TOKENS, self.info.window - 1)
        ids = [(7919 * i + 1) % self.info.vocabulary for i in range(count)]
        parameters = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        (output,) = self._run([{"prompt_token_ids": ids}], [parameters])
        return np.array(output.prompt_logprobs.logprobs)

    def sleep(self) -> None:
        """Level 1: weights to host memory, KV cache dropped."""
        if not self.is_cpu and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True

    def wake(self) -> None:
        """Undo :meth:`sleep`; after a :meth:`load` only the KV cache is still to come back."""
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def shutdown(self) -> None:
        """Stop vLLM's own workers, if it has any."""
        self.llm.llm_engine.engine_core.shutdown()


def _disable_dynamo() -> None:
    """On CPU vLLM compiles the rank of a token with g++ even in eager mode: 15 s, or a failure."""
    import torch._dynamo

    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch._dynamo.config.disable = True


def _cpu_kv_bytes(config: Mapping[str, Any]) -> int:
    """KV cache for every sequence at full length, within bounds; vLLM's own default is 92 % of RAM."""
    from transformers import AutoConfig

    hf = AutoConfig.from_pretrained(config["model"], trust_remote_code=config["trust_remote_code"]).get_text_config()
    heads = getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads
    width = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    window = config["max_model_len"] or hf.max_position_embeddings
    sequence = 2 * hf.num_hidden_layers * heads * width * 4 * window
    wanted = min(sequence * config["max_num_seqs"], MAX_CPU_KV_BYTES)
    return max(wanted, sequence, MIN_CPU_KV_BYTES)


def _leave_with_parent(parent: int, folders: Sequence[str]) -> None:
    """Watch for the parent's death; a generation in flight would otherwise outlive it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _answer(engine: Engine, operation: str, payload: Mapping[str, Any]) -> tuple[str, Any]:
    from vllm.exceptions import VLLMClientError

    try:
        return "ok", getattr(engine, operation)(**payload)
    except Cancelled:
        return "cancelled", None
    except VLLMClientError as error:
        return "invalid", str(error)
    except Exception as error:  # whatever it is, the parent must hear of it
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"


def main() -> None:
    """Serve one parent: ``python -c "<import and call this>" DESCRIPTOR PARENT_PID``."""
    connection = Connection(int(sys.argv[1]))
    config = connection.recv()
    watch = threading.Thread(target=_leave_with_parent, args=(int(sys.argv[2]), config["folders"]), daemon=True)
    watch.start()
    try:
        engine = Engine(config, connection)
        if config["dry_sync"]:
            engine.dry_sync()
    except Exception as error:  # whatever it is, the parent must hear of it
        traceback.print_exc()
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        return
    connection.send(("ok", engine.info))
    while not engine.leaving:
        try:
            operation, payload = connection.recv()
            if operation == "exit":
                break
            if operation != "cancel":  # one that came after its answer had left
                connection.send(_answer(engine, operation, payload))
        except (EOFError, OSError):
            # The parent has gone, or ends this process now. Leaving first would leave the parent's folders behind.
            watch.join()
    engine.shutdown()
    sys.stdout.flush()
    os._exit(0)
