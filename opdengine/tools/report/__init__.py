"""One page about one or several runs: curves, rollouts, tokens, debates, verdicts, drops and settings.

The page is a single file that needs no network. The curves are drawn by uPlot (MIT, in ``vendor/``), the page is a
Jinja template; whatever models, servers and files wrote enters it as JSON that cannot end its element, and is shown as
text, never as markup.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from opdengine import __version__
from opdengine.errors import ConfigError, WriteError

SIZE = 8_000_000
"""Bytes of data on a page; with styles and scripts it stays below 10 MB."""
HERE = Path(__file__).parent
SCRIPTS = ("vendor/uPlot.iife.min.js", "page.js", "curves.js", "tokens.js", "views.js")
STYLES = ("vendor/uPlot.min.css", "page.css")


def render(folders: Sequence[Path], size: int = SIZE, watch: bool = False) -> bytes:
    """The page, in UTF-8.

    Args:
        folders: of the runs.
        size: bytes that the data may take.
        watch: let the page ask its server for changes.

    Raises:
        ConfigError: a folder holds no run, or a package is missing.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ConfigError("opdengine report needs a package: pip install 'opdengine[train]'")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from opdengine.tools.report.runs import read_runs

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    page = environment.get_template("page.html").render(
        data=read_runs(folders, size) | {"version": __version__, "watch": watch},
        scripts=[(HERE / name).read_text("utf-8") for name in SCRIPTS],
        styles=[(HERE / name).read_text("utf-8") for name in STYLES],
    )
    return page.encode("utf-8", "backslashreplace")  # a lone surrogate becomes an escape of JSON


def write_report(folders: Sequence[Path], out: Path) -> int:
    """Write the page, whole or not at all; returns its bytes.

    Raises:
        ConfigError: a folder holds no run.
        WriteError: the file cannot be written.
    """
    page = render(folders)
    partial = out.with_name(f"{out.name}.tmp")
    try:
        partial.write_bytes(page)
        partial.replace(out)
    except OSError as error:
        raise WriteError(f"--out {str(out)!r} cannot be written ({error.strerror}); name another file") from error
    return len(page)
