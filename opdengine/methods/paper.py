"""A paper's settings are declared in its method's file and taken where the user sets nothing.

A default is a setting that decides what is learned: the loss, how the student is sampled, the optimiser. Lengths, batch
and steps depend on data and machine; a run keeps its own and is told the paper's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opdengine.config.section import Section, fields_of

if TYPE_CHECKING:
    from opdengine.config.train import TrainConfig

UNSTATED = "unstated"
"""The source of a default begins with this word where the paper leaves it open; the rest says why it is this value."""


@dataclass(frozen=True)
class Paper:
    """Settings of a method's paper, by name, those of sections as ``section.key``.

    Args:
        arxiv: number of the paper.
        defaults: setting -> (value, where the paper or its code has it).
        choices: setting -> what the paper's runs had, in words: never set, only reported.
    """

    arxiv: str
    defaults: Mapping[str, tuple[Any, str]]
    choices: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, setting: str) -> Any:
        """The default of a setting."""
        return self.defaults[setting][0]

    def fill(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as the user wrote them, with the defaults of those that are not there."""
        filled = dict(data)
        for setting, (value, _) in self.defaults.items():
            section, _, name = setting.rpartition(".")
            if not section:
                filled.setdefault(name, copy.copy(value))
            elif isinstance(given := filled.get(section, {}), Mapping):
                filled[section] = {name: copy.copy(value), **given}
        return filled

    def report(self, config: TrainConfig, processes: int = 1) -> list[str]:
        """Say which settings of a run are the paper's, which differ, and which it has to choose itself; one line each.

        Args:
            config: of the run.
            processes: that share the prompts of a step.
        """
        here = {setting: value_of(config, setting) for setting in (*self.defaults, *self.choices)}
        if "prompts_per_step" in here:
            here["prompts_per_step"] *= processes
        lines: dict[str, list[str]] = {"as in the paper": [], "unstated in the paper": [], "not as in the paper": []}
        for setting, (value, where) in self.defaults.items():
            if here[setting] != value:
                lines["not as in the paper"].append(
                    f"{setting}={_shown(here[setting])} (there {_shown(value)}: {where})"
                )
            elif where.startswith(UNSTATED):
                lines["unstated in the paper"].append(f"{setting}={_shown(value)}")
            else:
                lines["as in the paper"].append(f"{setting}={_shown(value)}")
        lines["to be chosen"] = [f"{s}={_shown(here[s])} (there {text})" for s, text in self.choices.items()]
        return [
            f"{config.method} (arXiv {self.arxiv}), {what}: {', '.join(settings)}"
            for what, settings in lines.items()
            if settings
        ]


def _shown(value: Any) -> str:
    """A value on one line; of a section what is not its default, as in YAML."""
    if isinstance(value, Section):
        said = ((name, getattr(value, name), field.default) for name, field in fields_of(type(value)).items())
        return f"{{{', '.join(f'{name}: {given}' for name, given, usual in said if given != usual)}}}"
    return str(value).replace("\n", "\\n")


def value_of(config: Any, setting: str) -> Any:
    """The value of a dotted setting; of a list, the values of its items."""
    for name in setting.split("."):
        config = [getattr(item, name) for item in config] if isinstance(config, list) else getattr(config, name)
    return config
