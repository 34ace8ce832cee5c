"""SDFT, SDPO and OPSD: what the student's teacher reads, closed forms, and what is refused."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agent_helpers import make_rollout as make_episode
from engine_helpers import (
    PROMPTS,
    ScriptedTeacher,
    divergence,
    full_logprobs,
    make_config,
    make_engine,
    make_samples,
)
from method_helpers import make_batch, make_rollout
from self_taught_helpers import REWARDS, SELF, SHOWN, config_of, graded, our_loss

from opdengine.config.method_sections import GrpoConfig
from opdengine.config.train import ConfigError
from opdengine.data.prompts import load_prompts
from opdengine.distributed import Ranks
from opdengine.environments.setup import load_tasks
from opdengine.methods import build_method
from opdengine.methods.group_relative import add_advantages, advantages
from opdengine.methods.privileged import Privileged, privileged_text
from opdengine.methods.sdpo import demonstration
from opdengine.training.run import train
from opdengine.types import Batch, Prompt, Sample, Turn
from tiny.agents.house import HOUSE

Models = dict[str, str]


# ------------------------------------------------------------------------------------------------ contexts


def test_a_demonstration_tells_thoughts_and_calls() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    chat = [{"role": "assistant", "content": "I look.", "reasoning_content": "Is it day?", "tool_calls": [call]},
            {"role": "tool", "content": "dark"}, {"role": "assistant", "content": "It is night."}]  # fmt: skip
    shown = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'
    assert privileged_text(chat) == f"Is it day?\nI look.\n{shown}\ndark\nIt is night."


def test_sdpo_shows_what_succeeded_and_what_was_said(models: Models, tmp_path: Path) -> None:
    def read(said: Any = None, **sdpo: Any) -> list[str]:
        templates = {"reprompt_template": "{prompt}|{solution}|{feedback}"}
        if sdpo.get("use_successful_as_teacher", True):
            templates["solution_template"] = "S {successful_previous_attempt}"
        if sdpo.get("include_environment_feedback"):
            templates["feedback_template"] = "F {feedback_raw}"
        config = config_of(models, "d.jsonl", tmp_path, "sdpo", sdpo={**templates, **sdpo})
        method = build_method(config)
        method.teachers = [ScriptedTeacher("self", [])]
        prompt = Prompt("p", ({"role": "user", "content": "Q"},), extra={"privileged_context": said})
        samples = []
        for i, (text, reward) in enumerate(
            [("bad", 0.0), ("<think>x</think> good", 1.0), ("fair", 0.6), ("best", 1.0)]
        ):
            turns = (Turn("prompt", np.array([1])), Turn("assistant", np.array([65 + i]), trains=True))
            samples.append(
                Sample(str(i), prompt, turns, reward=reward, group="g", text=text, info={"feedback": f"said {i}"})
            )
        batch = Batch(samples=samples)
        asyncio.run(method.annotate(batch))
        assert batch.metrics["sdpo/unshown"] == sum(not s.contexts for s in samples)
        return ["".join(map(chr, s.contexts[0].token_ids[:-1])) if s.contexts else "" for s in samples]

    good, best = "S <think>x</think> good", "S best"

    def frames(*parts: str) -> list[str]:
        return [f"<user>Q|{part}<assistant>" if part else "" for part in parts]

    assert read() == frames(f"{good}|", f"{best}|", f"{good}|", f"{good}|")
    assert read(success_reward_threshold=0.5)[1] == frames("S fair|")[0]
    assert read(dont_reprompt_on_self_success=False)[1] == frames(f"{good}|")[0]
    assert read(remove_thinking_from_demonstration=True)[0] == frames("S good|")[0]
    feedback = {"include_environment_feedback": True}
    assert read(**feedback)[:2] == frames(f"{good}|F said 0", f"{best}|")  # no feedback on what succeeded
    assert read("hint", **feedback)[:2] == frames(f"{good}|F hint", f"{best}|F hint")
    assert read(**feedback, environment_feedback_only_without_solution=True)[0] == frames(f"{good}|")[0]
    assert read(**feedback, use_successful_as_teacher=False) == frames("|F said 0", "", "|F said 2", "")


@pytest.mark.parametrize(
    ("said", "thinks", "shown"),
    [
        (["<think>never ends"], False, "<think>never ends"),
        (["<think>never ends"], True, ""),
        (["<think>all is thought</think>"], True, ""),
        ([" \n"], False, ""),
        (["a</think>left", "b</think>right"], True, "left\nright"),
        (["<think>a", "b</think>right"], True, "right"),
        (["left", "right"], False, "left\nright"),
    ],
)
def test_what_shows_nothing_is_no_demonstration(said: list[str], thinks: bool, shown: str) -> None:
    """Of an episode every turn is read by itself, as the chat template leaves thoughts open in each."""
    turns = [
        Turn("assistant", np.array([1]), trains=True, messages=({"role": "assistant", "content": text},))
        for text in said
    ]
    episode = Sample("0", Prompt("p", ()), tuple(turns), text="\n".join(said))
    assert demonstration(episode, thinks) == shown
    if len(said) == 1:  # a rollout of one turn has its text alone
        assert demonstration(make_rollout("1"), thinks) == ""
        rollout = make_rollout("1")
        rollout.text = said[0]
        assert demonstration(rollout, thinks) == shown


def test_the_next_success_is_shown_where_the_first_shows_nothing(models: Models, tmp_path: Path) -> None:
    sdpo = {"remove_thinking_from_demonstration": True, "reprompt_template": "{prompt}|{solution}|{feedback}"}
    method = build_method(config_of(models, "d.jsonl", tmp_path, "sdpo", sdpo=sdpo))
    method.teachers = [ScriptedTeacher("self", [])]
    samples = [make_rollout(str(i), group="g", reward=reward) for i, reward in enumerate([1.0, 1.0, 0.0])]
    samples[0].text, samples[1].text = "<think>so", "<think>so</think>yes"
    asyncio.run(method.annotate(batch := Batch(samples=samples)))
    assert "Correct solution:\n\nyes" in "".join(map(chr, samples[2].contexts[0].token_ids))
    assert [bool(s.contexts) for s in samples] == [True, False, True] and batch.metrics["sdpo/unshown"] == 1


def test_what_an_environment_says_at_the_end_is_feedback(models: Models, tmp_path: Path) -> None:
    """A whole run of episodes that all fail, by chance or by the limit: each is told what was said last."""
    config = config_of(
        models, "", tmp_path, "sdpo", environment={"name": HOUSE, "options": {"count": 4}, "max_turns": 2},
        sdpo={"include_environment_feedback": True, "use_successful_as_teacher": False}, max_steps=1,
        max_completion_length=4,
    )  # fmt: skip
    engine = make_engine(config)
    samples = make_samples(engine, list(load_tasks(config.environment, "train").prompts[:2]))
    assert samples and all(s.reward == 0 and s.info["feedback"] for s in samples)
    for sample in samples:
        read = engine.tokenizer.decode(sample.contexts[0].token_ids)
        assert "feedback from your unsuccessful earlier attempt" in read and str(sample.info["feedback"]) in read


def test_feedback_may_be_a_field_of_the_environments_task(models: Models, tmp_path: Path) -> None:
    sdpo = {"include_environment_feedback": True, "use_successful_as_teacher": False}
    method = build_method(config_of(models, "d.jsonl", tmp_path, "sdpo", sdpo=sdpo))
    method.teachers = [ScriptedTeacher("self", [])]
    sample = make_rollout("0", reward=0.0)
    sample.prompt = replace(sample.prompt, extra={"task": {"privileged_context": "look left"}})
    asyncio.run(method.annotate(Batch(samples=[sample])))
    assert "look left" in "".join(map(chr, sample.contexts[0].token_ids))


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_sdpo_over_the_whole_vocabulary(models: Models, shown_file: str, tmp_path: Path, weight: float) -> None:
    """float64: the divergence of every token of rollouts that are told anything, and the rewards' part of all."""
    config = config_of(
        models, shown_file, tmp_path, "sdpo", loss_normalization="sequence", divergence="forward_kl",
        advantage={"kl_mode": "full_vocab"}, sdpo={"distillation_weight": weight},
    )  # fmt: skip
    engine = make_engine(config)
    samples = graded(engine, load_prompts([shown_file]).prompts[:2], REWARDS)
    given = advantages([s.group for s in samples], REWARDS, "group")
    expected = 0.0
    for sample, advantage in zip(samples, given, strict=True):
        own = full_logprobs(models["student"], sample.token_ids, sample.target_positions, engine.vocab_size)
        if sample.contexts:
            (read,) = sample.contexts
            their = full_logprobs(models["student"], read.token_ids, read.target_positions, engine.vocab_size)
            expected += weight * float(divergence("forward_kl", own, their).mean())
        labels = torch.from_numpy(sample.target_ids)[:, None]
        expected -= (1 - weight) * advantage * float(own.gather(1, labels).mean())
    assert our_loss(engine, samples) == pytest.approx(expected / len(samples), rel=1e-4, abs=1e-6)


def test_privileged_teachers_debate(models: Models, shown_file: str, tmp_path: Path) -> None:
    """Two of the student's weights debate with the demonstration before them; the student never sees it."""
    teachers = [{**SELF[0], "name": "a"}, {"model": "self", "weights": "live", "name": "b"}]
    config = config_of(
        models, shown_file, tmp_path, "sdft", contexts="debate", teachers=teachers,
        debate={"rounds": 1, "max_tokens": 3, "prompts": PROMPTS},
    )  # fmt: skip
    method = build_method(config)
    spoken = [ScriptedTeacher(name, ["word <<CONFIDENCE=50>>"]) for name in "ab"]
    method.teachers = spoken
    prompt = load_prompts([shown_file]).prompts[3]
    turns = (Turn("prompt", np.array([1])), Turn("assistant", np.array([65]), trains=True))
    batch = Batch(samples=[Sample("0", prompt, turns)])
    asyncio.run(method.annotate(batch))
    assert "Q What is 3 + 3?\n\nIt is 6." in spoken[0].asked(0)
    read = "".join(map(chr, batch.samples[0].contexts[1].token_ids))
    assert "S What is 3 + 3?\n\nIt is 6. | B |" in read and "word" in read
    result = train(config, progress=False)
    assert result.metrics["debate/generated"] > 0 and result.metrics["loss"] > 0


def test_privileged_teachers_judge_an_agent_where_it_goes_wrong(models: Models, tmp_path: Path) -> None:
    """SAGE-OPD's turn weights, with the task's own field before the teacher."""
    config = make_config(
        models, "", tmp_path, method="sage_opd", environment={"name": HOUSE, "options": {"count": 4}},
        teachers=SELF, teacher_prompt_template="{prompt} ({goal})",
        sage={"use_failures": False, "use_confidence": False},
    )  # fmt: skip
    method = build_method(config)
    teacher = ScriptedTeacher("self", ["SKIP", "STRONG"])
    method.teachers = [teacher]
    sample = make_episode([2, 2])
    sample.prompt = Prompt("task", sample.prompt.messages, extra={"task": {"goal": "bring the pan"}})
    batch = Batch(samples=[sample])
    asyncio.run(method.annotate(batch))
    assert "<user>win the game (bring the pan)" in "".join(map(chr, sample.contexts[0].token_ids))
    assert sample.turn_weight is not None and len(sample.turn_weight) == 4


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{privileged_context}", "it leaves out {prompt}"),
        ("{prompt}", "it shows no column"),
        ("{prompt} {", "it is no format string"),
        ("{prompt} {0}", r"\['0'\] are no names of columns"),
        ("{prompt} {a.b}", r"\['a.b'\] are no names of columns"),
        ("{prompt} {answer:>9}", "placeholders are plain names such as {prompt}, without format or conversion"),
        ("{prompt} {answer!r}", "placeholders are plain names such as {prompt}, without format or conversion"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(template: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"teacher_prompt_template=.* is not possible; {words}"):
        Privileged(template)


FEEDBACK_ALONE = {"include_environment_feedback": True, "use_successful_as_teacher": False}
NOBODY = {"messages": [{"role": "system", "content": "Q"}], "privileged_context": "a"}


@pytest.mark.parametrize(
    ("method", "row", "words"),
    [
        ("sdft", {"prompt": "Q"}, "has nothing in the column 'privileged_context', which teacher_prompt_template"),
        ("sdft", {"prompt": "Q", "privileged_context": " "}, "has nothing in the column 'privileged_context'"),
        ("sdft", NOBODY, "has no message of the user, which teacher_prompt_template is to replace"),
        ("sdpo", {**NOBODY, "answer": "1"}, "has no message of the user, which sdpo.reprompt_template is to replace"),
    ],
)  # fmt: skip
def test_prompts_that_lack_what_is_shown_load_no_model(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, row: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("opdengine.training.run.build_engine", lambda *_: pytest.fail("a model was loaded"))
    file = tmp_path / "d.jsonl"
    good = {"id": "y", "prompt": "Q", "privileged_context": "a", "answer": "1"}
    file.write_text("\n".join(json.dumps(each) for each in (good, {"id": "x", **row})))
    with pytest.raises(ConfigError, match=rf"1 of 2 prompts: prompt 'x' \({file}, row 2\) {words}"):
        train(config_of(models, str(file), tmp_path / "run", method), progress=False)


def test_the_last_message_of_the_user_is_replaced_and_no_other() -> None:
    chat = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    tool = {"role": "tool", "content": "d"}
    told = Privileged("{prompt}-{answer}-{hint}")
    prompt = Prompt("1", (*chat, tool), answer={"x": 1}, extra={"hint": [1, 2]})
    assert told(prompt).messages == (*chat[:2], {"role": "user", "content": 'c-{"x": 1}-[1, 2]'}, tool)
    assert prompt.messages == (*chat, tool)  # what the student reads stays


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("sdft", {"teachers": [{"model": "other"}]}, "is taught by the student itself, but the teachers .*'other'"),
        ("sdft", {"teachers": []}, "needs at least 1 teacher"),
        ("opsd", {"teacher_prompt_template": None}, "needs teacher_prompt_template"),
        ("sdpo", {"teacher_prompt_template": SHOWN}, "reads sdpo.reprompt_template"),
        ("sdpo", {"num_generations": 1}, "num_generations=1 is not possible with method 'sdpo'"),
        ("sdpo", {"sdpo": {"use_successful_as_teacher": False}}, "the teacher would be shown nothing"),
        ("sdpo", {"sdpo": {"reprompt_template": "{prompt}{solution}"}}, "sdpo.reprompt_template=.* placeholders"),
        ("sdpo", {"sdpo": {"solution_template": "{x}"}}, "sdpo.solution_template=.* placeholders"),
        ("sdpo", {"sdpo": {"feedback_template": "{"}}, "sdpo.feedback_template=.* is no format string"),
        ("sdpo", {"sdpo": {"distillation_weight": 1.5}}, "sdpo.distillation_weight=1.5 is not possible"),
        ("sdpo", {"sdpo": {"success_reward_threshold": 0}}, "sdpo.success_reward_threshold=0.0 is not possible"),
        ("sdpo", {"sdpo": {"feedback_template": "{feedback_raw}"}}, "no effect with include_environment_feedback: f"),
        ("sdpo", {"sdpo": {"environment_feedback_only_without_solution": True}}, "include_environment_feedback: false"),
        *(("sdpo", {"sdpo": {**FEEDBACK_ALONE, **part}}, "no effect with use_successful_as_teacher: false")
          for part in ({"solution_template": "{successful_previous_attempt}"}, {"dont_reprompt_on_self_success": False},
                       {"remove_thinking_from_demonstration": True},
                       {"environment_feedback_only_without_solution": True})),
        ("sdpo", {"grpo": {"scale_rewards": "none"}}, "='none' has no effect with sdpo.distillation_weight"),
        ("sdft", {"grpo": {"epsilon_high": 0.3}}, "grpo.epsilon_high=0.3 has no effect with grpo.weight=0"),
        ("sdpo", {"contexts": "debate"}, "contexts='debate' is not possible"),
        ("sdpo", {"grpo": {"scale_rewards": "all"}}, "grpo.scale_rewards='all' is not possible"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(
    models: Models, tmp_path: Path, method: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        build_method(config_of(models, "d.jsonl", tmp_path, method, **changes))


# ------------------------------------------------------------------------------------------------ closed forms


def test_group_relative_advantages() -> None:
    rewards, groups = [1.0, 0.0, 0.0, 1.0, 1.0], ["a", "a", "a", "b", "b"]
    deviation = float(np.std([1, 0, 0], ddof=1))
    np.testing.assert_allclose(
        advantages(groups, rewards, "group"),
        [2 / 3 / (deviation + 1e-4), *[-1 / 3 / (deviation + 1e-4)] * 2, 0, 0], rtol=1e-12,
    )  # fmt: skip
    np.testing.assert_allclose(advantages(groups, rewards, "none"), np.array([2, -1, -1, 0, 0]) / 3 / (1 + 1e-4))
    of_all = float(np.std(rewards, ddof=1)) + 1e-4
    np.testing.assert_allclose(advantages(groups, rewards, "batch"), np.array([2, -1, -1, 0, 0]) / 3 / of_all)
    assert advantages([], [], "group").shape == (0,)


@pytest.mark.parametrize(("high", "expected"), [(None, [1.0, 1.15, 0.0]), (0.4, [1.0, 1.15, 1.3])])
def test_rewards_are_clipped_as_in_ppo(high: float | None, expected: list[float]) -> None:
    """A ratio that has moved beyond 1 +- epsilon in the direction of the advantage carries no loss."""
    ratios = np.log([1.0, 1.15, 1.3])
    samples = [make_rollout(str(i), [1, 2, 3], group="g", reward=float(i == 0)) for i in range(2)]
    batch = make_batch(samples, [[0.0] * 3] * 2)
    for sample in samples:
        sample.policy_logratio, sample.advantage = ratios.astype(np.float32), np.full(3, 0.5, dtype=np.float32)
    add_advantages(batch, Ranks(), GrpoConfig(scale_rewards="none", epsilon_high=high), 2.0)
    unit = 2.0 * 0.5 / (1 + 1e-4)
    np.testing.assert_allclose(samples[0].advantage, 0.5 + unit * np.array(expected), rtol=1e-5)
    np.testing.assert_allclose(samples[1].advantage, 0.5 - unit * np.exp(ratios), rtol=1e-5)
    batch = make_batch(samples, [[0.0] * 3] * 2)
    for sample in samples:
        sample.policy_logratio, sample.advantage = np.full(3, np.log(0.75), dtype=np.float32), None
    add_advantages(batch, Ranks(), GrpoConfig(scale_rewards="none", epsilon=0.2), 1.0)
    np.testing.assert_allclose(samples[0].advantage, 0.5 * 0.75 / (1 + 1e-4), rtol=1e-5)
    np.testing.assert_allclose(samples[1].advantage, 0.0)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_the_first_tokens_are_left_out_of_the_mean(models: Models, tmp_path: Path, normalization: str) -> None:
    config = config_of(
        models, "d.jsonl", tmp_path, "sdft", sdft={"num_loss_tokens_to_skip": 2}, loss_normalization=normalization
    )
    method, samples = build_method(config), [make_rollout("a", [1] * 5), make_rollout("b", [1] * 3)]
    method.weigh(Batch(samples=samples))
    factors = [8 / 4] * 2 if normalization == "token" else [5 / 3, 3 / 1]
    for sample, factor in zip(samples, factors, strict=True):
        expected = np.where(np.arange(len(sample.target_ids)) < 2, 0, factor)
        np.testing.assert_allclose(sample.kl_weight, expected, rtol=1e-6)
