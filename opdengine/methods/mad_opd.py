"""MAD-OPD: multi-agent-debate on-policy distillation (arXiv 2605.01347).

K teachers debate the state for R rounds (section 4.1). Each then judges the student's own tokens
under prompt + transcript, which the student never sees (equation 8), weighted by the confidences of
the last round (equation 7): sum_k w_k D(p_Tk(. | s, H, y_<t), p_S(. | s, y_<t)).

The debate itself stands in :mod:`opdengine.methods.debate`, because other methods can judge under one, too.
``debate.use_transcript: false`` with ``debate.rounds: 1`` is the ablation that keeps the first-turn
confidences as weights and drops the transcript.
"""

from __future__ import annotations

from opdengine.config.train import ConfigError, TrainConfig
from opdengine.methods.debate.contexts import debate_contexts
from opdengine.methods.method import Method, need_teachers


class MADOPD(Method):
    """Debate among K >= 2 teachers, transcript in the teachers' contexts, confidence weights."""

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
