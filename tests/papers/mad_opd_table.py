"""MAD-OPD and OPAD, arXiv 2605.01347, with their baselines and pairs of models."""

from __future__ import annotations

from paper_helpers import MACHINE, THINKS_NOT, VLLM, Row, teacher

OPTIMIZER: list[Row] = [
    ("learning_rate", 1e-5, "released scripts"),
    ("lr_scheduler_type", "cosine", "released scripts"),
    ("warmup_ratio", 0.05, "released scripts"),
    ("weight_decay", 0.01, "released scripts"),
    ("adam_beta1", 0.9, "appendix B.1"),
    ("adam_beta2", 0.999, "appendix B.1"),
    ("max_grad_norm", 1.0, "appendix B.1"),
]
SAMPLING: list[Row] = [
    ("temperature", 0.7, "released scripts"),
    ("top_p", 0.8, "released scripts"),
    ("top_k", 20, "released scripts"),
    ("repetition_penalty", 1.2, "released scripts"),
    ("num_generations", 1, "released code: one sample of a state"),
]
TEACHERS_WRITE: list[Row] = [
    ("temperature", 0.7, "unstated: as in the debates"),
    ("top_p", 0.8, "unstated: as in the debates"),
    ("top_k", 20, "unstated: as in the debates"),
    ("repetition_penalty", 1.0, "unstated"),
    ("num_generations", 1, "one answer of one teacher"),
]
LOSS: list[Row] = [
    ("teacher_reduction", "sum", "equation 8"),
    ("loss_normalization", "sequence", "released code: mean over tokens, then over samples"),
]
EXACT_LOSS: list[Row] = [*LOSS, ("divergence_temperature", 1.0, "released code")]
DEBATE: list[Row] = [
    ("debate.rounds", 2, "appendix B.1: R = 2"),
    ("debate.temperature", 0.7, "released scripts"),
    ("debate.top_p", 0.8, "released scripts"),
    ("debate.top_k", 20, "released scripts"),
    ("debate.repetition_penalty", 1.1, "released code"),
    ("debate.max_tokens", 4096, "released scripts"),
    ("debate.tau", 1.0, "equation 7"),
    ("debate.use_confidence", True, "section 4.2"),
    ("debate.use_transcript", True, "section 4.1"),
]
SOFT: list[Row] = [("divergence", "jsd", "remark 1: agents"), ("jsd_beta", 0.5, "remark 1")]
HARD: list[Row] = [("divergence", "reverse_kl", "remark 1: code")]
BATCH: list[Row] = [
    ("prompts_per_step", 128, "released scripts: 1 x 16 x 8"),
    ("per_device_train_batch_size", 8, "ours: 8 x 16 on one device"),
    ("gradient_accumulation_steps", 16, "ours"),
    ("max_tokens_per_batch", 20480, "ours: the longest sequence"),
]
TOOL_USE: list[Row] = [
    *BATCH,
    ("max_prompt_length", 16384, "released scripts"),
    ("max_completion_length", 4096, "released scripts"),
    ("max_steps", 125, "one epoch: 16,000 decision points"),
    ("save_steps", 5, "released scripts"),
]
CODE: list[Row] = [
    *BATCH,
    ("max_prompt_length", 4096, "released scripts"),
    ("max_completion_length", 16384, "released scripts"),
    ("max_steps", 234, "one epoch: 30,000 prompts"),
    ("save_steps", 10, "appendix B"),
]
WORDS: dict[str, list[Row]] = {
    "agentic": [("debate.prompts", "tools", "released code: toolace_mode")],
    "code": [("debate.prompts", "code", "released code: code_mode")],
}
PLAIN: dict[str, list[Row]] = {"agentic": [*SOFT, *TOOL_USE], "code": [*HARD, *CODE]}
QUIET = {"enable_thinking": False}


def models(student: str, *teachers: str, weights: tuple[float, ...] = (1.0, 1.0)) -> list[Row]:
    """Rows of a pair of teachers and their student, none of whom thinks."""
    rows: list[Row] = [("model", f"Qwen/{student}", "table of the README"), *THINKS_NOT]
    for place, (name, weight) in enumerate(zip(teachers, weights, strict=False)):
        rows += teacher(
            place, model=f"Qwen/{name}", name=name.lower(), weight=weight, chat_template_kwargs=QUIET, key=[]
        )
    return rows


PAIRS = {
    "qwen3_14b_8b_to_1.7b": models("Qwen3-1.7B", "Qwen3-14B", "Qwen3-8B"),
    "qwen3_14b_8b_to_4b": models("Qwen3-4B", "Qwen3-14B", "Qwen3-8B"),
    "qwen3_32b_30b_a3b_to_4b": models("Qwen3-4B", "Qwen3-32B", "Qwen3-30B-A3B"),
    "qwen3_32b_30b_a3b_to_8b": models("Qwen3-8B", "Qwen3-32B", "Qwen3-30B-A3B"),
    "qwen3_32b_30b_a3b_to_14b": models("Qwen3-14B", "Qwen3-32B", "Qwen3-30B-A3B"),
    "qwen3.5_27b_9b_to_4b": models("Qwen3.5-4B", "Qwen3.5-27B", "Qwen3.5-9B"),
}
SHARED: list[Row] = [*OPTIMIZER, *MACHINE]
MAD: list[Row] = [("method", "mad_opd", "section 4"), *EXACT_LOSS, *SAMPLING, *DEBATE, *SHARED]
FIRST = ("Qwen3-4B", "Qwen3-14B", "Qwen3-8B")

PRESETS: dict[str, list[Row]] = {
    **{
        f"mad_opd_{task}_{pair}": [*MAD, *PLAIN[task], *WORDS[task], *rows]
        for task in ("agentic", "code")
        for pair, rows in PAIRS.items()
    },
    **{
        f"opd_{task}_qwen3_14b_to_4b": [
            ("method", "opd", "section 5"),
            ("divergence_temperature", 0.7, "released code: of this baseline alone"),
            *[*LOSS, *SAMPLING, *SHARED, *SOFT, *rows, *models(*FIRST[:2])],
        ]
        for task, rows in (("agentic", TOOL_USE), ("code", CODE))
    },
    **{
        f"mt_opd_{task}_qwen3_14b_8b_to_4b": [
            ("method", "mt_opd", "section 5"),
            *[*EXACT_LOSS, *SAMPLING, *SHARED, *PLAIN[task], *models(*FIRST, weights=(0.5, 0.5))],
        ]
        for task in ("agentic", "code")
    },
    **{
        f"mt_seqkd_{task}_qwen3_14b_8b_to_4b": [
            ("method", "mt_seqkd", "section 5"),
            *[*LOSS, *TEACHERS_WRITE, *SHARED, *rows, *models(*FIRST, weights=(7.0, 3.0))],
        ]
        for task, rows in (("agentic", TOOL_USE), ("code", CODE))
    },
    "opad_toolace_qwen3_14b_8b_to_4b": [
        ("method", "opad", "section 4.4"),
        ("opad.sampling", "all", "released code: every step"),
        ("opad.steps_per_trajectory", None, "released code: every step"),
        ("environment.name", "recorded", "released code: a static environment"),
        ("environment.options", {"mode": "replay", "files": {"train": "data/toolace.json"}}, "section 4.4"),
        ("environment.max_turns", 10, "released code: toolace_env"),
        ("environment.max_trajectory_tokens", 20480, "16384 and 4096"),
        ("max_completion_length", 4096, "released scripts"),
        ("per_device_train_batch_size", 8, "ours"),
        ("gradient_accumulation_steps", 4, "32 conversations of about four steps: about 128"),
        ("max_tokens_per_batch", 20480, "ours: the longest sequence"),
        ("max_steps", 125, "one epoch: 16,000 steps"),
        ("save_steps", 5, "released scripts"),
        *[*EXACT_LOSS, *SAMPLING, *DEBATE, *SHARED, *VLLM, *SOFT, *WORDS["agentic"], *PAIRS["qwen3_14b_8b_to_4b"]],
    ],
}

ARMS: list[Row] = [*EXACT_LOSS, *SAMPLING, *OPTIMIZER, ("jsd_beta", 0.5, "remark 1")]
DEFAULTS: dict[str, list[Row]] = {
    "mad_opd": [*ARMS, *DEBATE, *HARD],
    "opad": [*ARMS, *DEBATE, *SOFT, ("opad.sampling", "all", "section 4.4")],
    "mt_opd": [*ARMS, *HARD],
    "mt_seqkd": [*EXACT_LOSS, *TEACHERS_WRITE, *OPTIMIZER, ("jsd_beta", 0.5, "remark 1")],
}
SECTIONS = {"debate": ("mad_opd", {"prompts", "seed"})}
"""Section -> a method that has it, and what of it is no constant of the paper."""
