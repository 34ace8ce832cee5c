"""Fenced code blocks of Markdown, read line by line as CommonMark says (section 4.5)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FENCE = re.compile(r"(?P<marks>`{3,}|~{3,})(?P<info>.*)", re.DOTALL)
ITEM = re.compile(r"(?:[-+*]|\d{1,9}[.)])(?:[ \t]+|$)")
LINE_END = re.compile(r"\r\n|\n|\r")
LANGUAGE = re.compile(r"\w[\w+#.-]*")
MARKS = "```"


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        language: the first word of its info string in lower case, "" where there is none.
        code: its lines, without the indentation of the opening fence; each ends with a line break.
        closed: whether it has a closing fence; the end of the text ends it, too.
    """

    language: str
    code: str
    closed: bool = True


@dataclass
class _Open:
    """A block whose closing fence has not been met."""

    marks: str
    indent: int
    language: str
    lines: list[str]

    def is_closed_by(self, text: str, indent: int) -> bool:
        """Whether a line ends the block: as many marks or more, nothing behind them, indented by at most 3 more."""
        bare = text.rstrip()
        return len(bare) >= len(self.marks) and not bare.strip(self.marks[0]) and indent - self.indent <= 3

    def block(self, closed: bool) -> Block:
        """What it has become."""
        return Block(self.language, _code(self.lines if closed else _without_last_end(self.lines)), closed)


def fenced_blocks(text: str) -> list[Block]:
    """All fenced blocks of a text, in order; takes time in proportion to its length.

    A fence is indented by up to three spaces, from the margin or from the text of a list item. Where no block
    holds anything, fences that begin behind other text (``So: ```python``) count as well.
    """
    blocks = list(_blocks(text))
    if any(block.code.strip() for block in blocks):
        return blocks
    return [block for block in _blocks_within_lines(text) if block.code.strip()] or blocks


def _blocks(text: str) -> Iterator[Block]:
    items: list[int] = []  # where the text of each open list item begins
    block: _Open | None = None
    for line in LINE_END.split(text):
        start = len(line) - len(line.lstrip(" \t"))
        indent = len(line[:start].expandtabs(4))
        if block is not None:
            if block.is_closed_by(line[start:], indent):
                yield block.block(closed=True)
                block = None
            else:
                block.lines.append(_without_indent(line, block.indent))
            continue
        if start == len(line):
            continue
        while items and indent < items[-1]:
            items.pop()
        while indent - (items[-1] if items else 0) <= 3 and (item := ITEM.match(line, start)):
            indent += len(item[0])
            items.append(indent)
            start = item.end()
        fence = FENCE.match(line, start)
        if fence and indent - (items[-1] if items else 0) <= 3 and _is_opening(fence):
            block = _Open(fence["marks"], indent, _language(fence["info"]), [])
    if block is not None:
        yield block.block(closed=False)


def _blocks_within_lines(text: str) -> Iterator[Block]:
    """Return the blocks between pairs of fences that stand anywhere; code inside one line is no block."""
    parts = text.split(MARKS)
    for number in range(1, len(parts), 2):
        info, *lines = LINE_END.split(parts[number])
        if lines:
            yield Block(_language(info), _code(_without_last_end(lines)), closed=number + 1 < len(parts))


def _code(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _without_last_end(lines: Sequence[str]) -> Sequence[str]:
    """Without the empty line that is left behind the last line break of a text."""
    return lines[:-1] if lines and not lines[-1].strip() else lines


def _is_opening(fence: re.Match[str]) -> bool:
    """Whether it is more than code inside a line: behind a fence of backticks there is no backtick."""
    return fence["marks"][0] == "~" or "`" not in fence["info"]


def _language(info: str) -> str:
    found = LANGUAGE.search("".join(info.split(None, 1)[:1]))
    return found[0].lower() if found else ""


def _without_indent(line: str, indent: int) -> str:
    """The line with up to so many columns of leading space removed."""
    column = 0
    for place, character in enumerate(line):
        if column >= indent or character not in " \t":
            return line[place:]
        column += 4 - column % 4 if character == "\t" else 1
    return ""
