"""The methods by name. Each is one small file that reads beside its paper."""

from __future__ import annotations

import inspect

from opdengine.config.train import ConfigError, TrainConfig
from opdengine.methods.method import Method
from opdengine.plugins import load_object

METHODS: dict[str, str] = {
    "opd": "opdengine.methods.opd:OPD",
    "mt_opd": "opdengine.methods.opd:MTOPD",
    "mt_seqkd": "opdengine.methods.mt_seqkd:MTSeqKD",
    "mad_opd": "opdengine.methods.mad_opd:MADOPD",
    "opad": "opdengine.methods.opad:OPAD",
    "sage_opd": "opdengine.methods.sage_opd:SAGEOPD",
    "tcod": "opdengine.methods.agent_baselines:TCOD",
    "entropy_opd": "opdengine.methods.agent_baselines:EntropyOPD",
    "uni_opd": "opdengine.methods.uni_opd:UniOPD",
    "camopd": "opdengine.methods.camopd:CaMOPD",
}


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
        kind = load_object(METHODS.get(name, name))
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ConfigError(f"method {name!r} cannot be loaded: {error}") from error
    if not (inspect.isclass(kind) and issubclass(kind, Method)):
        raise ConfigError(f"method {name!r} is no class that inherits opdengine.methods.method.Method")
    try:
        inspect.signature(kind).bind(config, **options)
    except TypeError as error:
        raise ConfigError(f"method {name!r} cannot be made with (config, **method_options): {error}") from error
    method: Method = kind(config, **options)
    return method
