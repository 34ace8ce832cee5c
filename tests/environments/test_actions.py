"""What is read out of a student's message, well formed or not."""

from __future__ import annotations

import json

import pytest

from opdengine.environments import FAILURES
from opdengine.environments.actions import FORMATS, Action, tool_action, visible_text, with_tool_calls


def say(content, **more):
    return {"role": "assistant", "content": content, **more}


ODD = [
    None,
    7,
    3.5,
    True,
    b"bytes",
    {"a": 1},
    [1, 2],
    [{"type": "image"}],
    [None],
    "",
    "  ",
    "<think>",
    "\x00",
    "\ud800",
]


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("content", ODD, ids=repr)
def test_odd_content_is_a_failure_or_a_bare_action_and_never_raises(format_, content):
    action = FORMATS[format_](say(content))
    assert action.failure in FAILURES or (format_ == "action" and action.name == content)
    for message in ({}, None, "text", 5, say(content, tool_calls=content)):
        assert FORMATS[format_](message).failure in (*FAILURES, "")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("<think>hm</think> go den ", "go den"),
        ("<think>a</think>x<think>b</think>y", "xy"),
        ("began before</think>\n\ngo den", "go den"),
        ("<think>no end", None),
        ([{"type": "text", "text": "go"}, {"type": "text", "text": " den"}], "go den"),
        ("  ", ""),
        (None, ""),
    ],
)
def test_thoughts_are_put_aside(text, seen):
    assert visible_text(say(text)) == seen


@pytest.mark.parametrize(
    ("format_", "text", "action"),
    [
        ("action", "go den", Action("go den")),
        ("action", "<think>Action: x</think>\ngo den", Action("go den")),
        ("action", "go den\nopen box", Action(failure="unparseable")),
        ("action", "<think>only</think>", Action(failure="empty")),
        ("react", "Thought: I see.\nAction: go to desk 1", Action("go to desk 1")),
        ("react", "action:open box  ", Action("open box")),
        ("react", "Thought: a\nAction: first\nObservation: made up\nAction: second", Action("first")),
        ("react", "Thought: no action here", Action(failure="unparseable")),
        ("react", "Thought: a\nAction:", Action(failure="unparseable")),
        ("react", "Thought: a\nAction:   \nmore", Action(failure="unparseable")),
        ("react", "<think>Action: inside</think>Action: outside", Action("outside")),
        ("react", "<think>cut off at the limit\nAction: x", Action(failure="unparseable")),
        (
            "search",
            "<thought>t</thought><action>search[capital of Peru]</action>",
            Action("search", {"text": "capital of Peru"}),
        ),
        ("search", "<action> Answer[ Lima ] </action>", Action("answer", {"text": "Lima"})),
        ("search", "<action>search[list[0] of x]</action>", Action("search", {"text": "list[0] of x"})),
        ("search", "<action>search[]</action>", Action("search", {"text": ""})),
        ("search", "<action>search[a", Action(failure="unparseable")),
        ("search", "<action>search[a]", Action("search", {"text": "a"})),
        ("search", "<action>look[a]</action>", Action(failure="unparseable")),
        ("search", "search[a]", Action(failure="unparseable")),
        ("search", "<action>search[a]</action><action>answer[b]</action>", Action("search", {"text": "a"})),
    ],
)
def test_text_formats(format_, text, action):
    assert FORMATS[format_](say(text)) == action


def call(name, arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_markup_becomes_tool_calls_and_text_around_it_stays():
    message = with_tool_calls(say("<think>t</think>I look.\n" + call("f", {"x": 1}) + "\n" + call("g", {})))
    assert message == say(
        "I look.",
        tool_calls=[
            {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
            {"type": "function", "function": {"name": "g", "arguments": {}}},
        ],
    )
    assert with_tool_calls(message) == message


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "<tool_call>not json</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f"',
        call("f", {}) + "<tool_call>",
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
)
def test_calls_that_cannot_be_read_stay_text(text):
    assert with_tool_calls(say(text)) == say(text)
    assert tool_action(say(text)) == Action(failure="unparseable")


def test_one_tool_call_is_an_action():
    expected = Action("f", {"x": 1})
    assert tool_action(say(call("f", {"x": 1}))) == expected
    for arguments in ({"x": 1}, '{"x": 1}'):
        calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
        assert tool_action(say(None, tool_calls=calls)) == expected
    empty = [{"function": {"name": "f", "arguments": ""}}]
    assert tool_action(say("", tool_calls=empty)) == Action("f")
    assert tool_action(say("", tool_calls=empty * 2)) == Action(failure="tool_error")
    assert tool_action(say("", tool_calls=[])) == Action(failure="empty")
    for bad in (5, [5], [{}], [{"function": {"name": "f", "arguments": "[]"}}], [{"function": None}]):
        assert tool_action(say("", tool_calls=bad)) == Action(failure="unparseable")
