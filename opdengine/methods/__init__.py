"""The methods by name. Each is one small file: a function from configuration to recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from opdengine.config import ConfigError, TrainConfig
from opdengine.methods.agent_baselines import entropy_opd, tcod
from opdengine.methods.camopd import PAPER as CAMOPD
from opdengine.methods.camopd import camopd
from opdengine.methods.mad_opd import BASELINES as MAD_OPD_BASELINES
from opdengine.methods.mad_opd import PAPER as MAD_OPD
from opdengine.methods.mad_opd import mad_opd
from opdengine.methods.mt_seqkd import PAPER as MT_SEQKD
from opdengine.methods.mt_seqkd import mt_seqkd
from opdengine.methods.opad import PAPER as OPAD
from opdengine.methods.opad import opad
from opdengine.methods.opd import mt_opd, opd
from opdengine.methods.paper import Paper
from opdengine.methods.sage_opd import PAPER as SAGE_OPD
from opdengine.methods.sage_opd import sage_opd
from opdengine.methods.uni_opd import PAPER as UNI_OPD
from opdengine.methods.uni_opd import uni_opd
from opdengine.plugins import PluginError, explain, load_object
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

PAPERS: dict[str, Paper] = {
    "mt_opd": MAD_OPD_BASELINES,
    "mt_seqkd": MT_SEQKD,
    "mad_opd": MAD_OPD,
    "opad": OPAD,
    "sage_opd": SAGE_OPD,
    "tcod": SAGE_OPD,
    "entropy_opd": SAGE_OPD,
    "uni_opd": UNI_OPD,
    "camopd": CAMOPD,
}
"""What a run takes where it says nothing. Baselines have the settings of the method that they are compared with; plain
"opd" is a baseline of every paper and has none."""


def build_recipe(config: TrainConfig) -> Recipe:
    """The recipe of ``config.method``; checks its settings without loading a model.

    Raises:
        ConfigError: the method is unknown or cannot be loaded, or its settings do not fit it.
    """
    name, options = config.method, config.method_options
    if name in METHODS:
        if options:
            raise ConfigError(f"method_options={options!r} is not possible: {name!r} has a section of its own, if any")
        return METHODS[name](config)
    if ":" not in name:
        raise ConfigError(
            f"method={name!r} is unknown; choose one of {sorted(METHODS)}, 'module:function' or 'file.py:function'"
        )
    try:
        method = load_object(name)
    except PluginError as error:
        raise ConfigError(f"method {name!r} cannot be loaded: {error}") from error
    try:
        inspect.signature(method).bind(config, **options)
    except TypeError as error:
        raise ConfigError(f"method {name!r} cannot be called with (config, **method_options): {error}") from error
    try:
        recipe = method(config, **options)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"method {name!r} failed: {explain(error)}") from error
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"method {name!r} returned a {type(recipe).__name__}, not an opdengine.recipe.Recipe")
    return recipe
