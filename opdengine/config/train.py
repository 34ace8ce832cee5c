"""Everything a run can be told, as one dataclass tree (read by :mod:`opdengine.config.loading`).

Names follow Hugging Face's ``TrainingArguments`` and TRL where they have one. Unknown keys and
impossible values are errors that name the remedy, raised before any model is loaded.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from opdengine.config.method_sections import (
    AdvantageConfig,
    CaMOPDConfig,
    DebateConfig,
    EntropyConfig,
    OpadConfig,
    SageConfig,
    TcodConfig,
    UniOPDConfig,
)
from opdengine.config.secrecy import refuse_secrets
from opdengine.config.sections import (
    COUNT,
    COUNT_OR_NONE,
    PENALTY,
    POSITIVE,
    SECONDS,
    SEED,
    SHARE,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    DataConfig,
    EnvironmentConfig,
    LoRAConfig,
    Range,
    Section,
    TeacherConfig,
    at_home,
    by_key,
)
from opdengine.errors import ConfigError
from opdengine.workers.printing import brief

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_kl")
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
DTYPES = ("auto", "float32", "bfloat16", "float16")


MIDDLE = Range(0, 1, open_low=True, open_high=True, remedy="it lies between 0 and 1; the ends are KLs by name")
BETA = Range(0, 1, open_high=True)
NORM = dataclasses.replace(POSITIVE, also=(math.inf,))

MOST_PER_STEP = 10**7
"""Rollouts of one step on one device."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """Everything a run depends on.

    Settings that are read (:func:`opdengine.config.loading.from_mapping`) and do not name a value take that of the
    method's paper first; the defaults here are those of methods without one, and of a class that is built by hand.

    Args:
        model: the student: model folder or hub name.
        train_data: sources of prompts: JSONL or Parquet files, or ``datasets`` folders, with a ``prompt`` or
            ``messages`` column and optionally ``id, tools, answer, data_source``. Sections of :class:`DataConfig`
            also read the layouts of public data sets.
        output_dir: where the run is written; an existing run is resumed or refused.
        teachers: the models that judge the student, and debate.
        method: "opd", "mt_opd", "mt_seqkd", "mad_opd", "opad", "sage_opd", "tcod", "entropy_opd", "uni_opd",
            "camopd", "module:function" or "file.py:function".
        method_options: keywords of a function of your own.
        contexts: under what the teachers of "sage_opd" and "uni_opd" judge: the "plain" prompt, or the
            transcript and weights of a "debate" as in MAD-OPD.
        divergence: one of "reverse_kl", "forward_kl", "jsd", "skew_kl", or a mapping from routing key (and
            "default") to one: the task-adaptive divergence of MAD-OPD, remark 1.
        jsd_beta: weight of the teacher in the middle distribution of the JSD.
        skew_alpha: weight of the teacher in the middle distribution of the skew KL.
        teacher_reduction: "sum" of the teachers' divergences (the papers) or divergence to the
            "mixture" of the teachers.
        divergence_temperature: divides both models' logits in the loss; independent of sampling.
        on_teacher_failure: when a served teacher's call fails for good: "stop" with a checkpoint of
            the last finished step, or "drop" the teacher from the rollouts concerned (counted).
        loss_normalization: "token" (mean over all target tokens of the step) or "sequence" (mean
            over rollouts of token means).
        debate: how teachers debate, for "mad_opd", "opad" and ``contexts: debate``.
        advantage: how ``uni_opd`` and ``camopd`` weigh sampled tokens.
        uni_opd, camopd: settings of the method of that name.
        environment: where the student acts over many turns.
        opad, sage, tcod, entropy_opd: settings of the methods "opad", "sage_opd", "tcod" and "entropy_opd".
        dtype: of the student's parameters; "auto" keeps the checkpoint's (float32 where that is float16).
        bf16: autocast forward and backward to bfloat16 (parameters keep ``dtype``), in the sampler, too.
        lora: train an adapter and leave the student's weights as they are; null trains them all.
        freeze_head: do not train the output embedding (where it is tied, the input embedding neither);
            the loss then computes no gradient of it. With ``lora`` it is always frozen.
        attn_implementation: "auto" takes flash-attn on a GPU where installed, else SDPA.
        trust_remote_code: run code that comes with a model.
        chat_template: Jinja text or file in place of the student tokenizer's own.
        chat_template_kwargs: handed to the student's chat template.
        eval_data: like ``train_data``, with an ``answer`` column; ``train_data`` is never evaluated in its place.
        eval_temperature: of the answers to ``eval_data``; 0 is greedy.
        eval_num_generations: answers to each evaluation prompt; the accuracy is their mean.
        eval_max_prompts: evaluate on at most this many prompts.
        max_prompt_length: prompts with more tokens are left out and counted.
        skip_bad_rows: leave out malformed rows (counted) instead of refusing the file.
        verifier: how an answer is graded: "exact_match", "numeric", "choice", "math", "code", "reasoning_gym",
            "module:function" or "file.py:function"; or a mapping from routing key (and "default") to one of these.
        verifier_timeout: seconds that grading one completion may take; longer counts as failed (score 0).
        verifier_workers: processes that grade.
        verifier_allow_unsandboxed: let the "code" verifier run the model's programs where the system offers
            no isolation; they can then read and delete your files.
        temperature, top_p, top_k, repetition_penalty: how the student is sampled.
        max_completion_length: most new tokens of a rollout.
        num_generations: rollouts per prompt.
        use_vllm: sample with vLLM instead of transformers.
        vllm_mode: "colocate" runs vLLM beside the trainer; "server" uses one that was started by
            ``opdengine vllm-serve``, the same for all processes.
        vllm_server_base_url: address of that server, or ``unix:/path`` of its socket.
        vllm_sync_dir: folder for weight files, which that server must be able to read; default: shared
            memory or the temporary folder of the first process's machine.
        vllm_response_timeout: seconds after which vLLM counts as hanging in one call.
        vllm_gpu_memory_utilization: share of the GPU's memory for colocated vLLM.
        vllm_tensor_parallel_size: GPUs per colocated vLLM engine. With several processes, so many neighbours on a
            machine share an engine on their GPUs.
        vllm_enable_sleep_mode: give the GPU's memory to the trainer while vLLM does not sample; not possible with
            an engine that several processes share.
        max_staleness: updates that may lie between the weights that sample a batch and those that it
            updates. 0: strictly in turn. From 1 on, rollouts and debates of the next batches run during
            the update (useful with vLLM and served teachers, which work elsewhere).
        per_device_train_batch_size: prompts per device and accumulation step.
        gradient_accumulation_steps: multiplies the prompts of an optimiser step.
        max_tokens_per_batch: token budget of one forward and backward pass.
        max_steps: optimiser steps.
        learning_rate: of AdamW, at its highest.
        lr_scheduler_type: "constant", "constant_with_warmup", "linear" or "cosine", as in transformers.
        warmup_ratio: share of the steps over which the learning rate rises from 0.
        weight_decay, adam_beta1, adam_beta2, adam_epsilon: of AdamW; norms and biases are not decayed.
        max_grad_norm: longer gradients are scaled down to this norm.
        gradient_checkpointing: trade compute for memory.
        vocab_parallel_head: with several processes, split the student's head by vocabulary instead of gathering
            it: the update needs no whole weight or gradient of it, and the hidden states of a micro-batch are
            gathered instead. Runs the torch implementation of the fused loss.
        loss_impl: implementation of the fused loss: "auto", "triton", "torch" or "reference".
        workspace_bytes: byte budget for temporaries of the fused loss.
        seed: of data order, sampling and initialisation.
        logging_steps: write metrics every so many steps.
        eval_steps: evaluate every so many steps, before the first and after the last one; 0 leaves it at those two.
        save_steps: write a checkpoint every so many steps; 0 is never.
        save_total_limit: keep the newest so many checkpoints; None keeps all.
        log_completions: write rollouts and debates of each step as JSONL.
        report_to: besides metrics.jsonl: "tensorboard".
        run_name: shown by trackers.
        resume_from_checkpoint: "latest" (the newest that is whole; from the beginning where there is none yet) or a
            checkpoint folder.
        ddp_timeout: seconds that one process may wait for another (``torchrun``), rollouts and debates included.
        max_bad_steps: more steps in a row than this that train nothing end the run: of which the loss or gradient is
            not finite (they move no weight and are written to ``bad_steps/``), every episode broke, no rollout is left
            or has weight, or the gradient or the update is 0. A run of which no step trains anything fails always.
        max_logprob_difference: stop when sampler and trainer disagree by more (mean absolute
            difference of a step, nats).
    """

    model: str
    output_dir: str
    train_data: list[str | DataConfig] = field(default_factory=list)
    teachers: list[TeacherConfig] = field(default_factory=list)
    method: str = "mad_opd"
    method_options: dict[str, Any] = field(default_factory=dict)
    contexts: str = "plain"
    divergence: str | dict[str, str] = "reverse_kl"
    jsd_beta: float = 0.5
    skew_alpha: float = 0.1
    teacher_reduction: str = "sum"
    divergence_temperature: float = 1.0
    on_teacher_failure: str = "stop"
    loss_normalization: str = "token"
    debate: DebateConfig = field(default_factory=DebateConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    uni_opd: UniOPDConfig = field(default_factory=UniOPDConfig)
    camopd: CaMOPDConfig = field(default_factory=CaMOPDConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    opad: OpadConfig = field(default_factory=OpadConfig)
    sage: SageConfig = field(default_factory=SageConfig)
    tcod: TcodConfig = field(default_factory=TcodConfig)
    entropy_opd: EntropyConfig = field(default_factory=EntropyConfig)

    dtype: str = "auto"
    bf16: bool = False
    lora: LoRAConfig | None = None
    freeze_head: bool = False
    attn_implementation: str = "auto"
    trust_remote_code: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    eval_data: list[str | DataConfig] = field(default_factory=list)
    eval_temperature: float = 0.0
    eval_num_generations: int = 1
    eval_max_prompts: int | None = None
    max_prompt_length: int = 4096
    skip_bad_rows: bool = False
    verifier: str | dict[str, str] = "exact_match"
    verifier_timeout: float = 30.0
    verifier_workers: int = 4
    verifier_allow_unsandboxed: bool = False

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_completion_length: int = 512
    num_generations: int = 1
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_server_base_url: str = "http://127.0.0.1:8000"
    vllm_sync_dir: str | None = None
    vllm_response_timeout: float = 3600.0
    vllm_gpu_memory_utilization: float = 0.3
    vllm_tensor_parallel_size: int = 1
    vllm_enable_sleep_mode: bool = False
    max_staleness: int = 0

    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_tokens_per_batch: int = 16384
    max_steps: int = 100
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    vocab_parallel_head: bool = False
    loss_impl: str = "auto"
    workspace_bytes: int | None = None
    seed: int = 0

    logging_steps: int = 1
    eval_steps: int = 0
    save_steps: int = 0
    save_total_limit: int | None = None
    log_completions: bool = True
    report_to: list[str] = field(default_factory=list)
    run_name: str = ""
    resume_from_checkpoint: str | None = None
    ddp_timeout: float = 7200.0
    max_bad_steps: int = 3
    max_logprob_difference: float = 0.5

    ranges: ClassVar[Mapping[str, Range]] = {
        "jsd_beta": MIDDLE,
        "skew_alpha": MIDDLE,
        "divergence_temperature": Range(0.01, 1000),
        "eval_temperature": TEMPERATURE,
        "eval_num_generations": COUNT,
        "eval_max_prompts": COUNT,
        "max_prompt_length": COUNT,
        "verifier_timeout": SECONDS,
        "verifier_workers": Range(1, 1024),
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "top_k": TOP_K,
        "repetition_penalty": PENALTY,
        "max_completion_length": COUNT,
        "num_generations": COUNT,
        "vllm_response_timeout": SECONDS,
        "vllm_gpu_memory_utilization": Range(0, 1, open_low=True),
        "vllm_tensor_parallel_size": Range(1, 1024),
        "max_staleness": Range(0, 1000, remedy="0 is strictly in turn, 1000 the most"),
        "per_device_train_batch_size": COUNT,
        "gradient_accumulation_steps": COUNT,
        "max_tokens_per_batch": COUNT,
        "max_steps": COUNT,
        "learning_rate": Range(0, 10),
        "warmup_ratio": SHARE,
        "weight_decay": Range(0, 100),
        "adam_beta1": BETA,
        "adam_beta2": BETA,
        "adam_epsilon": Range(1e-20, 1),
        "max_grad_norm": NORM,
        "workspace_bytes": Range(1, 2**50),
        "seed": SEED,
        "logging_steps": COUNT,
        "eval_steps": COUNT_OR_NONE,
        "save_steps": COUNT_OR_NONE,
        "save_total_limit": COUNT,
        "ddp_timeout": SECONDS,
        "max_bad_steps": COUNT_OR_NONE,
        "max_logprob_difference": NORM,
    }

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one optimiser step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def debates(self) -> bool:
        """Whether the teachers debate."""
        return self.method in ("mad_opd", "opad") or self.contexts == "debate"

    def divergence_of(self, key: str) -> str:
        """The divergence that prompts with this routing key are trained with.

        Raises:
            ConfigError: the mapping has neither the key nor "default".
        """
        return by_key(self.divergence, key, "divergence")

    def __post_init__(self) -> None:
        for name in ("model", "output_dir", "chat_template", "vllm_sync_dir", "resume_from_checkpoint"):
            object.__setattr__(self, name, at_home(getattr(self, name)))
        refuse_secrets(dataclasses.asdict(self))
        self.in_range()
        _check_values(self)
        _check_together(self)
        object.__setattr__(self, "teachers", _named(self.teachers))


def _named(teachers: Sequence[TeacherConfig]) -> list[TeacherConfig]:
    """Give every teacher a name and refuse doubles."""
    named = [t if t.name else dataclasses.replace(t, name=Path(t.model).name or t.model) for t in teachers]
    names = [t.name for t in named]
    if doubles := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f"teachers share the name {doubles}; give each teacher its own name")
    return named


def _check_values(config: TrainConfig) -> None:
    need, one_of = config.need, config.one_of
    kinds = config.divergence if isinstance(config.divergence, dict) else {"": config.divergence}
    need(
        bool(kinds) and all(kind in DIVERGENCES for kind in kinds.values()),
        "divergence",
        f"use {list(DIVERGENCES)} or a mapping from data_source to one of them",
    )
    one_of("teacher_reduction", ("sum", "mixture"))
    one_of("contexts", ("plain", "debate"))
    need(
        config.contexts == "plain" or config.method in ("sage_opd", "uni_opd"),
        "contexts",
        "only 'sage_opd' and 'uni_opd' can take over a debate; 'mad_opd' and 'opad' always debate",
    )
    one_of("loss_normalization", ("token", "sequence"))
    one_of("on_teacher_failure", ("stop", "drop"))
    one_of("lr_scheduler_type", SCHEDULERS)
    one_of("dtype", DTYPES)
    one_of("vllm_mode", ("colocate", "server"))
    need(config.verifier != {}, "verifier", "map data_sources (and 'default') to verifiers, or name one")
    need(
        config.max_staleness == 0 or config.use_vllm,
        "max_staleness",
        "without use_vllm the student samples with the weights that are being updated: use 0",
    )
    need(
        not config.vllm_enable_sleep_mode or config.max_staleness == 0,
        "vllm_enable_sleep_mode",
        "with max_staleness above 0 vLLM samples during the update and cannot sleep",
    )
    one_of("loss_impl", ("auto", "triton", "torch", "reference"))
    need(
        not config.vocab_parallel_head or config.loss_impl in ("auto", "torch"),
        "loss_impl",
        "with vocab_parallel_head it is 'torch'",
    )
    for tracker in config.report_to:
        need(tracker == "tensorboard", "report_to", "only 'tensorboard' is known; [] is metrics.jsonl alone")
    for i, teacher in enumerate(config.teachers):
        _check_teacher(config, teacher, f"teachers.{i}")
    if config.environment.name:
        need(not config.train_data, "train_data", "the tasks come from the environment; leave it out")
        need(not config.eval_data, "eval_data", "use environment.eval_splits")
    else:
        need(bool(config.train_data), "train_data", "name at least one file, or an environment")


def _check_together(config: TrainConfig) -> None:
    need = config.need
    need(
        config.num_generations == 1 or config.temperature > 0,
        "num_generations",
        "with temperature 0 all generations are equal: use 1",
    )
    need(
        config.eval_num_generations == 1 or config.eval_temperature > 0,
        "eval_num_generations",
        "with eval_temperature 0 all answers are equal: use 1",
    )
    need(
        config.prompts_per_step * config.num_generations <= MOST_PER_STEP,
        "per_device_train_batch_size",
        f"with gradient_accumulation_steps={config.gradient_accumulation_steps} and num_generations="
        f"{config.num_generations} a step has more than {MOST_PER_STEP} rollouts",
    )
    for key in ("model", "output_dir", "method"):
        need(bool(getattr(config, key).strip()), key, "it must not be empty")
    config.not_blank("attn_implementation", "chat_template", "verifier", "vllm_sync_dir", "resume_from_checkpoint")
    config.need(
        _is_address(config.vllm_server_base_url), "vllm_server_base_url", "write http://host:port or unix:/path"
    )


def _is_address(url: str, schemes: Sequence[str] = ("http", "https", "unix")) -> bool:
    """Whether a URL names a server, without credential and query."""
    try:
        parts = urlsplit(url)
        place = parts.hostname if parts.scheme != "unix" else parts.path
        return parts.scheme in schemes and bool(place) and parts.port != 0 and not re.search(r"[\s@?#]", url)
    except ValueError:  # of the port, or of brackets
        return False


def _check_teacher(config: TrainConfig, teacher: TeacherConfig, where: str) -> None:
    def need(ok: bool, key: str, remedy: str) -> None:
        if not ok:
            raise ConfigError(f"{where}.{key}={brief(getattr(teacher, key))} is not possible; {remedy}")

    for key, range_ in teacher.ranges.items():
        need(getattr(teacher, key) in range_, key, str(range_))
    need(bool(teacher.model.strip()), "model", "it must not be empty")
    for key in ("tokenizer", "chat_template", "writer_model"):
        value = getattr(teacher, key)
        need(value is None or bool(value.strip()), key, "it must not be empty; leave it out")
    need(not teacher.name or bool(teacher.name.strip()), "name", "it must not be blank")
    need(all(teacher.key), "key", "a routing key must not be empty; [] is every prompt")

    need(teacher.dtype in DTYPES, "dtype", f"choose one of {list(DTYPES)}")
    endpoint = "base_url" if teacher.base_url is not None else "writer_base_url"
    url = getattr(teacher, endpoint)
    if url is not None:
        if "@" in url or "?" in url or "#" in url:
            raise ConfigError(
                f"{where}.{endpoint} holds a credential or a query; put the key's variable into api_key_env"
            )
        need(_is_address(url, ("http", "https")), endpoint, "give a URL such as http://host:8000/v1")
    if teacher.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", teacher.api_key_env):
        raise ConfigError(
            f"{where}.api_key_env is the name of an environment variable such as TEACHER_KEY, not the key"
        )
    need(url is not None or teacher.api_key_env is None, "api_key_env", "it belongs to an endpoint; set base_url too")
    if teacher.base_url is None:
        need(teacher.tokenizer is None, "tokenizer", "it belongs to a served teacher; set base_url too")
        need(url is not None or teacher.writer_model is None, "writer_model", "set writer_base_url too")
        need(not (teacher.shard and teacher.offload), "shard", "with offload the weights leave the GPU: choose one")
        need(not (teacher.shard and config.max_staleness), "shard", "it calls for max_staleness: 0")
        return
    for key in ("writer_base_url", "writer_model"):
        need(getattr(teacher, key) is None, key, "a teacher with base_url writes there anyway; leave it out")
    for key in ("offload", "shard"):
        need(not getattr(teacher, key), key, "the weights of a served teacher are not here")
    if config.method == "mt_seqkd":
        return  # its teachers write and never judge
    exact = "a served teacher tells its likeliest tokens only; use a local teacher"
    if config.divergence_temperature != 1.0:
        raise ConfigError(
            f"divergence_temperature={config.divergence_temperature} is not possible with {where}: {exact}, or 1.0"
        )
    if config.teacher_reduction == "mixture":
        raise ConfigError(f"teacher_reduction='mixture' is not possible with {where}: {exact}, or 'sum'")
