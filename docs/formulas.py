"""Formulas of the pages become MathML, which browsers draw without JavaScript; roles of docstrings become links."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):<code>(~?)([\w.]+)(?:\(\))?</code>")


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """The page with formulas and references rewritten."""

    def formula(match: re.Match[str]) -> str:
        try:
            return convert(html.unescape(match.group(2)), display="block" if match.group(1) == "div" else "inline")
        except Exception as error:  # whatever the converter cannot read
            raise PluginError(
                f"{page.file.src_uri}: the formula {match.group(2)!r} cannot be converted: {error}"
            ) from error

    def role(match: re.Match[str]) -> str:
        name = match.group(2)
        return f'<autoref identifier="{name}" optional><code>{name.rpartition(".")[2]}</code></autoref>'

    return ROLE.sub(role, FORMULA.sub(formula, content))
