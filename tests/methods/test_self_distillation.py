"""SDFT, SDPO and OPSD: what the student's teacher reads, closed forms, and the losses of TRL on the same tokens."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from agent_helpers import make_rollout as make_episode
from engine_helpers import PROMPTS, ScriptedTeacher, make_config, make_engine, make_samples
from method_helpers import make_batch, make_rollout
from transformers import AutoModelForCausalLM

from opdengine.config.method_sections import GrpoConfig
from opdengine.config.train import ConfigError
from opdengine.data.prompts import load_prompts
from opdengine.distributed import Ranks
from opdengine.methods import build_method
from opdengine.methods.group_relative import add_advantages, advantages
from opdengine.methods.privileged import Privileged
from opdengine.methods.sdft import TEMPLATE
from opdengine.training.run import train
from opdengine.types import Batch, Prompt, Sample, Turn
from tiny.agents.house import HOUSE

trl = pytest.importorskip("trl.experimental.sdft.sdft_trainer")
trl_sdpo = pytest.importorskip("trl.experimental.sdpo.sdpo_trainer")

Models = dict[str, str]
SELF = [{"model": "self", "weights": "base"}]
SHOWN = "{prompt}\n\n{privileged_context}"


@pytest.fixture(scope="module")
def shown_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompts with an answer and a demonstration."""
    path = tmp_path_factory.mktemp("shown") / "shown.jsonl"
    rows = [
        {"id": f"p{i}", "prompt": f"What is {i} + {i}?", "answer": str(2 * i), "privileged_context": f"It is {2 * i}."}
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(models: Models, file: str, folder: Path, method: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {"method": method, "teachers": SELF}
    if method != "sdpo":
        settings["teacher_prompt_template"] = SHOWN
    else:
        settings |= {"num_generations": 4, "verifier": "numeric"}
    return make_config(models, file, folder, **{**settings, **changes})


def logits(path: str, ids: np.ndarray, start: int) -> torch.Tensor:
    """float64 [1, T, V]: the logits that predict ``ids[start:]``."""
    model = AutoModelForCausalLM.from_pretrained(path).double().eval()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)[None]).logits[:, start - 1 : -1]


def trainer(**arguments: Any) -> Any:
    """As much of TRL's trainer as its losses look at."""
    args = SimpleNamespace(distillation_is_clip=None, distillation_topk=None, distillation_add_tail=False, **arguments)
    return SimpleNamespace(
        args=args, accelerator=SimpleNamespace(gather=lambda x: x), _metrics={"eval": {}},
        _log_self_distillation_metric=lambda *_: None,
    )  # fmt: skip


def trl_loss(samples: list[Sample], student: str, teacher: str, skip: int = 0, **arguments: Any) -> float:
    """The mean over rollouts of TRL's own loss of each; one without a context counts as 0."""
    losses = []
    for sample in samples:
        first = int(sample.target_positions[0])
        if not sample.contexts:
            losses.append(0.0)
            continue
        context = sample.contexts[0]
        mask = torch.ones(1, len(sample.target_ids))
        mask[:, :skip] = 0
        given = trl.DistillationLogits(
            torch.from_numpy(sample.target_ids)[None], mask, logits(student, sample.token_ids, first),
            logits(teacher, context.token_ids, int(context.target_positions[0])),
        )  # fmt: skip
        model = SimpleNamespace(training=False)
        loss = trl.SDFTTrainer._compute_self_distillation_loss(trainer(**arguments), model, {}, given)
        losses.append(float(loss))
    return float(np.mean(losses))


def our_loss(engine: Any, samples: list[Sample]) -> float:
    engine._optimizer_step = lambda loss, norm: {"loss": loss}
    return float(engine.update(Batch(samples=samples)).metrics["loss"])


# ------------------------------------------------------------------------------------------------ against TRL


@pytest.mark.parametrize(
    ("alpha", "divergence"),
    [(0.0, {"divergence": "forward_kl"}), (1.0, {"divergence": "reverse_kl"}),
     (0.3, {"divergence": "jsd", "jsd_beta": 0.3})],
)  # fmt: skip
@pytest.mark.parametrize(("method", "skip"), [("sdft", 0), ("sdft", 2), ("opsd", 0)])
def test_the_loss_is_trls(
    models: Models, shown_file: str, tmp_path: Path, alpha: float, divergence: dict[str, Any], method: str, skip: int
) -> None:
    sdft = {"num_loss_tokens_to_skip": skip}
    config = config_of(
        models, shown_file, tmp_path, method, loss_normalization="sequence", sdft=sdft, **divergence
    )  # fmt: skip
    engine = make_engine(config)
    samples = make_samples(engine, load_prompts([shown_file]).prompts[:4])
    theirs = trl_loss(
        samples, models["student"], models["student"], skip, distillation_mode="full_logits", distillation_alpha=alpha
    )
    assert theirs > 1e-3
    assert our_loss(engine, samples) == pytest.approx(theirs, rel=1e-5)


def test_the_prompt_of_the_teacher_is_trls(shown_file: str) -> None:
    prompts = load_prompts([shown_file]).prompts
    args = SimpleNamespace(args=SimpleNamespace(teacher_prompt_template=TEMPLATE))
    builder = trl.DemonstrationTeacherContextBuilder(args)
    context: Any
    for context in ("a way", [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], 7):
        prompt = Prompt(
            "1", ({"role": "system", "content": "s"}, *prompts[0].messages), extra={"privileged_context": context}
        )
        theirs = builder._compose_teacher_prompt(list(prompt.messages), context)
        assert [dict(m) for m in Privileged(TEMPLATE)(prompt).messages] == theirs


def graded(engine: Any, prompts: Any, rewards: list[float]) -> list[Sample]:
    """Samples of a step whose rollouts got these rewards."""

    async def run() -> list[Sample]:
        batch = Batch(0)
        batch = await engine.rollout(prompts, 0)
        for sample, reward in zip(batch, rewards, strict=True):
            sample.reward = reward
        engine.method.split(batch)
        await engine.annotate(batch)
        await engine.score(batch)
        engine.measure(batch)
        engine.weigh(batch)
        return list(batch)

    return asyncio.run(run())


REWARDS = [1.0, 0.0, 0.4, 0.0, 0.0, 0.0, 0.2, 0.0]
"""Of the second prompt none succeeds: three of the first and none of the second are told anything."""


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_sdpos_loss_is_trls(models: Models, shown_file: str, tmp_path: Path, weight: float) -> None:
    config = config_of(
        models, shown_file, tmp_path, "sdpo", loss_normalization="sequence", sdpo={"distillation_weight": weight}
    )
    engine = make_engine(config)
    samples = graded(engine, load_prompts([shown_file]).prompts[:2], REWARDS)
    assert [bool(s.contexts) for s in samples] == [False, True, True, True, False, False, False, False]
    distilled = trl_loss(
        samples, models["student"], models["student"], distillation_mode="sampled_token", distillation_alpha=1.0
    )
    rewards = torch.tensor(REWARDS)
    mean = rewards.view(-1, 4).mean(1).repeat_interleave(4)
    std = rewards.view(-1, 4).std(1).repeat_interleave(4)
    given = (rewards - mean) / (std + 1e-4)
    policy = []
    for sample, advantage in zip(samples, given, strict=True):
        first = int(sample.target_positions[0])
        inputs = {
            "completion_ids": torch.from_numpy(sample.target_ids)[None], "advantages": advantage[None],
            "completion_mask": torch.ones(1, len(sample.target_ids)),
        }  # fmt: skip
        mock = trainer()
        mock._metrics = {"eval": {"self_distillation/policy_loss": []}}
        mock.model = SimpleNamespace(training=False)
        mock.importance_sampling_level, mock.epsilon_low, mock.epsilon_high, mock.loss_type = "token", 0.2, 0.2, "grpo"
        own = logits(models["student"], sample.token_ids, first).requires_grad_()
        loss = trl_sdpo.SDPOTrainer._compute_policy_loss(mock, inputs, own)
        (gradient,) = torch.autograd.grad(loss, own)
        # The surrogate's value is -A whatever the policy; its gradient is what counts: that of -A log p(y).
        log_p = own.log_softmax(-1).gather(2, inputs["completion_ids"][..., None])
        (expected,) = torch.autograd.grad(-(advantage * log_p).mean(), own)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
        policy.append(-(float(advantage) * float(log_p.detach().mean())))
    expected_loss = weight * distilled + (1 - weight) * float(np.mean(policy))
    assert our_loss(engine, samples) == pytest.approx(expected_loss, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("clip", [1.2, 1.02])
def test_the_divergence_of_older_rollouts_is_weighed_as_in_trl(
    models: Models, shown_file: str, tmp_path: Path, clip: float
) -> None:
    """Ratios below and above the clip; the student has moved since it sampled."""
    config = config_of(models, shown_file, tmp_path, "sdft", loss_normalization="sequence", distillation_is_clip=clip)
    engine = make_engine(config)
    samples = make_samples(engine, load_prompts([shown_file]).prompts[:4])
    assert all((s.policy_logratio == 0).all() and (s.kl_weight == 1).all() for s in samples)
    for parameter in engine.student.model.parameters():
        parameter.data *= 1.15
    engine.version = 1
    engine.student.model.save_pretrained(tmp_path / "moved")
    batch = Batch(samples=samples)
    engine.measure(batch)
    engine.weigh(batch)
    losses, seen = [], []
    for sample in samples:
        context, first = sample.contexts[0], int(sample.target_positions[0])
        own = logits(str(tmp_path / "moved"), sample.token_ids, first)
        given = trl.DistillationLogits(
            torch.from_numpy(sample.target_ids)[None], torch.ones(1, len(sample.target_ids)), own,
            logits(models["student"], context.token_ids, int(context.target_positions[0])),
        )  # fmt: skip
        mock = trainer(distillation_mode="full_logits", distillation_alpha=1.0)
        mock.args.distillation_is_clip = clip
        old = {"old_per_token_logps": torch.from_numpy(sample.sampler_logprob)[None].double()}
        model = SimpleNamespace(training=False)
        losses.append(float(trl.SDFTTrainer._compute_self_distillation_loss(mock, model, old, given)))
        now = own.log_softmax(-1).gather(2, given.completion_ids[..., None])[..., 0]
        seen.append((now - old["old_per_token_logps"]).exp())
    assert min(s.min() for s in seen) < clip < max(s.max() for s in seen)
    assert our_loss(engine, samples) == pytest.approx(float(np.mean(losses)), rel=1e-3)


# ------------------------------------------------------------------------------------------------ contexts


def test_sdpo_shows_what_succeeded_and_what_was_said(models: Models, tmp_path: Path) -> None:
    def read(said: Any = None, **sdpo: Any) -> list[str]:
        templates = {
            "reprompt_template": "{prompt}|{solution}|{feedback}",
            "solution_template": "S {successful_previous_attempt}",
            "feedback_template": "F {feedback_raw}",
        }
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


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt("x", ({"role": "user", "content": "Q"},)), "'x' has nothing in the column 'privileged_context'"),
        (Prompt("x", ({"role": "user", "content": "Q"},), extra={"privileged_context": " "}), "prompt 'x' has nothing"),
        (Prompt("x", ({"role": "system", "content": "Q"},), extra={"privileged_context": "a"}), "no message of"),
    ],
)  # fmt: skip
def test_prompts_that_lack_what_is_shown_are_refused(prompt: Prompt, words: str) -> None:
    good = Prompt("y", ({"role": "user", "content": "Q"},), extra={"privileged_context": "a"})
    with pytest.raises(ConfigError, match=f"1 of 2 prompts: .*{words}"):
        Privileged(SHOWN).require([good, prompt])


def test_a_run_whose_data_lack_the_column_loads_no_model(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opdengine.training.run.build_engine", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(
        ConfigError, match="12 of 12 prompts: prompt 'p0' has nothing in the column 'privileged_context'"
    ):
        train(config_of(models, prompt_file, tmp_path, "sdft"), progress=False)


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
