"""One benchmark, from its name to its table: everything is checked before the model is loaded, every seed is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from opdengine import __version__
from opdengine.config.train import TrainConfig
from opdengine.data.benchmarks import BENCHMARKS
from opdengine.models.backbone import check_model_path
from opdengine.rollout.transformers import TransformersSampler
from opdengine.tools.bench.questions import Questions
from opdengine.tools.bench.record import Outcome, Record, file_of, identity

logger = logging.getLogger(__name__)

MOST = 10**6


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
                raise ValueError(f"--{name} {value} is not possible; it is a whole number from 1 on")


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
    asker: Asker = Questions(told.name, config, told.limit, told.data)
    try:
        settings = {
            "opdengine": __version__,
            "model": identity(config.model, config.trust_remote_code),
            "limit": told.limit,
            "data": told.data and Path(told.data).name,
            "chat_template_kwargs": config.chat_template_kwargs,
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


def listing() -> str:
    """All benchmarks and what they need, for people."""
    return "\n".join(f"{name:16} {each.about}" for name, each in sorted(BENCHMARKS.items()))
