"""Tables of what was measured on GPUs, for ``report.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks" / "gpu")]

from targets import tables

KINDS = {"reverse_kl": "reverse KL", "forward_kl": "forward KL", "jsd": "JSD"}
WHO = {"ours": "ours", "trl": "TRL", "liger": "Liger", "eager": "torch, full logits"}


def documents(name: str) -> list[dict[str, Any]]:
    """The committed files of one name, of every device."""
    files = sorted((ROOT / "benchmarks" / "results").glob(f"*/{name}.json"))
    return [json.loads(file.read_text()) for file in files]


def measured() -> list[dict[str, Any]]:
    """Sessions on a GPU that were not rehearsals."""
    return [document for document in documents("loss") if not document.get("smoke", True)]


def gpu() -> str:
    """Targets and predictions of the kernels on every GPU that was measured."""
    lines: list[str] = []
    for document in measured():
        lines += [f"{document['device'].replace('_', ' ')}, driver {document['driver']}:", ""]
        lines += [*tables(document["results"]), ""]
    return "\n".join(lines or tables({})).rstrip()


def loss_errors() -> str:
    """Gradient errors against float64 in bfloat16, by how far the teacher is from the student."""
    head = "| gradient of the head against float64, bfloat16 | KL 0.09 | KL 0.02 | KL 0.0008 |"
    lines = [head, "|---|---:|---:|---:|"]
    for document in measured():
        checked = document["results"].get("correctness", {})
        for kind in KINDS:
            cases = [checked.get(f"{kind}, KL {size}", {}) for size in ("9e-2", "2e-2", "8e-4")]
            for who, words in WHO.items():
                errors = [case.get(who, {}).get("weight") for case in cases]
                cells = ["" if error is None else f"{100 * error:.2g} %" for error in errors]
                if any(cells):
                    lines.append(f"| {KINDS[kind]}, {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def one_read() -> str:
    """Row work of 1024 rows in stages and with one read, at the block sizes that were tried."""
    (document,) = documents("one_read")
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in document["row_kernels"]:
        way = "in turn" if row["way"].startswith("in turn") else row["way"]
        found.setdefault((row["divergence"], row["teachers"]), {}).setdefault(way, []).append(row["ms"])
    lines = [
        "| row work of 1024 rows, V = 151936, ms | in stages | one read | stages of some rows in turn |",
        "|---|---:|---:|---:|",
    ]
    for (kind, teachers), ways in found.items():
        cells = [f"{min(ways[way]):.2f}" for way in ("stages", "one read", "in turn")]
        lines.append(f"| {KINDS[kind]}, K = {teachers} | " + " | ".join(cells) + " |")
    lines += ["", f"Each at the best of the block sizes and warps that were tried, at commit {document['commit']}."]
    return "\n".join(lines)


def gpu_sampled() -> str:
    """Gradients from sampled columns beside dense ones on a GPU."""
    lines = ["| | columns | ms | of the dense time | kernels alone, ms | launches |", "|---|---:|---:|---:|---:|---:|"]

    def row(case: str, share: str, ms: float, dense: float, kernels: float, launches: int) -> str:
        return f"| {case} | {share} | {ms:.1f} | {ms / dense:.2f} | {kernels:.1f} | {launches} |"

    for document in measured():
        for case, found in document["results"]["speed"].items():
            if not case.endswith(", sampled"):
                continue
            dense = found["ours, share 0.0"]["ms"]
            shape, kind = case.removesuffix(", sampled").split()
            for share in (0.0, 0.05, 0.1, 0.2):
                figures = found[f"ours, share {share}"]
                words = "all" if share == 0 else f"{100 * share:.0f} %"
                alone = sum(ms for _, ms in figures["by_kernel"].values())
                lines.append(row(f"{shape}, {KINDS[kind]}", words, figures["ms"], dense, alone, figures["launches"]))
    for document in documents("sampled"):
        parts = {"another machine": document["results"]}
        parts["torch operations, before"] = document["in_torch_operations"]["results"]
        for where, results in parts.items():
            for name, figures in results.items():
                kind, share = name.split(", ", 1)
                words = share.replace("dense", "all").replace("share 0.1", "10 %")
                dense = results[f"{kind}, dense"]["ms"]
                case = f"S1, {KINDS[kind]}, {where}"
                lines.append(row(case, words, figures["ms"], dense, figures["kernels_ms"], figures["launches"]))
    return "\n".join(lines)


def gpu_step() -> str:
    """What teachers of real size read, and how fast."""
    lines = ["| teacher | tokens read | seconds | TFLOP/s | peak, GB |", "|---|---:|---:|---:|---:|"]
    for document in measured():
        step = document["results"]["step"]
        sizes, parameters = step["models"]["sizes"], step["models"]["parameters"]
        for phase, figures in step["teachers"]["phases"].items():
            name, what = phase.split(": ")
            if what == "to the device":
                continue
            each = sizes["prompt"] + sizes["transcript"] + (sizes["response"] if what == "score" else 0)
            tokens = sizes["sequences"] * each
            rate = 2 * tokens * parameters[name] / figures["seconds"] / 1e12
            peak = figures["peak_bytes"] / 1e9
            lines.append(f"| {name}, {what} | {tokens} | {figures['seconds']:.2f} | {rate:.0f} | {peak:.1f} |")
    return "\n".join(lines)


def block_rows() -> str:
    """Noise of sampled columns by the rows that share a draw."""
    results = json.loads((ROOT / "benchmarks" / "results" / "block_rows.json").read_text())["results"]
    blocks = list(next(iter(results["noise"].values())))
    lines = ["| live columns, exponent | " + " | ".join(blocks) + " |", "|---|" + "---:|" * len(blocks)]
    for name, found in results["noise"].items():
        cells = [f"{100 * hidden:.1f}, {100 * weight:.1f} %" for hidden, weight in found.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {
    "gpu": gpu,
    "loss_errors": loss_errors,
    "one_read": one_read,
    "gpu_sampled": gpu_sampled,
    "gpu_step": gpu_step,
    "block_rows": block_rows,
}
