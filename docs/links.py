"""Links of the pages to files of the repository: on the site they lead to its source host, or are plain names."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace links that leave the folder of the pages; raise ValueError where the file does not exist.

    ``REPOSITORY_URL`` names where the files can be read, for example ``https://host/owner/name/blob/main``.
    """
    place = Path(page.file.abs_src_path).parent

    def rewritten(link: re.Match[str]) -> str:
        text, path = link[1], (place / link[2]).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return link[0]
        if not path.exists():
            raise ValueError(f"{page.file.src_uri}: the link {link[2]!r} leads to no file")
        host = os.environ.get("REPOSITORY_URL")
        return f"[{text}]({host}/{path.relative_to(ROOT)}{link[3] or ''})" if host else f"`{text.strip('`')}`"

    return LINK.sub(rewritten, markdown)
