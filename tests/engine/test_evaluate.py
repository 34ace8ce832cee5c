"""Evaluation with several answers to each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import make_config

from opdengine.cli import main
from opdengine.config.train import ConfigError
from opdengine.distributed import Ranks
from opdengine.models.backbone import load_model
from opdengine.models.chat import encode_chat, load_tokenizer
from opdengine.rollout.transformers import TransformersSampler
from opdengine.training.evaluate import answer_params, evaluate, warn_of_overlap
from opdengine.training.run import train
from opdengine.types import Completion, Prompt, Request, SamplingParams
from tiny.agents.house import HOUSE

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


# ------------------------------------------------------------------------------- what is held out


def test_training_data_is_not_evaluated_in_place_of_evaluation_data(
    models: dict[str, str], prompt_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", models["student"], "--train_data", prompt_file, "--output_dir", str(tmp_path / "o")]
    assert main(["eval", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("opdengine: nothing to evaluate on: name the data with eval_data")
    assert captured.out == ""
    assert main(["eval", *arguments[:2], *arguments[4:], "--environment.name", HOUSE]) == 2
    assert "name the tasks with environment.eval_splits" in capsys.readouterr().err


def test_an_evaluation_needs_a_model_and_data_alone(
    models: dict[str, str], prompt_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", models["student"], "--eval_data", prompt_file, "--max_completion_length", "2"]
    assert main(["eval", *arguments]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["train", *arguments]) == 2
    assert "missing setting 'output_dir'" in capsys.readouterr().err
    assert main(["train", *arguments, "--output_dir", "o"]) == 2
    assert "train_data=[] is not possible; name at least one file, or an environment" in capsys.readouterr().err


def test_what_is_evaluated_and_trained_on_is_pointed_out(
    models: dict[str, str], prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same file under another name, a part of it in another file, and nothing that only looks like it."""
    lines = Path(prompt_file).read_text().splitlines()
    link, part, other = tmp_path / "link.jsonl", tmp_path / "part.jsonl", tmp_path / "other.jsonl"
    link.symlink_to(prompt_file)
    part.write_text("\n".join(line.replace('"id": "p', '"id": "copy') for line in lines[:3]) + "\n")
    other.write_text(lines[0].replace("What is", "Say what is") + "\n")
    arguments = ["--model", models["student"], "--train_data", prompt_file, "--output_dir", str(tmp_path / "o")]
    arguments += ["--max_completion_length", "2", "--eval_data", str(link)]
    assert main(["eval", *arguments]) == 0
    assert "WARNING: 12 of the 12 prompts of eval_data are training prompts" in caplog.text
    caplog.clear()
    changes = {"max_steps": 1, "eval_data": [str(part), str(other)], "max_completion_length": 2}
    train(make_config(models, prompt_file, tmp_path / "run", **changes), progress=False)
    assert "WARNING: 3 of the 4 prompts of eval_data are training prompts" in caplog.text
    caplog.clear()
    changes |= {"eval_data": [str(other)]}
    train(make_config(models, prompt_file, tmp_path / "clean", **changes), progress=False)
    assert "training prompts" not in caplog.text


def test_tasks_of_the_training_split_are_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    task = [Prompt(str(i), (), extra={"task": {"id": i, "seed": 7}}) for i in range(3)]
    warn_of_overlap({"train": task[:2], "unseen": task[2:]}, task[:2])
    assert caplog.messages[0].startswith("WARNING: 2 of the 2 prompts of train are") and len(caplog.messages) == 1


def test_evaluation_steps_without_data_are_pointed_out(
    models: dict[str, str], prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(make_config(models, prompt_file, tmp_path, eval_steps=1, max_steps=1), progress=False)
    assert "eval_steps=1 evaluates nothing: name what to evaluate on with eval_data" in caplog.text
