"""This module holds what debating teachers are told: prompt families, the transcript and the confidence tag.

The content follows MAD-OPD (arXiv 2605.01347, section 4.1 and the released prompts); the wording
is ours. A family is data, so a configuration file can bring its own.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from opdengine.models.rendering import rewritten
from opdengine.models.thoughts import without_thoughts
from opdengine.types import Message

CONFIDENCE_TAG = re.compile(r"<<\s*CONFIDENCE\s*=\s*([+-]?\d+(?:\.\d+)?)\s*>>")


@dataclass(frozen=True)
class DebatePrompts:
    """One family of debate prompts.

    The fields are format strings. ``{task}`` is the user's last message, ``{expert}`` the letter of
    the teacher that reads, ``{transcript}`` everything said so far, ``{confidence}`` the request
    for a confidence (empty when confidences are off).

    Args:
        first: round 1, read without any transcript.
        later: rounds 2..R.
        score: the context under which a teacher judges the student's tokens after the debate.
        confidence: what ``{confidence}`` becomes in ``first`` and ``later``.
        continuation: stands in for ``{task}`` where the last message is not the user's (after a
            tool result): the debate text then follows as a user message of its own.
        entry: one turn of the transcript.
        start: opens the transcript.
        end: closes it.
    """

    first: str
    later: str
    score: str
    confidence: str = (
        "\n\nEnd your reply with exactly <<CONFIDENCE=N>> where N is a whole number from 0 (surely "
        "wrong) to 100 (certain), and write nothing after it."
    )
    continuation: str = "Decide on the next step of the conversation above."
    entry: str = "[Expert {expert} Round {round}]: {text}"
    start: str = "[Debate Start]\n"
    end: str = "\n[Debate End]"

    def __post_init__(self) -> None:
        required = {
            "first": {"task"},
            "later": {"task", "transcript"},
            "score": {"task", "transcript"},
            "entry": {"text"},
        }
        allowed = {"task", "transcript", "expert", "confidence"}
        for name in ("first", "later", "score", "entry"):
            names = {field for _, field, _, _ in string.Formatter().parse(getattr(self, name)) if field}
            legal = {"expert", "round", "text"} if name == "entry" else allowed
            if missing := required[name] - names:
                raise ValueError(f"debate prompt {name!r} lacks the placeholder {sorted(missing)}")
            if unknown := names - legal:
                raise ValueError(
                    f"debate prompt {name!r} uses unknown placeholders {sorted(unknown)}; it may use {sorted(legal)}"
                )

    def transcript(self, rounds: Sequence[Sequence[str]]) -> str:
        """Everything said so far: ``rounds[r][k]`` is expert k's text of round r + 1."""
        entries = [
            self.entry.format(expert=expert_letter(k), round=r + 1, text=text)
            for r, texts in enumerate(rounds)
            for k, text in enumerate(texts)
        ]
        return self.start + "\n".join(entries) + self.end

    def first_messages(self, messages: Sequence[Message], expert: int, ask_confidence: bool) -> list[Message]:
        """Round 1: the teacher answers the state alone."""
        return self._ask(messages, self.first, expert, "", ask_confidence)

    def later_messages(
        self,
        messages: Sequence[Message],
        expert: int,
        rounds: Sequence[Sequence[str]],
        ask_confidence: bool,
    ) -> list[Message]:
        """Rounds 2..R: the teacher sees the whole transcript so far and answers again."""
        return self._ask(messages, self.later, expert, self.transcript(rounds), ask_confidence)

    def score_messages(
        self, messages: Sequence[Message], expert: int, rounds: Sequence[Sequence[str]]
    ) -> list[Message]:
        """The privileged context under which the student's own tokens are judged."""
        return self._ask(messages, self.score, expert, self.transcript(rounds), False)

    def _ask(
        self,
        messages: Sequence[Message],
        template: str,
        expert: int,
        transcript: str,
        ask_confidence: bool,
    ) -> list[Message]:
        last_is_user = bool(messages) and messages[-1].get("role") == "user"
        asked = messages[-1].get("content") if last_is_user else self.continuation

        def written(task: str) -> str:
            return template.format(
                task=task,
                expert=expert_letter(expert),
                transcript=transcript,
                confidence=self.confidence if ask_confidence else "",
            )

        kept = messages[:-1] if last_is_user else messages
        return [*kept, {"role": "user", "content": rewritten(asked, written)}]


def expert_letter(index: int) -> str:
    """A, B, C, ... for teacher 0, 1, 2, ..."""
    return string.ascii_uppercase[index]


def parse_confidence(text: str, opening: str = "") -> float | None:
    """The last ``<<CONFIDENCE=N>>`` of a reply outside its thoughts, not yet clamped; None when there is none.

    Args:
        text: of the reply.
        opening: the thought that the prompt leaves open, see :attr:`opdengine.teachers.Teacher.opening`.
    """
    found = CONFIDENCE_TAG.findall(without_thoughts(opening + text) or "")
    return float(found[-1]) if found else None


def _family(role: str, focus: str, answer: str) -> DebatePrompts:
    discussion = (
        "{task}\n\nExperts are discussing this task; you are Expert {expert}. "
        "This has been said so far:\n{transcript}\n\n"
    )
    return DebatePrompts(
        first=f"{role}\n\n{{task}}\n\n{answer}{{confidence}}",
        later=(
            f"{discussion}You need not agree with anyone, your earlier self included. Check {focus}. "
            f"Then write your improved answer. {answer}{{confidence}}"
        ),
        score=f"{discussion}Give the best answer to the task in the light of the discussion. {answer}",
    )


FAMILIES = {
    "generic": _family(
        role="You are an expert who solves problems carefully.",
        focus="every step of the reasoning and the final result",
        answer="Reason step by step and finish with the answer.",
    ),
    "tools": _family(
        role="You are an expert in using tools on behalf of a user.",
        focus="the choice of tool, the correctness of every parameter and the order of the calls",
        answer="Reply exactly as the assistant of this conversation should: a tool call or a message.",
    ),
    "code": _family(
        role="You are an expert competitive programmer.",
        focus="correctness, edge cases, time and memory, and needless length",
        answer="Give a complete program.",
    ),
}


def debate_prompts(spec: str | dict[str, str]) -> DebatePrompts:
    """A family by name ("generic", "tools", "code") or from a mapping of its fields.

    Raises:
        ValueError: the name or a field is unknown, or a placeholder is missing.
    """
    if isinstance(spec, str):
        if spec not in FAMILIES:
            raise ValueError(f"unknown debate prompts {spec!r}; choose one of {sorted(FAMILIES)}")
        return FAMILIES[spec]
    fields = {field.name for field in dataclasses.fields(DebatePrompts)}
    if unknown := set(spec) - fields:
        raise ValueError(f"debate prompts have no field {sorted(unknown)}; known: {sorted(fields)}")
    if missing := {"first", "later", "score"} - set(spec):
        raise ValueError(f"debate prompts lack {sorted(missing)}")
    return DebatePrompts(**spec)
