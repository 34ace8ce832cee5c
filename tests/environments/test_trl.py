"""Our environments in TRL's own trainer, and environments written for TRL in ours."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from opdengine.environments import Environment, InfrastructureError
from opdengine.environments.pool import EnvironmentPool
from opdengine.environments.trl import TRLEnvironment, dataset_rows, environment_factory
from tiny.agents.house import HOUSE, House

HERE = Path(__file__).parent
GAME = f"{HERE / 'counter_game.py'}:CounterGame"
TROUBLED = f"{HERE / 'troubled.py'}:Troubled"
OPTIONS = {"format": "tools", "count": 4, "instructions": False, "types": ["find"]}


def say(content, *calls):
    functions = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return {"role": "assistant", "content": content} | ({"tool_calls": functions} if functions else {})


@pytest.fixture(scope="module")
def house():
    return environment_factory(HOUSE, OPTIONS)


def twin(row):
    """The same episode, played here."""
    world = House(**OPTIONS)
    return world, world.reset(seed=row["seed"], task=json.loads(row["task"]))


def test_tools_say_what_the_schemas_say(house):
    from transformers.utils import get_json_schema

    world = house()
    tools = [n for n, _ in inspect.getmembers(type(world), inspect.isfunction) if not n.startswith("_")]
    assert set(tools) == {"reset", "get_reward", "go", "open", "take", "put", "unlock"}
    _, start = twin(dataset_rows(HOUSE, "train", OPTIONS)[0])
    for tool in start.tools:
        schema = get_json_schema(getattr(world, tool["function"]["name"]))
        assert schema["function"].pop("return") == {"type": "string", "description": "What happens."}
        for about in schema["function"]["parameters"]["properties"].values():
            assert about.pop("description")
        assert schema == tool
    assert type(world).__name__ == "House"


def test_the_expert_wins_through_the_methods(house):
    world = house()
    assert world.get_reward() == 0.0
    for row in dataset_rows(HOUSE, "train", OPTIONS):
        here, start = twin(row)
        assert world.reset(**row, extra="ignored") == start.messages[0]["content"]
        step = None
        while step is None or not step.done:
            assert world.get_reward() == 0.0
            function = here.expert()["tool_calls"][0]["function"]
            step = here.step(here.expert())
            assert getattr(world, function["name"])(**function["arguments"]) == step.messages[0]["content"]
        assert world.get_reward() == 1.0
        with pytest.raises(ValueError, match="over"):
            world.go(room="hall")


def test_environments_of_text_get_one_tool():
    options = {**OPTIONS, "format": "action"}
    world = environment_factory(HOUSE, options)()
    row = dataset_rows(HOUSE, "train", options)[1]
    here = House(**options)
    here.reset(seed=0, task=json.loads(row["task"]))
    world.reset(**row)
    while not world.get_reward():
        action = here.expert()["content"]
        assert world.act(action=action) == here.step(here.expert()).messages[0]["content"]


def test_a_broken_environment_is_no_reward():
    world = environment_factory(TROUBLED)()
    task = json.dumps({"id": "0", "type": "any"})
    assert world.reset(task=task) == "hello"
    with pytest.raises(RuntimeError, match="crash"):
        world.act(action="killed")
    assert world.get_reward() is None
    with pytest.raises(ValueError, match="over"):
        world.act(action="hello")
    assert "error" in world.reset(task={"id": "0", "reset": "raise"}) and world.get_reward() is None
    assert world.reset(task=task) == "hello" and world.act(action="echo") == "echo"
    assert world.act(action="end") == "The episode is over." and world.get_reward() == 1.0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"properties": {"x": {"type": "date"}}}, "KeyError: 'date'"),
        ({"properties": {"not a name": {"type": "string"}}}, "not a valid"),
        ({"properties": {"x": {}}}, "KeyError: 'type'"),
    ],
)
def test_tools_that_are_no_methods_are_refused(parameters, message):
    from opdengine.environments.trl import _method

    with pytest.raises(ValueError, match=rf"tool 'f' cannot be made .*{message}"):
        _method({"name": "f", "parameters": parameters}, native=True)


def test_rich_schemas_come_back_from_the_methods():
    from transformers.utils import get_json_schema

    from opdengine.environments.trl import _method

    properties = {
        "n": {"type": "integer", "description": "Number."},
        "share": {"type": "number", "description": "Share."},
        "sure": {"type": "boolean", "description": "Sure?"},
        "names": {"type": "array", "items": {"type": "string"}, "description": "Names."},
        "more": {"type": "object", "description": "More."},
        "unit": {"type": "string", "enum": ["m", "km"], "description": "Unit."},
    }
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    schema = {"name": "f", "description": "Do it.", "parameters": parameters}
    assert get_json_schema(_method(schema, native=True))["function"]["parameters"] == parameters
    optional = {**schema, "parameters": {**parameters, "required": ["unit"]}}
    made = get_json_schema(_method(optional, native=True))["function"]["parameters"]
    assert made["required"] == ["unit"] and made["properties"]["n"]["type"] == "integer"


def test_trls_trainer_trains_on_our_environment(house, tiny, tmp_path, monkeypatch):
    """One optimiser step; one of two rollouts plays the expert's calls, the other says nothing useful."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    markup = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
    tokenizer = tiny.make_tokenizer(markup)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    tokenizer.padding_side = "left"
    model = tiny.make_model(tmp_path / "model", tokenizer, seed=0, window=8192)
    rows = dataset_rows(HOUSE, "train", OPTIONS)[:1]
    made = []

    def remembered():
        made.append(house())
        return made[-1]

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4096,
        max_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        environment_factory=remembered,
    )
    here, start = twin(rows[0])
    prompts = []

    def sample(prompt_ids, *_, **__):
        prompts.append([tokenizer.decode(ids) for ids in prompt_ids])
        expert = here.expert()["tool_calls"][0]["function"] if not here._success else None
        turns = ["The episode is over."] * len(prompt_ids)
        if expert:
            turns[0] = f"<tool_call>\n{json.dumps(expert)}\n</tool_call>"
            here.step(here.expert())
        return [[*tokenizer.encode(turn), tokenizer.eos_token_id] for turn in turns], None

    monkeypatch.setattr(trainer, "_generate_single_turn", sample)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "rewards/House/mean" in entry)
    assert log["rewards/House/mean"] == 0.5 and log["tools/failure_frequency"] == 0.0
    assert [world.get_reward() for world in made] == [1.0, 0.0]
    assert start.messages[0]["content"] in prompts[0][0] and '"name": "unlock"' in prompts[0][0]
    assert "<tool_response>" in prompts[1][0]


@pytest.fixture
def game_files(tmp_path):
    rows = [
        {"prompt": "A game.", "start": 1, "target": 10},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Go."}], "target": 5, "id": "five"},
        {"prompt": "Silent.", "silent": True, "target": 3, "data_source": "quiet"},
        {},
    ]
    file = tmp_path / "games.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"environment": GAME, "files": {"train": str(file)}}


def test_theirs_is_an_environment_here(game_files):
    world = TRLEnvironment(**game_files)
    assert isinstance(world, Environment)
    tasks = TRLEnvironment.tasks("train", **game_files)
    assert [(task["id"], task["type"]) for task in tasks] == [
        ("games:1", "trl"),
        ("five", "trl"),
        ("games:3", "quiet"),
        ("games:4", "trl"),
    ]
    starts = [world.reset(seed=7, task=task) for task in tasks]
    assert [m["content"] for start in starts for m in start.messages][:4] == [
        "A game. Count from 1 to 10.",
        "s",
        "Go. Count from 0 to 5.",
        "Silent.",
    ]
    assert [tool["function"]["name"] for tool in starts[0].tools] == ["add", "peek"]
    assert world.reset(seed=7, task=tasks[3]) == starts[3], "the environment's own randomness is seeded"
    assert len({world.reset(seed=s, task=tasks[3]).messages[0]["content"] for s in range(9)}) > 1
    world.close()


def test_tools_are_called_until_the_student_calls_none(game_files):
    world = TRLEnvironment(**game_files)
    world.reset(seed=0, task=TRLEnvironment.tasks("train", **game_files)[0])
    step = world.step(say("", ("add", {"amount": 2, "twice": True}), ("peek", {})))
    assert step.messages == (
        {"role": "tool", "name": "add", "content": "value 5"},
        {"role": "tool", "name": "peek", "content": "5"},
    )
    assert step.info["failure"] == "" and not step.done
    for wrong in (("fly", {}), ("_hidden", {}), ("reset", {}), ("add", {}), ("add", {"amount": -1}), ("add", "[")):
        step = world.step(say("", wrong))
        assert step.info["failure"] == "tool_error" and step.messages[0]["content"].startswith("{'error': "), wrong
    assert "Negative amounts" in world.step(say("", ("add", {"amount": -1}))).messages[0]["content"]
    assert world.step(say('<tool_call>{"name": "add", "arguments": {"amount": 5}}</tool_call>')).info["failure"] == ""
    last = world.step(say("Done."))
    assert last.terminated and last.reward == 1.0 and last.info["success"] and last.info["score"] == 1.0
    world.close()


@pytest.mark.parametrize(
    ("amount", "reward", "score", "success"), [(0, -1.0, 0.0, False), (10, 0.5, 0.5, False), (9, 1.0, 1.0, True)]
)
def test_rewards_become_scores(game_files, amount, reward, score, success):
    world = TRLEnvironment(**game_files, max_turns=1)
    world.reset(seed=0, task=TRLEnvironment.tasks("train", **game_files)[0])
    step = world.step(say("", ("add", {"amount": amount})))
    assert step.truncated and (step.reward, step.info["score"], step.info["success"]) == (reward, score, success)
    assert step.info["raw_score"] == reward
    world.close()


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf"), None, "1", [1.0]])
def test_a_reward_that_is_no_number_scores_nothing(game_files, monkeypatch, reward):
    world = TRLEnvironment(**game_files, max_turns=1)
    world.reset(seed=0, task=TRLEnvironment.tasks("train", **game_files)[0])
    monkeypatch.setattr(world._environment, "get_reward", lambda: reward)
    with pytest.raises(InfrastructureError, match=r"get_reward gave no number, .* is not a finite number"):
        world.step(say("", ("add", {"amount": 1})))


def test_odd_messages_end_the_episode_or_are_answered(game_files):
    world = TRLEnvironment(**game_files)
    task = TRLEnvironment.tasks("train", **game_files)[0]
    cases = [(say(""), "empty"), (say(None), "empty"), (say(5), "unparseable"), (say("<tool_call>{"), "unparseable")]
    cases += [(None, "empty"), ({"tool_calls": 5}, "unparseable"), (say("fine"), "")]
    for message, failure in cases:
        world.reset(seed=0, task=task)
        step = world.step(message)
        assert step.terminated and step.info["failure"] == failure, message
    for call in (None, 5, {}, {"function": None}, {"function": {"name": "add"}}):
        world.reset(seed=0, task=task)
        assert world.step({"tool_calls": [call]}).info["failure"] == "tool_error", call
    world.close()


def test_an_episode_without_a_score_is_an_infrastructure_error(game_files):
    task = TRLEnvironment.tasks("train", **game_files)[0]
    with EnvironmentPool("trl", game_files) as pool:
        pool.reset({0: (0, task)})
        assert pool.step({0: say("", ("add", {"amount": 12}))})[0].messages[0]["content"] == "value 13"
        broken = pool.step({0: say("I stop.")})[0]
        assert broken.reason == "error" and "cannot be scored" in broken.detail


def test_what_cannot_be_played_is_refused(game_files, tmp_path):
    with pytest.raises(ValueError, match="no method get_reward"):
        TRLEnvironment(environment=f"{HERE / 'counter_game.py'}:NoReward")
    with pytest.raises(ValueError, match="environment=''"):
        TRLEnvironment()
    with pytest.raises(ValueError, match="neither 'module:name'"):
        TRLEnvironment(environment="nothing")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 5}\n{"prompt": [{"role": "assistant", "content": "x"}]}\n')
    with pytest.raises(ValueError, match=r"2 of 2 rows(?s:.*)neither text nor(?s:.*)does not end with a user message"):
        TRLEnvironment.tasks("train", **{**game_files, "files": {"train": str(bad)}})
    with pytest.raises(InfrastructureError, match="does not start"):
        environment_factory(TROUBLED, {"broken": True})
