"""The rows of ``rollouts/step_N.jsonl``: one for each sample of a step."""

from __future__ import annotations

from typing import Any

from opdengine.types import Sample, Turn

TOLD = ("action", "failure", "observation", "reward", "stop_reason")
"""The log keeps these fields of what an environment told about a turn."""


def completion_row(sample: Sample) -> dict[str, Any]:
    """What the log of rollouts says of a sample; all of it can be written as JSON or as text.

    ``turns`` is there where the student acted in an environment: what was said after the prompt, in order, and of
    the student's turns what came of them.
    """
    row = {
        "id": sample.id,
        "prompt_id": sample.prompt.id,
        "data_source": sample.prompt.key,
        "text": sample.text,
        "tokens": len(sample.target_ids),
        "stop_reason": sample.stop_reason,
        "reward": sample.reward,
        "policy_version": sample.policy_version,
        "prompt": [dict(message) for message in sample.prompt.messages],
        "answer": sample.prompt.answer,
        "drop": sample.drop,
        "group": sample.group,
        "trajectory": sample.trajectory,
        "teachers": [context.teacher for context in sample.contexts],
    }
    if sample.prompt.tools:
        row["tools"] = [dict(tool) for tool in sample.prompt.tools]
    if any(turn.messages for turn in sample.turns):
        row["turns"] = [_turn_row(turn) for turn in sample.turns[1:]]
        row |= {name: sample.info[name] for name in ("success", "score") if name in sample.info}
    return row


def _turn_row(turn: Turn) -> dict[str, Any]:
    told = {name: turn.info[name] for name in TOLD if name in turn.info}
    return {"role": turn.role, "messages": [dict(message) for message in turn.messages], **told}
