"""Benchmarks of prompts and a verifier; the same rows and verifiers can be ``eval_data`` of a run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from opdengine.config.sections import DataConfig
from opdengine.config.train import TrainConfig
from opdengine.data.benchmarks import BENCH, Benchmark, find_benchmark
from opdengine.data.prompts import PromptSet, load_prompts
from opdengine.data.templates import Reader
from opdengine.models.rendering import thought_opening
from opdengine.rollout.transformers import TransformersSampler
from opdengine.tools.bench.record import Outcome
from opdengine.training.evaluate import answer_params, evaluate, require_answers
from opdengine.types import Prompt
from opdengine.verifiers.grader import Grader
from opdengine.verifiers.score import VerifierSettings

logger = logging.getLogger(__name__)

ALL = "all"
"""The row of all questions, where there are several kinds."""


class Questions:
    """The questions of a benchmark, answered once for every seed.

    Args:
        name: of the benchmark, as :func:`opdengine.data.benchmarks.find_benchmark` takes it.
        config: how answers are sampled.
        limit: take the first so many questions of each kind.
        file: of the questions, in place of the package's.

    Raises:
        ValueError: something is missing or malformed; nothing has been loaded then.
    """

    def __init__(self, name: str, config: TrainConfig, limit: int | None, file: str | None) -> None:
        self.benchmark: Benchmark = find_benchmark(name)
        self.benchmark.require(file is not None)
        if file is not None and ":" in name:
            raise ValueError(f"--data takes all questions of a file; leave {name.partition(':')[2]!r} out of the name")
        path = f"{BENCH}{name}" if file is None else file
        prompts = load_prompts([DataConfig(path, format=self.benchmark.format)], skip_bad_rows=config.skip_bad_rows)
        self.prompts = first_of_each(require_answers(prompts.prompts), limit)
        settings = VerifierSettings(config.verifier_timeout, config.verifier_workers, config.verifier_allow_unsandboxed)
        self._grader = Grader(self.benchmark.verifier, settings)
        self._config, self._name = config, name.partition(":")[0]

    def settings(self) -> dict[str, Any]:
        """What the values depend on besides the model and the seed."""
        sampling = asdict(answer_params(self._config))
        del sampling["seed"]
        return {
            "versions": self.benchmark.versions(),
            "questions": len(self.prompts),
            "fingerprint": PromptSet(tuple(self.prompts), {}).fingerprint,
            "sampling": sampling,
            "verifier": {"name": self.benchmark.verifier, "timeout": self._config.verifier_timeout},
        }

    def run(self, sampler: TransformersSampler, tokenizer: Any, seed: int) -> Outcome:
        """Answer and grade. Prompts that leave no room for an answer in the model's window count as wrong."""
        reader = Reader("the model", tokenizer, self._config.chat_template_kwargs)
        params = replace(answer_params(self._config), seed=seed)
        encoded = {p.id: reader.encode(p.messages, p.tools) for p in self.prompts}
        room = sampler.window - params.max_tokens if sampler.window is not None else None
        if room is not None and room < 1:
            raise ValueError(
                f"max_completion_length={params.max_tokens} leaves no room for a prompt in the model's window of "
                f"{sampler.window}; lower it"
            )
        asked = [p for p in self.prompts if room is None or len(encoded[p.id]) <= room]
        if left_out := len(self.prompts) - len(asked):
            logger.warning(
                "WARNING: %d of %d prompts have more than %d tokens and count as wrong: with answers of up to %d they "
                "exceed the model's window; lower max_completion_length",
                *(left_out, len(self.prompts), room, params.max_tokens),
            )
        if not asked:
            raise ValueError(f"no prompt fits the model's window of {sampler.window}; lower max_completion_length")
        self._grader.opening = thought_opening(tokenizer, self._config.chat_template_kwargs)
        found = evaluate(sampler, asked, lambda p: encoded[p.id], self._grader, params)
        scores = {p.id: [0.0] * params.n for p in self.prompts}
        scores |= {p.id: row for p, row in zip(asked, found.scores.tolist(), strict=True)}
        details = {
            "mean_length": found.mean_length,
            "clipped_ratio": found.clipped_ratio,
            "failed": dict(found.failed),
            "too_long": left_out,
            "scores": scores,
        }
        answers = [
            {"id": p.id, "score": score, "text": text}
            for p, texts in zip(asked, found.texts, strict=True)
            for score, text in zip(scores[p.id], texts, strict=True)
        ]
        return Outcome(self._rows(scores), details, answers)

    def _rows(self, scores: dict[str, list[float]]) -> dict[str, dict[str, float]]:
        """The mean of every kind of question, and of all."""
        kinds: dict[str, list[float]] = {}
        keys = {prompt.key for prompt in self.prompts}
        for prompt in self.prompts:
            kinds.setdefault(prompt.key if len(keys) > 1 else self._name, []).append(float(np.mean(scores[prompt.id])))
        if len(kinds) > 1:
            kinds[ALL] = [value for values in kinds.values() for value in values]
        return {kind: {"value": float(np.mean(values)), "questions": len(values)} for kind, values in kinds.items()}

    def close(self) -> None:
        """End the processes that grade."""
        self._grader.close()


def first_of_each(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first ``limit`` prompts of every routing key, in their order."""
    seen: Counter[str] = Counter()
    kept = []
    for prompt in prompts:
        seen[prompt.key] += 1
        if limit is None or seen[prompt.key] <= limit:
            kept.append(prompt)
    return kept
