"""Settings that nothing in a run would read are refused or named, so that nobody takes them for done.

Those that contradict the run are refused. Those of another method are only named, since one file serves several methods
(``--method tcod``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from opdengine.config.section import fields_of, section_in
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
    for setting, value in _said(config, settings, paper).items():
        raise ConfigError(f"{setting}={value!r} has no effect with {where}; {remedy}")


def _evaluates(config: TrainConfig) -> bool:
    return bool(config.eval_data or config.environment.eval_splits)


def _diverges_by(kind: str) -> Callable[[TrainConfig], bool]:
    def reads(config: TrainConfig) -> bool:
        named = config.divergence
        return kind in (named.values() if isinstance(named, Mapping) else [named])

    return reads


def _method_is(*names: str) -> Callable[[TrainConfig], bool]:
    return lambda config: config.method in names


OF_A_METHOD = (
    "uni_opd", "camopd", "opad", "mt_seqkd", "tcod", "entropy_opd", "eopd", "sdft", "sdpo", "g_opd", "relaxed_opd",
    "selectkd",
)  # fmt: skip
"""Sections that one method reads, which has their name."""

READ_WHERE: Mapping[str, Callable[[TrainConfig], bool]] = {
    **{name: _method_is(name) for name in OF_A_METHOD},
    "sage": _method_is("sage_opd"),
    "advantage": _method_is("uni_opd", "camopd", "sdpo", "g_opd", "relaxed_opd", "gold"),
    "debate": lambda config: config.debates,
    "environment": lambda config: bool(config.environment.name),
    "jsd_beta": _diverges_by("jsd"),
    "skew_alpha": _diverges_by("skew_kl"),
    "warmup_ratio": lambda config: config.lr_scheduler_type != "constant" or config.warmup_ratio == 0,
    "eval_steps": _evaluates,
    "eval_temperature": lambda config: bool(config.eval_data),
    "eval_num_generations": lambda config: bool(config.eval_data),
    "eval_max_prompts": lambda config: bool(config.eval_data),
    "save_total_limit": lambda config: bool(config.save_steps or config.metric_for_best_model),
}
"""Settings and sections that not every run reads, and which runs do."""


def unread(config: TrainConfig, paper: Paper | None = None) -> dict[str, Any]:
    """Settings that say something, and of which nothing in the run takes notice.

    Args:
        config: of a run with a method of ours; what another one reads is its own business.
        paper: of the method.

    Returns:
        Their values, by dotted name.
    """
    asleep = [name for name, reads in READ_WHERE.items() if not reads(config)]
    return _said(config, (setting for name in asleep for setting in _settings_of(name)), paper)


def _settings_of(name: str) -> list[str]:
    section = section_in(TrainConfig, name)
    return [name] if section is None else [f"{name}.{setting}" for setting in fields_of(section)]


def _said(config: TrainConfig, settings: Iterable[str], paper: Paper | None) -> dict[str, Any]:
    """Those of some settings that have another value than if nothing had been said."""
    found = {}
    for setting in settings:
        section, _, name = setting.rpartition(".")
        field = fields_of(section_in(TrainConfig, section) if section else TrainConfig)[name]
        unsaid = [field.get_default(call_default_factory=True)]
        if paper is not None and setting in paper.defaults:
            unsaid.append(paper[setting])
        if (value := value_of(config, setting)) not in unsaid:
            found[setting] = value
    return found
