"""Folders of runs as they lie on disk, written by hand: any length, every kind of log, and text that means harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from opdengine.metrics import write_jsonl
from opdengine.training.token_log import Pieces, write_tokens

EVIL = (
    "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 2'>{{ 7 }}\u2028\x00\ud800<!-- 漢"
)
"""Ends elements, is markup, a template, a line for JavaScript, a control character, half a character."""


class Words:
    """Stands for a tokenizer: id n is a word."""

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"w{token}"

    def decode(self, ids: list[int]) -> str:
        return EVIL if ids[0] == 7 else f" word{ids[0]}"


def token_arrays(length: int, seed: int) -> dict[str, np.ndarray]:
    """Two teachers; the second one lists alternatives."""
    rng = np.random.default_rng(seed)
    own = -rng.random(length).astype(np.float32)
    theirs = -rng.random((length, 2)).astype(np.float32)
    alternatives = np.full((length, 2, 5), -1, dtype=np.int32)
    alternatives[:, 1, :3] = [[1, 2, 7]]
    logprobs = np.full((length, 2, 5), np.nan, dtype=np.float32)
    logprobs[:, 1, :3] = np.log([[0.5, 0.3, 0.1]])
    return {
        "token_ids": np.arange(length + 2, dtype=np.int32) % 50,
        "is_target": np.arange(length + 2) >= 2,
        "scale": np.array([0.1]),
        "student_logprob": own,
        "student_entropy": rng.random(length).astype(np.float32),
        "teacher_logprob": theirs,
        "reverse_kl": rng.random((length, 2)).astype(np.float32),
        "mix": np.array([0.25, 0.75], dtype=np.float32),
        "kl_weight": np.zeros(length, dtype=np.float32),
        "advantage": (theirs.mean(axis=1) - own + 0.5).astype(np.float32),
        "alternatives": alternatives,
        "alternatives_logprob": logprobs,
    }


def rollout(step: int, place: int, **changes: Any) -> dict[str, Any]:
    """One line of a log of rollouts."""
    return {
        "id": f"{place}.0", "prompt_id": f"task {place % 5}", "data_source": ["code", "math"][place % 2],
        "text": f"answer {place} of step {step}", "tokens": 40, "stop_reason": "stop", "reward": float(place % 2),
        "policy_version": step - 1, "answer": f"expected {place % 5}", "drop": "balance" if place % 4 == 3 else "",
        "prompt": [{"role": "user", "content": f"question {place % 5}"}], "teachers": ["large", "small"],
        **changes,
    }  # fmt: skip


def write_run(folder: Path, steps: int = 12, rollouts: int = 8, tokens: int = 40, evil: bool = False) -> Path:
    """A run of Uni-OPD under debates."""
    folder.mkdir(parents=True)
    text = {"text": EVIL, "answer": {EVIL: EVIL}, "prompt": [{"role": EVIL, "content": EVIL}]} if evil else {}
    metrics: list[dict[str, Any]] = [{"step": 0, "eval/accuracy": 0.25}]
    for step in range(1, steps + 1):
        metrics.append(
            {"step": step, "loss": 1 / step, "grad_norm": float("nan"), "completions/sampled": float(rollouts),
             "completions/kept": rollouts * 0.75, "dropped/balance": rollouts * 0.25, "timing/rollout": 2.0,
             "timing/update": 1.0, "reward/mean": 0.5, **({"eval/accuracy": step / steps} if step % 4 == 0 else {})}
        )  # fmt: skip
        write_jsonl(folder / f"rollouts/step_{step}.jsonl", [rollout(step, i, **text) for i in range(rollouts)])
        logged = [(i, token_arrays(tokens, step + i)) for i in range(min(rollouts, 8))]
        write_tokens(folder / f"tokens/step_{step}.npz", logged, Pieces(Words()))
        said = EVIL if evil else f"I say {step}"
        debate = {"prompt_id": "task 0", "teachers": ["large", "small"], "rounds": [[said, "b"], ["c", said]],
                  "confidences": [90.0, None], "weights": [0.6, 0.4], "problems": {"missing_confidence": 1},
                  "failed": ""}  # fmt: skip
        write_jsonl(folder / f"debates/step_{step}.jsonl", [debate])
    answers = [{"prompt_id": "held out", "score": 1.0, "prompt": [{"role": "user", "content": "?"}], "answer": "4",
                "text": EVIL if evil else "4"}]  # fmt: skip
    write_jsonl(folder / f"evaluations/step_{steps}.jsonl", answers)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    settings = {"method": "uni_opd", "max_steps": steps, "run_name": "a", "teachers": [{"model": "m", "weight": 1.0}],
                "learning_rate": 1e-3 if evil else 1e-4}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def write_agent_run(folder: Path) -> Path:
    """A run of SAGE-OPD: turns, observations and verdicts."""
    write_run(folder, steps=2)
    turns = [
        {"role": "assistant", "messages": [{"role": "assistant", "content": "go kitchen"}], "action": "go kitchen",
         "failure": "", "stop_reason": "stop"},
        {"role": "environment", "messages": [{"role": "user", "content": "You are in the kitchen."}]},
        {"role": "assistant", "messages": [{"role": "assistant", "content": "fly"}], "action": "",
         "failure": "unparseable", "stop_reason": "length"},
    ]  # fmt: skip
    rows = [rollout(1, i, turns=turns, success=bool(i), reward=float(i)) for i in range(2)]
    verdicts = [
        {"rollout_id": f"{i}.0", "prompt_id": "task", "turn": turn, "verdict": ["skip", "strong"][turn], "weight": turn,
         "text": "", "reply": "SKIP, it was right"}
        for i in range(2)
        for turn in range(2)
    ]  # fmt: skip
    write_jsonl(folder / "rollouts/step_1.jsonl", rows)
    write_jsonl(folder / "verdicts/step_1.jsonl", verdicts)
    return folder
