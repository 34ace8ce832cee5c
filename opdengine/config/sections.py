"""Settings that belong to no method: data, teachers, environment, adapter."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from opdengine.errors import ConfigError
from opdengine.workers.printing import brief

DATA_COLUMNS = ("id", "prompt", "messages", "tools", "answer", "data_source")
"""What a row of data may say to the engine; other columns are handed to environments."""


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


VARIABLE = re.compile(r"\$(\w+|\{\w+\})(/|$)")
"""A variable of the shell in a path."""
TEMPLATE = re.compile(r"\{\{|\{%|\n")
"""What no path has, but a Jinja template."""


def at_home(path: Any) -> Any:
    """A path with ``~`` and ``~user`` written out; anything else is left as it is.

    Raises:
        ConfigError: there is no such user, or the path has a variable of the shell in it.
    """
    if not isinstance(path, str):
        return path
    if VARIABLE.search(path) and not TEMPLATE.search(path) and not os.path.exists(path):
        raise ConfigError(f"the path {path!r}: variables of the shell are not filled in here; write the path out")
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ConfigError(f"the folder {path!r}: there is no user {path.split('/')[0][1:]!r}; write the path out")
    return found


@dataclass(frozen=True)
class Range:
    """Where a number may lie.

    Args:
        low, high: the ends; they belong to it.
        open_low, open_high: they do not.
        also: values that are possible besides, such as 0 or ``math.inf``.
        remedy: what the message says in place of the ends.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    also: tuple[float, ...] = ()
    remedy: str = ""

    def __contains__(self, value: float) -> bool:
        if value in self.also:
            return True
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        """What a value must be."""
        low = f"it must be {'above' if self.open_low else 'at least'} {self.low:.12g}"
        ends = f"{low} and {'below' if self.open_high else 'at most'} {self.high:.12g}"
        others = "".join(f", or {value:g}" for value in self.also)
        return self.remedy or f"{ends}{others}"


COUNT = Range(1, 10**9)
COUNT_OR_NONE = Range(0, 10**9)
SEED = Range(0, 2**62)
SECONDS = Range(1e-3, 1e7, remedy="it is a number of seconds, at most 1e7")
TEMPERATURE = Range(0.01, 100, also=(0,), remedy="it must be 0 (greedy) or lie between 0.01 and 100")
TOP_P = Range(0, 1, open_low=True, remedy="it lies in (0, 1]; 1 keeps every token")
TOP_K = Range(0, 10**9, remedy="it must not be negative; 0 keeps every token")
PENALTY = Range(0.01, 100, remedy="it must lie between 0.01 and 100; 1 is off")
FACTOR = Range(0, 1e6)
POSITIVE = Range(1e-6, 1e6)
SHARE = Range(0, 1)


class Section:
    """Checks of one section's values; messages name the key as the user writes it."""

    section: ClassVar[str] = ""
    ranges: ClassVar[Mapping[str, Range]] = {}
    """Where every number may lie; null is checked nowhere."""

    def need(self, ok: bool, name: str, remedy: str) -> None:
        """Raise ConfigError unless ``ok``."""
        if not ok:
            key = f"{self.section}.{name}" if self.section else name
            raise ConfigError(f"{key}={brief(getattr(self, name))} is not possible; {remedy}")

    def not_blank(self, *names: str) -> None:
        """Raise ConfigError for text that says nothing."""
        for name in names:
            value = getattr(self, name)
            self.need(not isinstance(value, str) or bool(value.strip()), name, "it must not be empty; leave it out")

    def in_range(self) -> None:
        """Raise ConfigError for a number out of its range, which one that is not a number always is."""
        for name, range_ in self.ranges.items():
            value = getattr(self, name)
            for number in value if isinstance(value, (list, tuple)) else [value]:
                self.need(number is None or number in range_, name, str(range_))

    def one_of(self, name: str, choices: Sequence[Any]) -> None:
        """Raise ConfigError unless the value is one of ``choices``."""
        self.need(getattr(self, name) in choices, name, f"choose one of {list(choices)}")


@dataclass(frozen=True)
class DataConfig(Section):
    """One source of prompts; a plain path stands for one with nothing but ``path``.

    Args:
        path: JSONL, JSON-list or Parquet file, ``datasets`` folder, hub data set as ``name:split``, or
            generated tasks as ``reasoning_gym:NAMES?size=1000&seed=0&split=train``.
        format: layout of its rows: "prompts" (ours), or that of a public data set (docs/verifiers.md lists them).
        data_source: routing key of all its rows; default: the row's own, or the format's.
        columns: our column -> dotted place in the row, in place of the format's.
        where: use only rows with these values; dotted place -> value, list of values, or ``{min: , max: }``.
        system: system message in place of the row's; empty removes it.
        suffix: added to the last user message; default: the format's.
    """

    section = "data"

    path: str
    format: str = "prompts"
    data_source: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    suffix: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.columns) - set(DATA_COLUMNS))
        self.need(not unknown, "columns", f"{unknown} are no columns of ours; ours are {list(DATA_COLUMNS)}")


@dataclass(frozen=True)
class EnvironmentConfig(Section):
    """An environment in which the student acts over many turns, in place of prompts to answer.

    ``max_completion_length`` is then the limit of one turn.

    Args:
        name: "search", "recorded", "trl", "alfworld", "textworld", "scienceworld", "module:Class" or "file.py:Class";
            empty: no environment.
        options: keywords of the environment's class; ``opdengine settings environment.NAME`` explains those of ours.
        train_split: tasks to train on.
        eval_splits: tasks to evaluate on, such as ["valid_seen", "valid_unseen"].
        eval_max_tasks: at most this many of each split.
        eval_temperatures: evaluate once at each; 0 is greedy, the others with ``top_p`` and ``top_k`` and without
            ``repetition_penalty``.
        max_turns: most turns of the student in an episode.
        max_trajectory_tokens: an episode ends before a turn that might not fit; default: the
            student's window.
        num_environments: episodes that run at a time, each in a process of its own.
        reset_timeout, step_timeout: seconds after which an environment counts as hanging.
        max_observation_chars: longer answers end the episode as broken.
        stop: strings that end a turn.
    """

    section = "environment"

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

    ranges: ClassVar[Mapping[str, Range]] = {
        "eval_max_tasks": COUNT,
        "eval_temperatures": TEMPERATURE,
        "max_turns": Range(1, 10**6),
        "max_trajectory_tokens": COUNT,
        "num_environments": Range(1, 4096),
        "reset_timeout": SECONDS,
        "step_timeout": SECONDS,
        "max_observation_chars": COUNT,
    }

    def __post_init__(self) -> None:
        self.in_range()
        self.need(bool(self.eval_temperatures), "eval_temperatures", "give at least one; 0 is greedy")
        self.need(all(self.stop), "stop", "an empty string would end every turn at once")
        self.need(all(self.eval_splits), "eval_splits", "a split has a name")


@dataclass(frozen=True)
class LoRAConfig(Section):
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

    section = "lora"

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    merge_final: bool = False

    ranges: ClassVar[Mapping[str, Range]] = {
        "r": Range(1, 10**5),
        "lora_alpha": POSITIVE,
        "lora_dropout": Range(0, 1, open_high=True, remedy="it lies in [0, 1); 0 is off"),
    }

    def __post_init__(self) -> None:
        self.in_range()
        self.need(bool(self.target_modules), "target_modules", "name at least one layer, or 'all-linear'")


@dataclass(frozen=True)
class TeacherConfig(Section):
    """One teacher: a model in this process, or one that a server offers (``base_url``).

    Args:
        model: model folder or hub name; with ``base_url`` the name under which it is served.
        name: used in metrics, logs and caches; default: the last part of ``model``.
        weight: fixed mixing weight (MT-OPD) or share of the data (MT-SeqKD); relative.
        key: routing keys (``data_source``) that this teacher answers for; empty: all prompts.
        dtype: "auto" keeps the dtype of the checkpoint.
        chat_template: Jinja text or file in place of the tokenizer's own.
        chat_template_kwargs: handed to the chat template, for example ``enable_thinking: false``; what the
            student has and this template knows must be stated here, too.
        offload: keep a local teacher's weights on the CPU while it neither writes nor judges.
        shard: with several processes, split a local teacher's weights over them (FSDP2); its head stays
            whole. Judging costs little more; writing gathers all weights for every token.
        base_url: OpenAI-compatible endpoint, such as ``http://host:8000/v1``. It writes debates and
            answers; it judges by top-k log-probs, a lower bound of the exact divergence.
        writer_base_url: an OpenAI-compatible endpoint that serves a local teacher's model, too: it writes
            the teacher's text, and the weights here judge, exactly.
        writer_model: the name under which it is served there; default: ``model``.
        tokenizer: with ``base_url``: folder or hub name of the tokenizer; default: ``model``.
        api_key_env: of an endpoint: the environment variable that holds the key (never the key).
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
    shard: bool = False
    base_url: str | None = None
    writer_base_url: str | None = None
    writer_model: str | None = None
    tokenizer: str | None = None
    api_key_env: str | None = None
    max_concurrency: int = 32
    timeout: float = 600.0
    max_retries: int = 5
    score_top_k: int = 64

    ranges: ClassVar[Mapping[str, Range]] = {
        "weight": FACTOR,
        "max_concurrency": Range(1, 10**5),
        "timeout": SECONDS,
        "max_retries": Range(0, 1000, remedy="it must not be negative; 0 is one attempt, 1000 are the most"),
        "score_top_k": Range(1, 10**6),
    }

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer", "chat_template"):
            object.__setattr__(self, name, at_home(getattr(self, name)))
