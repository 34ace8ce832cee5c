"""Thoughts in a model's text: where they end, and whether the last one has ended at all."""

from __future__ import annotations

import re

NAMES = ("think", "thinking", "reasoning", "seed:think")
_ANGLED = "|".join(map(re.escape, NAMES))
_OPENING = rf"<(?:{_ANGLED})>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>"
_CLOSING = rf"</(?:{_ANGLED})>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>"
TAG = re.compile(rf"(?P<close>{_CLOSING})|(?P<open>{_OPENING})", re.IGNORECASE)
"""The marks that models write around their thoughts: ``<think>`` of most, ``[THINK]`` of Magistral and others."""
QUOTES = "\"'`"


def answer_part(text: str) -> str | None:
    """Return the text behind the last thought, or None if the thought has no end, so that there is no answer yet.

    A thought may begin before the text (many chat templates open it): whatever stands before a closing tag
    belongs to one. A tag in quotes, as in a program that reads such text, is no tag, except that any closing tag
    ends a thought that is open.
    """
    parts = _visible_parts(text)
    return None if parts is None else parts[-1]


def without_thoughts(text: str) -> str | None:
    """All that stands outside of thoughts, or None if the last one has no end; see :func:`answer_part`."""
    parts = _visible_parts(text)
    return None if parts is None else "".join(parts)


def _visible_parts(text: str) -> list[str] | None:
    parts: list[str] = []
    inside, start = False, 0
    for tag in TAG.finditer(text):
        if tag["close"]:
            if not inside and _closes_a_string(text, tag):
                continue
            if not inside:
                parts.clear()
            inside, start = False, tag.end()
        elif not inside and text[max(tag.start() - 1, 0) : tag.start()] not in tuple(QUOTES):
            parts.append(text[start : tag.start()])
            inside = True
    return None if inside else [*parts, text[start:]]


def _closes_a_string(text: str, tag: re.Match[str]) -> bool:
    """Whether a closing tag is part of a quoted string, such as ``"<think>.*?</think>"``."""
    if text[tag.end() : tag.end() + 1] not in (*QUOTES, "\\"):
        return False
    line = text[max(text.rfind("\n", 0, tag.start()) + 1, tag.start() - 200) : tag.start()]
    return any(quote in line for quote in QUOTES)


def open_thought(opening: str) -> str:
    """The end of a prompt from where a thought is left open, or ``""``: what a completion goes on with."""
    last = None
    for tag in TAG.finditer(opening):
        last = tag if tag["open"] else None
    return "" if last is None else opening[last.start() :]
