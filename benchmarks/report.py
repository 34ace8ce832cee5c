"""Fill the tables of the README from committed result files, and draw its figure.

    python benchmarks/report.py            rewrite README.md and docs/demo.png
    python benchmarks/report.py --check    fail if README.md does not show the committed results

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a function here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
DEMO = ROOT / "benchmarks" / "results" / "demo.json"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def demo() -> str:
    """Held-out accuracy of every arm of the demo."""
    from tiny.demo import arms
    from tiny.task import SKILLS

    results = json.loads(DEMO.read_text())
    columns = ["eval/accuracy", *(f"eval/accuracy/{skill}" for skill in SKILLS)]
    lines = ["| | mean | " + " | ".join(SKILLS) + " |", "|---|" + "---:|" * len(columns)]

    def row(title: str, rows: list[Mapping[str, float]], bold: bool = False) -> str:
        values = 100 * np.array([[r[c] for c in columns] for r in rows])
        spread = values.std(axis=0, ddof=1) if len(rows) > 1 else None
        cells = [
            f"{mean:.1f}" + ("" if spread is None else f" ± {spread[i]:.1f}")
            for i, mean in enumerate(values.mean(axis=0))
        ]
        mark = "**" if bold else ""
        return f"| {mark}{title}{mark} | " + " | ".join(f"{mark}{cell}{mark}" for cell in cells) + " |"

    for name, metrics in results["teachers"].items():
        lines.append(row(f"teacher `{name}`, asked plainly", [metrics]))
    runs = results["runs"]
    lines.append(row("student before", [r["curve"][0] for r in runs if r["arm"] == "mad_opd"][:1]))
    for arm in arms():
        finals = [r["curve"][-1] for r in runs if r["arm"] == arm.name]
        lines.append(row(arm.title, finals, bold=arm.name == "mad_opd"))
    count = len(results["seeds"])
    spread = f", mean ± standard deviation over {count} seeds" if count > 1 else f", seed {results['seeds'][0]}"
    lines.append("")
    lines.append(
        f"Accuracy in percent on {results['test_prompts']} held-out prompts a skill after {results['steps']} steps of "
        f"{results['batch_size']} prompts{spread}."
    )
    return "\n".join(lines)


TABLES = {"demo": demo}


def render(text: str) -> str:
    """README text with every table filled in.

    Raises:
        KeyError: a block names an unknown table.
    """
    return BLOCK.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)


def main(arguments: list[str]) -> int:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = render(before)
    if "--check" in arguments:
        return int(before != after)
    readme.write_text(after)
    figures: dict[str, Any] = json.loads(DEMO.read_text())
    from tiny.demo import draw

    (ROOT / "docs").mkdir(exist_ok=True)
    draw(figures, ROOT / "docs" / "demo.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
