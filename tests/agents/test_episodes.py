"""Episodes over many turns: exact ids, limits, full batches, broken environments, real models."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from agent_helpers import Countdown, LocalPool, Scripted
from engine_helpers import make_config, make_engine

from opdengine.environments.episodes import Episodes, Job, episode_metrics, turns_of
from opdengine.environments.protocol import Broken, Observation, Step
from opdengine.methods.opad import steps_of
from opdengine.models.chat import append_answer, encode_answer, encode_chat
from opdengine.models.rendering import thought_opening
from opdengine.training.evaluate import evaluate_episodes, wilson
from opdengine.types import Batch, Prompt, Sample, SamplingParams
from tiny.agents.house import HOUSE

PARAMS = SamplingParams(max_tokens=8)

THINKING = (  # strips the reasoning of earlier turns, as the templates of reasoning models do
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_episodes(tokenizer: Any, pool: Any, **changes: Any) -> Episodes:
    return Episodes(
        **{"pool": pool, "tokenizer": tokenizer, "template_kwargs": {}, "max_turns": 9, "max_trajectory_tokens": 500}
        | changes
    )


def make_jobs(count: int) -> list[Job]:
    return [
        Job(str(i), Prompt(f"t{i}", (), key="count", extra={"task": {"id": f"t{i}"}}), seed=i) for i in range(count)
    ]


def test_a_trajectory_is_the_sampled_ids_between_the_templates(tokenizer: Any) -> None:
    sampler = Scripted(tokenizer, lambda request: "one <think>x</think> two")
    rollouts, broken = make_episodes(tokenizer, LocalPool(Countdown, 1)).play(sampler, make_jobs(1), PARAMS)
    (rollout,) = rollouts
    assert not broken and rollout.stop_reason == "terminated" and rollout.reward == 1.0
    assert [t.role for t in rollout.turns] == [
        "prompt",
        "assistant",
        "environment",
        "assistant",
        "environment",
        "assistant",
    ]
    chat = [{"role": "user", "content": "task t0"}]
    for left in (2, 1):
        chat += [
            {"role": "assistant", "content": "one <think>x</think> two"},
            {"role": "user", "content": f"{left} left"},
        ]
    whole = encode_chat(tokenizer, chat) + tokenizer.encode("one <think>x</think> two") + [tokenizer.eos_token_id]
    assert rollout.token_ids.tolist() == whole
    # What each turn was sampled from is exactly what stands before it in the trajectory.
    starts = np.cumsum([0] + [len(t.token_ids) for t in rollout.turns])
    for request, (index, _, _) in zip(sampler.requests, turns_of(rollout), strict=True):
        assert list(request.token_ids) == whole[: starts[index]]
    assert rollout.target_ids.tolist() == [t for turn in rollout.turns if turn.trains for t in turn.token_ids]
    assert len(set(r.seed for r in sampler.requests)) == 3


def test_a_template_that_strips_reasoning_does_not_change_what_was_sampled(tiny: Any) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = THINKING
    sampler = Scripted(tokenizer, lambda request: "<think>why</think>go")
    (rollout,), _ = make_episodes(tokenizer, LocalPool(Countdown, 1)).play(sampler, make_jobs(1), PARAMS)
    text = tokenizer.decode(rollout.token_ids)
    assert text.count("<think>why</think>go<|im_end|>\n<|im_start|>user\n") == 2
    again = encode_chat(tokenizer, [m for _, _, chat in list(turns_of(rollout))[-1:] for m in chat])
    assert "why" not in tokenizer.decode(again)  # rendering the chat again would have


class Cut(Countdown):
    """Says and lists halves of characters."""

    def reset(self, *, seed: int, task: Any) -> Observation:
        start = super().reset(seed=seed, task=task)
        tool = {"type": "function", "function": {"name": "f", "description": "cut \ud83d"}}
        return Observation(({"role": "user", "content": "begin \ud83d"},), (tool,), {**start.info, "goal": "\ud83d"})

    def step(self, message: Any) -> Step:
        step = super().step(message)
        answers = tuple({**answer, "content": "see \udc00"} for answer in step.messages)
        return Step(answers, step.reward, step.terminated, info={**step.info, "admissible": ["go \ud83d"]})


def test_halves_of_characters_are_replaced(tokenizer: Any, tiny: Any) -> None:
    """In what an environment says, and in calls that are read from the student's text."""
    shown = tiny.make_tokenizer()
    shown.chat_template = "{{ tools | tojson if tools else '' }}" + tokenizer.chat_template
    episodes = make_episodes(
        shown, LocalPool(Cut, 1), parse=lambda m: {**m, "tool_calls": [{"function": {"name": "\ud83d"}}]}
    )
    (rollout,), broken = episodes.play(Scripted(shown, lambda request: "go"), make_jobs(1), PARAMS)
    assert not broken and rollout.prompt.messages[0]["content"] == "begin \ufffd"
    assert "see \ufffd" in shown.decode(rollout.token_ids) and rollout.info["goal"] == "\ufffd"
    assert rollout.turns[1].info["admissible"] == ["go \ufffd"]
    assert rollout.turns[1].messages[0]["tool_calls"] == [{"function": {"name": "\ufffd"}}]
    rollout.text.encode()


def test_a_start_that_the_template_leaves_out_is_refused(tiny: Any) -> None:
    tokenizer = tiny.make_tokenizer()  # its template prints no tools
    with pytest.raises(ValueError, match="the chat template of the student leaves out the tools"):
        make_episodes(tokenizer, LocalPool(Cut, 1)).play(Scripted(tokenizer, lambda r: "go"), make_jobs(1), PARAMS)


def test_an_environment_reads_no_action_in_a_thought_that_the_template_opened(tiny: Any) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = THINKING.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    opening = thought_opening(tokenizer, {})
    assert opening == "<think>\n"
    for text, given in (("go", "<think>\ngo"), ("why</think>go", "why</think>go")):
        sampler = Scripted(tokenizer, lambda request, text=text: text)  # type: ignore[misc]
        episodes = make_episodes(tokenizer, LocalPool(Countdown, 1), opening=opening)
        (rollout,), _ = episodes.play(sampler, make_jobs(1), PARAMS)
        assert {m["content"] for t in rollout.turns for m in t.messages if m["role"] == "assistant"} == {given}
    tokenizer.chat_template = THINKING.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
    assert thought_opening(tokenizer, {}) == ""


def test_an_unfinished_message_is_closed_before_the_answer(tokenizer: Any) -> None:
    answer = encode_answer(tokenizer, [{"role": "user", "content": "no"}])
    assert tokenizer.decode(answer) == "<|im_end|>\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n"
    assert append_answer([5, tokenizer.eos_token_id], answer) == answer[1:]
    assert append_answer([5, 6], answer) == answer


def test_a_template_without_room_for_a_conversation_is_refused(tiny: Any) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="leaves out the assistant's messages"):
        encode_answer(tokenizer, [{"role": "user", "content": "no"}])


def test_a_template_that_leaves_out_the_answer_is_refused(tiny: Any) -> None:
    """As some do with tool messages behind a message without rendered calls; escaped text is no such case."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'tool' %}[{{ m.role }}]{{ m.content }}"
        "{% elif escaped %}[tool]{{ m.content | tojson }}{% endif %}{% endfor %}"
    )
    tool = [{"role": "tool", "content": 'a "quoted" word'}]
    with pytest.raises(ValueError, match=r"leaves out messages of the roles \['tool'\]"):
        encode_answer(tokenizer, tool)
    assert tokenizer.decode(encode_answer(tokenizer, tool, (), {"escaped": True})) == r'[tool]"a \"quoted\" word"'
    assert tokenizer.decode(encode_answer(tokenizer, [{"role": "user", "content": "no"}])) == "[user]no"


def test_the_batch_stays_full_while_tasks_wait(tokenizer: Any) -> None:
    lengths = iter([1, 4, 2, 3, 1, 2, 3, 1])
    pool = LocalPool(lambda: Varying(lengths), 2)
    rollouts, _ = make_episodes(tokenizer, pool).play(Scripted(tokenizer, lambda r: "a"), make_jobs(8), PARAMS)
    assert [r.id for r in rollouts] == [str(i) for i in range(8)]  # in the order of the jobs
    assert sum(pool.batches) == 17 and pool.batches[:-1] == [2] * (len(pool.batches) - 1)


class Varying(Countdown):
    """Episodes of the next length at each reset."""

    def __init__(self, lengths: Any) -> None:
        self.lengths = lengths

    def reset(self, *, seed: int, task: Any) -> Observation:
        self.turns = next(self.lengths)
        return super().reset(seed=seed, task=task)


def test_limits_end_an_episode_and_are_counted(tokenizer: Any) -> None:
    sampler = Scripted(tokenizer, lambda r: "abcdef")
    (long,), _ = make_episodes(tokenizer, LocalPool(lambda: Countdown(9), 1), max_turns=2).play(
        sampler, make_jobs(1), PARAMS
    )
    assert long.stop_reason == "max_turns" and long.turns[-1].role == "assistant" and long.reward == 0
    assert len([t for t in long.turns if t.trains]) == 2
    (full,), _ = make_episodes(tokenizer, LocalPool(lambda: Countdown(9), 1), max_trajectory_tokens=90).play(
        sampler, make_jobs(1), PARAMS
    )
    assert full.stop_reason == "window" and 0 < len(full.token_ids) <= 90
    assert full.turns[-1].role == "assistant"  # never cut in the middle
    metrics = episode_metrics([long, full])
    assert metrics["episodes/end/window"] == 1 and metrics["episodes/end/max_turns"] == 1


class Scored(Countdown):
    """Tells a score with every step, and the world's own number."""

    def step(self, message: Any) -> Step:
        answer = super().step(message)
        told = 1 - self.left / self.turns
        return Step(answer.messages, terminated=answer.terminated, info={**answer.info, "score": told, "raw_score": -7})


def test_an_episode_that_is_cut_off_keeps_its_score(tokenizer: Any) -> None:
    (cut,), _ = make_episodes(tokenizer, LocalPool(lambda: Scored(4), 1), max_turns=3).play(
        Scripted(tokenizer, lambda r: "a"), make_jobs(1), PARAMS
    )
    assert cut.stop_reason == "max_turns" and cut.reward == cut.info["score"] == 0.75 and not cut.info["success"]
    metrics = episode_metrics([cut])
    assert metrics["episodes/score"] == 0.75 and metrics["episodes/raw_score"] == -7
    assert "episodes/raw_score" not in episode_metrics([Sample("a", cut.prompt, (), info={"success": 1, "score": 1})])


def test_broken_environments_are_neither_success_nor_failure(tokenizer: Any) -> None:
    pool = LocalPool(Countdown, 2, {(0, 1): Broken("crash"), (1, 4): Broken("timeout")})
    rollouts, broken = make_episodes(tokenizer, pool).play(Scripted(tokenizer, lambda r: "a"), make_jobs(4), PARAMS)
    assert broken == {"environment/crash": 1, "environment/timeout": 1}
    assert len(rollouts) == 2 and all(r.info["success"] for r in rollouts)


def test_episode_metrics() -> None:
    rollout = Sample("a", Prompt("p", ()), (), info={"success": True, "score": 0.5})
    turns = [
        turn_with(action="go", failure=""),
        turn_with(action="go", failure=""),
        turn_with(action="", failure="empty"),
    ]
    metrics = episode_metrics([Sample("a", rollout.prompt, tuple(turns), info=rollout.info)])
    assert metrics["episodes/turns"] == 3
    assert metrics["episodes/invalid_action_rate"] == pytest.approx(1 / 3)
    assert metrics["episodes/repeated_action_rate"] == pytest.approx(1 / 3)
    assert metrics["episodes/success"] == 1 and metrics["episodes/score"] == 0.5


def turn_with(**info: Any) -> Any:
    from opdengine.types import Turn

    return Turn("assistant", np.array([1]), np.zeros(1), True, info=info)


def test_wilsons_interval() -> None:
    low, high = wilson(10, 20)
    assert (low, high) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0) and wilson(0, 10)[0] == 0.0


def test_evaluation_greedy_and_sampled(tokenizer: Any) -> None:
    pool = LocalPool(Countdown, 2, {(0, 0): Broken("error")})
    sampler = Scripted(tokenizer, lambda r: "a")
    prompts = [job.prompt for job in make_jobs(4)]
    metrics, records = evaluate_episodes(
        make_episodes(tokenizer, pool), sampler, {"seen": prompts}, [0.0, 0.7], SamplingParams(max_tokens=8, top_p=0.9)
    )
    assert metrics["eval/seen/success"] == 1 and metrics["eval/seen/broken"] == 1 and metrics["eval/seen/turns"] == 3
    assert metrics["eval/seen/success@0.7"] == 1 and metrics["eval/seen/broken@0.7"] == 0
    assert metrics["eval/seen/success_low"] == pytest.approx(wilson(3, 3)[0])
    assert len(records) == 7 and records[0]["messages"][0]["role"] == "assistant"
    temperatures = [(p.temperature, p.top_p) for p in sampler.params]
    assert set(temperatures) == {(0.0, 1.0), (0.7, 0.9)}


class Guess(Countdown):
    """Draws what is to be guessed in its reset, as environments do whose tasks leave something open."""

    def reset(self, *, seed: int, task: Any) -> Observation:
        start = super().reset(seed=seed, task=task)
        return Observation(start.messages, info={**start.info, "drawn": int(np.random.default_rng(seed).integers(1e9))})


def test_the_rollouts_of_a_group_begin_alike_and_are_sampled_apart(models: dict[str, str], tmp_path: Path) -> None:
    """Rewards are compared within a group: another start would count as a better or worse rollout."""
    config = make_config(models, "", tmp_path, environment={"name": HOUSE}, num_generations=3, max_completion_length=6)
    engine = make_engine(config)
    assert engine.episodes is not None
    engine.episodes.pool.close()
    engine.episodes.pool = LocalPool(Guess, 2)
    sampler = Scripted(engine.tokenizer, lambda request: "a")
    engine.sampler = cast(Any, sampler)
    batch = Batch(5)
    engine.play([job.prompt for job in make_jobs(2)], [0, 1], batch)
    drawn: dict[str, set[int]] = {}
    for sample in batch.samples:
        drawn.setdefault(sample.group, set()).add(sample.info["drawn"])
    assert [len(found) for found in drawn.values()] == [1, 1] and len(set.union(*drawn.values())) == 2
    assert len({request.seed for request in sampler.requests}) == len(sampler.requests) == 18


def test_steps_have_their_true_prefix_and_share_one_forward_pass(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss over steps is that over whole trajectories, and the student reads each trajectory once."""
    config = make_config(
        models, "", tmp_path, environment={"name": HOUSE, "num_environments": 2}, max_completion_length=6
    )
    engine = make_engine(config)
    assert engine.episodes is not None
    # Text that survives decoding and encoding: teachers render the chat before a step in their own template.
    engine.sampler = Scripted(engine.tokenizer, lambda request: "abc")
    engine.config.__dict__["max_logprob_difference"] = 1e9
    try:
        tasks = [Prompt(f"t{i}", (), extra={"task": task}) for i, task in enumerate(house_tasks()[:2])]
        engine.episodes.max_turns = 3
        batch = Batch()
        engine.play(tasks, range(len(tasks)), batch)
        whole = batch.samples
    finally:
        engine.episodes.close()
    steps = [step for rollout in whole for step in steps_of(rollout)]
    assert len(steps) == 6
    for step in steps:
        (rollout,) = [r for r in whole if r.id == step.trajectory]
        assert np.array_equal(step.token_ids, rollout.token_ids[: len(step.token_ids)])
    assert (
        steps[1].prompt.messages[-1]["role"] == "user"
        and len(steps[1].prompt.messages) == len(whole[0].prompt.messages) + 2
    )

    fed: list[int] = []
    forward = engine.student.forward
    monkeypatch.setattr(
        engine.student, "forward", lambda batch: (fed.append(int(batch.position_ids.numel())), forward(batch))[1]
    )

    def gradients(rollouts: Sequence[Sample]) -> tuple[float, dict[str, torch.Tensor]]:
        fed.clear()

        async def run() -> float:
            batch = Batch(samples=list(rollouts))
            await engine.annotate(batch)
            await engine.score(batch)
            engine.measure(batch)
            engine.weigh(batch)
            grabbed = {}
            monkeypatch.setattr(
                engine,
                "_optimizer_step",
                lambda loss, norm: (
                    grabbed.update(
                        {n: p.grad.clone() for n, p in engine.student.model.named_parameters() if p.grad is not None}
                    )
                    or {"loss": loss}
                ),
            )
            loss = engine.update(batch).metrics["loss"]
            found.update(grabbed)
            return loss

        found: dict[str, torch.Tensor] = {}
        engine.probed = True
        return asyncio.run(run()), found

    loss_whole, grad_whole = gradients(whole)
    tokens_whole = sum(fed)
    loss_steps, grad_steps = gradients(steps)
    assert sum(fed) == tokens_whole  # not the sum over prefixes
    assert loss_steps == pytest.approx(loss_whole, rel=1e-5)
    for name, value in grad_whole.items():
        torch.testing.assert_close(grad_steps[name], value, rtol=1e-4, atol=1e-7)


def house_tasks() -> Sequence[Any]:
    from opdengine.environments import load_environment

    return load_environment(HOUSE).tasks("train", count=4)


def test_an_answer_that_fills_the_window_ends_the_episode(tokenizer: Any) -> None:
    class Talker(Countdown):
        def step(self, message: Any) -> Step:
            return Step(({"role": "user", "content": "x" * 400},), info={"action": "a"})

    (rollout,), _ = make_episodes(tokenizer, LocalPool(Talker, 1)).play(
        Scripted(tokenizer, lambda r: "a"), make_jobs(1), PARAMS
    )
    assert rollout.stop_reason == "window" and len(rollout.turns) == 4
