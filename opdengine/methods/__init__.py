"""The methods by name. Each is one small file: a function from configuration to recipe."""

from __future__ import annotations

from collections.abc import Callable

from opdengine.config import ConfigError, TrainConfig
from opdengine.methods.agent_baselines import entropy_opd, tcod
from opdengine.methods.camopd import camopd
from opdengine.methods.mad_opd import mad_opd
from opdengine.methods.mt_seqkd import mt_seqkd
from opdengine.methods.opad import opad
from opdengine.methods.opd import mt_opd, opd
from opdengine.methods.sage_opd import sage_opd
from opdengine.methods.uni_opd import uni_opd
from opdengine.recipe import Recipe

METHODS: dict[str, Callable[[TrainConfig], Recipe]] = {
    "opd": opd,
    "mt_opd": mt_opd,
    "mt_seqkd": mt_seqkd,
    "mad_opd": mad_opd,
    "opad": opad,
    "sage_opd": sage_opd,
    "tcod": tcod,
    "entropy_opd": entropy_opd,
    "uni_opd": uni_opd,
    "camopd": camopd,
}


def build_recipe(config: TrainConfig) -> Recipe:
    """The recipe of ``config.method``; checks its settings without loading anything.

    Raises:
        ConfigError: the method is unknown or its settings do not fit it.
    """
    if config.method not in METHODS:
        raise ConfigError(f"method={config.method!r} is unknown; choose one of {sorted(METHODS)}")
    return METHODS[config.method](config)
