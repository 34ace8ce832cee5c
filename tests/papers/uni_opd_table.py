"""Uni-OPD, arXiv 2605.03677, with its baseline."""

from __future__ import annotations

from paper_helpers import MACHINE, THINKS_NOT, VLLM, Row, teacher

UNI: list[Row] = [
    ("uni_opd.balance", "group", "released scripts: scope sample"),
    ("uni_opd.balance_ratio", 1.0, "released scripts"),
    ("uni_opd.margin", "shift", "section 2.5"),
    ("uni_opd.margin_statistic", "mean", "table C.2 and released scripts"),
    ("uni_opd.margin_scope", "group", "released scripts"),
    ("uni_opd.margin_delta", 0.4, "table C.2"),
    ("uni_opd.margin_direction", "spread", "table C.2"),
    ("uni_opd.correct_from", 1.0, "released code: exactly right"),
    ("uni_opd.keep_per_prompt", None, "released code: no limit"),
]
PLAIN_OPD: list[Row] = [
    ("uni_opd.balance", "none", "tables 1 to 6: plain OPD"),
    ("uni_opd.margin", "none", "tables 1 to 6: plain OPD"),
]
ADVANTAGE: list[Row] = [
    ("advantage.kl_mode", "sampled", "equation 2"),
    ("advantage.importance", "clip", "released scripts"),
    ("advantage.max_gap", 10.0, "released scripts"),
]
CLIP: list[Row] = [("advantage.low", 0.2, "released scripts"), ("advantage.high", 0.28, "released scripts")]
LEARNING: list[Row] = [
    ("divergence", "reverse_kl", "equation 1"),
    ("loss_normalization", "sequence", "released code"),
    ("num_generations", 16, "released scripts"),
    ("temperature", 1.0, "released scripts"),
    ("top_p", 1.0, "released scripts"),
    ("top_k", 0, "released scripts: off"),
    ("learning_rate", 1e-6, "released scripts"),
    ("lr_scheduler_type", "constant_with_warmup", "released scripts"),
    ("warmup_ratio", 0.1, "released scripts: 5 of about 50 steps"),
    ("weight_decay", 0.1, "released scripts"),
    ("adam_beta1", 0.9, "released scripts"),
    ("adam_beta2", 0.98, "released scripts"),
]
RUN: list[Row] = [
    ("method", "uni_opd", "section 2"),
    *[*LEARNING, *ADVANTAGE, *CLIP],
    ("model", "Qwen/Qwen3-4B", "table C.1"),
    *THINKS_NOT,
    ("prompts_per_step", 64, "released scripts"),
    ("per_device_train_batch_size", 8, "ours: 8 x 8 on one device"),
    ("gradient_accumulation_steps", 8, "ours"),
    ("max_prompt_length", 4096, "released scripts"),
    ("max_completion_length", 16384, "released scripts"),
    ("max_tokens_per_batch", 20480, "ours: the longest sequence"),
    ("max_steps", 50, "figures of the dynamics"),
    ("max_grad_norm", 1.0, "unstated"),
    ("save_steps", 5, "ours"),
    *[*MACHINE, *VLLM],
]
QUIET = {"enable_thinking": False}
MATH: list[Row] = [
    *teacher(0, model="models/qwen3-4b-math-rl", name="math", chat_template_kwargs=QUIET, key=[]),
    ("verifier", "math", "released code"),
]
BOTH: list[Row] = [
    *teacher(0, model="models/qwen3-4b-math-rl", name="math", chat_template_kwargs=QUIET, key=["math"]),
    *teacher(1, model="models/qwen3-4b-code-rl", name="code", chat_template_kwargs=QUIET, key=["code"]),
    ("verifier", {"math": "math", "code": "code"}, "released code"),
]
STRONG: list[Row] = [
    *teacher(0, model="Qwen/Qwen3-30B-A3B-Instruct-2507", name="qwen3-30b-a3b", chat_template_kwargs={}, key=[]),
    ("verifier", {"math": "math", "code": "code"}, "released code"),
]
DEEPMATH: list[Row] = [
    ("train_data.0.format", "deepmath", "DeepMath"),
    ("train_data.0.where", {"difficulty": {"min": 6}}, "difficulty 6 and more"),
]
EURUS: list[Row] = [
    ("train_data.1.format", "eurus", "Eurus-2-RL"),
    ("train_data.1.where", {"ability": "code"}, "its code"),
]
SEEING: list[Row] = [
    *[row for row in RUN if row[0] not in ("model", "use_vllm", *(name for name, _, _ in THINKS_NOT))],
    ("model", "Qwen/Qwen3-VL-4B-Instruct", "table C.1"),
    ("freeze_vision_tower", True, "unstated"),
    ("use_vllm", False, "ours: vLLM resizes pictures in its own way"),
    *[row for row in UNI if row[0] not in ("uni_opd.margin_delta", "uni_opd.margin_direction")],
    ("uni_opd.margin_delta", 0.0, "table C.2, multimodal"),
    ("uni_opd.margin_direction", "lift", "table C.2, multimodal"),
    ("train_data.0.format", "openmmreasoner_images", "released code: its scorer"),
]
SEEING_MATH: list[Row] = [
    *teacher(0, model="models/qwen3-vl-4b-math-rl", name="vlm-math", key=[], images="image"),
    ("verifier", "math", "released code"),
]
CROSS: list[Row] = [
    *teacher(0, model="models/qwen3-vl-4b-math-rl", name="vlm-math", key=["vlm-math"], images="image"),
    *teacher(1, model="models/qwen3-4b-code-rl", name="code", key=["code"], images="omit", chat_template_kwargs=QUIET),
    ("train_data.0.data_source", "vlm-math", "released code: its alias"),
    ("verifier", {"vlm-math": "math", "code": "code"}, "released code"),
]
PRESETS: dict[str, list[Row]] = {
    "uni_opd_vl_math_qwen3_vl_4b": [*SEEING, *SEEING_MATH],
    "uni_opd_cross_modal_qwen3_vl_4b": [*SEEING, *CROSS, *EURUS],
    "uni_opd_math_qwen3_4b": [*RUN, *UNI, *MATH],
    "uni_opd_math_code_qwen3_4b": [*RUN, *UNI, *BOTH],
    "uni_opd_qwen3_30b_a3b_to_4b": [*RUN, *UNI, *STRONG],
    "opd_math_qwen3_4b": [*RUN, *PLAIN_OPD, *MATH, *DEEPMATH],
    "opd_math_code_qwen3_4b": [*RUN, *PLAIN_OPD, *BOTH, *DEEPMATH, *EURUS],
}
DEFAULTS: dict[str, list[Row]] = {"uni_opd": [*LEARNING, *UNI, *ADVANTAGE]}
SECTIONS: dict[str, tuple[str, set[str]]] = {"uni_opd": ("uni_opd", set()), "advantage": ("uni_opd", set())}
"""Section -> a method that has it, and what of it is no constant of the paper."""

BALANCING: list[Row] = [
    ("rollouts", 8, "N = 8"),
    ("temperature", 1.0, "offline balancing"),
    ("top_p", 0.95, "offline balancing"),
    ("top_k", 50, "offline balancing"),
    ("cap", 4.0, "ours: the paper names no ratio"),
    ("target", "largest", "ours: an about flat histogram"),
]
