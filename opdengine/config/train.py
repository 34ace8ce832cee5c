"""Everything a run can be told, as one tree of sections (read by :mod:`opdengine.config.loading`).

Names follow Hugging Face's ``TrainingArguments`` and TRL where they have one. Unknown keys and impossible values are
errors that name the remedy, raised before any model is loaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from opdengine.config.fields import (
    BY_SHAPE,
    IMPOSSIBLE,
    AsMapping,
    AsText,
    Choice,
    Count,
    CountOrNone,
    Filled,
    FilledPath,
    Flag,
    Free,
    Integer,
    Listed,
    Maybe,
    Name,
    NeededPath,
    Penalty,
    PerKey,
    Positive,
    PositiveOrInf,
    Range,
    Real,
    Refused,
    Seconds,
    Seed,
    Share,
    Temperature,
    Text,
    TopK,
    TopP,
    unwrapped,
)
from opdengine.config.method_sections import (
    AdvantageConfig,
    CaMOPDConfig,
    DebateConfig,
    EntropyConfig,
    EOPDConfig,
    GkdConfig,
    GoldConfig,
    GOPDConfig,
    GrpoConfig,
    MTSeqKDConfig,
    OpadConfig,
    RelaxedOPDConfig,
    SageConfig,
    SdftConfig,
    SdpoConfig,
    SelecTKDConfig,
    TcodConfig,
    UniOPDConfig,
)
from opdengine.config.secrecy import refuse_secrets
from opdengine.config.section import ByContent, Changeable, Elsewhere, Extendable, Resumable, Section, settings
from opdengine.config.sections import (
    SELF,
    DataConfig,
    Dtype,
    EnvironmentConfig,
    Images,
    LoRAConfig,
    TeacherConfig,
    by_key,
    is_address,
)
from opdengine.config.yaml_text import Written
from opdengine.errors import ConfigError
from opdengine.types import DIVERGENCES

__all__ = ["ConfigError", "DebateConfig", "LoRAConfig", "SageConfig", "TeacherConfig", "TrainConfig", "by_key"]

MOST_PER_STEP = 10**7
"""Rollouts of one step on one device."""

TRACKERS = ("tensorboard", "wandb", "trackio")
Middle = Annotated[
    Real, Range(0, 1, open_low=True, open_high=True, remedy="it lies between 0 and 1; the ends are KLs by name")
]
Beta = Annotated[Real, Range(0, 1, open_high=True)]
Source = Annotated[Annotated[Text, AsText] | Annotated[DataConfig, AsMapping], BY_SHAPE]
Parallel = Annotated[Integer, Range(1, 1024)]


def _known(divergence: str | dict[str, str]) -> str | dict[str, str]:
    """Refuse what is no divergence."""
    kinds = divergence.values() if isinstance(divergence, dict) else [divergence]
    if not kinds or not all(kind in DIVERGENCES for kind in kinds):
        remedy = f"use {list(DIVERGENCES)} or a mapping from data_source to one of them"
        raise Refused(IMPOSSIBLE + remedy, value=divergence)
    return divergence


def _by_name(teacher: Any) -> Any:
    """A name alone stands for a teacher of that model."""
    return {"model": teacher} if isinstance(unwrapped(teacher), (str, Written)) else teacher


TeacherOrName = Annotated[TeacherConfig, BeforeValidator(_by_name)]


def _named(teachers: list[TeacherConfig]) -> list[TeacherConfig]:
    """Give every teacher a name and refuse doubles."""
    named = [t if t.name else dataclasses.replace(t, name=Path(t.model).name or t.model) for t in teachers]
    names = [t.name for t in named]
    if doubles := sorted({n for n in names if names.count(n) > 1}):
        raise Refused(f"teachers share the name {doubles}; give each teacher its own name")
    return named


@settings
class TrainConfig(Section):
    """Everything a run depends on.

    Settings that are read (:func:`opdengine.config.loading.from_mapping`) and do not name a value take that of the
    method's paper first; the defaults here are those of methods without one, and of a class that is built by hand.
    """

    model: Annotated[ByContent[NeededPath], Elsewhere({"model_name_or_path": ""})]
    """the student: model folder or hub name."""
    output_dir: Resumable[NeededPath]
    """where the run is written; an existing run is resumed or refused."""
    train_data: Annotated[Listed[Source], Elsewhere({"dataset_name": " (name:split, or a file)"})] = field(
        default_factory=list
    )
    """sources of prompts: JSONL or Parquet files, or ``datasets`` folders, with a ``prompt`` or ``messages`` column and
    optionally ``id, tools, answer, data_source``. Sections of :class:`DataConfig` also read the layouts of public data
    sets."""
    teachers: Annotated[Listed[TeacherOrName], AfterValidator(_named)] = field(default_factory=list)
    """the models that judge the student, and debate; a name alone stands for a teacher with nothing but ``model``."""
    method: Name = "mad_opd"
    """one of "opd", "mt_opd", "mt_seqkd", "mad_opd", "opad", "sage_opd", "tcod", "entropy_opd", "eopd", "uni_opd",
    "camopd", "sdft", "sdpo", "opsd", "grpo", "gkd", "g_opd", "relaxed_opd", "selectkd", "gold", or a class of your own:
    "module:Class" or "file.py:Class"."""
    method_options: Free = field(default_factory=dict)
    """keywords of a method of your own."""
    contexts: Choice[Literal["plain", "debate"]] = "plain"
    """under what the teachers of "sage_opd", "uni_opd", "sdft" and "opsd" judge: the "plain" prompt, or the transcript
    and weights of a "debate" as in MAD-OPD."""
    teacher_prompt_template: Changeable[Maybe[Filled]] = None
    """what teachers read in place of the last message of the user (the student never sees it): a format string with
    ``{prompt}``, that message, and ``{privileged_context}``, ``{answer}`` or any other column of the row; null is the
    plain prompt."""
    divergence: Annotated[
        Changeable[PerKey[Text]],
        AfterValidator(_known),
        Elsewhere({"beta": " (0 is forward_kl, 1 reverse_kl, between them jsd with jsd_beta)"}),
    ] = "reverse_kl"
    """one of "reverse_kl", "forward_kl", "jsd", "skew_kl", or a mapping from routing key (and "default") to one: the
    task-adaptive divergence of MAD-OPD, remark 1."""
    jsd_beta: Changeable[Middle] = 0.5
    """weight of the teacher in the middle distribution of the JSD."""
    skew_alpha: Changeable[Middle] = 0.1
    """weight of the teacher in the middle distribution of the skew KL."""
    teacher_reduction: Changeable[Choice[Literal["sum", "mixture"]]] = "sum"
    """the "sum" of the teachers' divergences (the papers) or divergence to the "mixture" of the teachers."""
    divergence_temperature: Changeable[Annotated[Real, Range(0.01, 1000)]] = 1.0
    """divides both models' logits in the loss; independent of sampling."""
    on_teacher_failure: Resumable[Choice[Literal["stop", "drop"]]] = "stop"
    """when a served teacher's call fails for good: "stop" with a checkpoint of the last finished step, or "drop" the
    teacher from the rollouts concerned (counted)."""
    loss_normalization: Changeable[Choice[Literal["token", "sequence"]]] = "token"
    """mean over all target tokens of the step ("token"), or over rollouts of token means ("sequence")."""
    debate: Changeable[DebateConfig] = field(default_factory=DebateConfig)
    """how teachers debate, for "mad_opd", "opad" and ``contexts: debate``."""
    advantage: Changeable[AdvantageConfig] = field(default_factory=AdvantageConfig)
    """how ``uni_opd``, ``camopd``, ``sdpo``, ``g_opd``, ``relaxed_opd`` and ``gold`` weigh sampled tokens."""
    uni_opd: Changeable[UniOPDConfig] = field(default_factory=UniOPDConfig)
    """settings of the method "uni_opd"."""
    camopd: CaMOPDConfig = field(default_factory=CaMOPDConfig)
    """settings of the method "camopd"."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """where the student acts over many turns."""
    opad: Changeable[OpadConfig] = field(default_factory=OpadConfig)
    """settings of the method "opad"."""
    sage: Changeable[SageConfig] = field(default_factory=SageConfig)
    """settings of the method "sage_opd"."""
    mt_seqkd: Changeable[MTSeqKDConfig] = field(default_factory=MTSeqKDConfig)
    """settings of the method "mt_seqkd"."""
    tcod: Changeable[TcodConfig] = field(default_factory=TcodConfig)
    """settings of the method "tcod"."""
    entropy_opd: Changeable[EntropyConfig] = field(default_factory=EntropyConfig)
    """settings of the method "entropy_opd"."""
    eopd: Changeable[EOPDConfig] = field(default_factory=EOPDConfig)
    """settings of the method "eopd"."""
    sdft: Changeable[SdftConfig] = field(default_factory=SdftConfig)
    """settings of the method "sdft"."""
    sdpo: Changeable[SdpoConfig] = field(default_factory=SdpoConfig)
    """settings of the method "sdpo"."""
    grpo: Changeable[GrpoConfig] = field(default_factory=GrpoConfig)
    """the group-relative policy gradient: beside any method, alone ("grpo"), and in "sdpo"."""
    gkd: Changeable[GkdConfig] = field(default_factory=GkdConfig)
    """how answers of the student are mixed with given ones: beside any method with a divergence, and in "gkd"."""
    g_opd: Changeable[GOPDConfig] = field(default_factory=GOPDConfig)
    """settings of the method "g_opd"."""
    relaxed_opd: Changeable[RelaxedOPDConfig] = field(default_factory=RelaxedOPDConfig)
    """settings of the method "relaxed_opd"."""
    selectkd: Changeable[SelecTKDConfig] = field(default_factory=SelecTKDConfig)
    """settings of the method "selectkd"."""
    gold: Changeable[GoldConfig] = field(default_factory=GoldConfig)
    """how the divergence to teachers with ``tokenizer_alignment: spans`` is taken."""

    dtype: Annotated[Dtype, Elsewhere({"torch_dtype": ""})] = "auto"
    """of the student's parameters; "auto" keeps the checkpoint's (float32 where that is float16)."""
    bf16: Changeable[Annotated[Flag, Elsewhere({"fp16": ", or neither"})]] = False
    """autocast forward and backward to bfloat16 (parameters keep ``dtype``), in the sampler, too."""
    lora: Maybe[LoRAConfig] = None
    """train an adapter and leave the student's weights as they are; null trains them all."""
    freeze_head: Flag = False
    """do not train the output embedding (where it is tied, the input embedding neither); the loss then computes no
    gradient of it. With ``lora`` it is always frozen."""
    images: Images = "image"
    """what the student reads where a message has a picture: the "image", the "text" in its place (column
    ``image_text``), or nothing ("omit")."""
    freeze_vision_tower: Flag = True
    """of a student that sees, train its language model and leave the part that reads pictures as it is."""
    attn_implementation: Resumable[Filled] = "auto"
    """of transformers; "auto" takes flash-attn on a GPU where installed, else SDPA."""
    trust_remote_code: Flag = False
    """run code that comes with a model."""
    chat_template: Changeable[Maybe[FilledPath]] = None
    """Jinja text or file in place of the student tokenizer's own."""
    chat_template_kwargs: Free = field(default_factory=dict)
    """handed to the student's chat template."""

    eval_data: Resumable[Listed[Source]] = field(default_factory=list)
    """like ``train_data``, with an ``answer`` column; ``train_data`` is never evaluated in its place."""
    eval_temperature: Resumable[Temperature] = 0.0
    """of the answers to ``eval_data``; 0 is greedy."""
    eval_num_generations: Resumable[Count] = 1
    """answers to each evaluation prompt; the accuracy is their mean."""
    eval_max_prompts: Resumable[Maybe[Count]] = None
    """evaluate on at most this many prompts."""
    max_prompt_length: Annotated[Count, Elsewhere({"max_length": " and max_completion_length"})] = 4096
    """prompts with more tokens are left out and counted."""
    skip_bad_rows: Flag = False
    """leave out malformed rows (counted) instead of refusing the file."""
    verifier: Changeable[PerKey[Filled]] = "exact_match"
    """how an answer is graded: "exact_match", "numeric", "choice", "math", "code", "reasoning_gym", "bfcl", "evalplus",
    "module:function" or "file.py:function"; or a mapping from routing key (and "default") to one of these."""
    verifier_timeout: Changeable[Seconds] = 30.0
    """seconds that grading one completion may take; longer counts as failed (score 0)."""
    verifier_workers: Resumable[Parallel] = 4
    """processes that grade."""
    verifier_allow_unsandboxed: Changeable[Flag] = False
    """let the "code" verifier run the model's programs where the system offers no isolation; they can then read and
    delete your files."""

    temperature: Changeable[Temperature] = 1.0
    """of the student's sampling; 0 is greedy."""
    top_p: Changeable[TopP] = 1.0
    """sample the student from its likeliest tokens that hold this share of the probability."""
    top_k: Changeable[TopK] = 0
    """sample the student from this many likeliest tokens; 0 is all."""
    repetition_penalty: Changeable[Penalty] = 1.0
    """lowers the logits of tokens that the student has read or written; 1 is off."""
    max_completion_length: Annotated[Changeable[Count], Elsewhere({"max_new_tokens": ""})] = 512
    """most new tokens of a rollout."""
    num_generations: Changeable[Count] = 1
    """rollouts per prompt."""
    use_vllm: Changeable[Flag] = False
    """sample with vLLM instead of transformers."""
    vllm_mode: Changeable[Choice[Literal["colocate", "server"]]] = "colocate"
    """where vLLM runs: beside the trainer ("colocate"), or as the "server" that was started by
    ``opdengine vllm-serve``, the same for all processes."""
    vllm_server_base_url: Resumable[Text] = "http://127.0.0.1:8000"
    """address of that server, or ``unix:/path`` of its socket."""
    vllm_sync_dir: Resumable[Maybe[FilledPath]] = None
    """folder for weight files, which that server must be able to read; default: shared memory or the temporary folder
    of the first process's machine."""
    vllm_response_timeout: Resumable[Seconds] = 3600.0
    """seconds after which vLLM counts as hanging in one call."""
    vllm_gpu_memory_utilization: Resumable[Annotated[Real, Range(0, 1, open_low=True)]] = 0.3
    """share of the GPU's memory for colocated vLLM."""
    vllm_tensor_parallel_size: Parallel = 1
    """GPUs per colocated vLLM engine. With several processes, so many neighbours on a machine share an engine on their
    GPUs."""
    vllm_enable_sleep_mode: Resumable[Flag] = False
    """give the GPU's memory to the trainer while vLLM does not sample; not possible with an engine that several
    processes share."""
    max_staleness: Changeable[Annotated[Integer, Range(0, 1000, remedy="0 is strictly in turn, 1000 the most")]] = 0
    """updates that may lie between the weights that sample a batch and those that it updates. 0: strictly in turn. From
    1 on, rollouts and debates of the next batches run during the update (useful with vLLM and served teachers, which
    work elsewhere)."""

    distillation_is_clip: Changeable[Maybe[Positive]] = None
    """multiply the divergence at each token of a rollout from older weights by min(r, this), where r is the ratio of
    its probabilities under the policy now and the policy that sampled; null multiplies by nothing. With
    ``max_staleness`` 0 every r is 1. (Advantages have ``advantage.importance``.)"""

    per_device_train_batch_size: Resumable[Count] = 8
    """prompts per device and accumulation step."""
    gradient_accumulation_steps: Resumable[Count] = 1
    """multiplies the prompts of an optimiser step."""
    max_tokens_per_batch: Resumable[Count] = 16384
    """token budget of one forward and backward pass."""
    max_steps: Extendable[Count] = 100
    """optimiser steps. A resumed run may have more, or fewer, than before; see ``changed_schedule``."""
    num_train_epochs: Extendable[Maybe[Annotated[Real, Range(0, 1e6, open_low=True)]]] = None
    """in place of ``max_steps``: how often the training data are passed through. The run counts the steps from it when
    it has read the data, and keeps that number."""
    changed_schedule: Resumable[Choice[Literal["continue", "restart"]]] = "continue"
    """what becomes of the learning rate where a resumed run has other ``max_steps`` or another schedule: "continue"
    goes on as if it had been so from the beginning (the rate may jump), "restart" begins the schedule anew, warm-up
    included, over the steps that are left."""
    learning_rate: Changeable[Annotated[Real, Range(0, 10)]] = 1e-5
    """of AdamW, at its highest."""
    lr_scheduler_type: Changeable[Choice[Literal["constant", "constant_with_warmup", "linear", "cosine"]]] = "cosine"
    """how the learning rate changes: "constant", "constant_with_warmup", "linear" or "cosine", as in transformers."""
    warmup_ratio: Annotated[Changeable[Share], Elsewhere({"warmup_steps": ""})] = 0.05
    """share of the steps over which the learning rate rises from 0."""
    weight_decay: Changeable[Annotated[Real, Range(0, 100)]] = 0.01
    """of AdamW; norms and biases are not decayed."""
    adam_beta1: Changeable[Beta] = 0.9
    """of AdamW: decay of the mean gradient."""
    adam_beta2: Changeable[Beta] = 0.999
    """of AdamW: decay of the mean squared gradient."""
    adam_epsilon: Changeable[Annotated[Real, Range(1e-20, 1)]] = 1e-8
    """of AdamW: added to the denominator."""
    max_grad_norm: Changeable[PositiveOrInf] = 1.0
    """longer gradients are scaled down to this norm."""
    gradient_checkpointing: Resumable[Flag] = False
    """trade compute for memory."""
    vocab_parallel_head: Resumable[Flag] = False
    """with several processes, split the student's head by vocabulary instead of gathering it: the update needs no whole
    weight or gradient of it, and the hidden states of a micro-batch are gathered instead. Runs the torch implementation
    of the fused loss."""
    loss_impl: Resumable[Choice[Literal["auto", "triton", "torch", "reference"]]] = "auto"
    """implementation of the fused loss: "auto", "triton", "torch" or "reference"."""
    workspace_bytes: Resumable[Maybe[Annotated[Integer, Range(1, 2**50)]]] = None
    """byte budget for temporaries of the fused loss."""
    vocab_sample: Changeable[Annotated[Real, Range(0, 1, open_high=True)]] = 0.0
    """share of the vocabulary from which the gradient of an exact divergence is computed: unbiased, for that share of
    its products; 0 is all of it. The metric `gradient_noise` is the distance of a micro-batch's gradient from the exact
    one, as a share of it. With the reverse KL the loss and the teachers' statistics come from a sample of the rows."""
    seed: Seed = 0
    """of data order, sampling and initialisation."""

    logging_steps: Resumable[Count] = 1
    """write metrics every so many steps."""
    eval_steps: Annotated[Resumable[CountOrNone], Elsewhere({"eval_strategy": " (0: only before and after)"})] = 0
    """evaluate every so many steps, before the first and after the last one; 0 leaves it at those two."""
    save_steps: Annotated[Resumable[CountOrNone], Elsewhere({"save_strategy": " (0: never)"})] = 0
    """write a checkpoint every so many steps, and after the last one; 0 is never."""
    save_total_limit: Resumable[Maybe[Count]] = None
    """keep the newest so many checkpoints, and the best one; None keeps all."""
    metric_for_best_model: Resumable[Maybe[Filled]] = None
    """a metric of the evaluations, such as "eval/accuracy": after every evaluation that is the best so far a checkpoint
    is written, which ``save_total_limit`` never removes."""
    greater_is_better: Resumable[Maybe[Flag]] = None
    """whether more of that metric is better; null: yes, unless it is a loss, a rate of failures or a count of turns."""
    load_best_model_at_end: Resumable[Flag] = False
    """let ``final/`` be the best checkpoint's model instead of the last one."""
    early_stopping_patience: Resumable[Maybe[Count]] = None
    """end the run after so many evaluations in a row that did not improve ``metric_for_best_model``; null: never."""
    early_stopping_threshold: Resumable[Annotated[Real, Range(0, 1e6)]] = 0.0
    """what is better by no more than this is no improvement."""
    log_completions: Resumable[Flag] = True
    """write rollouts and debates of each step as JSONL."""
    log_tokens: Resumable[Choice[Literal["none", "sample", "all"]]] = "sample"
    """with ``log_completions``, also write token ids, log-probs, weights and advantages: of no rollout ("none"), of 8
    of each step ("sample"), or of "all", from which the loss of every step can be recomputed."""
    print_completions_steps: Resumable[CountOrNone] = 0
    """show one completion every so many steps, where the run is watched; 0 is never."""
    report_to: Resumable[Listed[Text]] = field(default_factory=list)
    """besides metrics.jsonl: any of "tensorboard", "wandb" (Weights & Biases) and "trackio"."""
    run_name: Resumable[Text] = ""
    """shown by trackers; default: the name of ``output_dir``."""
    project: Resumable[Maybe[Filled]] = None
    """of the trackers; default: their variables WANDB_PROJECT and TRACKIO_PROJECT, else "opdengine"."""
    push_to_hub: Annotated[
        Resumable[Flag], Elsewhere({"hub_token": " (log in with 'hf auth login', or set HF_TOKEN)"})
    ] = False
    """push ``final/`` to the Hugging Face hub at the end; whether that may be is asked before the first step."""
    hub_model_id: Resumable[Maybe[Filled]] = None
    """OWNER/NAME of the repository; default: the name of ``output_dir``, of whoever is logged in."""
    hub_private_repo: Annotated[Resumable[Maybe[Flag]], Elsewhere({"hub_private": ""})] = None
    """whether that repository is private; null: as the owner's new ones are."""
    resume_from_checkpoint: Resumable[Maybe[FilledPath]] = None
    """the checkpoint folder to continue from, or "latest" (the newest that is whole; from the beginning where there is
    none yet)."""
    allow_changes: Resumable[Flag] = False
    """let a resumed run have other values of settings that change what is learned, but not the order of the data (✎
    in docs/settings.md); each is named in ``changes.jsonl``."""
    ddp_timeout: Resumable[Seconds] = 7200.0
    """seconds that one process may wait for another (``torchrun``), rollouts and debates included."""
    max_bad_steps: Resumable[CountOrNone] = 3
    """more steps in a row than this that train nothing end the run: of which the loss or gradient is not finite (they
    move no weight and are written to ``bad_steps/``), every episode broke, no rollout is left or has weight, or the
    gradient or the update is 0. A run of which no step trains anything fails always."""
    max_logprob_difference: Resumable[PositiveOrInf] = 0.5
    """stop when sampler and trainer disagree by more (mean absolute difference of a step, nats)."""

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one optimiser step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def debates(self) -> bool:
        """Whether the teachers debate."""
        return self.method in ("mad_opd", "opad") or self.contexts == "debate"

    def as_loaded(self, teacher: TeacherConfig) -> TeacherConfig:
        """A teacher with the model and, where it has none of its own, the template that it is loaded with.

        Only ``model: self`` becomes another: the student's.
        """
        if teacher.model != SELF:
            return teacher
        kwargs = {**self.chat_template_kwargs, **teacher.chat_template_kwargs}
        template = teacher.chat_template or self.chat_template
        return dataclasses.replace(teacher, model=self.model, chat_template=template, chat_template_kwargs=kwargs)

    def shares_student(self, teacher: TeacherConfig) -> bool:
        """Whether a teacher reads the student's own parameters, where one process holds them."""
        return teacher.weights == "live" or (teacher.weights == "base" and self.lora is not None)

    def require_train_data(self) -> None:
        """Raise ConfigError unless there is something to train on, which not every command needs."""
        if not self.train_data and not self.environment.name:
            raise ConfigError("train_data=[] is not possible; name at least one file, or an environment")

    def divergence_of(self, key: str) -> str:
        """The divergence that prompts with this routing key are trained with.

        Raises:
            ConfigError: the mapping has neither the key nor "default".
        """
        return str(by_key(self.divergence, key, "divergence"))

    def __post_init__(self) -> None:
        refuse_secrets(dataclasses.asdict(self))
        _check_loss(self)
        _check_sampling(self)
        _check_data(self)
        _check_best(self)
        for i, teacher in enumerate(self.teachers):
            _check_teacher(self, teacher, f"teachers.{i}")


def _check_loss(config: TrainConfig) -> None:
    need = config.need
    need(
        config.contexts == "plain" or config.method in ("sage_opd", "uni_opd", "sdft", "opsd"),
        "contexts",
        "only 'sage_opd', 'uni_opd', 'sdft' and 'opsd' can take over a debate; 'mad_opd' and 'opad' always debate",
    )
    need(
        not config.vocab_parallel_head or config.loss_impl in ("auto", "torch"),
        "loss_impl",
        "with vocab_parallel_head it is 'torch'",
    )
    need(config.log_completions or config.log_tokens != "all", "log_tokens", "it belongs to log_completions: true")
    sampled = config.vocab_sample > 0
    need(not sampled or config.loss_impl != "reference", "vocab_sample", "loss_impl 'reference' computes every column")
    need(
        not sampled or (config.method != "mt_seqkd" and any(teacher.judges_exactly for teacher in config.teachers)),
        "vocab_sample",
        "it is for divergences to teachers that judge exactly, and none does: use 0",
    )
    hub = config.hub_model_id is None and config.hub_private_repo is None
    need(config.push_to_hub or hub, "push_to_hub", "hub_model_id and hub_private_repo belong to push_to_hub: true")
    trackers = config.report_to
    known = set(trackers) <= set(TRACKERS) and len(set(trackers)) == len(trackers)
    need(known, "report_to", f"it lists some of {list(TRACKERS)}, each once; [] is metrics.jsonl alone")


def _check_sampling(config: TrainConfig) -> None:
    need = config.need
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
    need(
        config.num_generations == 1 or config.temperature > 0,
        "num_generations",
        "with temperature 0 all generations are equal: use 1",
    )
    need(
        config.prompts_per_step * config.num_generations <= MOST_PER_STEP,
        "per_device_train_batch_size",
        f"with gradient_accumulation_steps={config.gradient_accumulation_steps} and num_generations="
        f"{config.num_generations} a step has more than {MOST_PER_STEP} rollouts",
    )
    need(is_address(config.vllm_server_base_url), "vllm_server_base_url", "write http://host:port or unix:/path")


def _check_data(config: TrainConfig) -> None:
    need = config.need
    need(config.verifier != {}, "verifier", "map data_sources (and 'default') to verifiers, or name one")
    need(
        config.eval_num_generations == 1 or config.eval_temperature > 0,
        "eval_num_generations",
        "with eval_temperature 0 all answers are equal: use 1",
    )
    if config.environment.name:
        need(not config.train_data, "train_data", "the tasks come from the environment; leave it out")
        need(not config.eval_data, "eval_data", "use environment.eval_splits")


def _check_own(config: TrainConfig, teacher: TeacherConfig, where: str) -> None:
    """Refuse what a run cannot do with the student as its own teacher."""

    def need(ok: bool, key: str, remedy: str) -> None:
        config.need(ok, f"{where}.{key}", remedy, getattr(teacher, key))

    need(teacher.model == SELF or teacher.weights is None, "weights", "they belong to model: self")
    if config.shares_student(teacher):
        for key in ("dtype", "offload", "shard"):
            plain = getattr(teacher, key) == getattr(TeacherConfig, key)
            need(plain, key, f"weights: {teacher.weights} are the student's own parameters here; leave it out")
    if teacher.weights == "ema" or config.shares_student(teacher):
        ahead = "max_staleness above 0 has teachers asked while the student is updated, and these weights change then"
        need(config.max_staleness == 0, "weights", f"{ahead}; use 0, or base without lora")
    told = config.teacher_prompt_template is not None or config.debates or config.method == "sdpo"
    need(
        teacher.weights != "live" or told or ":" in config.method,
        "weights",
        "under the student's own prompt its present weights agree with it in every token, so nothing would be learned; "
        "set teacher_prompt_template, or use base or ema",
    )


def _check_best(config: TrainConfig) -> None:
    need, metric = config.need, config.metric_for_best_model
    if metric is None:
        need(not config.load_best_model_at_end, "load_best_model_at_end", "name the metric: metric_for_best_model")
        need(config.early_stopping_patience is None, "early_stopping_patience", "name the metric_for_best_model")
        need(config.greater_is_better is None, "greater_is_better", "it belongs to metric_for_best_model")
        return
    evaluates = config.eval_steps > 0 and (config.eval_data or config.environment.eval_splits)
    need(bool(evaluates), "metric_for_best_model", "nothing is evaluated while the run goes on: set eval_steps, and "
         "eval_data or environment.eval_splits")  # fmt: skip


def _check_stored(config: TrainConfig, teacher: TeacherConfig, where: str) -> None:
    """Refuse a folder of judgements where no answer comes twice; what own methods judge is not known."""
    if teacher.stored is None or ":" in config.method:
        return

    def need(ok: bool, key: str, remedy: str) -> None:
        config.need(ok, f"{where}.{key}", remedy, getattr(teacher, key))

    need(config.method != "mt_seqkd", "stored", "the teachers of 'mt_seqkd' write and never judge; leave it out")
    anew = "what the student samples is judged once and never again; only given answers come again: set gkd.lmbda"
    need(config.gkd.lmbda < 1, "stored", f"{anew} below 1, or leave it out")
    if teacher.stored_only:
        need(config.gkd.lmbda == 0, "stored_only", f"{anew}: 0, or leave it out")
        need(not config.gkd.seq_kd, "stored_only", "with gkd.seq_kd the teachers write, which is not stored")


def _check_teacher(config: TrainConfig, teacher: TeacherConfig, where: str) -> None:
    _check_stored(config, teacher, where)
    if teacher.judges_exactly:
        _check_own(config, teacher, where)
        sharded = teacher.shard and config.max_staleness > 0
        config.need(not sharded, f"{where}.shard", "it calls for max_staleness: 0", teacher.shard)
        return
    if config.method == "mt_seqkd":
        return  # its teachers write and never judge
    exact = "a served teacher tells its likeliest tokens only; use a local teacher, or hidden_states_url"
    if config.divergence_temperature != 1.0:
        raise ConfigError(
            f"divergence_temperature={config.divergence_temperature} is not possible with {where}: {exact}, or 1.0"
        )
    if config.teacher_reduction == "mixture":
        raise ConfigError(f"teacher_reduction='mixture' is not possible with {where}: {exact}, or 'sum'")
