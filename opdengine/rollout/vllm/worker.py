"""The process behind :class:`opdengine.rollout.vllm.child.ChildEngine`: vLLM, and one question at a time."""

from __future__ import annotations

import base64
import os
import select
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from opdengine.models.pictures import open_picture
from opdengine.rollout.vllm.engine import FRESH, NO_STAMP
from opdengine.rollout.vllm.extension import WORKER_EXTENSION
from opdengine.types import Image
from opdengine.workers.talk import Answer, Question, answer_questions

MIN_CPU_KV_BYTES, MAX_CPU_KV_BYTES = 64 << 20, 2 << 30


class Cancelled(Exception):
    """The parent does not want the answer any more."""


class ReadOtherwise(Exception):
    """vLLM makes other tokens of a prompt with pictures than the trainer does."""


class Engine:
    """vLLM in this process; the methods without underscore are what can be asked.

    Args:
        config: arguments of :func:`opdengine.rollout.vllm.sampler.open_child`, by name.
        channel: file descriptor; looked at between engine steps for a cancellation.
    """

    def __init__(self, config: Mapping[str, Any], channel: int) -> None:
        from vllm.platforms import current_platform

        self._is_cpu = current_platform.is_cpu()
        if self._is_cpu:
            _disable_dynamo()
        from vllm import LLM

        self._channel = channel
        self._stamp = FRESH
        self._asleep = False
        self._sees = "limit_mm_per_prompt" in config
        eager = config["enforce_eager"]
        kv_bytes = config["kv_cache_memory_bytes"]
        if self._is_cpu and kv_bytes is None:
            kv_bytes = _cpu_kv_bytes(config)
        self._llm = LLM(
            **{
                **config,
                "kv_cache_memory_bytes": kv_bytes,
                "enforce_eager": self._is_cpu if eager is None else eager,
                "enable_sleep_mode": config["enable_sleep_mode"] and not self._is_cpu,
            },
            # A prompt that is cut in two crashes the CPU build when its request has a seed.
            enable_chunked_prefill=False if self._is_cpu else None,
            logprobs_mode="processed_logprobs",
            worker_extension_cls=WORKER_EXTENSION,
        )
        self.info = [os.getpid(), self._llm.collective_rpc("describe_engine", args=(self._sees,))[0]]

    def generate(
        self, prompts: Sequence[Any], seeds: Sequence[Sequence[int]], sampling: Mapping[str, Any]
    ) -> tuple[str, list[Any]]:
        """Sample once per (prompt, seed), prompts outermost.

        Args:
            prompts: token ids; with pictures a mapping of ``marked`` ids, the ``pictures`` in base64, and the ids that
                the prompt must be ``read_as``.
            seeds: of the samples of each prompt.
            sampling: further fields of vLLM's ``SamplingParams``.

        Returns:
            The name of the weights and (token ids, log-probs, reason) of every sample.
        """
        from vllm import SamplingParams

        rows = [(_input(prompt), len(row)) for prompt, row in zip(prompts, seeds, strict=True)]
        inputs = [given for given, count in rows for _ in range(count)]
        parameters = [SamplingParams(seed=seed, flat_logprobs=True, **sampling) for row in seeds for seed in row]
        found = self._run(inputs, parameters)
        asked = [prompt for prompt, row in zip(prompts, seeds, strict=True) for _ in row]
        for prompt, output in zip(asked, found, strict=True):
            if isinstance(prompt, Mapping):
                _require_same(list(output.prompt_token_ids), prompt["read_as"])
        outputs = [output.outputs[0] for output in found]
        return self._stamp, [(list(o.token_ids), o.logprobs.logprobs, str(o.finish_reason)) for o in outputs]

    def _run(self, inputs: list[Any], parameters: list[Any]) -> list[Any]:
        """All outputs in order; whatever ends this early leaves no request behind."""
        engine = self._llm.llm_engine
        finished: list[Any] = []
        try:
            self._llm.enqueue(inputs, parameters, use_tqdm=False)
            while engine.has_unfinished_requests():
                finished += [output for output in engine.step() if output.finished]
                if select.select([self._channel], [], [], 0)[0]:
                    raise Cancelled
        except BaseException:
            left = list(engine.output_processor.request_states)
            engine.abort_request(left, internal=True)
            raise
        return sorted(finished, key=lambda output: int(output.request_id))

    def load(self, stored: Sequence[Any], stamp: str) -> None:
        """Replace the weights and forget everything computed with the old ones; see ``load_policy_file``."""
        self._stamp = NO_STAMP
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("load_policy_file", args=tuple(stored), kwargs={"sees": self._sees})
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM refused to reset its prefix cache after a weight update")
        if self._sees:  # what the tower made of pictures before
            self._llm.llm_engine.reset_encoder_cache()
        self._stamp = stamp

    def sleep(self) -> None:
        """Level 1: weights to host memory, KV cache dropped."""
        if not self._is_cpu and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Undo :meth:`sleep`; after a :meth:`load` only the KV cache is still to come back."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Stop vLLM's own workers, if it has any."""
        self._llm.llm_engine.engine_core.shutdown()


def _input(prompt: Any) -> dict[str, Any]:
    """A prompt in vLLM's form; its processor puts the tokens of pictures in place of their marks."""
    if not isinstance(prompt, Mapping):
        return {"prompt_token_ids": prompt}
    files = [Image("", 0, 0, base64.b64decode(text)) for text in prompt["pictures"]]
    return {"prompt_token_ids": prompt["marked"], "multi_modal_data": {"image": list(map(open_picture, files))}}


def _require_same(found: list[int], wanted: list[int]) -> None:
    if found != wanted:
        place = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), -1)
        first = f", and they differ at {place} ({found[place]}, {wanted[place]})" if place >= 0 else ""
        raise ReadOtherwise(
            f"vLLM reads a prompt with pictures as {len(found)} tokens, the trainer as {len(wanted)}{first}: its "
            "processor is another one than transformers'; set use_vllm to false, or images to 'text' or 'omit'"
        )


def serve(channel: int) -> None:
    """Answer until the owner hangs up: ``{"start": [config]}``, then the methods of :class:`Engine` by name."""
    engine: Engine | None = None

    def answer(question: Question) -> Answer | None:
        nonlocal engine
        operation = next(name for name in question if name != "number")
        if operation == "close":
            return None
        from vllm.exceptions import VLLMClientError

        try:
            if engine is None:
                (config,) = question[operation]
                engine = Engine(config, channel)
                return {operation: engine.info}
            return {operation: getattr(engine, operation)(*question[operation])}
        except Cancelled:
            return {"cancelled": True}
        except (VLLMClientError, ReadOtherwise) as error:
            return {"invalid": str(error)}
        except Exception as error:  # whatever it is, the parent must hear of it
            traceback.print_exc()
            return {"failed": f"{type(error).__name__}: {error}"}

    answer_questions(channel, answer)
    if engine is not None:
        engine.close()


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
    sequence: int = 2 * hf.num_hidden_layers * heads * width * 4 * window
    wanted = min(sequence * config["max_num_seqs"], MAX_CPU_KV_BYTES)
    return int(max(wanted, sequence, MIN_CPU_KV_BYTES))
