"""The agents' demos: words, lessons, shipped models, the gate, and one small run of each."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from opdengine.config.loading import load_config  # noqa: E402
from opdengine.config.train import SageConfig  # noqa: E402
from opdengine.environments.episodes import Episodes, Job, turns_of  # noqa: E402
from opdengine.environments.recorded import Recorded  # noqa: E402
from opdengine.methods import METHODS, build_method  # noqa: E402
from opdengine.methods.sage_judge import Judge  # noqa: E402
from opdengine.rollout.transformers import TransformersSampler  # noqa: E402
from opdengine.types import Prompt, SamplingParams  # noqa: E402
from real.house import lessons as real  # noqa: E402
from real.house import study  # noqa: E402
from tiny.agents import lessons, measure, opad, results, sage, world  # noqa: E402
from tiny.agents.arms import MODELS, parser, shared_settings  # noqa: E402
from tiny.agents.house import House  # noqa: E402
from tiny.agents.tokenizer import build_tokenizer  # noqa: E402
from tiny.lessons import IGNORE  # noqa: E402
from tiny.training import new_model  # noqa: E402

FOLDERS = ("teacher", "expert_bring", "expert_open", "student")
TASK = {
    "id": "t",
    "type": "open",
    "goal": "get the coin from the safe.",
    "item": "coin",
    "target": "",
    "start": "hall",
    "exits": {"hall": ["den", "loft"], "den": ["hall"], "loft": ["hall"]},
    "containers": {"box": ["hall", ""], "jar": ["hall", "key"], "tin": ["den", ""], "safe": ["loft", "coin"]},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def report():
    return json.loads((MODELS / "report.json").read_text())


@pytest.fixture(scope="module")
def models():
    return {name: AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval() for name in FOLDERS}


def at(*actions: str) -> House:
    """The house after some actions."""
    house = House(**world.OPTIONS)
    house.reset(seed=0, task=TASK)
    for action in actions:
        assert not house.step(world.message(action)).info["failure"], action
    return house


def test_everything_that_is_said_in_the_house_has_tokens_of_its_own(tokenizer):
    rng = random.Random(0)
    for task in House.tasks("valid_unseen", **world.OPTIONS, count=60):
        for moment in lessons.play(task, rng, 0.4, judged=0.5):
            texts = [m["content"] for m in moment.chat] + [moment.action]
            texts += [lessons.question(moment, True, True)] if moment.verdict else []
            for text in texts:
                ids = tokenizer.encode(text, add_special_tokens=False)
                assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
            assert len(tokenizer.encode(moment.action, add_special_tokens=False)) == 2


@pytest.mark.parametrize(
    ("before", "action", "verdict"),
    [
        ([], "open box", "SKIP"),  # the expert's
        ([], "open jar", "SKIP"),  # another container here
        ([], "go den", "WEAK"),  # new, but there and back are two turns
        ([], "open tin", "STRONG"),  # in another room
        (["open box", "open jar"], "take key", "SKIP"),
        (["open box", "open jar", "take key"], "go loft", "SKIP"),  # one of two new rooms
        (["open box", "open jar", "take key", "go den"], "open tin", "WEAK"),  # the key is found already
        (["open box", "open jar", "take key", "go den"], "put key", "WEAK"),
        (["open box", "open jar", "take key", "go den", "go hall"], "go den", "STRONG"),  # back for nothing
    ],
)
def test_verdicts(before, action, verdict):
    house = at(*before)
    shown = house.admissible()
    assert world.verdict(house, action) == verdict
    assert house.admissible() == shown  # judging plays on a copy


def test_remaining_turns_are_the_experts():
    house = at()
    turns = world.remaining(house)
    for _ in range(turns):
        assert not house._success
        house.step(house.expert())
    assert house._success


def test_episode_lessons_hold_the_experts_labels_where_the_agent_went_wrong(tokenizer):
    moments = lessons.play(TASK, random.Random(3), 0.5)
    assert any(m.action != m.right for m in moments)
    (lesson,) = [lessons.Pupil(tokenizer, [TASK], random.Random(0))._episode(moments)]
    assert len(lesson.inputs) == len(lesson.labels)
    asked = [i for i, token in enumerate(lesson.inputs) if token == tokenizer.convert_tokens_to_ids("<|assistant|>")]
    assert len(asked) == len(moments)
    for place, moment in zip(asked, moments, strict=True):
        verb, noun = moment.right.split(" ")
        assert tokenizer.decode(lesson.labels[place]) == verb
        assert tokenizer.decode(lesson.inputs[place + 1 : place + 3]) == moment.action
        assert lesson.labels[place + 2] == tokenizer.eos_token_id
        said = lesson.labels[place + 1]
        if moment.action.split(" ")[0] == verb:
            assert tokenizer.decode(said) == f" {noun}"
        elif said != IGNORE:
            assert f"{moment.action.split(' ')[0]}{tokenizer.decode(said)}" in moment.possible


def test_a_real_model_is_taught_right_actions_as_the_tiny_ones_are(tokenizer):
    taught = {kind: kind(tokenizer, [TASK], random.Random(0)) for kind in (lessons.Pupil, real.RealPupil)}
    moments = lessons.play(TASK, random.Random(3), 0.0)
    plain, same = (pupil._episode(moments) for pupil in taught.values())
    assert (plain.inputs, plain.labels) == (same.inputs, same.labels)
    moments = lessons.play(TASK, random.Random(3), 0.5)
    lesson = taught[real.RealPupil]._episode(moments)
    assert lesson.inputs == taught[lessons.Pupil]._episode(moments).inputs
    asked = [i for i, token in enumerate(lesson.inputs) if token == tokenizer.convert_tokens_to_ids("<|assistant|>")]
    for place, moment in zip(asked, moments, strict=True):
        verb, noun, end = tokenizer.encode(moment.right + "<|end|>", add_special_tokens=False)
        said = lesson.inputs[place + 1 : place + 3]
        wanted = [verb, noun, end] if said == [verb, noun] else [verb, noun if said[0] == verb else IGNORE, IGNORE]
        assert lesson.labels[place : place + 3] == wanted
    assert sum(label != IGNORE for label in lesson.labels) == sum(
        3 if m.action == m.right else 1 + (m.action.split()[0] == m.right.split()[0]) for m in moments
    )


@pytest.mark.parametrize("name", ["sage", "opad"])
def test_every_arm_of_a_real_model_can_be_run(name, tmp_path):
    options = parser("", steps=2, learning_rate=1e-3, batch_size=2, test_games=2).parse_args([])
    options.more, options.dtype, options.longest = study.SHARED, "bfloat16", real.MAX_TOKENS
    options.student = str(MODELS / "student")
    for arm in study.STUDIES[name](MODELS):
        config = {**shared_settings(options, 0), **arm.settings, "output_dir": str(tmp_path / arm.name)}
        file = tmp_path / f"{arm.name}.yaml"
        file.write_text(yaml.safe_dump(config))
        method = build_method(load_config(file))
        assert method.config.max_completion_length == 6 and method.config.lora.r == 8
        assert {Path(teacher.model).name for teacher in method.config.teachers} <= set(study.AGENTS[name])


def test_lessons_about_foreign_tasks_do_not_tell_what_is_right(tokenizer):
    games = [t for t in House.tasks("train", **world.OPTIONS, count=300) if t["type"] == "open"]
    pupil = lessons.Pupil(tokenizer, games, random.Random(0), expert=0, foreign="open")
    taught = [(m, game) for game in games[:60] for m in lessons.play(game, pupil.rng, 0.3, aimless=True)]
    chance = np.mean([1 / len(m.possible) for m, _ in taught])
    hits = []
    for moment, game in taught:
        house = House(**world.OPTIONS)
        house.reset(seed=0, task=game)
        for message in moment.chat:
            if message["role"] == "assistant":
                house.step(message)
        hits.append(moment.right == world.advice(house))
    assert abs(np.mean(hits) - chance) < 4 * (0.25 / len(hits)) ** 0.5


@pytest.mark.parametrize("prompt", [world.JUDGE_PROMPT, real.JUDGE_PROMPT])
@pytest.mark.parametrize(("history", "later"), [(False, False), (True, False), (False, True)])
def test_the_judge_is_taught_the_very_question_that_sage_asks(tokenizer, models, history, later, prompt):
    episodes = Episodes(measure.Houses(2), tokenizer, {}, 6, 512)
    task = House.tasks("train", **world.OPTIONS, count=3)[2]
    job = Job("r", Prompt(task["id"], (), key=task["type"], extra={"task": task}), seed=1)
    params = SamplingParams(max_tokens=world.MAX_TOKENS, temperature=1.0)
    ((rollout,), _) = episodes.play(TransformersSampler(models["student"], tokenizer), [job], params)
    judge = Judge(SageConfig(judge_prompt=prompt, judge_history=history, judge_next_observation=later))
    house = House(**world.OPTIONS)
    info = house.reset(seed=0, task=task).info
    turns = list(turns_of(rollout))
    assert len(turns) >= 2
    for index, turn, chat in turns:
        said = turn.messages[0]["content"]
        moment = lessons.Moment(
            list(chat),
            said,
            "",
            [],
            query={
                "task_goal": task["goal"],
                "last_obs": info["observation"],
                "admissible": ", ".join(info["admissible"]) or "not listed",
                "llm_text": said,
            },
        )
        info = house.step(turn.messages[0]).info
        moment.next_obs = info["observation"]
        (asked,) = judge.messages((rollout, index, turn, chat))
        assert asked == {"role": "user", "content": lessons.question(moment, history, later, prompt)}


@pytest.mark.parametrize("name", FOLDERS)
def test_shipped_models_win_as_often_as_reported(name, models, tokenizer, report):
    count = 60
    expected = report["valid_unseen"][name]["greedy"]["all"]
    games = House.tasks("valid_unseen", **world.OPTIONS, count=2 * count)[count:]
    found = measure.success(models[name], tokenizer, games)["all"]
    spread = (max(expected * (1 - expected), 0.01) * (1 / count + 1 / report["games_per_split"])) ** 0.5
    assert abs(found - expected) <= 4 * spread


def test_shipped_student_sometimes_succeeds_and_the_teacher_mostly(report):
    for split in results.SPLITS:
        assert 0.1 <= report[split]["student"]["sampled"]["all"] <= 0.5
        assert report[split]["teacher"]["greedy"]["all"] >= 0.75


def test_shipped_experts_know_what_they_are_named_after(report):
    for split in results.SPLITS:
        for name, own, foreign in (("expert_bring", "bring", "open"), ("expert_open", "open", "bring")):
            assert report[split][name]["greedy"][own] >= report[split][name]["greedy"][foreign] + 0.4


def test_shipped_judge_is_better_than_its_commonest_word(models, tokenizer, report):
    confusion = report["valid_unseen"]["judge"]["confusion"]
    asked = {right: sum(said.values()) for right, said in confusion.items()}
    assert report["valid_unseen"]["judge"]["plain"] >= max(asked.values()) / sum(asked.values()) + 0.05
    games = House.tasks("valid_unseen", **world.OPTIONS, count=40)
    assert abs(measure.judge(models["teacher"], tokenizer, games, 150, seed=9)["plain"] -
               report["valid_unseen"]["judge"]["plain"]) < 0.15  # fmt: skip


def test_shipped_files(tokenizer):
    for name in FOLDERS:
        shipped = AutoTokenizer.from_pretrained(MODELS / name)
        assert shipped.get_vocab() == tokenizer.get_vocab() and shipped.chat_template == tokenizer.chat_template
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= 1_700_000


def test_intervals():
    mean, low, high = results.interval([0.4, 0.5, 0.6], games=100)
    assert mean == pytest.approx(0.5) and high - mean == pytest.approx(4.30 * 0.1 / 3**0.5)
    assert low == pytest.approx(2 * mean - high)
    assert results.interval([0.5], games=100)[1:] == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_every_arm_is_a_method_with_settings_of_its_own(tmp_path):
    options = parser("", steps=2, learning_rate=1e-3, batch_size=4, test_games=5).parse_args([])
    opad.write_records(tmp_path / "records.jsonl", 5)
    for arms in (sage.arms(), opad.arms(4, tmp_path / "records.jsonl")):
        seen = []
        for arm in arms:
            file = tmp_path / "arm.yaml"
            file.write_text(json.dumps({**shared_settings(options, 0), **arm.settings, "output_dir": str(tmp_path)}))
            build_method(load_config(str(file)))
            seen.append(json.dumps(arm.settings, sort_keys=True, default=str))
        assert len(set(seen)) == len(arms)


def test_expert_episodes_become_records_that_end_in_success(tmp_path):
    file = tmp_path / "records.jsonl"
    opad.write_records(file, 6)
    games = {task["id"]: task for task in House.tasks("train", **world.OPTIONS, count=6)}
    tasks = Recorded.tasks("train", mode="replay", files={"train": str(file)})
    assert {task["id"] for task in tasks} == set(games)
    for task in tasks:
        house = House(**world.OPTIONS)
        assert list(house.reset(seed=0, task=games[task["id"]]).messages) == task["start"]
        steps = [house.step(message) for message in task["rest"] if message["role"] == "assistant"]
        assert steps[-1].info["success"] and not any(step.done for step in steps[:-1])
        assert [m for s in steps[:-1] for m in s.messages] == [m for m in task["rest"] if m["role"] == "user"]


def test_a_student_that_never_succeeds_stops_the_demo(tokenizer, tmp_path, capsys):
    new_model(tokenizer, 16, 1, 0).save_pretrained(tmp_path / "nobody")
    tokenizer.save_pretrained(tmp_path / "nobody")
    arguments = ["--student", str(tmp_path / "nobody"), "--test_games", "10", "--output_dir", str(tmp_path / "runs")]
    assert sage.demo(arguments) == 1
    said = capsys.readouterr().out
    assert "wins 0 %" in said and "--student_steps" in said and "--force" in said
    assert not (tmp_path / "runs").exists()


def test_unknown_arms_are_named(capsys):
    assert sage.demo(["--arms", "sage", "sagee"]) == 2
    assert "sagee" in capsys.readouterr().out


@pytest.mark.parametrize(("demo", "arm"), [(sage.demo, "sage"), (opad.demo, "opad_sampled")])
def test_a_small_run_writes_numbers_table_and_figure(demo, arm, tmp_path, capsys):
    small = ["--steps", "2", "--batch_size", "3", "--train_games", "20", "--test_games", "6", "--jobs", "1"]
    places = ["--output_dir", str(tmp_path / "runs"), "--save_results", str(tmp_path / "kept.json")]
    assert demo([*small, *places, "--arms", arm, "--force", "--figure", str(tmp_path / "kept.png")]) == 0
    kept = json.loads((tmp_path / "kept.json").read_text())
    (run,) = kept["runs"]
    assert run["arm"] == arm and len(run["curve"]["episodes/success"]) == 2
    assert {f"{split}/success" for split in results.SPLITS} <= set(run["after"])
    if arm == "sage":
        assert sum(run["mean"][f"sage/{k}"] for k in ("skip", "weak", "strong", "det_fail")) == pytest.approx(
            1, abs=0.01
        )
    assert (tmp_path / "kept.png").stat().st_size > 5000
    assert "student before" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_configurations_of_real_models_load(file):
    config = load_config(str(file))
    assert type(build_method(config)) is METHODS[config.method]
    if config.method == "sage_opd":  # appendix A of the paper
        assert (config.learning_rate, config.weight_decay, config.temperature) == (1e-6, 0.1, 0.4)
        assert (config.prompts_per_step, config.num_generations, config.sage.alpha) == (64, 1, 0.5)
        assert config.environment.max_turns == (16 if config.environment.name == "search" else 30)
        assert config.max_completion_length == 4096 and config.sage.judge_max_tokens == 1028
    if config.method == "opad":
        assert (config.divergence, config.jsd_beta) == ("jsd", 0.5)
