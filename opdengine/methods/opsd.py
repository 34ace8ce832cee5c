"""OPSD: on-policy self-distillation (Zhao et al., arXiv 2601.18734).

The model that the run began with reads the reference solution and judges the student's own attempt, over the whole
vocabulary: D(p(. | x, y_<t), q(. | x, y*, y_<t)) at every token. Its weights stay as they were, so with ``lora`` one
model is held.
"""

from __future__ import annotations

from opdengine.methods.paper import Paper
from opdengine.methods.sdft import FromDemonstrations

TEMPLATE = (
    "{prompt}\n\nA reference solution:\n\n{privileged_context}\n\nUnderstand why it is right. Then solve the problem "
    "again in your own words, step by step."
)

PAPER = Paper(
    arxiv="2601.18734",
    defaults={
        "teacher_prompt_template": (TEMPLATE, "as in the released code, in our words"),
        "divergence": ("jsd", "released scripts"),
        "jsd_beta": (0.5, "released scripts"),
        "loss_normalization": ("token", "released code"),
        "num_generations": (1, "released code"),
        "temperature": (1.2, "released scripts"),
        "top_p": (0.95, "released scripts"),
        "top_k": (20, "released scripts"),
        "learning_rate": (2e-5, "released scripts"),
    },
    choices={
        "teachers.weights": "base",
        "lora": "r 64, lora_alpha 128",
        "max_completion_length": "2048",
    },
)


class OPSD(FromDemonstrations):
    """The reference solution in the teacher's prompt."""

    paper = PAPER
