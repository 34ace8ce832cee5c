"""SDFT, arXiv 2601.19897, SDPO, arXiv 2601.20802, and OPSD, arXiv 2601.18734."""

from __future__ import annotations

import math

from paper_helpers import Row

SDFT: list[Row] = [
    (
        "teacher_prompt_template",
        "{prompt}\n\nThis is an example for a response to the question:\n{privileged_context}\n\nNow answer with a "
        "response of your own, including the thinking process.",
        "section 3",
    ),
    ("divergence", "reverse_kl", "section 3"),
    ("loss_normalization", "sequence", "released code"),
    ("num_generations", 1, "released code"),
    ("temperature", 1.0, "released code"),
    ("sdft.num_loss_tokens_to_skip", 0, "as in TRL; 3 in the released code"),
]
SDPO: list[Row] = [
    ("divergence", "reverse_kl", "as in TRL"),
    ("advantage.importance", "truncated", "released code"),
    ("advantage.high", 2.0, "released code: is_clip"),
    ("advantage.max_gap", math.inf, "released code: none is left out"),
    ("advantage.kl_mode", "sampled", "as in TRL"),
    ("loss_normalization", "sequence", "as in TRL"),
    ("num_generations", 8, "as in TRL"),
    ("temperature", 1.0, "as in TRL"),
    ("learning_rate", 1e-6, "released code"),
    ("sdpo.distillation_weight", 1.0, "section 3"),
    ("sdpo.use_successful_as_teacher", True, "section 3"),
    ("sdpo.success_reward_threshold", 1.0, "as in TRL"),
    ("sdpo.dont_reprompt_on_self_success", True, "released code"),
    ("sdpo.include_environment_feedback", False, "as in TRL; true in the released code"),
    ("sdpo.environment_feedback_only_without_solution", False, "as in TRL; true in the released code"),
    ("sdpo.remove_thinking_from_demonstration", False, "as in TRL; true in the released code"),
    ("sdpo.reprompt_template", "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n", "as in TRL"),
    ("sdpo.solution_template", "\nCorrect solution:\n\n{successful_previous_attempt}\n\n", "as in TRL"),
    (
        "sdpo.feedback_template",
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}\n\n",
        "as in TRL",
    ),
    ("grpo.scale_rewards", "group", "arXiv 2402.03300, section 4.1"),
    ("grpo.epsilon", 0.2, "as in TRL"),
]
OPSD: list[Row] = [
    (
        "teacher_prompt_template",
        "{prompt}\n\nA reference solution:\n\n{privileged_context}\n\nUnderstand why it is right. Then solve the "
        "problem again in your own words, step by step.",
        "as in the released code, in our words",
    ),
    ("divergence", "jsd", "released scripts"),
    ("jsd_beta", 0.5, "released scripts"),
    ("loss_normalization", "token", "released code"),
    ("num_generations", 1, "released code"),
    ("temperature", 1.2, "released scripts"),
    ("top_p", 0.95, "released scripts"),
    ("top_k", 20, "released scripts"),
    ("learning_rate", 2e-5, "released scripts"),
]

PRESETS: dict[str, list[Row]] = {}
DEFAULTS: dict[str, list[Row]] = {"sdft": SDFT, "sdpo": SDPO, "opsd": OPSD}
SECTIONS: dict[str, tuple[str, set[str]]] = {
    "sdft": ("sdft", set()),
    "sdpo": ("sdpo", set()),
    "grpo": ("sdpo", {"weight"}),
}
