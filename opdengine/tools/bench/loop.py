"""One benchmark, from its name to its table: everything is checked before the model is loaded, every seed is kept."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from opdengine import __version__
from opdengine.config.train import TrainConfig
from opdengine.data.benchmarks import BENCHMARKS
from opdengine.models.backbone import check_model_path
from opdengine.models.chat import read_template
from opdengine.rollout.transformers import TransformersSampler
from opdengine.tools.bench.lm_eval import PREFIX, TASKS, LmEval, is_lm_eval
from opdengine.tools.bench.questions import Questions
from opdengine.tools.bench.record import Outcome, Record, file_of, identity

logger = logging.getLogger(__name__)

MOST = 10**6
NOT_HERE = {
    "tau2": "needs a checkout of tau2-bench (the package tau2 of the registry is another project); serve the model "
    "with vllm serve and name it to tau2 as an OpenAI endpoint (docs/benchmarks.md)",
    "alfworld": "is an environment: opdengine eval --environment.name alfworld (docs/environments.md)",
    "scienceworld": "is an environment: opdengine eval --environment.name scienceworld (docs/environments.md)",
    "search": "is an environment: opdengine eval --environment.name search (docs/environments.md)",
}
"""Sets of the papers that are run in another way."""


class Asker(Protocol):
    """A benchmark that is ready to be asked."""

    def settings(self) -> dict[str, Any]:
        """What the values depend on besides the model and the seed."""
        ...

    def run(self, sampler: TransformersSampler, tokenizer: Any, seed: int) -> Outcome:
        """The values of one seed."""
        ...

    def close(self) -> None:
        """Give back processes."""
        ...


@dataclass(frozen=True)
class BenchSettings:
    """What ``opdengine bench`` is told besides the settings of a run.

    Args:
        name: of the benchmark.
        limit: first questions of each kind; None is all.
        seeds: how many, from ``seed`` of the settings on.
        data: file of the questions, in place of the package's.
        out: result file; None is :func:`opdengine.tools.bench.record.file_of`.
    """

    name: str
    limit: int | None = None
    seeds: int = 1
    data: str | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        for name, value in (("limit", self.limit), ("seeds", self.seeds)):
            if value is not None and not 1 <= value <= MOST:
                raise ValueError(f"--{name} {value} is not possible; it is a whole number from 1 to {MOST}")


def bench(
    config: TrainConfig, told: BenchSettings, load: Callable[[TrainConfig], tuple[TransformersSampler, Any]]
) -> Record:
    """Run the seeds that the result file lacks.

    Args:
        config: the model and how its answers are sampled (``eval_temperature``, ``eval_num_generations``, ...).
        told: the benchmark and its extent.
        load: loads the model, when all else has been found in order.

    Raises:
        ValueError: a name, package, file or setting; before the model is loaded.
    """
    if told.seeds > 1 and config.eval_temperature == 0:
        raise ValueError(
            f"--seeds {told.seeds} at eval_temperature 0 gives the same answers every time; set "
            "--eval_temperature 0.7, say, or leave --seeds out"
        )
    if told.out is not None and told.out.is_dir():
        raise ValueError(f"--out {str(told.out)!r} is a folder; name a file")
    check_model_path(config.model)
    asker = prepared(told, config)
    try:
        settings = {
            "opdengine": __version__,
            "model": identity(config.model, config.trust_remote_code),
            "limit": told.limit,
            "data": told.data and Path(told.data).name,
            "chat_template_kwargs": config.chat_template_kwargs,
            **_own(config),
            **asker.settings(),
        }
        record = Record(told.out or file_of(config.model, told.name), told.name, settings, config.model)
        wanted = [config.seed + i for i in range(told.seeds)]
        missing = [seed for seed in wanted if seed not in record.seeds]
        if len(missing) < len(wanted):
            logger.info("%s holds %d of these %d seeds already", record.file, len(wanted) - len(missing), len(wanted))
        if missing:
            sampler, tokenizer = load(config)
            for seed in missing:
                record.add(seed, asker.run(sampler, tokenizer, seed))
    finally:
        asker.close()
    return record


def _own(config: TrainConfig) -> dict[str, Any]:
    """What is said of the model in place of its own: the text of a chat template, and the dtype."""
    found: dict[str, Any] = {}
    if config.chat_template is not None:
        text = read_template(config.chat_template)
        found["chat_template"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    if (config.dtype, config.bf16) != ("auto", False):
        found["dtype"] = f"{config.dtype}, bf16={config.bf16}"
    return found


def prepared(told: BenchSettings, config: TrainConfig) -> Asker:
    """The benchmark of a name, with its questions.

    Raises:
        ValueError: a name, package or file.
    """
    kind = LmEval if is_lm_eval(told.name) else Questions
    if kind is Questions and told.name.partition(":")[0] not in BENCHMARKS:
        known = [*BENCHMARKS, *TASKS]
        close = difflib.get_close_matches(told.name, known, n=1)
        why = NOT_HERE.get(told.name) or f"is unknown; choose one of {sorted(known)}, or {PREFIX}:TASK of lm-eval"
        raise ValueError(f"the benchmark {told.name!r} {why}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return kind(told.name, config, told.limit, told.data)


def listing() -> str:
    """All benchmarks, for people."""
    lines = [f"{name:16} {each.about}" for name, each in BENCHMARKS.items()]
    lines += [f"{name:16} the task {task} of lm-eval" for name, task in TASKS.items()]
    return "\n".join([*sorted(lines), f"{PREFIX + ':TASK,...':16} any other tasks of lm-eval that run no programs"])
