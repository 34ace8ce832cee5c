"""CaMOPD, arXiv 2605.27115, with its baseline."""

from __future__ import annotations

import math

from paper_helpers import MACHINE, VLLM, Row, teacher

CAMOPD: list[Row] = [
    ("camopd.schedule", "alternating", "equation 5"),
    ("camopd.n_general", 3, "appendix A.7: 3-1"),
    ("camopd.selection", "mass", "equation 8"),
    ("camopd.rho_g", 0.8, "appendix A"),
    ("camopd.rho_d", 0.8, "appendix A"),
    ("camopd.score_g", "abs", "equation 6"),
    ("camopd.score_d", "pos", "equation 7"),
    ("camopd.r_g", 2.0, "appendix A"),
    ("camopd.r_d", 1.0, "appendix A"),
    ("camopd.min_tokens", 0, "equation 8: no rollout is left out for its length"),
]
DIAGNOSES: list[Row] = [
    ("camopd.diagnose_steps", 0, "ours: off"),
    ("camopd.diagnose_samples", 32, "ours"),
    ("camopd.diagnose_draws", 20, "ours"),
    ("camopd.diagnose_dimensions", 4096, "ours"),
]
VANILLA: list[Row] = [
    ("camopd.schedule", "mixed", "equation 3"),
    ("camopd.n_general", 1, "equation 3: 1 : 1"),
    ("camopd.selection", "none", "equation 2"),
    ("camopd.r_g", 1.0, "equation 2"),
    ("camopd.r_d", 1.0, "equation 2"),
]
ADVANTAGE: list[Row] = [
    ("advantage.kl_mode", "sampled", "equation 2"),
    ("advantage.importance", "band", "equation 2: w_t"),
    ("advantage.max_gap", math.inf, "equation 2: none is left out"),
]
BAND: list[Row] = [("advantage.low", 0.5, "unstated"), ("advantage.high", 2.0, "unstated")]
LEARNING: list[Row] = [
    ("divergence", "reverse_kl", "equation 2"),
    ("loss_normalization", "sequence", "equation 9"),
    ("num_generations", 1, "appendix A"),
    ("temperature", 1.0, "unstated: samples of the student itself"),
    ("top_p", 1.0, "unstated: samples of the student itself"),
    ("top_k", 0, "unstated: samples of the student itself"),
    ("learning_rate", 2e-6, "appendix A"),
    ("max_grad_norm", 1000.0, "unstated: at 1.0 r_g 1 and 2 give the same weights to the last bit"),
]
RUN: list[Row] = [
    ("method", "camopd", "section 3"),
    *[*LEARNING, *ADVANTAGE, *BAND],
    ("prompts_per_step", 512, "appendix A"),
    ("per_device_train_batch_size", 16, "ours: 16 x 32 on one device"),
    ("gradient_accumulation_steps", 32, "ours"),
    ("max_prompt_length", 4096, "appendix A"),
    ("max_completion_length", 32768, "appendix A"),
    ("max_tokens_per_batch", 36864, "ours: the longest sequence"),
    ("max_steps", 120, "appendix A"),
    ("lr_scheduler_type", "constant", "unstated"),
    ("weight_decay", 0.01, "unstated"),
    ("save_steps", 20, "ours"),
    *[*MACHINE, *VLLM],
]
MEDICAL: list[Row] = [
    ("model", "Intelligent-Internet/II-Medical-8B", "appendix A: the start is the domain's teacher"),
    *teacher(0, model="Qwen/Qwen3-8B", name="general", key=[]),
    *teacher(1, model="Intelligent-Internet/II-Medical-8B", name="medical", key=["medical"]),
    ("camopd.domain", ["medical"], "appendix A"),
]
ROLE_PLAY: list[Row] = [
    ("model", "models/qwen3-4b-instruct-2507-coser-sft", "appendix A: the start is the domain's teacher"),
    *teacher(0, model="Qwen/Qwen3-4B-Instruct-2507", name="general", key=[]),
    *teacher(1, model="models/qwen3-4b-instruct-2507-coser-sft", name="role-play", key=["role_play"]),
    ("camopd.domain", ["role_play"], "appendix A"),
]
PRESETS: dict[str, list[Row]] = {
    "camopd_medical_qwen3_8b": [*RUN, *CAMOPD, *DIAGNOSES, *MEDICAL],
    "camopd_role_play_qwen3_4b": [*RUN, *CAMOPD, *DIAGNOSES, *ROLE_PLAY],
    "vanilla_mopd_medical_qwen3_8b": [*RUN, *VANILLA, *MEDICAL],
    "vanilla_mopd_role_play_qwen3_4b": [*RUN, *VANILLA, *ROLE_PLAY],
}
DEFAULTS: dict[str, list[Row]] = {"camopd": [*LEARNING, *CAMOPD, *DIAGNOSES, *ADVANTAGE]}
SECTIONS: dict[str, tuple[str, set[str]]] = {"camopd": ("camopd", set())}
"""Section -> a method that has it, and what of it is no constant of the paper."""
