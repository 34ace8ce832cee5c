"""Settings of small runs of every method, for tests that end and continue them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine_helpers import PROMPTS

from tiny.agents.house import HOUSE

ENVIRONMENT = {
    "name": HOUSE,
    "num_environments": 2,
    "max_turns": 2,
    "max_trajectory_tokens": 400,
    "eval_splits": ["valid_unseen"],
    "eval_temperatures": [0.0],
    "eval_max_tasks": 1,
    "options": {"count": 6, "instructions": False},
}
JUDGE = {"judge_max_tokens": 3, "judge_prompt": "{llm_text}", "use_failures": False}

OF_METHODS: dict[str, dict[str, Any]] = {
    "opd": {"freeze_head": True},
    "mt_opd": {"lora": {"r": 2, "lora_dropout": 0.1}},
    "mt_seqkd": {},
    "mad_opd": {"divergence": "jsd"},
    "opad": {"environment": ENVIRONMENT, "opad": {"sampling": "surprise", "steps_per_trajectory": 1}},
    "sage_opd": {"environment": ENVIRONMENT, "sage": JUDGE},
    "tcod": {"environment": ENVIRONMENT},
    "entropy_opd": {"environment": ENVIRONMENT, "entropy_opd": {"tau": 0.5}},
    "uni_opd": {"num_generations": 4, "verifier": f"{Path(__file__).with_name('even_verifier.py')}:even"},
    "camopd": {"num_generations": 2, "camopd": {"domain": ["code"], "n_general": 1}},
    "sdft": {
        "teachers": [{"model": "self", "weights": "ema", "teacher_update_rate": 0.5, "teacher_sync_steps": 2}],
        "teacher_prompt_template": "{prompt} {answer}",
        "sdft": {"num_loss_tokens_to_skip": 1},
    },
    "sdpo": {
        "teachers": [{"model": "self", "weights": "live"}],
        "num_generations": 4,
        "verifier": f"{Path(__file__).with_name('even_verifier.py')}:even",
        "sdpo": {"distillation_weight": 0.5, "success_reward_threshold": 0.5},
    },
    "opsd": {
        "teachers": [{"model": "self", "weights": "base"}],
        "teacher_prompt_template": "{answer} {prompt}",
        "lora": {"r": 2, "lora_dropout": 0.1},
    },
    "grpo": {
        "teachers": [],
        "num_generations": 4,
        "verifier": f"{Path(__file__).with_name('even_verifier.py')}:even",
    },
    "eopd": {"eopd": {"tau": 3.0}},
    "gkd": {"gkd": {"lmbda": 0.5, "completion_column": "answer", "sft_alpha": 0.5}},
    "g_opd": {"g_opd": {"reference": "small"}},
    "relaxed_opd": {"relaxed_opd": {"entropy_share": 0.5}},
    "selectkd": {"selectkd": {"rejected_weight": 0.1}},
    "gold": {"advantage": {"kl_mode": "full_vocab"}},
}
"""What every method needs beside :func:`settings_of`."""

RUNS = {**OF_METHODS, "mt_seqkd, agents": {"method": "mt_seqkd", "environment": ENVIRONMENT}}
"""A run of every method, and of those that do something else in an environment another one, by name."""


def settings_of(name: str, models: dict[str, str], prompt_file: str, steps: int) -> dict[str, Any]:
    """One of :data:`RUNS`, which takes seconds: every step is saved, and every second one is evaluated."""
    own = RUNS[name]
    method = own.get("method", name)
    teachers = [{"model": models["big"]}, {"model": models["small"]}]
    if method == "camopd":
        teachers = [{"model": models["big"], "key": ["code"]}, {"model": models["small"], "key": ["agentic"]}]
    elif method in ("opd", "eopd", "gkd", "sage_opd", "tcod", "entropy_opd", "relaxed_opd", "selectkd"):
        teachers = teachers[:1]
    elif method == "gold":
        teachers = [{**teachers[0], "tokenizer_alignment": "spans"}]
    answers = {} if "environment" in own else {
        "train_data": [prompt_file], "eval_data": [prompt_file], "eval_max_prompts": 2,
    }  # fmt: skip
    return {
        "model": models["student"],
        "teachers": teachers,
        "method": method,
        "debate": {"max_tokens": 4, "prompts": PROMPTS},
        "per_device_train_batch_size": 3,
        "num_generations": 2 if method == "mad_opd" else 1,
        "max_completion_length": 6,
        "eval_steps": 2,
        "max_steps": steps,
        "warmup_ratio": 0.3,
        "learning_rate": 3e-3,
        "save_steps": 1,
        "verifier_workers": 1,
        **answers,
        **own,
    }
