"""MAD-OPD: multi-agent-debate on-policy distillation (arXiv 2605.01347).

K teachers debate the state for R rounds (section 4.1). Each then judges the student's own tokens
under prompt + transcript, which the student never sees (equation 8), weighted by the confidences of
the last round (equation 7): sum_k w_k D(p_Tk(. | s, H, y_<t), p_S(. | s, y_<t)).

The debate itself stands in :mod:`opdengine.methods.debate`, because other methods can judge under one, too.
``debate.use_transcript: false`` with ``debate.rounds: 1`` is the ablation that keeps the first-turn
confidences as weights and drops the transcript.
"""

from __future__ import annotations

from dataclasses import replace

from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.methods.debate.contexts import debate_contexts
from opdengine.methods.method import Method, need_teachers
from opdengine.methods.paper import Paper

BASELINES = Paper(
    arxiv="2605.01347",
    defaults={
        "jsd_beta": (0.5, "remark 1"),
        "teacher_reduction": ("sum", "equation 8"),
        "divergence_temperature": (1.0, "released code"),
        "loss_normalization": ("sequence", "released code"),
        "num_generations": (1, "released code"),
        "temperature": (0.7, "released scripts"),
        "top_p": (0.8, "released scripts"),
        "top_k": (20, "released scripts"),
        "repetition_penalty": (1.2, "released scripts"),
        "learning_rate": (1e-5, "released scripts"),
        "lr_scheduler_type": ("cosine", "released scripts"),
        "warmup_ratio": (0.05, "released scripts"),
        "weight_decay": (0.01, "released scripts"),
        "adam_beta1": (0.9, "appendix B.1"),
        "adam_beta2": (0.999, "appendix B.1"),
        "max_grad_norm": (1.0, "appendix B.1"),
    },
    choices={
        "divergence": "reverse_kl for code, jsd for tool use: remark 1",
        "max_prompt_length": "4096 for code, 16384 for tool use",
        "max_completion_length": "16384 for code, 4096 for tool use",
        "prompts_per_step": "128",
        "max_steps": "one epoch: 234 for code, 125 for tool use",
    },
)
"""The settings that all arms of the paper share."""

PAPER = replace(BASELINES, choices={**BASELINES.choices, "debate.prompts": "code, tools"})
"""The paper's debate is the default of :class:`opdengine.config.method_sections.DebateConfig`."""


class MADOPD(Method):
    """Debate among K >= 2 teachers, transcript in the teachers' contexts, confidence weights."""

    paper = PAPER

    teachers_per_prompt = 2

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        need_teachers(config, 2)
        debate = config.debate
        if not debate.use_transcript and not debate.use_confidence:
            raise ConfigError(
                "debate.use_transcript and debate.use_confidence are both off, so the debate would be "
                "generated and not used; turn one on or use method 'mt_opd'"
            )
        self.contexts = debate_contexts(config)
