"""Evaluation with several answers to each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import make_config

from opdengine.config.train import ConfigError
from opdengine.distributed import Ranks
from opdengine.models.backbone import load_model
from opdengine.models.chat import encode_chat, load_tokenizer
from opdengine.rollout.transformers import TransformersSampler
from opdengine.training.evaluate import answer_params, evaluate
from opdengine.types import Completion, Prompt, Request, SamplingParams

WRITTEN = {"a": ["1", "0", "0", "1"], "b": ["0", "0", "0", "0"], "c": ["1", "1", "1", "1"]}


class Scripted:
    """Writes what stands in the table."""

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        ids = np.array([1, 2])
        return [
            [Completion(ids, np.zeros(2, np.float32), "stop", text) for text in WRITTEN[r.id][: params.n]]
            for r in requests
        ]


def prompts() -> list[Prompt]:
    return [Prompt(i, ({"role": "user", "content": i},), answer="1", key="xyz"[n]) for n, i in enumerate(WRITTEN)]


def grade(text: str, answer: object, messages: object) -> float:
    return float(text == answer)


def test_accuracy_is_the_mean_and_pass_the_share_that_any_answer_solves() -> None:
    found = evaluate(Scripted(), prompts(), lambda p: [1], grade, SamplingParams(n=4))  # type: ignore[arg-type]
    metrics = found.metrics()
    assert metrics["eval/accuracy"] == pytest.approx((2 / 4 + 0 + 1) / 3)
    assert metrics["eval/pass@4"] == pytest.approx(2 / 3)
    assert metrics["eval/accuracy/x"] == 0.5
    assert found.texts == tuple(tuple(row) for row in WRITTEN.values()) and found.scores.shape == (3, 4)
    one = evaluate(Scripted(), prompts(), lambda p: [1], grade, SamplingParams()).metrics()  # type: ignore[arg-type]
    assert one["eval/accuracy"] == pytest.approx(2 / 3) and not any("pass@" in name for name in one)


class First(Ranks):
    """The first of two ranks, whose own answers are all there is."""

    def gather(self, value: object) -> list[object]:  # type: ignore[override]
        return [value]


def test_samples_are_those_of_the_prompt_whoever_draws_them(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    config = make_config(models, prompt_file, tmp_path, eval_temperature=1.0, eval_num_generations=3)
    tokenizer = load_tokenizer(models["student"])
    sampler = TransformersSampler(load_model(models["student"], dtype="float32"), tokenizer)

    def texts(ranks: Ranks) -> tuple[tuple[str, ...], ...]:
        encode = lambda p: encode_chat(tokenizer, p.messages)  # noqa: E731
        return evaluate(sampler, prompts(), encode, grade, answer_params(config), ranks).texts

    whole = texts(Ranks())
    assert len({text for row in whole for text in row}) == 9
    assert texts(Ranks()) == whole
    assert texts(First(0, 2)) == whole[:1]


def test_several_greedy_answers_are_refused(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_num_generations=4 is not possible; with eval_temperature 0"):
        make_config(models, prompt_file, tmp_path, eval_num_generations=4)
    greedy = answer_params(make_config(models, prompt_file, tmp_path, top_p=0.9, top_k=5))
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.n) == (0.0, 1.0, 0, 1)
