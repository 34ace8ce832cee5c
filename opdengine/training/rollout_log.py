"""The rows of ``rollouts/step_N.jsonl``: one for each sample of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from opdengine.types import Image, Message, Sample, Turn

TOLD = ("action", "failure", "observation", "reward", "stop_reason")
"""The log keeps these fields of what an environment told about a turn."""


def completion_row(sample: Sample) -> dict[str, Any]:
    """What the log of rollouts says of a sample; all of it can be written as JSON or as text.

    ``turns`` is there where the student acted in an environment: what was said after the prompt, in order, and of
    the student's turns what came of them; ``author`` is there where a teacher acted in its place.
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
        "prompt": _shown(sample.prompt.messages),
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
        row |= {name: sample.info[name] for name in ("success", "score", "author") if name in sample.info}
    return row


def _turn_row(turn: Turn) -> dict[str, Any]:
    told = {name: turn.info[name] for name in TOLD if name in turn.info}
    return {"role": turn.role, "messages": _shown(turn.messages), **told}


def _shown(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """A chat for the log: a picture is named there, and its bytes reach no other process."""
    return [
        {**message, "content": [_named(part) for part in content]}
        if isinstance(content := message.get("content"), (list, tuple))
        else dict(message)
        for message in messages
    ]


def _named(part: Any) -> Any:
    image = part.get("image") if isinstance(part, Mapping) else None
    return {**part, "image": str(image)} if isinstance(image, Image) else part
