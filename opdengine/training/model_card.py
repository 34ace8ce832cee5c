"""The card of a trained model (``final/README.md``): what it was made from, how, and how well it does.

It says nothing that a run killed and resumed would say otherwise: no dates, times or places of the machine.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from opdengine import __version__
from opdengine.config.loading import to_mapping
from opdengine.config.section import RESUMABLE, fields_of, mark_of, section_in
from opdengine.config.train import TrainConfig
from opdengine.config.yaml_text import dump_yaml
from opdengine.methods import METHODS, PAPERS
from opdengine.methods.method import Method
from opdengine.models.lora import read_adapted
from opdengine.training.best import PREFIX
from opdengine.training.changes import read_changes
from opdengine.training.writer import read_metrics

ON_POLICY, SEQUENCES = "2306.13649", "1606.07947"
TITLES = {
    ON_POLICY: "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    SEQUENCES: "Sequence-Level Knowledge Distillation",
    "2605.01347": "MAD-OPD: on-policy distillation with multi-agent debate",
    "2606.19659": "SAGE-OPD: selective turn intervention for agents",
    "2605.03677": "Uni-OPD: outcome-guided on-policy distillation",
    "2605.27115": "CaMOPD: counteraction-aware multi-teacher on-policy distillation",
    "2601.19897": "SDFT: self-distillation from demonstrations",
    "2601.20802": "SDPO: self-distillation policy optimisation",
    "2601.18734": "OPSD: on-policy self-distillation",
    "2402.03300": "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    "2602.12125": "Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation",
    "2603.11137": "Scaling Reasoning Efficiently via Relaxed On-Policy Distillation",
    "2603.07079": "Entropy-Aware On-Policy Distillation of Language Models",
    "2510.24021": "SelecTKD: Selective Token-Weighted Knowledge Distillation for LLMs",
    "2402.12030": "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
}
"""Numbers of arXiv -> titles, as in CITATION.cff."""

PACKAGES = ("torch", "transformers", "peft", "vllm")
OWN = ("model", "teachers", "method", "train_data", "max_steps", "num_train_epochs", "per_device_train_batch_size",
       "gradient_accumulation_steps")  # fmt: skip
"""Settings that the card tells in words."""


def write_card(folder: Path, config: TrainConfig, run: Path, prompts_per_step: int, step: int) -> None:
    """Write the card of the model in a folder.

    Args:
        folder: of the model.
        config: of the run.
        run: its folder, whose metrics are told.
        prompts_per_step: over all processes.
        step: of which the model is.
    """
    parts = [_head(config), _origin(config, prompts_per_step, step), _scores(run, step), _settings(config)]
    parts += [_changes(run), _versions(config), _citation(config)]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", "utf-8")


def _head(config: TrainConfig) -> str:
    """What the hub reads, and the title."""
    names = [name for name in (hub_name(config.model),) if name]
    teachers = [hub_name(t.model) for t in config.teachers]
    tags = ["opdengine", "on-policy-distillation", config.method.rpartition(":")[2]]
    told: dict[str, Any] = {
        "library_name": "transformers" if config.lora is None else "peft",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    if names:
        told["base_model"] = names
    if any(teachers):
        told["teacher_models"] = [name for name in teachers if name]
    title = f"{shown(config.model)}, {shown(config.method)}"
    if config.run_name:
        title = plain(" ".join(map(_without_places, config.run_name.split())))
    return f"---\n{dump_yaml(told)}---\n\n# {title}"


def _origin(config: TrainConfig, prompts_per_step: int, step: int) -> str:
    what = "Weights" if config.lora is None else f"A LoRA adapter (r={config.lora.r})"
    teachers = ", ".join(f"`{shown(t.model)}`" + ("" if t.is_here else " (served)") for t in config.teachers)
    kind: type[Method] | None = METHODS.get(config.method)
    about = " ".join(((kind.__doc__ or "") if kind else "").split("\n\n")[0].split())
    data = ", ".join(f"`{shown(s if isinstance(s, str) else s.path)}`" for s in config.train_data)
    lines = [
        f"{what} of `{shown(config.model)}`, distilled with opdengine {__version__}.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | `{shown(config.model)}` |",
        f"| teachers | {teachers or 'none'} |",
        f"| method | `{shown(config.method)}`{': ' + about if about else ''} |",
        f"| data | {data or 'the environment `' + shown(config.environment.name) + '`'} |",
        f"| training | {step} steps of {prompts_per_step} prompts, {config.num_generations} rollouts each |",
    ]
    return "\n".join(lines)


def _scores(run: Path, step: int) -> str:
    """The evaluation before training and of the model's step, where there are both."""
    file = run / "metrics.jsonl"
    rows = read_metrics(file, warn=False) if file.is_file() else []
    measured = [(row["step"], _evaluated(row)) for row in rows if _evaluated(row)]
    now = next((values for at, values in reversed(measured) if at == step), None)
    if now is None:
        return ""
    before = measured[0][1] if measured[0][0] == 0 and step else {}
    lines = ["## Evaluation", "", "| metric | before | after |", "|---|---:|---:|"]
    lines += [f"| {plain(name)} | {_number(before.get(name))} | {_number(value)} |" for name, value in now.items()]
    return "\n".join(lines)


def _evaluated(row: Mapping[str, Any]) -> dict[str, float]:
    return {name.removeprefix(PREFIX): value for name, value in row.items() if name.startswith(PREFIX)}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _settings(config: TrainConfig) -> str:
    """What decides what is learned, where it is not the default."""
    default = to_mapping(TrainConfig(model="model", output_dir="output"))
    chosen = _other(to_mapping(config), default, TrainConfig, None)
    for name in OWN:
        chosen.pop(name, None)
    if not chosen:
        return ""
    return (
        f"## Settings\n\nThose that decide what is learned, and are not the default.\n\n```yaml\n{dump_yaml(chosen)}```"
    )


def _other(values: Mapping[str, Any], default: Mapping[str, Any], cls: Any, outer: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, info in fields_of(cls).items():
        mark, value, usual = mark_of(info) or outer, values[name], default[name]
        if mark == RESUMABLE or value == usual:
            continue
        inner = section_in(cls, name)
        if inner is not None and isinstance(value, Mapping) and isinstance(usual, Mapping):
            value = _other(value, usual, inner, mark)
            if not value:
                continue
        found[name] = _without_places(value)
    return found


def _without_places(value: Any) -> Any:
    """Values whose absolute paths are cut down to names."""
    if isinstance(value, Mapping):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value:
        return Path(value).name or value
    return value


def _changes(run: Path) -> str:
    lines = [
        f"- after step {line['step']}: `{place}` {_value(before)} -> {_value(now)}"
        for line in read_changes(run)
        for place, (before, now) in line["changes"].items()
        if not place.endswith(("model", ".path")) and "train_data" not in place
    ]
    return "\n".join(["### Changed while it was trained", "", *lines]) if lines else ""


def _value(value: Any) -> str:
    return plain(str(_without_places(value)))


def _versions(config: TrainConfig) -> str:
    versions = [f"opdengine {__version__}", f"python {platform.python_version()}"]
    for name in PACKAGES:
        if (name == "peft" and config.lora is None) or (name == "vllm" and not config.use_vllm):
            continue
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return f"## Versions\n\n{', '.join(versions)}"


def _citation(config: TrainConfig) -> str:
    numbers = [SEQUENCES if config.method == "mt_seqkd" else ON_POLICY]
    if (paper := PAPERS.get(config.method)) is not None and paper.arxiv not in numbers:
        numbers.append(paper.arxiv)
    entries = [
        f"@article{{arxiv:{number},\n  title = {{{TITLES.get(number, 'arXiv:' + number)}}},\n  eprint = {{{number}}},\n"
        f"  archivePrefix = {{arXiv}},\n  url = {{https://arxiv.org/abs/{number}}}\n}}"
        for number in numbers
    ]
    return "## Citation\n\n```bibtex\n" + "\n\n".join(entries) + "\n```"


def hub_name(model: str) -> str | None:
    """The name of a model on the hub; of an adapter's folder its base's; None for a folder."""
    if Path(model).expanduser().is_dir():
        base = read_adapted(model)
        return hub_name(base) if base is not None else None
    return model if model.count("/") == 1 and not model.startswith((".", "/", "~")) else None


def shown(text: str) -> str:
    """A path without its folders, or a name of the hub, as :func:`plain` text."""
    if Path(text).is_absolute() or text.startswith(("~", ".")) or text.count("/") > 1:
        text = Path(text).name or text
    return plain(text)


def plain(text: str) -> str:
    """Text on one line, in which nothing can break a table or a heading."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
