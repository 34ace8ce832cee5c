"""What the committed results say beyond their tables: of equation 7, of OPAD, and of every method in a sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> dict[str, Any]:
    """A committed result."""
    results: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return results


def weights(stated: str, tau: float) -> list[float]:
    """Weights of equation 7 for confidences such as "95, 5"."""
    scaled = np.exp(np.array([float(c) for c in stated.split(",")]) / 100 / tau)
    return [float(w) for w in scaled / scaled.sum()]


def shares(stated: str, tau: float) -> str:
    """The same as text."""
    return " : ".join(f"{w:.3f}" for w in weights(stated, tau))


def confidences() -> str:
    """What the demo's teachers state in their debates, and the weights that follow."""
    results = read("demo")
    tau = results["tau"]
    lines = [f"| confidences (convert, compile) | debates | weights at tau {tau} | at the paper's tau 1 |"]
    lines.append("|---|---:|---:|---:|")
    for number, counts in enumerate(results["confidences"], start=1):
        lines += [
            f"| round {number}: {stated} | {count} | {shares(stated, tau)} | {shares(stated, 1.0)} |"
            for stated, count in counts.items()
        ]
    return "\n".join(lines)


def won(results: Mapping[str, Any], arm: str) -> str:
    """Mean share of games that an arm wins, seen and unseen."""
    runs = [run["after"] for run in results["runs"] if run["arm"] == arm]
    return " and ".join(f"{100 * np.mean([run[f'valid_{s}/success'] for run in runs]):.1f}" for s in ("seen", "unseen"))


def opad_less() -> str:
    """Games won with OPAD less those with each of its baselines, seed by seed."""
    from tiny.study_tables import interval

    results = read("opad")
    shares = {
        (run["arm"], run["seed"]): [100 * run["after"][f"valid_{s}/success"] for s in ("seen", "unseen")]
        for run in results["runs"]
    }
    titles = {run["arm"]: run["title"] for run in results["runs"] if run["arm"] != "opad"}
    lines = ["| OPAD less | seen games | unseen games |", "|---|---:|---:|"]
    for arm, title in titles.items():
        gaps = np.array([np.subtract(shares["opad", s], shares[a, s]) for a, s in shares if a == arm])
        cells = [f"{column.mean():+.1f} ± {interval(column):.1f}" for column in gaps.T]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Percent of the games, mean of the differences and 95 % interval over five seeds."])


def place(results: Mapping[str, Any]) -> str:
    """How a study's method ranks among its arms by the mean accuracy."""
    finals = {
        arm["title"]: np.mean([r["curve"][-1]["eval/accuracy"] for r in results["runs"] if r["arm"] == arm["name"]])
        for arm in results["arms"]
    }
    title = results["arms"][0]["title"]
    rank = 1 + sum(final > finals[title] for final in finals.values())
    ends = {1: "the highest", len(finals): "the lowest"}
    return f"{100 * finals[title]:.1f} %, {ends.get(rank, f'number {rank}')} of {len(finals)} arms"


def findings() -> str:
    """What the committed runs of every method show, in the words of a reader who looks for its faults."""
    found = {name: read(name) for name in ("demo", "opad", "sage", "uni_opd", "camopd")}
    tau, (first, *_, last) = found["demo"]["tau"], found["demo"]["confidences"]
    opad = found["opad"]
    equal = sum(count for stated, count in last.items() if len(set(stated.split(", "))) == 1)
    mean = np.mean([r["mean"]["teacher_weight/expert_bring"] for r in opad["runs"] if r["arm"] == "opad"])
    apart = max(first, key=lambda stated: max(weights(stated, tau)))
    rows = {
        "mad_opd": f"the last confidences are {'; '.join(last)} in {sum(last.values())} debates of the demo, equal in "
        f"{equal}: equation 7 gave {shares(next(iter(last)), tau)} and did nothing. First-turn confidences act at tau "
        f"{tau}, where {apart} gives {shares(apart, tau)}; at the paper's tau 1 it gives {shares(apart, 1.0)}",
        "opad": f"{won(opad, 'opad')} % of seen and unseen games. One expert alone teaches more: "
        f"{won(opad, 'opd_open')} % (the other: {won(opad, 'opd_bring')} %). Live steps equal recorded ones: "
        f"{won(opad, 'recorded')} %. The experts' weights were {mean:.3f} : {1 - mean:.3f}, so equation 7 did nothing",
        "sage_opd": f"{won(found['sage'], 'sage')} % of seen and unseen games, OPD {won(found['sage'], 'opd')} %: no "
        "component is shown to help",
        "uni_opd": f"{place(found['uni_opd'])}; no component is shown to help",
        "camopd": f"{place(found['camopd'])}; no difference by selection, schedule or `r_g` is shown",
    }
    return "\n".join(
        ["| | committed runs on tiny models |", "|---|---|", *(f"| `{n}` | {t} |" for n, t in rows.items())]
    )
