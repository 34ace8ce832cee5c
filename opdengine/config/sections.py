"""Settings that belong to no method: data, teachers, environment, adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from opdengine.config.fields import (
    BY_SHAPE,
    TEMPERATURE,
    AsList,
    AsText,
    Choice,
    Count,
    Factor,
    Filled,
    FilledPath,
    Flag,
    Free,
    Integer,
    Listed,
    Mapped,
    Maybe,
    NeededPath,
    Positive,
    Range,
    Real,
    Refused,
    Seconds,
    Text,
)
from opdengine.config.section import ByContent, Changeable, Elsewhere, Resumable, Section, settings
from opdengine.errors import ConfigError

DATA_COLUMNS = ("id", "prompt", "messages", "tools", "answer", "data_source", "images", "image_text")
"""What a row of data may say to the engine; other columns are handed to environments, templates and methods."""

MAPPED_COLUMNS = (*DATA_COLUMNS, "completion", "privileged_context")
"""What ``columns`` may fill: those of the engine, and those that methods look for where they are told no other name."""

Images = Choice[Literal["image", "text", "omit"]]
Dtype = Choice[Literal["auto", "float32", "bfloat16", "float16"]]


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


@settings
class DataConfig(Section):
    """One source of prompts; a plain path stands for one with nothing but ``path``."""

    section = "data"

    path: ByContent[Text]
    """JSONL, JSON-list or Parquet file, ``datasets`` folder, hub data set as ``name:split``, generated tasks as
    ``reasoning_gym:NAMES?size=1000&seed=0&split=train``, or a benchmark as ``bench:NAME`` (``opdengine bench`` lists
    them)."""
    format: Text = "prompts"
    """layout of its rows: "prompts" (ours), "sft" (chats that end with an answer), or that of a public data set
    (docs/verifiers.md lists them)."""
    data_source: Maybe[Text] = None
    """routing key of all its rows; default: the row's own, or the format's."""
    columns: Mapped[Text] = field(default_factory=dict)
    """our column -> dotted place in the row, in place of the format's. With ``format: prompts`` or ``sft`` all other
    columns of the row keep their names."""
    where: Free = field(default_factory=dict)
    """use only rows with these values; dotted place -> value, list of values, or ``{min: , max: }``."""
    system: Maybe[Text] = None
    """system message in place of the row's; empty removes it."""
    suffix: Maybe[Text] = None
    """added to the last user message; default: the format's."""
    image_folder: Maybe[Text] = None
    """paths of pictures begin here and may not lead out; default: the folder of ``path``."""
    max_image_pixels: Annotated[Integer, Range(4, 2**26)] = 2**24
    """a picture with more is a bad row; nothing of it is decoded."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.columns) - set(MAPPED_COLUMNS))
        self.need(not unknown, "columns", f"{unknown} are no columns of ours; ours are {list(MAPPED_COLUMNS)}")


@settings
class EnvironmentConfig(Section):
    """An environment in which the student acts over many turns, in place of prompts to answer.

    ``max_completion_length`` is then the limit of one turn.
    """

    section = "environment"

    name: Changeable[Text] = ""
    """one of "search", "recorded", "trl", "alfworld", "textworld", "scienceworld", "module:Class" or "file.py:Class";
    empty: no environment."""
    options: Changeable[Free] = field(default_factory=dict)
    """keywords of the environment's class; ``opdengine settings environment.NAME`` explains those of ours."""
    train_split: Text = "train"
    """tasks to train on."""
    eval_splits: Resumable[Listed[Text]] = field(default_factory=list)
    """tasks to evaluate on, such as ["valid_seen", "valid_unseen"]."""
    eval_max_tasks: Resumable[Maybe[Count]] = None
    """at most this many of each split."""
    eval_temperatures: Annotated[Resumable[Listed[Real]], TEMPERATURE] = field(default_factory=lambda: [0.0])
    """evaluate once at each; 0 is greedy, the others with ``top_p`` and ``top_k`` and without
    ``repetition_penalty``."""
    max_turns: Changeable[Annotated[Integer, Range(1, 10**6)]] = 30
    """most turns of the student in an episode."""
    max_trajectory_tokens: Changeable[Maybe[Count]] = None
    """an episode ends before a turn that might not fit; default: the student's window."""
    num_environments: Resumable[Annotated[Integer, Range(1, 4096)]] = 16
    """episodes that run at a time, each in a process of its own."""
    reset_timeout: Resumable[Seconds] = 120.0
    """seconds after which an environment counts as hanging when an episode begins."""
    step_timeout: Resumable[Seconds] = 60.0
    """seconds after which an environment counts as hanging in a turn."""
    max_observation_chars: Changeable[Count] = 100_000
    """longer answers end the episode as broken."""
    stop: Changeable[Listed[Text]] = field(default_factory=list)
    """strings that end a turn."""

    def __post_init__(self) -> None:
        self.need(bool(self.eval_temperatures), "eval_temperatures", "give at least one; 0 is greedy")
        self.need(all(self.stop), "stop", "an empty string would end every turn at once")
        self.need(all(self.eval_splits), "eval_splits", "a split has a name")


@settings
class LoRAConfig(Section):
    """A low-rank adapter instead of the student's own weights (LoRA, arXiv 2106.09685), in peft's names."""

    section = "lora"

    r: Annotated[Integer, Range(1, 10**5), Elsewhere({"lora_r": "", "use_peft": ""})] = 16
    """rank."""
    lora_alpha: Annotated[Positive, Elsewhere({"lora_alpha": ""})] = 32.0
    """the adapter's output is scaled by ``lora_alpha / r``."""
    lora_dropout: Annotated[Changeable[Real], Range(0, 1, open_high=True, remedy="it lies in [0, 1); 0 is off")] = 0.0
    """on the adapter's input during the update; the sampler has none."""
    target_modules: Annotated[
        Annotated[Text, AsText] | Annotated[Listed[Text], AsList],
        BY_SHAPE,
        Elsewhere({"lora_target_modules": ""}),
    ] = "all-linear"
    """which layers: "all-linear" (every linear layer but the head), names of layers such as ["q_proj", "v_proj"],
    or a regular expression."""
    use_rslora: Flag = False
    """scale by ``lora_alpha / sqrt(r)`` (arXiv 2312.03732)."""
    merge_final: Resumable[Flag] = False
    """at the end also write the model with the adapter merged in, to ``merged/``."""

    def __post_init__(self) -> None:
        self.need(bool(self.target_modules), "target_modules", "name at least one layer, or 'all-linear'")


SELF = "self"
"""The model of a teacher that is the student itself."""


@settings
class TeacherConfig(Section):
    """One teacher: a model in this process, or one on servers (``hidden_states_url``, as exact, or ``base_url``)."""

    model: Annotated[ByContent[NeededPath], Elsewhere({"teacher_model": "", "teacher_model_name_or_path": ""})]
    """model folder or hub name; with ``base_url`` the name under which it is served; "self" is the student itself, with
    ``weights`` (a folder of that name is "./self")."""
    name: Resumable[Text] = ""
    """used in metrics, logs and caches; default: the last part of ``model``."""
    weight: Changeable[Factor] = 1.0
    """fixed mixing weight (MT-OPD) or share of the data (MT-SeqKD); relative."""
    key: Listed[Text] = field(default_factory=list)
    """routing keys (``data_source``) that this teacher answers for; empty: all prompts."""
    weights: Annotated[Maybe[Choice[Literal["base", "live", "ema"]]], Elsewhere({"teacher_model_kind": ""})] = None
    """of ``model: self``: "base", those that the run began with (with ``lora`` the adapter is off and nothing is held
    twice); "live", the student's present ones, without gradient; "ema", a moving average of the student's."""
    teacher_update_rate: Annotated[
        Changeable[Real],
        Range(0, 1, open_low=True, remedy="it lies in (0, 1]; 1 copies the student"),
        Elsewhere({"teacher_update_rate": ""}),
    ] = 0.05
    """with ``weights: ema``: share of the student in each update of the average."""
    teacher_sync_steps: Annotated[Changeable[Count], Elsewhere({"teacher_sync_steps": ""})] = 1
    """with ``weights: ema``: optimiser steps from one update of the average to the next."""
    dtype: Changeable[Dtype] = "auto"
    """of its weights; "auto" keeps the dtype of the checkpoint, and of ``model: self`` the student's."""
    chat_template: Changeable[Maybe[FilledPath]] = None
    """Jinja text or file in place of the tokenizer's own."""
    chat_template_kwargs: Changeable[Free] = field(default_factory=dict)
    """handed to the chat template, for example ``enable_thinking: false``; what the student has and this template knows
    must be stated here, too."""
    images: Images = "image"
    """what it reads where a message has a picture: the "image", the "text" in its place (column ``image_text``), or
    nothing ("omit"): then it judges under the words alone."""
    tokenizer_alignment: Annotated[
        Changeable[Choice[Literal["none", "spans"]]],
        Elsewhere({"use_uld_loss": " (spans)", "use_extended_uld": " (spans)", "teacher_tokenizer_name_or_path": ""}),
    ] = "none"
    """of a teacher with another tokenizer than the student's: "spans" judges spans of equal text, in which the
    probabilities of several tokens are merged; "none" refuses it (docs/methods/gold.md)."""
    offload: Resumable[Flag] = False
    """keep a local teacher's weights on the CPU while it neither writes nor judges."""
    shard: Resumable[Flag] = False
    """with several processes, split a local teacher's weights over them (FSDP2); its head stays whole. Judging costs
    little more; writing gathers all weights for every token."""
    base_url: Resumable[Maybe[Text]] = None
    """OpenAI-compatible endpoint, such as ``http://host:8000/v1``. It writes debates and answers; it judges by top-k
    log-probs, a lower bound of the exact divergence."""
    hidden_states_url: Resumable[Listed[Text]] = field(default_factory=list)
    """addresses of ``opdengine teacher-serve`` on other machines, such as ``http://host:8765``; several share the work.
    They send hidden states and the loss is computed here, so the teacher judges exactly; they write, too."""
    hidden_states_dtype: Changeable[Choice[Literal["auto", "float32", "bfloat16"]]] = "auto"
    """in which hidden states travel; "auto" is the dtype in which the server computes, which rounds nothing."""
    writer_base_url: Resumable[Maybe[Text]] = None
    """an OpenAI-compatible endpoint that serves the model of a local teacher, or of one with ``hidden_states_url``,
    too: it writes the teacher's text, and the weights here (or there) judge, exactly."""
    writer_model: Resumable[Maybe[Filled]] = None
    """the name under which it is served there; default: ``model``."""
    tokenizer: Resumable[Maybe[FilledPath]] = None
    """with ``base_url`` or ``hidden_states_url``: folder or hub name of the tokenizer; default: ``model``."""
    api_key_env: Resumable[Maybe[Text]] = None
    """of an endpoint: the environment variable that holds the key, or the token of ``teacher-serve`` (never the key
    itself)."""
    max_concurrency: Resumable[Annotated[Integer, Range(1, 10**5)]] = 32
    """most calls at the same time."""
    timeout: Resumable[Seconds] = 600.0
    """seconds that one call may take."""
    max_retries: Resumable[Annotated[Integer, Range(0, 1000)]] = 5
    """further attempts of a call that failed for a reason that may pass; 0 is one attempt."""
    score_top_k: Changeable[Annotated[Integer, Range(1, 10**6)]] = 64
    """log-probs per token (vLLM: start the server with ``--max-logprobs`` as large)."""
    stored: Resumable[Maybe[FilledPath]] = None
    """folder of what it has said about given answers (``gkd.lmbda`` below 1): that is read there, and the rest is asked
    and added, so that it judges each answer once (docs/stored_teachers.md)."""
    stored_dtype: Changeable[Choice[Literal["auto", "bfloat16"]]] = "auto"
    """in which hidden states are stored; "auto" is the teacher's own, which rounds nothing."""
    stored_only: Resumable[Flag] = False
    """its network is not even loaded: what is not stored ends the run. ``opdengine score`` stores all beforehand."""
    stored_max_bytes: Resumable[Maybe[Annotated[Integer, Range(1, 2**62)]]] = None
    """of the folder of this teacher: what would exceed it is judged, and not stored. Default: no limit."""

    @property
    def is_here(self) -> bool:
        """Whether its weights are in this process."""
        return self.base_url is None and not self.hidden_states_url

    @property
    def judges_exactly(self) -> bool:
        """Whether it tells its distributions over the whole vocabulary."""
        return self.base_url is None

    def __post_init__(self) -> None:
        need, served = self.need, self.base_url is not None
        need(not self.name or bool(self.name.strip()), "name", "it must not be blank")
        need(all(self.key), "key", "a routing key must not be empty; [] is every prompt")
        endpoint = "base_url" if served else "writer_base_url"
        url = getattr(self, endpoint)
        addresses = [(endpoint, url, "http://host:8000/v1")] if url is not None else []
        addresses += [("hidden_states_url", place, "http://host:8765") for place in self.hidden_states_url]
        for key, address, example in addresses:
            if re.search("[@?#]", address):
                remedy = "put the key's variable into api_key_env"
                raise Refused(f"{{key}} holds a credential or a query; {remedy}", key, address)
            need(is_address(address, ("http", "https")), key, f"give a URL such as {example}")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise Refused(
                "{key} is the name of an environment variable such as TEACHER_KEY, not the key", "api_key_env"
            )
        need(
            bool(addresses) or self.api_key_env is None,
            "api_key_env",
            "it belongs to an endpoint; set base_url or hidden_states_url too",
        )
        if self.hidden_states_url:
            self._check_remote(served)
        else:
            need(self.hidden_states_dtype == "auto", "hidden_states_dtype", "it belongs to hidden_states_url")
        self._check_stored(served)
        if not served:
            remote = bool(self.hidden_states_url)
            need(
                remote or self.tokenizer is None,
                "tokenizer",
                "it belongs to a served teacher; set base_url or hidden_states_url too",
            )
            need(url is not None or self.writer_model is None, "writer_model", "set writer_base_url too")
            need(not (self.shard and self.offload), "shard", "with offload the weights leave the GPU: choose one")
            self._check_own(url)
            return
        for key in ("writer_base_url", "writer_model"):
            need(getattr(self, key) is None, key, "a teacher with base_url writes there anyway; leave it out")
        for key in ("offload", "shard"):
            need(not getattr(self, key), key, "the weights of a served teacher are not here")
        need(self.weights is None, "weights", "they belong to model: self, which no server holds")

    def _check_stored(self, served: bool) -> None:
        """Refuse what has no effect beside a folder of judgements, or without one."""
        need, kept = self.need, self.stored is not None
        for key in ("stored_dtype", "stored_only", "stored_max_bytes"):
            need(kept or getattr(self, key) == getattr(TeacherConfig, key), key, "it belongs to stored")
        need(not kept or self.model != SELF, "stored", "the student changes, and with it what it says as a teacher")
        need(not served or self.stored_dtype == "auto", "stored_dtype", "an endpoint tells log-probs and no states")
        if self.stored_only:
            need(self.stored_max_bytes is None, "stored_max_bytes", "with stored_only nothing is added")
            for key in ("offload", "shard"):
                need(not getattr(self, key), key, "with stored_only its weights are not loaded")

    def _check_remote(self, served: bool) -> None:
        """Refuse what does not go with servers of hidden states."""
        need, places = self.need, [place.rstrip("/") for place in self.hidden_states_url]
        need(not served, "base_url", "hidden_states_url judges exactly; leave one of the two out")
        need(len(set(places)) == len(places), "hidden_states_url", "an address is named twice")
        need(self.model != SELF, "model", "no server follows the student; name the served model")
        need(
            self.dtype == "auto", "dtype", "the weights are where 'opdengine teacher-serve --dtype' runs; leave it out"
        )
        for key in ("offload", "shard"):
            need(not getattr(self, key), key, "the weights of a served teacher are not here")

    def _check_own(self, url: str | None) -> None:
        """Refuse what the student cannot be as its own teacher."""
        need = self.need
        if self.model == SELF:
            need(self.weights is not None, "weights", "say which weights of the student judge: base, live or ema")
            need(self.tokenizer_alignment == "none", "tokenizer_alignment", "the student has its own tokenizer")
            need(url is None, "writer_base_url", "a server does not follow the student: with model: self leave it out")
        for key in ("teacher_update_rate", "teacher_sync_steps"):
            plain = getattr(self, key) == getattr(TeacherConfig, key)
            need(plain or self.weights == "ema", key, "it belongs to weights: ema")


def is_address(url: str, schemes: Sequence[str] = ("http", "https", "unix")) -> bool:
    """Whether a URL names a server, without credential and query."""
    try:
        parts = urlsplit(url)
        place = parts.hostname if parts.scheme != "unix" else parts.path
        return parts.scheme in schemes and bool(place) and parts.port != 0 and not re.search(r"[\s@?#]", url)
    except ValueError:  # of the port, or of brackets
        return False
