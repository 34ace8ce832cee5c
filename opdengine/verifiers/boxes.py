r"""This module reads the last ``\boxed{...}`` of a text."""

from __future__ import annotations

BOXES = ("\\boxed", "\\fbox")
MAX_CHARACTERS = 2000
ENDS = " \t\n$,.;\\"


def last_box(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` or ``\fbox{...}``; None where there is no box.

    ``\boxed 5`` holds 5. A box without an end, or longer than 2,000 characters, holds nothing.
    """
    found = max((text.rfind(name), len(name)) for name in BOXES)
    if found[0] < 0:
        return None
    text = text[sum(found) : sum(found) + MAX_CHARACTERS].lstrip()
    if not text.startswith("{"):
        end = next((place for place, character in enumerate(text) if character in ENDS), len(text))
        return text[:end]
    depth, escaped = 0, False
    for place, character in enumerate(text):
        depth += 0 if escaped else {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[1:place]
        escaped = character == "\\" and not escaped
    return ""
