"""A result file of the fused loss as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADER = "| case | provider | ms | of the floor | memory, GB | kernels | gradient error |"


def lines(document: Mapping[str, Any]) -> list[str]:
    """Everything a person wants to see after a session."""
    results = document["results"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    out = [f"{document['device']}: {versions}", ""]
    for case, figures in results.get("tests", {}).items():
        out.append(f"tests {case}: " + ", ".join(f"{k} {v}" for k, v in figures.items() if k != "tail" and v != []))
    for case, figures in results.get("ceilings", {}).items():
        plain = {k: v for k, v in figures.items() if isinstance(v, (int, float, str)) and k != "seconds"}
        out.append(f"{case}: " + ", ".join(f"{k} {number(v)}" for k, v in plain.items()))
        out += [f"  {name}: {s['TB/s']:.2f} TB/s" for name, s in figures.get("sweeps", {}).items()]
    out += ["", HEADER, "|---|---|---:|---:|---:|---:|---:|"]
    for case, figures in results.get("speed", {}).items():
        out += rows(case, figures, results.get("correctness", {}))
    bad = [case for case, figures in results.get("correctness", {}).items() if not figures.get("passed", False)]
    out += ["", "correctness: " + ("failed: " + "; ".join(bad) if bad else "passed")]
    return out


def rows(case: str, figures: Mapping[str, Any], correctness: Mapping[str, Any]) -> list[str]:
    """One line per provider of a case."""
    if "skipped" in figures or "error" in figures:
        return [f"| {case} | {figures.get('skipped') or str(figures['error']).splitlines()[-1]} | | | | | |"]
    kind = next((k for k in ("reverse_kl", "forward_kl", "jsd") if k in case), "reverse_kl")
    errors = correctness.get(f"{kind}, KL 2e-2", {})
    out = []
    for provider, found in figures.items():
        if not isinstance(found, Mapping):
            continue
        if "error" in found:
            out.append(f"| {case} | {provider} | {found['error']} | | | | |")
            continue
        time = f"{found['ms']:.2f} ± {found['iqr']:.2f}" if "ms" in found else ""
        floor = f"{100 * found['of_floor']:.0f} %" if found.get("of_floor") else ""
        wrong = found.get("error_against_dense") or errors.get(provider.split(" at ")[0], {})
        error = format(wrong["weight"], ".1e") if "weight" in wrong else ""
        memory, kernels = f"{found['peak_bytes'] / 1e9:.3f}", found.get("launches") or ""
        out.append(f"| {case} | {provider} | {time} | {floor} | {memory} | {kernels} | {error} |")
    return out


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
