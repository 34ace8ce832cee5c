"""Supervised agents: what teachers play is what the student learns, token for token as if it had played."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agent_helpers import Countdown, LocalPool
from engine_helpers import (
    ScriptedTeacher,
    assert_same_gradients,
    full_logprobs,
    loss_and_gradient,
    make_config,
    make_engine,
    make_samples,
)
from transformers import AutoModelForCausalLM

from opdengine.environments.episodes import Episodes, Job
from opdengine.environments.protocol import Broken, Step
from opdengine.environments.setup import load_tasks
from opdengine.errors import NothingTrainedError
from opdengine.methods import build_method
from opdengine.methods.mt_seqkd import MTSeqKD, author
from opdengine.methods.trajectories import task_seed
from opdengine.models.chat import encode_answer, encode_chat
from opdengine.models.rendering import thought_opening
from opdengine.rollout.transformers import TransformersSampler
from opdengine.training.run import train
from opdengine.types import Batch, Failure, Prompt
from tiny.agents import world
from tiny.agents.house import HOUSE, House

ENVIRONMENT = {
    "name": HOUSE,
    "num_environments": 2,
    "max_turns": 3,
    "max_trajectory_tokens": 700,
    "options": {"count": 6, "instructions": False},
}
AGENTS = Path(__file__).parents[2] / "examples" / "tiny" / "agents" / "models"


@pytest.fixture
def engine(models: dict[str, str], tmp_path: Path) -> Iterator[Any]:
    """Two teachers that share six tasks, with the student's tokenizer."""
    config = make_config(models, "", tmp_path, method="mt_seqkd", environment=ENVIRONMENT)
    engine = make_engine(config)
    engine.sampler.generate = None  # the student is not sampled
    yield engine
    engine.episodes.close()


def tasks_of(engine: Any) -> Sequence[Prompt]:
    return load_tasks(engine.config.environment, "train").prompts


# ------------------------------------------------------------------- whole steps with real models


def test_trajectories_are_the_teachers_turns_in_the_students_chat(engine: Any) -> None:
    asked: dict[str, list[Any]] = {}
    for teacher in engine.teachers:
        plain = teacher.generate

        async def generate(requests, params, plain=plain, name=teacher.name):
            answers = await plain(requests, params)
            asked.setdefault(name, []).extend(zip(requests, answers, strict=True))
            return answers

        teacher.generate = generate
    tasks = tasks_of(engine)
    result = asyncio.run(engine.step(tasks))
    authors = {task.id: author(task, engine.teachers, 0).name for task in tasks}
    assert set(authors.values()) == {"big", "small"}
    for task, sample in zip(tasks, result.samples, strict=True):
        house = House(**engine.config.environment.options)
        start = house.reset(seed=0, task=task.extra["task"])
        turns = [
            (request, answer)
            for request, answer in asked[authors[task.id]]
            if request.id.startswith(f"{task.id} turn ")
        ]
        ids, trained = list(encode_chat(engine.tokenizer, start.messages)), []
        for number, (request, answer) in enumerate(turns):
            assert list(request.token_ids) == ids  # teachers have the student's template here
            said = answer.token_ids.tolist()
            trained += range(len(ids), len(ids) + len(said))
            ids += said
            step = house.step({"role": "assistant", "content": answer.text})
            if number + 1 < len(turns):
                ids += encode_answer(engine.tokenizer, step.messages, (), {}, said)
        assert len(turns) == 3 and sample.stop_reason == "max_turns"
        assert sample.token_ids.tolist() == ids
        assert sample.target_positions.tolist() == trained
        assert sample.sampler_logprob is None and sample.info["author"] == authors[task.id]
    metrics = result.metrics
    assert metrics["episodes/begun"] == 6 and metrics["episodes/turns"] == 3 and metrics["episodes/success"] == 0
    assert metrics["seqkd/written/big"] + metrics["seqkd/written/small"] == metrics["completions/kept"] == 6
    assert metrics["seqkd/success/big"] == 0
    # A task is played once: the second epoch asks nobody, and learns the same.
    for teacher in engine.teachers:
        teacher.generate = None
    again = asyncio.run(engine.step(tasks[::-1]))
    assert [s.token_ids.tolist() for s in again.samples[::-1]] == [s.token_ids.tolist() for s in result.samples]
    assert not [name for name in again.metrics if name.startswith("seqkd/written")]


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_the_loss_is_the_cross_entropy_of_the_actions_alone(
    engine: Any, models: dict[str, str], normalization: str
) -> None:
    """Against float64 log-probs of the whole model, and Hugging Face's gradient with every other token masked."""
    engine.config.__dict__["loss_normalization"] = normalization
    samples = make_samples(engine, tasks_of(engine)[:4])
    loss, gradient = loss_and_gradient(engine, samples)
    model = AutoModelForCausalLM.from_pretrained(models["student"])
    total, exact = 0.0, 0.0
    for sample in samples:
        labels = torch.from_numpy(sample.token_ids)[None].clone()
        at = 0
        for turn in sample.turns:
            if turn.role != "assistant":
                labels[0, at : at + len(turn.token_ids)] = -100
            at += len(turn.token_ids)
        count = int((labels != -100).sum())
        share = 1 / sum(len(s.target_ids) for s in samples) if normalization == "token" else 1 / (count * len(samples))
        part = model(input_ids=torch.from_numpy(sample.token_ids)[None], labels=labels).loss * count * share
        part.backward()
        total += part.item()
        places = np.flatnonzero(labels[0].numpy() != -100)
        logprobs = full_logprobs(models["student"], sample.token_ids.tolist(), places, engine.vocab_size)
        chosen = logprobs.gather(1, torch.from_numpy(sample.token_ids[places])[:, None])
        exact -= float(chosen.sum()) * share
        assert count < len(sample.token_ids) - len(sample.turns[0].token_ids)  # some of the rest are observations
    assert loss == pytest.approx(total, rel=1e-5) and loss == pytest.approx(exact, rel=1e-5)
    assert_same_gradients(gradient, {n: p.grad for n, p in model.named_parameters()})


def test_what_is_said_of_episodes_that_all_fail(
    models: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Teachers that never succeed leave nothing to learn, and the run says so; their episodes are in the log."""
    changes: dict[str, Any] = {"mt_seqkd": {"successful_only": True}, "max_bad_steps": 0, "log_completions": True}
    config = make_config(models, "", tmp_path / "run", method="mt_seqkd", environment=ENVIRONMENT, **changes)
    remedy = r"4 of 4 episodes of the teachers did not succeed .*take teachers that succeed more often"
    with caplog.at_level(logging.WARNING), pytest.raises(NothingTrainedError, match=remedy):
        train(config, progress=False)
    assert "dropped/unsuccessful 4" in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_1.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and {row["drop"] for row in rows} == {"unsuccessful"}
    assert {row["author"] for row in rows} <= {"big", "small"} and not any(row["success"] for row in rows)
    assert [turn["role"] for turn in rows[0]["turns"]] == ["assistant", "environment"] * 2 + ["assistant"]
    assert {"action", "failure", "observation"} <= rows[0]["turns"][0].keys()


def test_the_tiny_agent_learns_from_its_teachers_victories(tmp_path: Path) -> None:
    """The bundled student wins a quarter of the games, greedy; the teacher four of five."""
    config = make_config(
        {name: str(AGENTS / ("student" if name == "student" else "teacher")) for name in ("student", "big", "small")},
        "", tmp_path, method="mt_seqkd", teachers=[{"model": str(AGENTS / "teacher")}],
        mt_seqkd={"successful_only": True}, max_completion_length=world.MAX_TOKENS, per_device_train_batch_size=12,
        max_steps=5, eval_steps=5, learning_rate=2e-3, log_completions=True,
        environment={
            "name": HOUSE, "options": {**world.OPTIONS, "count": 60}, "max_turns": world.MAX_TURNS,
            "num_environments": 12, "eval_splits": ["valid_unseen"], "eval_max_tasks": 40,
        },
    )  # fmt: skip
    history = train(config, progress=False).history
    assert history[0]["eval/valid_unseen/success"] < 0.35
    assert history[-1]["eval/valid_unseen/success"] > history[0]["eval/valid_unseen/success"] + 0.15
    for row in history[1:]:
        failed = row.get("dropped/unsuccessful", 0.0)
        assert row["completions/kept"] + failed == row["episodes/begun"] == 12
        assert row["episodes/success"] == row["seqkd/success/teacher"] == pytest.approx(1 - failed / 12)
    assert sum(row.get("dropped/unsuccessful", 0.0) for row in history[1:]) > 0


# ---------------------------------------------------------------------- single rules, with scripted teachers


class Guess(Countdown):
    """Three turns; won by whoever says "win" in the last one."""

    def step(self, message: Any) -> Step:
        step = super().step(message)
        won = step.terminated and "win" in str(message["content"])
        told = {**step.info, "success": won, "score": float(won)} if step.terminated else step.info
        return Step(step.messages, float(won), step.terminated, info=told)


def method_of(models: dict[str, str], tmp_path: Path, pool: Any, tokenizer: Any, *teachers: Any, **changes: Any) -> Any:
    """The method with scripted teachers, which have another tokenizer: an id of theirs is a character."""
    environment = {**ENVIRONMENT, **changes.pop("environment", {})}
    method = build_method(make_config(models, "", tmp_path, method="mt_seqkd", environment=environment, **changes))
    assert isinstance(method, MTSeqKD)
    for teacher in teachers:
        teacher.alignment = object()
    kwargs = method.config.chat_template_kwargs
    opening = thought_opening(tokenizer, kwargs)
    method.teachers, method.episodes = teachers, Episodes(pool, tokenizer, kwargs, 9, 500, opening=opening)
    return method


def write(method: Any, count: int = 4) -> Batch:
    prompts = [Prompt(f"t{i}", (), key="count", extra={"task": {"id": f"t{i}", "hint": "4"}}) for i in range(count)]
    batch: Batch = asyncio.run(method.write(prompts, None))
    asyncio.run(method.annotate(batch))
    return batch


def test_failures_are_left_out_where_that_is_asked_for(models: dict[str, str], tmp_path: Path, tokenizer: Any) -> None:
    found = {}
    for only in (False, True):
        teacher = ScriptedTeacher("a", lambda call, r: "win" if r.id.startswith(("t0", "t2")) else "lose")
        pool = LocalPool(Guess, 2)
        method = method_of(models, tmp_path, pool, tokenizer, teacher, mt_seqkd={"successful_only": only})
        batch = write(method)
        found[only] = [sample.drop for sample in batch.samples]
        method.weigh(batch)
        assert all(np.all(s.advantage == 1) and not np.any(s.kl_weight) for s in batch)
        assert batch.metrics["episodes/success"] == 0.5 and batch.metrics["episodes/begun"] == 4
        assert [s.reward for s in batch.samples] == [1.0, 0.0, 1.0, 0.0]
    assert found == {False: [""] * 4, True: ["", "unsuccessful", "", "unsuccessful"]}


def test_a_teacher_with_other_tokens_reads_its_own_chat_and_is_kept_in_the_students(
    models: dict[str, str], tmp_path: Path, tokenizer: Any
) -> None:
    teacher = ScriptedTeacher("a", lambda call, request: f"go {call} win")
    method = method_of(models, tmp_path, LocalPool(Guess, 1), tokenizer, teacher)
    (sample,) = write(method, 1).samples
    # What it has read: its template around the environment's words; the id 1 is what it said, each time.
    said = chr(1)
    assert teacher.asked(0) == "<user>task t0<assistant>"
    assert teacher.asked(2) == f"<user>task t0<assistant>{said}<user>2 left<assistant>{said}<user>1 left<assistant>"
    chat = [{"role": "user", "content": "task t0"}]
    for number, left in ((0, 2), (1, 1)):
        chat += [{"role": "assistant", "content": f"go {number} win"}, {"role": "user", "content": f"{left} left"}]
    whole = [*encode_chat(tokenizer, chat), *tokenizer.encode("go 2 win"), tokenizer.eos_token_id]
    assert sample.token_ids.tolist() == whole
    assert tokenizer.decode(sample.target_ids) == "".join(f"go {i} win<|im_end|>" for i in range(3))
    assert sample.info["success"] and len({request.seed for call in teacher.calls for request in call}) == 3


def test_a_turn_that_has_no_end_is_given_none(models: dict[str, str], tmp_path: Path, tokenizer: Any) -> None:
    """One that was cut off, and one that a string of environment.stop has ended."""

    class Cut(ScriptedTeacher):
        async def generate(self, requests: Any, params: Any) -> Any:
            answers = await super().generate(requests, params)
            return [type(a)(a.token_ids, a.logprobs, "length", a.text) for a in answers]

    for teacher in (Cut("a", lambda call, request: "go on"), ScriptedTeacher("b", lambda call, request: "go on;")):
        method = method_of(
            models, tmp_path, LocalPool(Guess, 1), tokenizer, teacher, environment={"stop": [";"]},
            teachers=[{"model": models["big"]}],
        )  # fmt: skip
        assert method.params.stop == (";",)
        (sample,) = write(method, 1).samples
        text = "go on" if teacher.name == "a" else "go on;"
        assert tokenizer.decode(sample.target_ids) == text * 3
        assert tokenizer.decode(sample.token_ids).count(f"{text}<|im_end|>\n<|im_start|>user") == 2
        assert sample.is_clipped == (teacher.name == "a")


def test_an_end_that_the_student_does_not_know_becomes_its_own(
    models: dict[str, str], tmp_path: Path, tiny: Any
) -> None:
    """Same tokens, another template: the teacher ends its turns with a token that means nothing to the student."""
    tokenizer = tiny.make_tokenizer(extra=("<|end|>",))
    foreign = tokenizer.convert_tokens_to_ids("<|end|>")
    for end, kept in ((foreign, tokenizer.eos_token_id), (tokenizer.eos_token_id, tokenizer.eos_token_id)):

        class Ends(ScriptedTeacher):
            async def generate(self, requests: Any, params: Any, end: int = end) -> Any:
                answers = await super().generate(requests, params)
                ids = np.array([*tokenizer.encode("win"), end])
                return [type(a)(ids, np.zeros(len(ids)), "stop", "win") for a in answers]

        teacher = Ends("a", lambda call, request: "win")
        method = method_of(models, tmp_path, LocalPool(Guess, 1), tokenizer, teacher)
        teacher.alignment = None
        (sample,) = write(method, 1).samples
        assert sample.target_ids.tolist() == [*tokenizer.encode("win"), kept] * 3
        assert list(teacher.calls[1][0].token_ids).count(end) == 1  # it reads its own


def test_episodes_that_break_or_do_not_fit_have_a_reason(
    models: dict[str, str], tmp_path: Path, tokenizer: Any
) -> None:
    broken = {(0, 1): Broken("crash")}

    class Fails(ScriptedTeacher):
        failing = True

        async def generate(self, requests: Any, params: Any) -> Any:
            answers = await super().generate(requests, params)
            bad = [self.failing and r.id.startswith("t1") for r in requests]
            return [Failure(self.name, "timeout") if b else a for a, b in zip(answers, bad, strict=True)]

    teacher = Fails("a", lambda call, request: "win")
    method = method_of(models, tmp_path, LocalPool(Guess, 3, broken), tokenizer, teacher)
    batch = write(method, 3)
    assert [s.drop for s in batch.samples] == ["environment/crash", "teacher_failure", ""]
    assert batch.metrics["episodes/begun"] == 3 and batch.metrics["seqkd/written/a"] == 1
    # In the next epoch what broke is played again, and nothing else.
    teacher.failing, teacher.calls = False, []
    batch = write(method, 3)
    assert [s.drop for s in batch.samples] == [""] * 3 and batch.metrics["seqkd/written/a"] == 2
    assert {r.id.split()[0] for call in teacher.calls for r in call} == {"t0", "t1"}

    teacher = ScriptedTeacher("long", lambda call, request: "win " * 200)  # one token of the teacher's
    (sample,) = write(method_of(models, tmp_path, LocalPool(Guess, 1), tokenizer, teacher), 1).samples
    assert sample.drop == sample.stop_reason == "window"

    longest = len("<user>task t0<assistant>") + 6  # the first turn fits, the second does not
    teacher = ScriptedTeacher("short", lambda call, request: "win", window=longest)
    (sample,) = write(method_of(models, tmp_path, LocalPool(Guess, 1), tokenizer, teacher), 1).samples
    assert sample.stop_reason == "teacher_window/short" and sample.trained_turns == 1 and not sample.drop
    teacher.window = longest - 1
    (sample,) = write(method_of(models, tmp_path, LocalPool(Guess, 1), tokenizer, teacher), 1).samples
    assert sample.drop == "teacher_window/short"


def test_teachers_share_the_tasks_by_weight_and_key(models: dict[str, str], tmp_path: Path, tokenizer: Any) -> None:
    teachers = [ScriptedTeacher(name, lambda call, request, name=name: f"{name} win") for name in ("a", "b", "c")]
    teachers[0].weight, teachers[2].keys = 3.0, ("other",)
    method = method_of(models, tmp_path, LocalPool(Guess, 8), tokenizer, *teachers)
    batch = write(method, 40)
    for sample in batch.samples:
        name = author(sample.prompt, teachers[:2], 0).name
        assert sample.info["author"] == name and set(sample.text.split("\n")) == {f"{name} win"}
    assert batch.metrics["seqkd/written/a"] > 2 * batch.metrics["seqkd/written/b"] > 0
    assert not teachers[2].calls


def test_a_teacher_may_be_shown_more_than_the_student(models: dict[str, str], tmp_path: Path, tokenizer: Any) -> None:
    teacher = ScriptedTeacher("a", lambda call, request: "win")
    shown = {"teacher_prompt_template": "{prompt} (say {hint})"}
    method = method_of(models, tmp_path, LocalPool(Guess, 1), tokenizer, teacher, **shown)
    (sample,) = write(method, 1).samples
    assert teacher.asked(1).startswith("<user>task t0 (say 4)<assistant>")
    assert "say" not in tokenizer.decode(sample.token_ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": {}, "train_data": "x.jsonl", "mt_seqkd": {"successful_only": True}},
         r"mt_seqkd\.successful_only=True has no effect with answers, which nobody grades; set environment\.name"),
        ({"environment": {**ENVIRONMENT, "stop": ["x"]}, "teachers": [{"model": "m", "base_url": "http://h:1/v1"}]},
         r"environment\.stop=\['x'\] is not possible in method 'mt_seqkd' with teacher 'm'"),
        ({"teachers": [{"model": "self", "weights": "ema"}]}, r"teacher 'self' is not possible .*use weights: base"),
        ({"num_generations": 2}, r"num_generations=2 .*one answer per prompt"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_done(
    models: dict[str, str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings = {"method": "mt_seqkd", "environment": ENVIRONMENT, **changes}
    config = make_config(models, settings.pop("train_data", ""), tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        build_method(config)


def test_the_student_that_plays_would_see_the_same(engine: Any, models: dict[str, str]) -> None:
    """The same weights as teacher and as student: both play the same episode, from the same ids."""
    task = tasks_of(engine)[0]
    name = author(task, engine.teachers, 0).name
    (written,) = make_samples(engine, [task])
    player = AutoModelForCausalLM.from_pretrained(models[name]).eval()
    requests = []

    class Noting(TransformersSampler):
        def generate(self, asked: Any, params: Any) -> Any:
            requests.extend(asked)
            return super().generate(asked, params)

    job = Job("0", task, task_seed(task.id, engine.config.seed))
    (played,), _ = engine.episodes.play(Noting(player, engine.tokenizer), [job], engine.method.params)
    assert [turn.token_ids.tolist() for turn in played.turns] == [turn.token_ids.tolist() for turn in written.turns]
    assert len(requests) == 3
