"""Settings that nothing in a run would read are refused, so that nobody takes them for done."""

from __future__ import annotations

from collections.abc import Iterable

from opdengine.config.section import section_in
from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.methods.paper import Paper, value_of


def refuse_unused(
    config: TrainConfig,
    settings: Iterable[str],
    where: str,
    remedy: str = "leave it out",
    paper: Paper | None = None,
) -> None:
    """Raise ConfigError for the first of some settings that has another value than if nothing had been said.

    Args:
        config: of the run.
        settings: by dotted name; none of them has an effect here.
        where: follows "has no effect with": what makes it so.
        remedy: what to do.
        paper: of the method, whose defaults are taken unasked.
    """
    for setting in settings:
        section, _, name = setting.rpartition(".")
        unsaid = [getattr(section_in(TrainConfig, section) if section else TrainConfig, name)]
        if paper is not None and setting in paper.defaults:
            unsaid.append(paper[setting])
        if (value := value_of(config, setting)) not in unsaid:
            raise ConfigError(f"{setting}={value!r} has no effect with {where}; {remedy}")
