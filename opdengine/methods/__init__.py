"""This module maps the names of methods to their classes. Each class stands in one file, to be read with its paper."""

from __future__ import annotations

import inspect

from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.methods.agent_baselines import TCOD, EntropyOPD
from opdengine.methods.camopd import CaMOPD
from opdengine.methods.eopd import EOPD
from opdengine.methods.g_opd import GOPD
from opdengine.methods.gkd import GKD, Mixture
from opdengine.methods.gold import GOLD, SETTINGS, CrossTokenizer
from opdengine.methods.group_relative import GRPO, RewardTerm, refuse_unweighed
from opdengine.methods.mad_opd import MADOPD
from opdengine.methods.method import Method
from opdengine.methods.mt_seqkd import MTSeqKD
from opdengine.methods.opad import OPAD
from opdengine.methods.opd import MTOPD, OPD
from opdengine.methods.opsd import OPSD
from opdengine.methods.sage_opd import SAGEOPD
from opdengine.methods.sdft import SDFT
from opdengine.methods.sdpo import SDPO
from opdengine.methods.stale import StaleWeights
from opdengine.methods.token_selection import RelaxedOPD, SelecTKD
from opdengine.methods.uni_opd import UniOPD
from opdengine.methods.unused import refuse_unused
from opdengine.plugins import PluginError, explain, load_object

METHODS: dict[str, type[Method]] = {
    "opd": OPD,
    "mt_opd": MTOPD,
    "mt_seqkd": MTSeqKD,
    "mad_opd": MADOPD,
    "opad": OPAD,
    "sage_opd": SAGEOPD,
    "tcod": TCOD,
    "entropy_opd": EntropyOPD,
    "eopd": EOPD,
    "uni_opd": UniOPD,
    "camopd": CaMOPD,
    "sdft": SDFT,
    "sdpo": SDPO,
    "opsd": OPSD,
    "grpo": GRPO,
    "gkd": GKD,
    "g_opd": GOPD,
    "relaxed_opd": RelaxedOPD,
    "selectkd": SelecTKD,
    "gold": GOLD,
}

OF_DIVERGENCES = ("vocab_sample", "teacher_reduction", "divergence_temperature")
"""Settings that change nothing where no method has a divergence."""

PAPERS = {name: method.paper for name, method in METHODS.items() if method.paper is not None}
"""The settings that a run takes from its paper where the user sets none. A baseline has the settings of the method that
it is compared with; plain "opd" is a baseline of every paper and has none."""


def build_method(config: TrainConfig) -> Method:
    """The method of ``config.method``; checks its settings without loading a model.

    Raises:
        ConfigError: the method is unknown or cannot be loaded, or its settings do not fit it.
    """
    name, options = config.method, config.method_options
    if name in METHODS and options:
        raise ConfigError(f"method_options={options!r} is not possible: {name!r} has a section of its own, if any")
    if name not in METHODS and ":" not in name:
        raise ConfigError(
            f"method={name!r} is unknown; choose one of {sorted(METHODS)}, 'module:Class' or 'file.py:Class'"
        )
    try:
        kind = METHODS[name] if name in METHODS else load_object(name)
    except PluginError as error:
        raise ConfigError(f"method {name!r} cannot be loaded: {error}") from error
    if not (inspect.isclass(kind) and issubclass(kind, Method)):
        raise ConfigError(f"method {name!r} is no class that inherits opdengine.methods.method.Method")
    try:
        inspect.signature(kind).bind(config, **options)
    except TypeError as error:
        raise ConfigError(f"method {name!r} cannot be called with (config, **method_options): {error}") from error
    if name in METHODS and name != "sdpo" and not config.grpo.weight:
        refuse_unweighed(config, "grpo.weight=0", "set that")
    added: list[type[Method]] = [Mixture] if config.gkd.lmbda < 1 else []
    added += [RewardTerm] if config.grpo.weight else []
    added += [StaleWeights] if config.distillation_is_clip is not None else []
    if any(t.tokenizer_alignment != "none" for t in config.teachers):
        added.append(CrossTokenizer)
    else:
        refuse_unused(config, SETTINGS, "teachers of which none has tokenizer_alignment: spans")
    if added:
        kind = type(kind.__name__, (*added, kind), {})
    try:
        method: Method = kind(config, **options)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"method {name!r} failed: {explain(error)}") from error
    if not method.diverges:
        refuse_unused(config, OF_DIVERGENCES, f"method {name!r} as it is set, which has no divergence")
    return method
