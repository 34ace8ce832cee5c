"""SAGE-OPD, arXiv 2606.19659, with its baselines and environments."""

from __future__ import annotations

from paper_helpers import MACHINE, THINKS_NOT, VLLM, Row, teacher

SAGE: list[Row] = [
    ("sage.alpha", 0.5, "equation 7 and section 5.1"),
    ("sage.use_failures", True, "section 3.3"),
    ("sage.use_judge", True, "section 3.3"),
    ("sage.use_confidence", True, "equations 8 to 10"),
    ("sage.normalization", "all_tokens", "equation 11 and section 6.3"),
    ("sage.normalization_scope", "batch", "section 3.5"),
    ("sage.eps", 1e-8, "unstated"),
    ("sage.z_max", None, "equation 11"),
    ("sage.judge_temperature", 0.0, "appendix A"),
    ("sage.judge_max_tokens", 1028, "appendix A"),
    ("sage.judge_fallback", 1.0, "section 3.3: full supervision"),
    ("sage.judge_history", False, "table 9"),
    ("sage.judge_next_observation", False, "table 9"),
    ("sage.judge_prompt", None, "in our words"),
    ("sage.admissible_count", 30, "appendix C"),
    ("sage.confidence_temperature", 1.0, "equation 8: the distribution of the loss"),
    ("sage.kl_mode", "full_vocab", "equation 5"),
    ("sage.intervention", "judge", "section 3.3"),
]
TCOD: list[Row] = [("tcod.k_start", 1, "equation 25"), ("tcod.eta", 1.0, "equation 25")]
ENTROPY: list[Row] = [("entropy_opd.alpha", 1.0, "equation 26"), ("entropy_opd.tau", 0.8, "equation 26")]
SFT: list[Row] = [
    ("mt_seqkd.successful_only", False, "unstated"),
    ("repetition_penalty", 1.0, "unstated: of the teacher, as of the student"),
]
LEARNING: list[Row] = [
    ("divergence", "reverse_kl", "equation 5"),
    ("loss_normalization", "token", "equation 12"),
    ("temperature", 0.4, "appendix A"),
    ("top_p", 1.0, "appendix A"),
    ("top_k", 0, "appendix A: off"),
    ("environment.eval_temperatures", [0.4], "appendix A"),
    ("learning_rate", 1e-6, "appendix A"),
    ("weight_decay", 0.1, "appendix A"),
]
ONE_ROLLOUT: list[Row] = [("num_generations", 1, "section 5.1")]
RUN: list[Row] = [
    *LEARNING,
    ("model", "Qwen/Qwen3-1.7B", "section 5.1"),
    *THINKS_NOT,
    *teacher(0, model="Qwen/Qwen3-8B", name="qwen3-8b", chat_template_kwargs={"enable_thinking": False}, key=[]),
    ("prompts_per_step", 64, "appendix A"),
    ("per_device_train_batch_size", 8, "ours: 8 x 8 on one device"),
    ("gradient_accumulation_steps", 8, "ours"),
    ("max_tokens_per_batch", 32768, "ours"),
    ("max_completion_length", 4096, "appendix A: of a turn"),
    ("environment.max_trajectory_tokens", 32768, "ours"),
    ("environment.train_split", "train", "appendix A"),
    ("lr_scheduler_type", "constant", "unstated"),
    ("warmup_ratio", 0.0, "unstated"),
    ("max_grad_norm", 1.0, "unstated"),
    ("eval_steps", 5, "ours"),
    ("save_steps", 5, "ours"),
    *[*MACHINE, *VLLM],
]
ALFWORLD: list[Row] = [
    ("environment.name", "alfworld", "section 5.1"),
    ("environment.options", {"format": "react", "demonstration": True}, "appendix C: ReAct with one example"),
    ("environment.eval_splits", ["valid_seen", "valid_unseen"], "section 5.1"),
    ("environment.eval_max_tasks", None, "all 140 and 134 games"),
    ("environment.max_turns", 30, "appendix A"),
    ("environment.num_environments", 32, "ours"),
    ("max_steps", 55, "one epoch: 3,553 games"),
]
SCIENCEWORLD: list[Row] = [
    ("environment.name", "scienceworld", "section 5.1"),
    (
        "environment.options",
        {"format": "react", "demonstration": True, "inventory": True},
        "appendix C: ReAct with one example, the inventory in what is seen",
    ),
    ("environment.eval_splits", ["test"], "section 5.1"),
    ("environment.eval_max_tasks", 149, "table 2: 30 types, 5 variations of each, one type has 4"),
    ("environment.max_turns", 30, "appendix A"),
    ("environment.num_environments", 16, "ours"),
    ("max_steps", 56, "one epoch: 3,592 variations"),
]
SEARCH: list[Row] = [
    ("environment.name", "search", "section 5.1"),
    (
        "environment.options",
        {
            "corpus": "data/wiki_index",
            "questions": {"train": "data/questions_train.jsonl", "test": "data/questions_test.jsonl"},
            "max_searches": 8,
            "top_k": 3,
        },
        "appendix A: at most 8 searches, 3 documents each",
    ),
    ("environment.eval_splits", ["test"], "section 5.1"),
    ("environment.eval_max_tasks", 500, "table 3: at most 500 questions of a split"),
    ("environment.max_turns", 16, "appendix A"),
    ("environment.stop", ["</action>"], "appendix A"),
    ("environment.num_environments", 32, "ours"),
    ("max_steps", 156, "one epoch: 10,000 questions"),
]


def run(method: str, *tables: list[Row], rollouts: int = 1) -> list[Row]:
    """Rows of one run."""
    rows: list[Row] = [("method", method, "section 5.1"), ("num_generations", rollouts, "section 5.1"), *RUN]
    return [*rows, *(row for table in tables for row in table)]


PRESETS: dict[str, list[Row]] = {
    "sage_opd_alfworld_qwen3_8b_to_1.7b": run("sage_opd", ALFWORLD, SAGE),
    "sage_opd_scienceworld_qwen3_8b_to_1.7b": run("sage_opd", SCIENCEWORLD, SAGE),
    "sage_opd_search_qwen3_8b_to_1.7b": run("sage_opd", SEARCH, SAGE),
    "opd_alfworld_qwen3_8b_to_1.7b": run("opd", ALFWORLD),
    "opd_2_rollouts_alfworld_qwen3_8b_to_1.7b": run("opd", ALFWORLD, rollouts=2),
    "tcod_alfworld_qwen3_8b_to_1.7b": run("tcod", ALFWORLD, TCOD),
    "entropy_opd_alfworld_qwen3_8b_to_1.7b": run("entropy_opd", ALFWORLD, ENTROPY),
    "mt_seqkd_alfworld_qwen3_8b_to_1.7b": run("mt_seqkd", ALFWORLD, SFT),
}
DEFAULTS: dict[str, list[Row]] = {
    "sage_opd": [*LEARNING, *ONE_ROLLOUT, *SAGE, ("environment.max_turns", 30, "appendix A")],
    "tcod": [*LEARNING, *ONE_ROLLOUT, *TCOD],
    "entropy_opd": [*LEARNING, *ONE_ROLLOUT, *ENTROPY],
}
SECTIONS: dict[str, tuple[str, set[str]]] = {
    "sage": ("sage_opd", set()),
    "tcod": ("tcod", set()),
    "entropy_opd": ("entropy_opd", set()),
}
"""Section -> a method that has it, and what of it is no constant of the paper."""
