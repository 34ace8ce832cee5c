"""Recorded conversations as states, as prompts and as an environment."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from random import Random

import pytest

from opdengine.data.prompts import load_prompts
from opdengine.environments import FAILURES, Environment, HasExpert
from opdengine.environments.pool import EnvironmentPool
from opdengine.environments.recorded import Recorded, load_records, prompt_rows
from opdengine.models.chat import encode_answer, encode_chat

TOOLACE = {
    "system": 'You can call functions: [{"name": "weather"}]. Write [func(arg=value)].',
    "conversations": [
        {"from": "user", "value": "How is the weather in Rome?"},
        {"from": "assistant", "value": '[weather(city="Rome")]'},
        {"from": "tool", "value": '[{"name": "weather", "results": {"sky": "blue"}}]'},
        {"from": "assistant", "value": "The sky is blue."},
        {"from": "user", "value": "And in Oslo?"},
        {"from": "assistant", "value": '[weather(city="Oslo")]'},
        {"from": "tool", "value": "an answer that nobody reads"},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def call(a, b, as_text=False):
    arguments = {"a": a, "b": b}
    return {
        "type": "function",
        "function": {"name": "add", "arguments": json.dumps(arguments) if as_text else arguments},
    }


OPENAI = {
    "id": "sum",
    "data_source": "math",
    "tools": json.dumps(TOOLS),
    "messages": [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x", **call(1, 2, as_text=True)}]},
        {"role": "tool", "tool_call_id": "x", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ],
}


def say(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "talks.json"
    file.write_text(json.dumps([TOOLACE, OPENAI]))
    return str(file)


def test_both_layouts_become_messages(path):
    toolace, openai = load_records(path)
    assert (toolace.id, toolace.type, toolace.tools) == ("talks:1", "recorded", ())
    assert [m["role"] for m in toolace.messages] == [
        "system",
        "user",
        *["assistant", "tool"],
        "assistant",
        "user",
        "assistant",
        "tool",
    ]
    assert toolace.messages[0]["content"] == TOOLACE["system"] and toolace.messages[2] == say('[weather(city="Rome")]')
    assert (openai.id, openai.type, list(openai.tools)) == ("sum", "math", TOOLS)
    assert openai.messages[1] == say("", tool_calls=[{"id": "x", **call(1, 2)}])
    assert openai.messages[2] == {"role": "tool", "tool_call_id": "x", "content": "3"}


def test_conversations_as_json_text_are_read(path, tmp_path):
    file = tmp_path / "talks.json"
    texts = [
        {name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()} for row in (TOOLACE, OPENAI)
    ]
    file.write_text(json.dumps(texts))
    assert load_records(str(file)) == load_records(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "not JSON"),
        ('[{"role": "user"', "not JSON"),
        ('{"role": "user", "content": "hi"}', "neither 'messages' nor 'conversations' is a list"),
        ("", "neither 'messages' nor 'conversations' is a list"),
        ('["hi"]', "a turn that is not an object"),
    ],
)
def test_text_that_is_no_conversation_is_refused_with_its_row(tmp_path, text, message):
    file = tmp_path / "talks.json"
    file.write_text(json.dumps([OPENAI, {"messages": text}]))
    with pytest.raises(ValueError, match=f"row 2.*{message}"):
        Recorded.tasks("train", files={"train": str(file)})


def test_every_assistant_turn_is_a_training_prompt(path, tmp_path):
    rows = prompt_rows(path)
    assert [(row["id"], row["turn"], row["turns"]) for row in rows] == [
        ("talks:1/0", 0, 3),
        ("talks:1/1", 1, 3),
        ("talks:1/2", 2, 3),
        ("sum/0", 0, 2),
        ("sum/1", 1, 2),
    ]
    assert [m["content"] for m in rows[1]["messages"]] == [
        TOOLACE["system"],
        *(turn["value"] for turn in TOOLACE["conversations"][:3]),
    ]
    assert rows[1]["reference"] == say("The sky is blue.")
    target = tmp_path / "prompts.jsonl"
    command = [sys.executable, "-m", "opdengine.environments.recorded", path, str(target)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "5 prompts\n"
    prompts = load_prompts([str(target)]).prompts
    assert [p.id for p in prompts] == [row["id"] for row in rows]
    assert [list(p.messages) for p in prompts] == [row["messages"] for row in rows]
    assert list(prompts[3].tools) == TOOLS and prompts[3].key == "math" and prompts[1].extra["turn"] == 1


@pytest.mark.parametrize("mode", ["replay", "teacher_forced"])
def test_the_record_is_its_own_expert(path, mode):
    options = {"files": {"train": path}, "mode": mode}
    world = Recorded(**options)
    assert isinstance(world, Environment) and isinstance(world, HasExpert)
    tasks = Recorded.tasks("train", **options)
    assert len(tasks) == {"replay": 2, "teacher_forced": 5}[mode]
    assert len({task["id"] for task in tasks}) == len(tasks)
    for task in tasks:
        world.reset(seed=0, task=task)
        steps = [world.step(world.expert())]
        while not steps[-1].done:
            steps.append(world.step(world.expert()))
        assert all(step.info["equal"] and step.reward == 1.0 for step in steps)
        assert steps[-1].terminated and steps[-1].info["success"] and steps[-1].info["score"] == 1.0
        assert mode == "replay" or len(steps) == 1


def test_forced_tasks_are_the_states_of_the_prompts(path):
    tasks = Recorded.tasks("train", files={"train": path}, mode="teacher_forced")
    world = Recorded(mode="teacher_forced")
    for task, row in zip(tasks, prompt_rows(path), strict=True):
        start = world.reset(seed=0, task=task)
        assert list(start.messages) == row["messages"] and list(start.tools) == row["tools"] and task["id"] == row["id"]


def test_replay_answers_with_the_record_whatever_was_said(path):
    task = Recorded.tasks("train", files={"train": path})[0]
    world = Recorded()
    start = world.reset(seed=0, task=task)
    assert [m["role"] for m in start.messages] == ["system", "user"]
    assert start.info["goal"] == "How is the weather in Rome?"
    first = world.step(say("I cannot know."))
    assert first.messages == ({"role": "tool", "content": TOOLACE["conversations"][2]["value"]},)
    assert (first.info["equal"], first.reward, first.info["failure"]) == (False, 0.0, "")
    second = world.step(say(" The  sky is\nblue. "))
    assert second.info["equal"] and second.messages == ({"role": "user", "content": "And in Oslo?"},)
    third = world.step(say(""))
    assert third.messages == () and third.terminated and third.info["failure"] == "empty"
    assert third.info["success"] is False and third.info["score"] == pytest.approx(1 / 3)


def test_tool_outputs_carry_the_templates_markup(path, tokenizer):
    task = Recorded.tasks("train", files={"train": path})[0]
    world = Recorded()
    start = world.reset(seed=0, task=task)
    step = world.step(world.expert())
    played = tokenizer.decode(encode_chat(tokenizer, start.messages)) + '[weather(city="Rome")]'
    played += tokenizer.decode(encode_answer(tokenizer, step.messages))
    whole = encode_chat(tokenizer, load_records(path)[0].messages[:4])
    assert played == tokenizer.decode(whole) and "<|im_start|>tool\n[{" in played


def test_calls_are_compared_by_what_they_call(path):
    task = Recorded.tasks("train", files={"train": path})[1]
    world = Recorded()
    cases = [
        (say("Let me add.", tool_calls=[call(1, 2)]), True, ""),
        (say('<tool_call>{"arguments": {"b": 2, "a": 1}, "name": "add"}</tool_call>'), True, ""),
        (say("", tool_calls=[call(2, 1)]), False, ""),
        (say("", tool_calls=[call(1, 2), call(1, 2)]), False, ""),
        (say("It is 3."), False, ""),
        (say("<tool_call>{</tool_call>"), False, "unparseable"),
        (say("<think>endless"), False, "unparseable"),
    ]
    for message, equal, failure in cases:
        world.reset(seed=0, task=task)
        step = world.step(message)
        assert (step.info["equal"], step.info["failure"]) == (equal, failure), message
        assert step.messages[0]["content"] == "3"


def test_noise_is_answered_until_the_record_ends(path):
    random, world = Random(0), Recorded()
    tasks = Recorded.tasks("train", files={"train": path})
    odd = [None, 5, b"x", {}, [{"type": "image"}], [None], "", "text", "<tool_call>", say]
    calls = [None, 5, {}, [5], [{}], [{"function": {"name": "f", "arguments": {1: 2, "a": say}}}], "x"]
    for _ in range(200):
        task = random.choice(tasks)
        world.reset(seed=0, task=task)
        steps = []
        while not (steps and steps[-1].done):
            message = random.choice([None, "x", {"content": random.choice(odd), "tool_calls": random.choice(calls)}])
            steps.append(world.step(message))
            assert steps[-1].info["failure"] in ("", *FAILURES)
        assert len(steps) == sum(m["role"] == "assistant" for m in task["rest"])


def test_it_plays_in_a_pool(path):
    task = Recorded.tasks("train", files={"train": path})[0]
    with EnvironmentPool("recorded", {"files": {"train": path}}) as pool:
        assert pool.reset({0: (0, task)})[0] == Recorded().reset(seed=0, task=task)
        for turn in (1, 3, 5):
            step = pool.step({0: say(TOOLACE["conversations"][turn]["value"])})[0]
        assert step.terminated and step.info["score"] == 1.0


def broken_rows():
    def without(key, **changes):
        row = copy.deepcopy(TOOLACE)
        row.pop(key, None)
        return row | changes

    turn = {"from": "user", "value": "hi"}
    reply = {"from": "assistant", "value": "ho"}
    return {
        "neither 'messages' nor 'conversations'": without("conversations"),
        "no assistant turn": without("", conversations=[turn]),
        "an assistant turn follows system": without("", conversations=[reply]),
        "an assistant turn follows nothing": without("system", conversations=[reply]),
        "an assistant turn follows assistant": without("", conversations=[turn, reply, reply]),
        "unknown role 'oracle'": without("", conversations=[turn, {"from": "oracle", "value": "x"}]),
        "a turn that is not an object": without("", conversations=["hi"]),
        "a user turn without content": without("", conversations=[{"from": "user"}, reply]),
        "content of type int": without("", conversations=[{"from": "user", "value": 5}, reply]),
        "a system message that is not the first": without(
            "", conversations=[turn, {"from": "system", "value": "x"}, reply]
        ),
        "'tools' is not JSON": without("", tools="{"),
        "arguments that are not JSON": {
            "messages": [
                {"role": "user", "content": "x"},
                say(None, tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
            ]
        },
        "a tool call without a function's name": {
            "messages": [{"role": "user", "content": "x"}, say("", tool_calls=[{}])]
        },
    }


@pytest.mark.parametrize("problem", broken_rows())
def test_malformed_records_are_refused_or_left_out(tmp_path, caplog, problem):
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps(OPENAI) + "\n" + json.dumps(broken_rows()[problem]) + "\n")
    with pytest.raises(ValueError, match=rf"1 of 2 rows(?s:.*)row 2: .*{problem}"):
        load_records(str(file))
    assert [record.id for record in load_records(str(file), skip_bad_rows=True)] == ["sum"]
    assert "left out 1 of 2 rows" in caplog.text


def test_wrong_options_are_refused(path):
    with pytest.raises(ValueError, match="mode='live'"):
        Recorded(mode="live")
    with pytest.raises(ValueError, match="no file for split 'test'"):
        Recorded.tasks("test", files={"train": path})
