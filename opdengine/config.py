"""Everything a run can be told, as one dataclass tree (read by :mod:`opdengine.settings`).

Names follow Hugging Face's ``TrainingArguments`` and TRL where they have one. Unknown keys and
impossible values are errors that name the remedy, raised before any model is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from opdengine.errors import ConfigError
from opdengine.method_settings import AdvantageConfig, CaMOPDConfig, UniOPDConfig

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_kl")
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
SECRETS = ("api_key", "apikey", "password", "secret", "access_token", "auth_token", "hf_token")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TeacherConfig:
    """One teacher: a model in this process, or one that a server offers (``base_url``).

    Args:
        model: model folder or hub name; with ``base_url`` the name under which it is served.
        name: used in metrics, logs and caches; default: the last part of ``model``.
        weight: fixed mixing weight (MT-OPD) or share of the data (MT-SeqKD); relative.
        key: routing keys (``data_source``) that this teacher answers for; empty: all prompts.
        dtype: "auto" keeps the dtype of the checkpoint.
        chat_template: Jinja text or file in place of the tokenizer's own.
        chat_template_kwargs: handed to the chat template, for example ``enable_thinking: false``.
        offload: keep a local teacher's weights on the CPU while it neither writes nor judges.
        base_url: OpenAI-compatible endpoint, such as ``http://host:8000/v1``. It writes debates and
            answers; it judges by top-k log-probs, a lower bound of the exact divergence.
        tokenizer: with ``base_url``: folder or hub name of the tokenizer; default: ``model``.
        api_key_env: with ``base_url``: the environment variable that holds the key (never the key).
        max_concurrency: most calls at the same time.
        timeout: seconds that one call may take.
        max_retries: further attempts of a call that failed for a reason that may pass.
        score_top_k: log-probs per token (vLLM: start the server with ``--max-logprobs`` as large).
    """

    model: str
    name: str = ""
    weight: float = 1.0
    key: list[str] = field(default_factory=list)
    dtype: str = "auto"
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    offload: bool = False
    base_url: str | None = None
    tokenizer: str | None = None
    api_key_env: str | None = None
    max_concurrency: int = 32
    timeout: float = 600.0
    max_retries: int = 5
    score_top_k: int = 64


@dataclass(frozen=True)
class DebateConfig:
    """The debate of MAD-OPD (arXiv 2605.01347, section 4.1, equation 7).

    Args:
        rounds: R; round 1 is blind.
        temperature, top_p, top_k, repetition_penalty: how teachers are sampled.
        max_tokens: new tokens of one teacher in one round.
        prompts: "generic", "tools", "code", a mapping of :class:`DebatePrompts` fields, or a
            mapping from routing key (and "default") to one of these.
        use_confidence: ask for confidences and weigh teachers by them; off: uniform weights.
        use_transcript: teachers judge the student under the transcript; off: under the plain
            prompt (only the confidences are used).
        tau: temperature of the softmax over confidence / 100.
        cache_dir: debates are stored here and never generated twice; default: a folder in
            ``output_dir``. Share it between runs.
        seed: seed of the debate; part of the cache key.
    """

    rounds: int = 2
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 20
    repetition_penalty: float = 1.0
    max_tokens: int = 4096
    prompts: str | dict[str, Any] = "generic"
    use_confidence: bool = True
    use_transcript: bool = True
    tau: float = 1.0
    cache_dir: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class EnvironmentConfig:
    """An environment in which the student acts over many turns, in place of prompts to answer.

    ``max_completion_length`` is then the limit of one turn.

    Args:
        name: "house" (the built-in world), "search", "recorded", "alfworld", "textworld", "scienceworld",
            "module:Class" or "file.py:Class"; empty: no environment.
        options: keywords of the environment's class.
        train_split: tasks to train on.
        eval_splits: tasks to evaluate on, such as ["valid_seen", "valid_unseen"].
        eval_max_tasks: at most this many of each split.
        eval_temperatures: evaluate once at each; 0 is greedy.
        max_turns: most turns of the student in an episode.
        max_trajectory_tokens: an episode ends before a turn that might not fit; default: the
            student's window.
        num_environments: episodes that run at a time, each in a process of its own.
        reset_timeout, step_timeout: seconds after which an environment counts as hanging.
        max_observation_chars: longer answers end the episode as broken.
        stop: strings that end a turn.
    """

    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    train_split: str = "train"
    eval_splits: list[str] = field(default_factory=list)
    eval_max_tasks: int | None = None
    eval_temperatures: list[float] = field(default_factory=lambda: [0.0])
    max_turns: int = 30
    max_trajectory_tokens: int | None = None
    num_environments: int = 16
    reset_timeout: float = 120.0
    step_timeout: float = 60.0
    max_observation_chars: int = 100_000
    stop: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LoRAConfig:
    """A low-rank adapter instead of the student's own weights (LoRA, arXiv 2106.09685), in peft's names.

    Args:
        r: rank.
        lora_alpha: the adapter's output is scaled by ``lora_alpha / r``.
        lora_dropout: on the adapter's input during the update; the sampler has none.
        target_modules: "all-linear" (every linear layer but the head), names of layers such as
            ["q_proj", "v_proj"], or a regular expression.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` (arXiv 2312.03732).
        merge_final: at the end also write the model with the adapter merged in, to ``merged/``.
    """

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    merge_final: bool = False


@dataclass(frozen=True)
class OpadConfig:
    """Which steps of a trajectory become training states (OPAD; arXiv 2605.01347, section 4.4).

    Args:
        sampling: "all" steps, "uniform" or by "surprise": in proportion to the mean negative log-prob of
            what the student did there.
        steps_per_trajectory: how many; None is all.
    """

    sampling: str = "all"
    steps_per_trajectory: int | None = None


@dataclass(frozen=True)
class SageConfig:
    """SAGE-OPD (arXiv 2606.19659, sections 3.3 to 3.5).

    Args:
        alpha: weight of a turn judged WEAK (equation 7).
        use_failures: weight 1 without asking where the environment reports a failure.
        use_judge: ask the teacher about the other turns; off: all have weight 1.
        use_confidence: multiply with the teacher's mean largest probability (equations 8 to 10).
        normalization: what N of equation 11 counts: "all_tokens", "active_tokens" (of turns with
            weight), or "none" for Z = 1.
        normalization_scope: Z over the whole "batch" (all processes) or over each "trajectory".
        eps: least denominator of Z.
        z_max: bound of Z; None is unbounded.
        judge_temperature, judge_max_tokens: how the teacher is sampled as a judge.
        judge_fallback: weight where its reply holds no label.
        judge_history: show it the turns before.
        judge_next_observation: show it what happened then.
        judge_prompt: a format string in place of our own, with any of ``{task_type} {task_goal}
            {last_obs} {admissible} {admissible_count} {llm_text} {history} {next_obs}``.
        admissible_count: most possible actions shown.
        confidence_temperature: of the distributions whose largest probability is taken.
        intervention: "judge"; "random" gives the same weights to other turns, "inverted" the largest to
            those that got the smallest (controls).
    """

    alpha: float = 0.5
    use_failures: bool = True
    use_judge: bool = True
    use_confidence: bool = True
    normalization: str = "all_tokens"
    normalization_scope: str = "batch"
    eps: float = 1e-8
    z_max: float | None = None
    judge_temperature: float = 0.0
    judge_max_tokens: int = 1028
    judge_fallback: float = 1.0
    judge_history: bool = False
    judge_next_observation: bool = False
    judge_prompt: str | None = None
    admissible_count: int = 30
    confidence_temperature: float = 1.0
    intervention: str = "judge"


@dataclass(frozen=True)
class TcodConfig:
    """Turn curriculum (TCOD; arXiv 2606.19659, equation 25): ``k_start + eta * updates`` first turns."""

    k_start: int = 1
    eta: float = 1.0


@dataclass(frozen=True)
class EntropyConfig:
    """Entropy-aware OPD (arXiv 2606.19659, equation 26): weight 1 + ``alpha`` above entropy ``tau`` (nats)."""

    alpha: float = 1.0
    tau: float = 0.8


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on.

    Args:
        model: the student: model folder or hub name.
        train_data: JSONL or Parquet files, or ``datasets`` folders, with a ``prompt`` or
            ``messages`` column; optional ``id, tools, answer, data_source``.
        output_dir: where the run is written; an existing run is resumed or refused.
        teachers: the teachers.
        method: one of :data:`opdengine.methods.METHODS`.
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
        debate: settings of the debate.
        advantage: how ``uni_opd`` and ``camopd`` weigh sampled tokens.
        uni_opd: settings of that method.
        camopd: settings of that method.
        environment: where the student acts over many turns.
        opad, sage, tcod, entropy_opd: settings of these methods.
        dtype: of the student's parameters; "auto" keeps the checkpoint's.
        bf16: autocast forward and backward to bfloat16 (parameters keep ``dtype``).
        lora: train an adapter and leave the student's weights as they are; null trains them all.
        freeze_head: do not train the output embedding (where it is tied, the input embedding neither);
            the loss then computes no gradient of it. With ``lora`` it is always frozen.
        attn_implementation: "auto" takes flash-attn on a GPU where installed, else SDPA.
        trust_remote_code: run code that comes with a model.
        chat_template: Jinja text or file in place of the student tokenizer's own.
        chat_template_kwargs: handed to the student's chat template.
        eval_data: like ``train_data``, with an ``answer`` column.
        eval_max_prompts: evaluate on at most this many prompts.
        max_prompt_length: prompts with more tokens are left out and counted.
        skip_bad_rows: leave out malformed rows (counted) instead of refusing the file.
        verifier: how an answer is graded: "exact_match", "numeric", "module:function" or
            "file.py:function"; or a mapping from routing key (and "default") to one of these.
        verifier_timeout: seconds that grading one completion may take; longer counts as failed (score 0).
        verifier_workers: processes that grade.
        verifier_allow_unsandboxed: let the "code" verifier run the model's programs where the system offers
            no isolation; they can then read and delete your files.
        temperature, top_p, top_k, repetition_penalty: how the student is sampled.
        max_completion_length: most new tokens of a rollout.
        num_generations: rollouts per prompt.
        use_vllm: sample with vLLM instead of transformers.
        vllm_mode: "colocate" runs vLLM beside the trainer; "server" uses one that was started by
            ``opdengine vllm-serve``.
        vllm_server_base_url: address of that server.
        vllm_sync_dir: folder for weight files, which that server must be able to read; default: shared
            memory or the temporary folder of this machine.
        vllm_response_timeout: seconds after which vLLM counts as hanging in one call.
        vllm_gpu_memory_utilization: share of the GPU's memory for colocated vLLM.
        vllm_tensor_parallel_size: GPUs per colocated vLLM engine.
        vllm_enable_sleep_mode: give the GPU's memory to the trainer while vLLM does not sample.
        max_staleness: updates that may lie between the weights that sample a batch and those that it
            updates. 0: strictly in turn. From 1 on, rollouts and debates of the next batches run during
            the update (useful with vLLM and served teachers, which work elsewhere).
        per_device_train_batch_size: prompts per device and accumulation step.
        gradient_accumulation_steps: multiplies the prompts of an optimiser step.
        max_tokens_per_batch: token budget of one forward and backward pass.
        max_steps: optimiser steps.
        learning_rate, lr_scheduler_type, warmup_ratio, weight_decay, adam_beta1, adam_beta2,
            adam_epsilon, max_grad_norm: AdamW and its schedule.
        gradient_checkpointing: trade compute for memory.
        loss_impl: implementation of the fused loss: "auto", "triton", "torch" or "reference".
        workspace_bytes: byte budget for temporaries of the fused loss.
        seed: of data order, sampling and initialisation.
        logging_steps, eval_steps, save_steps: how often; 0 is never (evaluation: only before and
            after).
        save_total_limit: keep the newest so many checkpoints; None keeps all.
        log_completions: write rollouts and debates of each step as JSONL.
        report_to: besides metrics.jsonl: "tensorboard".
        run_name: shown by trackers.
        resume_from_checkpoint: "latest" (from the beginning where there is none yet) or a checkpoint folder.
        ddp_timeout: seconds that one process may wait for another (``torchrun``), rollouts and debates included.
        max_bad_steps: a step whose loss or gradient is not finite moves no weight and is written to
            ``bad_steps/``; more than so many in a row end the run.
        max_logprob_difference: stop when sampler and trainer disagree by more (mean absolute
            difference of a step, nats).
    """

    model: str
    output_dir: str
    train_data: list[str] = field(default_factory=list)
    teachers: list[TeacherConfig] = field(default_factory=list)
    method: str = "mad_opd"
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

    eval_data: list[str] = field(default_factory=list)
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

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one optimiser step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def divergence_of(self, key: str) -> str:
        """The divergence that prompts with this routing key are trained with.

        Raises:
            ConfigError: the mapping has neither the key nor "default".
        """
        return by_key(self.divergence, key, "divergence")

    def __post_init__(self) -> None:
        _check_values(self)
        object.__setattr__(self, "teachers", _named(self.teachers))


def by_key(setting: Any, key: str, name: str) -> Any:
    """Look up a setting that may be a mapping from routing key (and "default")."""
    if not isinstance(setting, Mapping):
        return setting
    if key in setting:
        return setting[key]
    if "default" in setting:
        return setting["default"]
    raise ConfigError(
        f"{name} has no entry for data_source {key!r} and no 'default' (it has {sorted(setting)}); add one of the two"
    )


def _named(teachers: Sequence[TeacherConfig]) -> list[TeacherConfig]:
    """Give every teacher a name and refuse doubles."""
    named = [t if t.name else dataclasses.replace(t, name=Path(t.model).name or t.model) for t in teachers]
    names = [t.name for t in named]
    if doubles := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f"teachers share the name {doubles}; give each teacher its own name")
    return named


def _check_values(config: TrainConfig) -> None:
    def need(ok: bool, key: str, remedy: str) -> None:
        if not ok:
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            raise ConfigError(f"{key}={value!r} is not possible; {remedy}")

    def one_of(key: str, choices: Sequence[str]) -> None:
        need(getattr(config, key) in choices, key, f"choose one of {list(choices)}")

    kinds = config.divergence if isinstance(config.divergence, dict) else {"": config.divergence}
    need(
        bool(kinds) and all(kind in DIVERGENCES for kind in kinds.values()),
        "divergence",
        f"use {list(DIVERGENCES)} or a mapping from data_source to one of them",
    )
    need(0 < config.jsd_beta < 1, "jsd_beta", "it lies between 0 and 1; the ends are KLs by name")
    need(0 < config.skew_alpha < 1, "skew_alpha", "it lies between 0 and 1; the ends are KLs by name")
    one_of("teacher_reduction", ("sum", "mixture"))
    one_of("contexts", ("plain", "debate"))
    need(
        config.contexts == "plain" or config.method in ("sage_opd", "uni_opd"),
        "contexts",
        "only 'sage_opd' and 'uni_opd' can take over a debate; 'mad_opd' and 'opad' always debate",
    )
    need(config.divergence_temperature > 0, "divergence_temperature", "it must be positive")
    one_of("loss_normalization", ("token", "sequence"))
    one_of("on_teacher_failure", ("stop", "drop"))
    one_of("lr_scheduler_type", SCHEDULERS)
    one_of("dtype", DTYPES)
    one_of("vllm_mode", ("colocate", "server"))
    need(config.vllm_response_timeout > 0, "vllm_response_timeout", "it must be positive")
    need(config.verifier_timeout > 0, "verifier_timeout", "it is a number of seconds")
    need(config.verifier != {}, "verifier", "map data_sources (and 'default') to verifiers, or name one")
    need(config.max_staleness >= 0, "max_staleness", "0 is strictly in turn")
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
    for tracker in config.report_to:
        need(tracker == "tensorboard", "report_to", "only 'tensorboard' is known")
    for key in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_tokens_per_batch",
        "max_steps",
        "max_completion_length",
        "num_generations",
        "max_prompt_length",
        "verifier_workers",
        "logging_steps",
        "debate.rounds",
        "debate.max_tokens",
        "environment.max_turns",
        "environment.num_environments",
        "environment.max_observation_chars",
    ):
        section, _, name = key.rpartition(".")
        owner = getattr(config, section) if section else config
        need(getattr(owner, name) >= 1, key, "it must be at least 1")
    for prefix, sampling in (("", config), ("debate.", config.debate)):
        need(sampling.temperature >= 0, f"{prefix}temperature", "it must be 0 (greedy) or positive")
        need(0 < sampling.top_p <= 1, f"{prefix}top_p", "it lies in (0, 1]; 1 keeps every token")
        need(sampling.top_k >= 0, f"{prefix}top_k", "it must not be negative; 0 keeps every token")
        need(sampling.repetition_penalty > 0, f"{prefix}repetition_penalty", "it must be positive; 1 is off")
    need(config.debate.tau > 0, "debate.tau", "it must be positive; large values are uniform")
    need(
        config.num_generations == 1 or config.temperature > 0,
        "num_generations",
        "with temperature 0 all generations are equal: use 1",
    )
    if config.lora is not None:
        need(config.lora.r >= 1, "lora.r", "it must be at least 1")
        need(config.lora.lora_alpha > 0, "lora.lora_alpha", "it must be positive")
        need(0 <= config.lora.lora_dropout < 1, "lora.lora_dropout", "it lies in [0, 1); 0 is off")
        need(bool(config.lora.target_modules), "lora.target_modules", "name at least one layer, or 'all-linear'")
    need(config.learning_rate >= 0, "learning_rate", "it must not be negative")
    need(0 <= config.warmup_ratio <= 1, "warmup_ratio", "it is a share between 0 and 1")
    need(config.max_grad_norm > 0, "max_grad_norm", "it must be positive")
    need(config.weight_decay >= 0, "weight_decay", "it must not be negative")
    need(0 <= config.adam_beta1 < 1, "adam_beta1", "it lies in [0, 1)")
    need(0 <= config.adam_beta2 < 1, "adam_beta2", "it lies in [0, 1)")
    need(config.adam_epsilon > 0, "adam_epsilon", "it must be positive")
    need(config.seed >= 0, "seed", "it must not be negative")
    need(config.ddp_timeout > 0, "ddp_timeout", "it is a number of seconds")
    need(config.max_bad_steps >= 0, "max_bad_steps", "it must not be negative; 0 ends the run at the first one")
    need(config.max_logprob_difference > 0, "max_logprob_difference", "it must be positive")
    choices = (
        ("opad.sampling", config.opad.sampling, ("all", "uniform", "surprise")),
        ("sage.normalization", config.sage.normalization, ("all_tokens", "active_tokens", "none")),
        ("sage.normalization_scope", config.sage.normalization_scope, ("batch", "trajectory")),
        ("sage.intervention", config.sage.intervention, ("judge", "random", "inverted")),
    )
    for key, value, possible in choices:
        need(value in possible, key, f"choose one of {list(possible)}")
    steps = config.opad.steps_per_trajectory
    need(steps is None or steps >= 1, "opad.steps_per_trajectory", "it must be at least 1, or null for all")
    need(0 <= config.sage.alpha <= 1, "sage.alpha", "it lies between SKIP's 0 and STRONG's 1")
    need(0 <= config.sage.judge_fallback <= 1, "sage.judge_fallback", "it lies between 0 and 1")
    need(config.sage.eps > 0, "sage.eps", "it must be positive")
    need(config.sage.judge_max_tokens >= 1, "sage.judge_max_tokens", "it must be at least 1")
    need(
        config.sage.confidence_temperature > 0,
        "sage.confidence_temperature",
        "at 0 every confidence is 1: set sage.use_confidence to false for that",
    )
    secret = sorted(k for k, v in config.environment.options.items() if k.lower() in SECRETS and v)
    if secret:
        raise ConfigError(
            f"environment.options.{secret[0]} looks like a secret, and settings are written to the run's folder; let "
            "the environment read it from a variable of the shell"
        )
    need(config.tcod.k_start >= 1, "tcod.k_start", "it must be at least 1")
    need(config.environment.step_timeout > 0, "environment.step_timeout", "it is a number of seconds")
    need(config.environment.reset_timeout > 0, "environment.reset_timeout", "it is a number of seconds")
    need(
        all(t >= 0 for t in config.environment.eval_temperatures) and bool(config.environment.eval_temperatures),
        "environment.eval_temperatures",
        "give at least one; 0 is greedy",
    )
    for key in (
        "save_total_limit",
        "eval_max_prompts",
        "workspace_bytes",
        "environment.eval_max_tasks",
        "environment.max_trajectory_tokens",
    ):
        section, _, name = key.rpartition(".")
        value = getattr(getattr(config, section) if section else config, name)
        need(value is None or value >= 1, key, "it must be at least 1, or null for no limit")
    for key in ("eval_steps", "save_steps"):
        need(getattr(config, key) >= 0, key, "it must not be negative; 0 is never")
    for i, teacher in enumerate(config.teachers):
        _check_teacher(config, teacher, f"teachers.{i}")
    if config.environment.name:
        need(not config.train_data, "train_data", "the tasks come from the environment; leave it out")
        need(not config.eval_data, "eval_data", "use environment.eval_splits")
    else:
        need(bool(config.train_data), "train_data", "name at least one file, or an environment")


def _check_teacher(config: TrainConfig, teacher: TeacherConfig, where: str) -> None:
    def need(ok: bool, key: str, remedy: str) -> None:
        if not ok:
            raise ConfigError(f"{where}.{key}={getattr(teacher, key)!r} is not possible; {remedy}")

    need(teacher.dtype in DTYPES, "dtype", f"choose one of {list(DTYPES)}")
    need(teacher.max_concurrency >= 1, "max_concurrency", "it must be at least 1")
    need(teacher.timeout > 0, "timeout", "it is a number of seconds")
    need(teacher.max_retries >= 0, "max_retries", "it must not be negative; 0 is one attempt")
    need(teacher.score_top_k >= 1, "score_top_k", "it must be at least 1")
    if teacher.base_url is None:
        for key in ("tokenizer", "api_key_env"):
            need(getattr(teacher, key) is None, key, "it belongs to a served teacher; set base_url too")
        return
    url = urlsplit(teacher.base_url)
    if url.username or url.password or url.query:
        raise ConfigError(f"{where}.base_url holds a credential or a query; put the key's variable into api_key_env")
    need(url.scheme in ("http", "https") and bool(url.netloc), "base_url", "give a URL such as http://host:8000/v1")
    need(not teacher.offload, "offload", "the weights of a served teacher are not here")
    if config.method == "mt_seqkd":
        return  # its teachers write and never judge
    exact = "a served teacher tells its likeliest tokens only; use a local teacher"
    if config.divergence_temperature != 1.0:
        raise ConfigError(
            f"divergence_temperature={config.divergence_temperature} is not possible with {where}: {exact}, or 1.0"
        )
    if config.teacher_reduction == "mixture":
        raise ConfigError(f"teacher_reduction='mixture' is not possible with {where}: {exact}, or 'sum'")
