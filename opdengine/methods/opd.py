"""On-policy distillation from one teacher (OPD) or from several with fixed weights (MT-OPD).

Teachers judge the student's own tokens under the plain prompt. OPD: Agarwal et al.,
arXiv 2306.13649. MT-OPD: the baseline of MAD-OPD, arXiv 2605.01347, section 5.
"""

from __future__ import annotations

from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.methods.mad_opd import BASELINES
from opdengine.methods.method import Method, need_teachers


class OPD(Method):
    """One teacher per prompt: a single teacher, or several routed by key."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        need_teachers(config, 1)
        shared = [t.name for t in config.teachers if not t.key]
        if len(config.teachers) > 1 and shared:
            raise ConfigError(
                f"method 'opd' uses one teacher per prompt, but {shared} have no routing key beside "
                "other teachers; give every teacher a key, keep one teacher, or use 'mt_opd'"
            )
        claimed = [key for t in config.teachers for key in set(t.key)]
        if doubles := sorted({key for key in claimed if claimed.count(key) > 1}):
            raise ConfigError(
                f"method 'opd' uses one teacher per prompt, but several teachers have the key {doubles}; "
                "give every key to one teacher, or use 'mt_opd'"
            )


class MTOPD(Method):
    """K teachers, the sum of their divergences with fixed weights."""

    paper = BASELINES

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        need_teachers(config, 2)
