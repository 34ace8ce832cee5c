"""``opdengine balance``: difficulty-aware balancing of the training prompts (arXiv 2605.03677).

The student answers every prompt several times and the verifier counts what is right. Prompts of the
counts that are scarce are repeated until the histogram is about flat; nothing is removed.

The rollouts are sampled at temperature 1 with top-p 0.95 and top-k 50, not as in training.

- U shape (never right and always right are both common): the counts in between are repeated.
- J shape (one end is the most common by far): all counts but that end are repeated.
- Any other shape is left as it is.

Each routing key is a histogram of its own. The paper gives the rule and no ratios: here each
chosen count is raised to the largest (or median) one, at most ``cap`` times.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opdengine.config.fields import COUNT, TOP_K, TOP_P, Range
from opdengine.config.train import TrainConfig
from opdengine.data.prompts import DataError, PromptSet, drop_long, load_prompts
from opdengine.errors import ConfigError
from opdengine.models.pictures import data_url
from opdengine.tools.figures import figure, require_matplotlib
from opdengine.training.run_folder import require_writable
from opdengine.types import Image, Prompt, Request, SamplingParams, images_of
from opdengine.workers.printing import brief

logger = logging.getLogger(__name__)

Sample = Callable[[Sequence[Prompt]], Sequence[Sequence[str]]]
"""Prompts -> the texts of all rollouts of each."""

Grade = Callable[[Sequence[str], Sequence[Prompt]], Sequence[float]]
"""Texts with the prompt of each -> rewards."""


@dataclass(frozen=True)
class BalanceSettings:
    """What ``opdengine balance`` is told beside the configuration.

    Args:
        output: the new data file; the counts, the report and the figure are written beside it.
        rollouts: of every prompt.
        temperature, top_p, top_k: how they are sampled, without a repetition penalty and whatever training samples
            with; the defaults are the paper's.
        cap: a prompt occurs at most this many times.
        target: raise scarce counts to the "largest" or the "median" one.
        chunk: prompts that are sampled and graded between two saves.
    """

    output: Path
    rollouts: int = 8
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 50
    cap: float = 4.0
    target: str = "largest"
    chunk: int = 64

    def __post_init__(self) -> None:
        checks = (
            ("output", self.output.suffix == ".jsonl", "it must end in .jsonl"),
            ("rollouts", self.rollouts in Range(2, 10**6), "a histogram needs at least 2, and at most 1e6"),
            (
                "temperature",
                self.temperature in Range(0.01, 100),
                "with 0 all rollouts of a prompt are equal; 100 is the most",
            ),
            ("top_p", self.top_p in TOP_P, TOP_P),
            ("top_k", self.top_k in TOP_K, TOP_K),
            ("cap", self.cap >= 1, "it must be at least 1; nothing is removed"),
            ("target", self.target in ("largest", "median"), "choose largest or median"),
            ("chunk", self.chunk in COUNT, COUNT),
        )
        for name, ok, remedy in checks:
            if not ok:
                raise ConfigError(f"--{name} {brief(getattr(self, name))} is not possible; {remedy}")
        require_writable("--output", str(self.output.parent))

    def path_with(self, ending: str) -> Path:
        """A file next to the output."""
        return self.output.with_suffix(ending)


# ------------------------------------------------------------------------------- pure rules


def histogram(counts: Sequence[int], rollouts: int) -> list[int]:
    """How many prompts have 0, 1, ... ``rollouts`` right answers."""
    return [int(size) for size in np.bincount(np.asarray(counts, dtype=np.int64), minlength=rollouts + 1)]


def shape(bins: Sequence[int]) -> str:
    """ "u": both ends hold more than any count between; "hard" or "easy": that end alone does; "other"."""
    inner = max(bins[1:-1], default=0)
    low, high = bins[0] > inner, bins[-1] > inner
    if low and high:
        return "u"
    return "hard" if low else "easy" if high else "other"


def chosen(kind: str, rollouts: int) -> range:
    """The counts whose prompts are repeated."""
    first, last = {"u": (1, rollouts - 1), "hard": (1, rollouts), "easy": (0, rollouts - 1), "other": (1, 0)}[kind]
    return range(first, last + 1)


def repetitions(counts: Mapping[str, int], settings: BalanceSettings, seed: int) -> dict[str, int]:
    """How often each prompt of one routing key shall occur; at least once.

    Args:
        counts: right answers by prompt id.
        settings: target and cap.
        seed: which prompts of a count occur once more than the others.
    """
    bins = histogram(list(counts.values()), settings.rollouts)
    occupied = [size for size in bins if size]
    goal = max(occupied) if settings.target == "largest" else float(np.median(occupied))
    times = dict.fromkeys(counts, 1)
    for count in chosen(shape(bins), settings.rollouts):
        ids = sorted((id for id, c in counts.items() if c == count), key=lambda id: _lot(id, seed))
        if not ids:
            continue
        total = max(len(ids), math.floor(min(goal, settings.cap * len(ids))))
        each, more = divmod(total, len(ids))
        times.update({id: each + (place < more) for place, id in enumerate(ids)})
    return times


def rows(prompts: Sequence[Prompt], times: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Rows of the new file: every prompt, then its copies, each with an id of its own."""
    taken = {p.id for p in prompts}
    for prompt in prompts:
        row = {**prompt.extra, "id": prompt.id, "messages": [dict(m) for m in prompt.messages]}
        row |= {"tools": [dict(t) for t in prompt.tools]} if prompt.tools else {}
        row |= {"data_source": prompt.key} if prompt.key else {}
        row |= {"answer": prompt.answer} if prompt.answer is not None else {}
        texts = [image.text for image in images_of(prompt.messages)]
        row |= {"image_text": texts} if texts and None not in texts else {}
        yield row
        number = 2
        for _ in range(times[prompt.id] - 1):
            while f"{prompt.id}#{number}" in taken:
                number += 1
            taken.add(f"{prompt.id}#{number}")
            yield {**row, "id": f"{prompt.id}#{number}"}


def _lot(id: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{id}".encode()).digest()


# ------------------------------------------------------------------------------ the counting


def pass_counts(
    prompts: Sequence[Prompt],
    sample: Sample,
    grade: Grade,
    file: Path,
    header: Mapping[str, Any],
    chunk: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, int]:
    """Right answers of every prompt; each finished chunk is kept in ``file`` and not sampled again.

    Args:
        prompts: to count.
        sample: writes the rollouts.
        grade: their rewards; 1 is right.
        file: JSON lines: the header, then one prompt a line.
        header: what the counts depend on.
        chunk: prompts between two saves.
        progress: told how many prompts are done.

    Raises:
        DataError: the file holds counts of something else.
    """
    done = _read_counts(file, header)
    open_ = [p for p in prompts if p.id not in done]
    with file.open("a") as out:
        for start in range(0, len(open_), chunk):
            part = open_[start : start + chunk]
            texts = sample(part)
            owners = [p for p, written in zip(part, texts, strict=True) for _ in written]
            rewards = iter(grade([text for written in texts for text in written], owners))
            for prompt, written in zip(part, texts, strict=True):
                done[prompt.id] = sum(next(rewards) >= 1 for _ in written)
                out.write(json.dumps({"id": prompt.id, "correct": done[prompt.id]}) + "\n")
            out.flush()
            progress(len(done))
    return {p.id: done[p.id] for p in prompts}


def _read_counts(file: Path, header: Mapping[str, Any]) -> dict[str, int]:
    """What an earlier call has counted; a line that was cut short is dropped."""
    lines = file.read_text().split("\n") if file.is_file() else []
    whole = lines[:-1]  # what follows the last line break was cut
    try:
        same = not whole or json.loads(whole[0]) == json.loads(json.dumps(header))
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise DataError(
            f"{file} counts for other settings: {whole[0]} there, {json.dumps(header)} now; choose another --output or "
            "remove the file"
        )
    most = header.get("n", math.inf)
    counts = dict(_read_count(file, number, line, most) for number, line in enumerate(whole[1:], start=2))
    file.write_text("".join(line + "\n" for line in whole or [json.dumps(header)]))
    return counts


def _read_count(file: Path, number: int, line: str, most: float) -> tuple[str, int]:
    """
    Raises:
        DataError: the line is not one that was written here.
    """
    try:
        row = json.loads(line)
        name, correct = row["id"], row["correct"]
        if not isinstance(name, str) or type(correct) is not int or not 0 <= correct <= most:
            raise ValueError(f"correct={correct!r:.100} of {name!r:.100} is no number of right answers of {most}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{file}, line {number}: {error}; remove the line, or the file to count anew") from error
    return name, correct


# ------------------------------------------------------------------------------- the command


def balance(config: TrainConfig, settings: BalanceSettings, progress: Callable[[int], None] = lambda done: None) -> Any:
    """Count, balance, write; returns the report.

    Raises:
        ConfigError, DataError: before any model is loaded, where possible.
    """
    from opdengine.data.templates import Reader
    from opdengine.models.backbone import check_model_path
    from opdengine.models.chat import load_tokenizer
    from opdengine.models.rendering import thought_opening
    from opdengine.verifiers.grader import Grader

    if not config.train_data:
        raise ConfigError("train_data=[] is not possible; name the files of prompts to balance")
    require_matplotlib()
    check_model_path(config.model)
    found = load_prompts(config.train_data, skip_bad_rows=config.skip_bad_rows)
    if without := [p.id for p in found.prompts if p.answer is None]:
        raise DataError(f"{len(without)} prompts have no 'answer' (e.g. {without[:3]}); the verifier compares with it")
    tokenizer = load_tokenizer(
        config.model,
        trust_remote_code=config.trust_remote_code,
        chat_template=config.chat_template,
        images=config.images,
    )
    reader = Reader("the student", tokenizer, config.chat_template_kwargs)

    def encode(prompt: Prompt) -> list[int]:
        return reader.encode(prompt.messages, prompt.tools)

    data = drop_long(found, lambda p: len(encode(p)), config.max_prompt_length)
    params = SamplingParams(
        max_tokens=config.max_completion_length,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        n=settings.rollouts,
        seed=config.seed,
    )
    header = depends_on(config, data, tokenizer, params)
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with Grader.from_config(config) as grader:
        grader.check(data.prompts)
        grader.opening = thought_opening(tokenizer, config.chat_template_kwargs)
        sampler = None

        def sample(prompts: Sequence[Prompt]) -> list[list[str]]:
            nonlocal sampler
            sampler = sampler or open_sampler(config, tokenizer)
            requests = [Request(p.id, encode(p), seed=_number(p.id)) for p in prompts]
            return [[c.text for c in completions] for completions in sampler.generate(requests, params)]

        def grade(texts: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
            return [score.value for score in grader.grade(texts, prompts)]

        try:
            counts = pass_counts(
                data.prompts, sample, grade, settings.path_with(".counts.jsonl"), header, settings.chunk, progress
            )
        finally:
            if sampler is not None:
                sampler.close()
        failures = grader.counts()
    if failed := sum(failures.values()):
        logger.warning(
            "WARNING: %d completions could not be graded and count as wrong (%s): the histogram holds them as well",
            failed,
            ", ".join(f"{name} {count:g}" for name, count in failures.items() if count),
        )
    report = {**write(data.prompts, counts, settings, config.seed), "dropped": dict(data.dropped), "verifier": failures}
    settings.path_with(".report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, settings.path_with(".png"))
    return report


def depends_on(config: TrainConfig, data: PromptSet, tokenizer: Any, params: SamplingParams) -> dict[str, Any]:
    """What the counts of a file depend on; the weights by their content, since others may be in their place by now."""
    from opdengine.tools.bench.record import identity

    read = json.dumps([tokenizer.chat_template, config.chat_template_kwargs, config.images], default=str)
    return {
        "data": data.fingerprint,
        "model": config.model,
        "weights": identity(config.model, config.trust_remote_code),
        "dtype": f"{config.dtype}, bf16={config.bf16}",
        "template": hashlib.sha256(read.encode()).hexdigest()[:16],
        "verifier": config.verifier,
        **vars(params),
    }


def write(prompts: Sequence[Prompt], counts: Mapping[str, int], settings: BalanceSettings, seed: int) -> dict[str, Any]:
    """Write the balanced file; returns histograms before and after, and the shape, by routing key."""
    times: dict[str, int] = {}
    by_key: dict[str, dict[str, int]] = {}
    for prompt in prompts:
        by_key.setdefault(prompt.key, {})[prompt.id] = counts[prompt.id]
    report: dict[str, Any] = {"rollouts": settings.rollouts, "cap": settings.cap, "target": settings.target, "keys": {}}
    for key, mine in sorted(by_key.items()):
        here = repetitions(mine, settings, seed)
        before = histogram(list(mine.values()), settings.rollouts)
        after = Counter[int]()
        for id, count in mine.items():
            after[count] += here[id]
        report["keys"][key] = {
            "shape": shape(before),
            "before": before,
            "after": [after[c] for c in range(settings.rollouts + 1)],
        }
        times |= here
    partial = settings.output.with_suffix(".tmp")
    with partial.open("w") as out:
        for row in rows(prompts, times):
            out.write(json.dumps(row, default=_written) + "\n")
    partial.replace(settings.output)
    return {**report, "prompts_before": len(prompts), "prompts_after": sum(times.values())}


def _written(value: Any) -> str:
    """What JSON does not have: pictures are kept whole, everything else as its text."""
    return data_url(value) if isinstance(value, Image) else str(value)


def open_sampler(config: TrainConfig, tokenizer: Any) -> Any:
    """The configured sampler with the student's weights."""
    from opdengine.training.build_sampler import build_sampler
    from opdengine.training.build_student import load_copy

    sees = tokenizer.vision is not None
    model = load_copy(config, sees)
    sampler = build_sampler(config, model, tokenizer, sees=sees)
    if sampler.policy_version != 0:
        sampler.load_policy(0, model.state_dict().items())
    return sampler


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Histograms before and after, one panel per routing key."""
    keys = report["keys"]
    with figure(file, (4.2 * len(keys), 3.2), columns=len(keys)) as axes:
        for axis, (key, found) in zip(axes, keys.items(), strict=True):
            places = np.arange(len(found["before"]))
            axis.bar(places - 0.2, found["before"], 0.4, label="before")
            axis.bar(places + 0.2, found["after"], 0.4, label="after")
            axis.set_title(f"{key or 'all prompts'} (shape: {found['shape']})", fontsize=10)
            axis.set_xlabel(f"right answers of {report['rollouts']}")
            axis.set_xticks(places)
        axes[0].set_ylabel("prompts")
        axes[0].legend(frameon=False)


def _number(id: str) -> int:
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:6], "big")
