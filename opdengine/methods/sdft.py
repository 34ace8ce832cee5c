"""SDFT: self-distillation from demonstrations (Shenfeld et al., arXiv 2601.19897).

The student answers a prompt; the same model, shown a demonstration in the prompt (``teacher_prompt_template``), judges
the answer: KL(p(. | x, y_<t) || q(. | x, c, y_<t)) at every token, where q is a moving average of p. So it learns from
demonstrations on its own states, and needs neither another model nor rewards.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from opdengine.config.method_sections import SageConfig
from opdengine.config.sections import SELF
from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.methods.debate.contexts import contexts_of
from opdengine.methods.method import Method, need_teachers
from opdengine.methods.paper import Paper
from opdengine.methods.sage_opd import normalise
from opdengine.types import Batch

TEMPLATE = (
    "{prompt}\n\nThis is an example for a response to the question:\n{privileged_context}\n\n"
    "Now answer with a response of your own, including the thinking process."
)

PAPER = Paper(
    arxiv="2601.19897",
    defaults={
        "teacher_prompt_template": (TEMPLATE, "section 3"),
        "divergence": ("reverse_kl", "section 3; forward_kl in the released code"),
        "loss_normalization": ("sequence", "released code"),
        "num_generations": (1, "released code"),
        "temperature": (1.0, "released code"),
    },
    choices={
        "teachers.weights": "ema",
        "teachers.teacher_update_rate": "0.01, released code",
        "teachers.teacher_sync_steps": "1, released code",
        "sdft.num_loss_tokens_to_skip": "3 in the released code, unstated otherwise",
    },
)


class SelfTaught(Method):
    """The student is its own teacher, under a prompt that says more."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        need_teachers(config, 1)
        if others := [t.name for t in config.teachers if t.model != SELF]:
            raise ConfigError(
                f"method {config.method!r} is taught by the student itself, but the teachers {others} are other "
                "models; write teachers: [{model: self, weights: base}], or live or ema, or take method 'opd' with "
                "teacher_prompt_template"
            )


class FromDemonstrations(SelfTaught):
    """Self-taught under ``teacher_prompt_template``, or in a debate of several of its weights about that."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        if config.teacher_prompt_template is None:
            raise ConfigError(
                f"method {config.method!r} needs teacher_prompt_template: under the plain prompt the student would be "
                "taught what it does already"
            )
        self.contexts = contexts_of(config)
        self.teachers_per_prompt = 2 if config.debates else 1


class SDFT(FromDemonstrations):
    """A demonstration in the teacher's prompt; the first tokens may carry no loss."""

    paper = PAPER

    def weigh(self, batch: Batch) -> None:
        """Weight 0 on the first tokens; the mean is over the others."""
        super().weigh(batch)
        skipped = self.config.sdft.num_loss_tokens_to_skip
        if not skipped:
            return
        for sample in batch:
            assert sample.kl_weight is not None
            sample.kl_weight = sample.kl_weight * (np.arange(len(sample.kl_weight)) >= skipped).astype(np.float32)
        scope: Literal["batch", "trajectory"] = "batch" if self.config.loss_normalization == "token" else "trajectory"
        normalise(batch, self.ranks, SageConfig(normalization_scope=scope))
