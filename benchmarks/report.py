"""Fill the tables of the README, of docs/ and of benchmarks/NOTES.md from committed result files and from the
papers' settings, and draw the figures.

    python benchmarks/report.py            rewrite the pages and the figures in docs
    python benchmarks/report.py --check    fail if a page does not show the committed results

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a function here.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks" / "gpu"), str(ROOT / "benchmarks")]
DEMO = ROOT / "benchmarks" / "results" / "demo.json"

import gpu_tables
import real_tables
from findings import confidences, findings, opad_less, place
from targets import compared

from opdengine.tools.figures import figure

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


PEERS = {
    "gemms": "its matrix products alone",
    "eager": "torch, full logits",
    "trl": "TRL",
    "liger": "Liger",
    "one call per teacher": "one call per teacher",
}
KINDS = {"reverse_kl": "reverse KL", "forward_kl": "forward KL", "jsd": "JSD"}


def loss_results() -> list[tuple[str, dict[str, Any]]]:
    """(device, {case: {provider: figures}}) of every committed result of the fused loss."""
    found = []
    for file in sorted((ROOT / "benchmarks" / "results").glob("*/loss.json"), reverse=True):
        document = json.loads(file.read_text())
        if document.get("smoke"):
            continue
        results = document["results"]
        cases = results
        if "speed" in results:
            cases = compared(results) | results.get("shapes", {})
        timed = {name: c for name, c in cases.items() if "ms" in c.get("ours", {}) and name.split()[-1] in KINDS}
        if timed:
            found.append((document["device"].replace("_", " "), timed))
    return found


def loss() -> str:
    """Time and memory of the fused loss as ratios to its peers, measured in turns on one machine."""
    lines = []
    for device, cases in loss_results():
        peers = [name for name in PEERS if any("ms" in case.get(name, {}) for case in cases.values())]
        floor = [" of the floor |"] if any("of_floor" in case["ours"] for case in cases.values()) else []
        lines += [
            f"| {device} | ours |{''.join(floor)} "
            + " | ".join(PEERS[name] for name in peers)
            + " | memory, share of full logits' |",
            "|---|" + "---:|" * (len(peers) + 2 + len(floor)),
        ]
        for name, case in cases.items():
            shape, kind = name.rsplit(" ", 1)
            ours = case["ours"]
            cells = [f"{ours['ms']:.0f} ms" if ours["ms"] >= 100 else f"{ours['ms']:.1f} ms"]
            cells += [f"{100 * ours['of_floor']:.0f} %" if "of_floor" in ours else ""] if floor else []
            cells += [f"{case[n]['ms'] / ours['ms']:.2f}×" if "ms" in case.get(n, {}) else "" for n in peers]
            whole = case.get("eager", {}).get("peak_bytes")
            cells.append(f"{100 * ours['peak_bytes'] / whole:.0f} %" if whole else "")
            lines.append(f"| {in_words(shape)}, {KINDS[kind]} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(
        [*lines, "Times of the others are multiples of ours; memory is what inputs and gradients leave out."]
    )


def in_words(name: str) -> str:
    """A shape of the GPU protocol by its sizes."""
    if not re.fullmatch(r"S\d", name):
        return name
    import problems

    shape = getattr(problems, name)
    widths = ", ".join(map(str, shape.teachers))
    half = ", half of them masked" if shape.masked else ""
    return f"{shape.rows} tokens{half}, {shape.width} <- {widths}, V = {shape.vocab}"


def draw_loss(results: list[tuple[str, dict[str, Any]]], file: Path) -> None:
    """Time of every provider over the time of the matrix products, one panel per device."""
    with figure(file, (9, 3.2 * len(results)), rows=len(results)) as axes:
        for axis, (device, found) in zip(axes, results, strict=True):
            cases = {name: case for name, case in found.items() if "ms" in case.get("gemms", {})}
            providers = [
                "ours",
                *(n for n in PEERS if n != "gemms" and any("ms" in c.get(n, {}) for c in cases.values())),
            ]
            for offset, provider in enumerate(providers):
                there = [(x, case) for x, case in enumerate(cases.values()) if "ms" in case.get(provider, {})]
                width = 0.8 / len(providers)
                axis.bar(
                    [x + width * offset for x, _ in there],
                    [case[provider]["ms"] / case["gemms"]["ms"] for _, case in there],
                    width,
                    label=PEERS.get(provider, provider),
                    color=f"C{['ours', *PEERS].index(provider)}",  # the same in every panel
                )
            axis.axhline(1.0, color="black", lw=0.8, ls="--")
            axis.set_xticks([x + 0.3 for x in range(len(cases))], list(cases), fontsize=8)
            axis.set_ylabel("time / matrix products")
            axis.set_title(device, fontsize=10)
            axis.legend(frameon=False, fontsize=8)


def percent(share: tuple[float, float, float]) -> str:
    """A share with its interval."""
    mean, low, high = (100 * value for value in share)
    return f"{mean:.1f} [{low:.0f}, {high:.0f}]"


def agents(folder: str = ".") -> str:
    """Games won by agents before and after, for the methods of SAGE-OPD and then of OPAD.

    Args:
        folder: of the results, in that of all.
    """
    from tiny.agents.results import SPLITS, interval, rows

    lines = ["| | seen games | unseen games | SKIP / WEAK / STRONG / failed | seeds |", "|---|---:|---:|---:|---:|"]
    notes = []
    for name in ("sage", "opad"):
        file = ROOT / "benchmarks" / "results" / folder / f"{name}.json"
        if not file.is_file():
            continue
        results = json.loads(file.read_text())
        for title, won in results.get("players", {}).items():
            shares = [interval([won[f"{split}/success"]], results["test_games"]) for split in SPLITS]
            line = f"| {title} | {' | '.join(map(percent, shares))} | | |"
            if line not in lines:  # both methods may have the same one
                lines.append(line)
        for row in rows(results):
            if row["name"] == "before" and notes:
                continue  # the same student
            cells = [percent(row[split]) for split in SPLITS]
            shares = [row["health"].get(f"sage/{label}") for label in ("skip", "weak", "strong", "det_fail")]
            said = " / ".join(f"{100 * share:.0f}" for share in shares if share is not None)
            seeds = row["count"] if row["name"] != "before" else ""
            lines.append(f"| {row['title']} | {' | '.join(cells)} | {said} | {seeds} |")
        steps = f"{results['steps']} steps of {results['batch_size']} episodes"
        notes.append(f"{name.upper()}: {steps}, {results['test_games']} games a split")
        if "judge" in results:
            said = results["judge"]["confusion"]  # what it should say -> what it says -> how often
            asked = sum(sum(answers.values()) for answers in said.values()) + results["judge"]["unparsed"]
            right, skip = sum(said[label][label] for label in said), sum(said["SKIP"].values())
            notes[-1] += (
                f"; asked about {asked} actions of unseen games the judge is right in {right}, where always SKIP would "
                f"be in {skip}"
            )
    ending = "Games won in percent, greedy, with 95 % intervals (over three seeds or more, else over one seed's games)"
    return "\n".join([*lines, "", f"{ending}. {'; '.join(notes)}."])


def scaling() -> str:
    """A step on several processes of this machine, and a checkpoint."""
    file = ROOT / "benchmarks" / "results" / "cpu_1_threads" / "scaling.json"
    results = json.loads(file.read_text())["results"]
    phases = ("rollout", "score", "update", "sync")
    lines = [f"| | step | {' | '.join(phases)} | of one process |", "|---|" + "---:|" * (len(phases) + 2)]
    for name, case in results.items():
        if name == "checkpoint":
            continue
        count, _, split = name.removeprefix("step_").partition("_processes")
        title = f"{count} process{'es' if count != '1' else ''}{split.replace('_', ' ').replace(' ', ', ', 1)}"
        seconds = [case["step_s"], *(case["phases_s"][phase] for phase in phases)]
        cells = [f"{value:.2f} s" for value in seconds]
        lines.append(f"| {title} | {' | '.join(cells)} | {100 * case['over_one_process']:.0f} % |")
    cores, saved = results["step_1_processes"]["cores"], results["checkpoint"]
    lines += [
        "",
        f"One thread a process, {cores} cores. A checkpoint of a student of {saved['parameters'] / 1e6:.0f} M float32 "
        f"parameters takes {saved['bytes'] / 1e6:.0f} MB ({saved['over_weights']:.2f} times the weights), "
        f"{saved['save_s']:.2f} s to write and {saved['resume_s']:.2f} s to read.",
    ]
    return "\n".join(lines)


def sampled() -> str:
    """Gradients from sampled columns beside dense ones, on rows of a real model."""
    document = json.loads((ROOT / "benchmarks" / "results" / "cpu_1_threads" / "real_rows.json").read_text())
    results, about = document["results"], document["results"]["rows"]
    lines = [
        "| | columns | of the dense time (quartiles) | noise of dX, predicted | noise of dW, predicted |",
        "|---|---:|---:|---:|---:|",
    ]
    for case, found in results.items():
        kind, _, rows = case.partition(", ")
        for share, figures in found.items() if kind in KINDS else ():
            if share == "dense":
                continue
            first, last = figures["over_dense_quartiles"]
            noises = [
                f"{100 * figures[f'{which}_noise']:.2f}, {100 * figures[f'predicted_{which}_noise']:.2f} %"
                for which in ("hidden", "weight")
            ]
            time = f"{figures['over_dense']:.2f} ({first:.2f}, {last:.2f})"
            lines.append(f"| {KINDS[kind]}, {rows} | {share.replace('%', ' %')} | {time} | {' | '.join(noises)} |")
    lines += [
        "",
        f"{about['rows']} rows of a model with {about['vocab']} columns of width {about['width']}, "
        f"{about['entropy']:.1f} nats of entropy and a KL of {about['kl']:.2f} to its teacher; processor time of one "
        "thread, on a machine with other programs.",
    ]
    return "\n".join(lines)


TRAINERS = {"ours": "opdengine", "trl": "TRL `DistillationTrainer`", "trl gkd": "TRL `GKDTrainer`"}


def trainers() -> str:
    """A whole step of ours and of TRL's trainers."""
    lines: list[str] = []
    for file in sorted((ROOT / "benchmarks" / "results").glob("*/trainers.json")):
        document = json.loads(file.read_text())
        case, version = document["results"]["step"], document["versions"]["trl"]
        lines += [
            f"| {document['device'].replace('_', ' ')}, TRL {version} | a step | | memory | |",
            "|---|" + "---:|" * 4,
        ]
        for name, title in TRAINERS.items():
            mine, theirs = case["ours"], case[name]
            time, room = (theirs[key] / mine[key] for key in ("step_s", "peak_bytes"))
            cells = f"{theirs['step_s']:.1f} s | {time:.1f}× | {theirs['peak_bytes'] / 1e6:.0f} MB | {room:.1f}×"
            lines.append(f"| {title} | {cells} |")
        lines.append("")
    return "\n".join(lines).rstrip()


TABLES = {
    "sampled": sampled,
    "demo": demo,
    "confidences": confidences,
    "findings": findings,
    "loss": loss,
    "agents": agents,
    "real_house": functools.partial(agents, "real"),
    "opad_less": opad_less,
    "scaling": scaling,
    "trainers": trainers,
}


STUDIES = ("uni_opd", "uni_opd_vl", "camopd")


def study_results(name: str) -> dict[str, Any] | None:
    """The committed results of a study, if there are any."""
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    results: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
    return results


def study(name: str) -> str:
    """A method and its controls, with what the method's own runs measured."""
    from tiny.study_tables import headings, measured, table_rows

    results = study_results(name)
    if results is None:
        return "No results are committed yet."
    names = headings(results)[:-1]
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    lines += ["| " + " | ".join(cells[:-1]) + " |" for cells in table_rows(results)]
    settings = results["settings"]
    lines += [
        "",
        f"Accuracy in percent on held-out prompts after {settings['max_steps']} steps of "
        f"{settings['per_device_train_batch_size']} prompts x {settings.get('num_generations', 1)} rollouts, mean ± "
        f"95 % interval over {len(results['seeds'])} seeds; the last column is the difference of the means, taken "
        f"seed by seed. By the mean: {results['arms'][0]['title']} {place(results)}.",
        "",
        "The method's own runs, means over steps and seeds: "
        + ", ".join(f"`{key}` {value:.3g}" for key, value in measured(results).items())
        + ".",
    ]
    return "\n".join(lines)


TABLES |= {name: functools.partial(study, name) for name in STUDIES}
TABLES |= real_tables.TABLES | gpu_tables.TABLES


def paper(method: str) -> str:
    """What a run takes from a method's paper where it says nothing, and what the paper's own runs had."""
    from opdengine.methods import PAPERS

    found = PAPERS[method]
    rows = [f"| `{name}` | {_plain(value)} | {where} |" for name, (value, where) in found.defaults.items()]
    chosen = "; ".join(f"`{name}` {text}" for name, text in found.choices.items()).replace("<", "&lt;")
    head = ["| taken where you say nothing | value | source |", "|---|---|---|"]
    # Some readers of Markdown take a table right behind a comment for text.
    had = ["", f"Not set, as they depend on data and machine; the paper's runs had: {chosen}."] if chosen else []
    return "\n".join(["", *head, *rows, *had])


def _plain(value: Any) -> str:
    """A value as a configuration file has it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, str) and "\n" in value:
        return "`" + value.replace("\n", "\\n") + "`"
    return ".inf" if value == float("inf") else f"{value:g}" if isinstance(value, float) else str(value)


def render(text: str) -> str:
    """Text of a page with every table filled in.

    Raises:
        KeyError: a block names an unknown table.
    """

    def filled(name: str) -> str:
        return paper(name.removeprefix("paper_")) if name.startswith("paper_") else TABLES[name]()

    return BLOCK.sub(lambda m: f"{m[1]}{filled(m[2])}\n{m[3]}", text)


def main(arguments: list[str]) -> int:
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "NOTES.md", *sorted((ROOT / "docs").rglob("*.md"))]
    before = [page.read_text() for page in pages]
    after = [render(text) for text in before]
    if "--check" in arguments:
        return int(before != after)
    for page, text in zip(pages, after, strict=True):
        page.write_text(text)
    figures: dict[str, Any] = json.loads(DEMO.read_text())
    from tiny.demo import draw

    (ROOT / "docs").mkdir(exist_ok=True)
    draw(figures, ROOT / "docs" / "demo.png")
    from tiny.agents import results as agents_results

    for name in ("sage", "opad"):
        file = ROOT / "benchmarks" / "results" / f"{name}.json"
        if file.is_file():
            agents_results.draw(json.loads(file.read_text()), ROOT / "docs" / f"{name}.png")
    if results := loss_results():
        draw_loss(results, ROOT / "docs" / "loss.png")
    from tiny import study as studies

    for name in STUDIES:
        if found := study_results(name):
            studies.draw(found, ROOT / "docs" / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
