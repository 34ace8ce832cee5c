"""A result file of the fused loss as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from targets import compared, tables

HEADER = "| case | provider | ms | of the floor | memory, GB | kernels | gradient error |"


def lines(document: Mapping[str, Any]) -> list[str]:
    """Everything a person wants to see after a session."""
    results = document["results"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    out = [f"{document['device']}: {versions}", ""]
    for section in ("gate", "tests", "sanitizer", "engine", "screened"):
        for case, figures in results.get(section, {}).items():
            parts = {key: value for key, value in figures.items() if isinstance(value, Mapping)}
            plain = {k: v for k, v in figures.items() if k not in (*parts, "tail", "seconds") and v != []}
            for name, found in [(f"{section}, {case}", plain), *((f"  {k}", v) for k, v in parts.items())]:
                out.append(f"{name}: " + ", ".join(f"{k} {number(v)}" for k, v in found.items()))
    out += step_lines(results.get("step", {}))
    for case, figures in (results.get("ceilings", {}) | results.get("kernels", {})).items():
        plain = {k: v for k, v in figures.items() if isinstance(v, (int, float, str)) and k != "seconds"}
        out.append(f"{case}: " + ", ".join(f"{k} {number(v)}" for k, v in plain.items()))
        out += [f"  {name}: {s['TB/s']:.2f} TB/s" for name, s in figures.get("sweeps", {}).items()]
    out += ["", HEADER, "|---|---|---:|---:|---:|---:|---:|"]
    parts = [compared({"speed": {}, **results}), results.get("shapes", {}), results.get("peers", {})]
    for case, figures in (item for part in parts for item in part.items()):
        out += rows(case, figures, results.get("correctness", {}))
    bad = [case for case, figures in results.get("correctness", {}).items() if not figures.get("passed", False)]
    out += ["", "correctness: " + ("failed: " + "; ".join(bad) if bad else "passed")]
    return [*out, "", *tables(results)]


def step_lines(step: Mapping[str, Any]) -> list[str]:
    """Seconds and peak memory of every phase of the whole step."""
    if not step:
        return []
    out = ["", "| case | phase | seconds | peak, GB |", "|---|---|---:|---:|"]
    for case, figures in step.items():
        for phase, found in figures.get("phases", {}).items():
            peak = f"{found['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in found else ""
            out.append(f"| {case} | {phase} | {found['seconds']:.3f} | {peak} |")
        if "update_seconds" in figures:
            share = f"loss {100 * figures['loss_share']:.1f} % of it"
            out.append(f"| {case} | the update, {share} | {figures['update_seconds']:.3f} | |")
        for word in ("out_of_memory", "error", "skipped"):
            if word in figures:
                out.append(f"| {case} | {word}: {str(figures[word]).splitlines()[-1]} | | |")
    return [*out, ""]


def rows(case: str, figures: Mapping[str, Any], correctness: Mapping[str, Any]) -> list[str]:
    """One line per provider of a case."""
    if "skipped" in figures or "error" in figures:
        return [f"| {case} | {figures.get('skipped') or str(figures['error']).splitlines()[-1]} | | | | | |"]
    kind = next((k for k in ("reverse_kl", "forward_kl", "jsd") if k in case), "reverse_kl")
    errors = correctness.get(f"{kind}, KL 2e-2", {})
    out = []
    for provider, found in figures.items():
        if not isinstance(found, Mapping) or "ms_by_chunk" in found:
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
