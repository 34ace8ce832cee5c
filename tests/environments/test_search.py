"""Search over a corpus of the test's own, episodes included."""

from __future__ import annotations

import json
import subprocess
import sys
from random import Random

import pytest

from opdengine.environments import FAILURES, Environment, HasExpert, load_environment
from opdengine.environments.pool import EnvironmentPool
from opdengine.environments.search import (
    NO_SEARCHES,
    NOT_FOUND,
    Search,
    exact_match,
    normalized,
    open_index,
    save_index,
)

pytest.importorskip("bm25s")

WORDS = [
    "river",
    "mountain",
    "castle",
    "bridge",
    "painter",
    "engine",
    "harvest",
    "island",
    "compass",
    "winter",
    "lantern",
    "orchard",
]


def documents():
    random = Random(0)
    rows = [
        {
            "id": str(i),
            "title": f"Town{i}",
            "text": f"Town{i} has {' and '.join(random.sample(WORDS, 3))}; mayor: Person{i}.",
        }
        for i in range(200)
    ]
    return [*rows, {"title": "The Who", "text": "The Who are a band. " + "long " * 500}]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    corpus, questions = folder / "corpus.jsonl", folder / "test.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in documents()))
    rows = [
        {
            "question": f"Who is the mayor of Town{i}?",
            "answers": [f"Person{i}", f"Mayor Person{i}"],
            "title": f"Town{i}",
        }
        for i in range(0, 200, 10)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = folder / "index"
    assert save_index(str(corpus), str(index)) == 201
    return {"corpus": str(corpus), "index": str(index), "questions": {"test": str(questions)}}


@pytest.fixture(params=["search", "tools"])
def options(request, files):
    return {"corpus": files["corpus"], "questions": files["questions"], "format": request.param}


def say(text):
    return {"role": "assistant", "content": text}


def act(world, name, text):
    if world.options.format == "search":
        return say(f"<thought>hm</thought><action>{name}[{text}]</action>")
    arguments = {"search": {"query": text}, "answer": {"text": text}}[name]
    return {"content": "", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


def test_the_expert_answers_every_question(options):
    world = Search(**options)
    assert isinstance(world, Environment) and isinstance(world, HasExpert)
    tasks = Search.tasks("test", **options)
    assert len(tasks) == 20 and len({task["id"] for task in tasks}) == 20
    for task in tasks:
        start = world.reset(seed=0, task=task)
        assert task["answers"][0] not in str(start), "the answer is not shown"
        first = world.step(world.expert())
        assert task["answers"][0] in first.messages[0]["content"].split("\n")[0], "the best document holds the answer"
        last = world.step(world.expert())
        assert last.terminated and last.reward == 1.0 and last.info["success"] and last.info["score"] == 1.0


def test_wrong_answers_end_without_reward(options):
    world = Search(**options)
    task = Search.tasks("test", **options)[0]
    world.reset(seed=0, task=task)
    step = world.step(act(world, "answer", "somebody else"))
    assert step.terminated and step.reward == 0.0 and step.info["success"] is False and step.info["score"] == 0.0
    world.reset(seed=0, task=task)
    assert world.step(act(world, "answer", " the mayor, person0! ")).reward == 1.0


def test_queries_that_find_nothing_are_answered(options):
    world = Search(**options)
    world.reset(seed=0, task=Search.tasks("test", **options)[0])
    for query, failure in [("zzzz qqqq", ""), ("!!! ???", ""), ("", "invalid_action"), ("  ", "invalid_action")]:
        step = world.step(act(world, "search", query))
        assert step.messages[0]["content"] == NOT_FOUND and step.info["failure"] == failure and not step.done
    assert len(world.step(act(world, "search", "the mayor of town7")).messages[0]["content"].split("\n")) == 3
    found = world.step(act(world, "search", "the who")).messages[0]["content"].split("\n")
    assert found[0].startswith("[1] The Who: ") and found[0].endswith("...") and len(found[0]) == 1000


def test_searches_are_limited(options):
    world = Search(**options, max_searches=2)
    world.reset(seed=0, task=Search.tasks("test", **options)[0])
    for _ in range(2):
        assert world.step(act(world, "search", "river")).info["failure"] == ""
    step = world.step(act(world, "search", "river"))
    assert step.messages[0]["content"] == NO_SEARCHES and step.info["failure"] == "invalid_action" and not step.done
    assert world.step(act(world, "answer", "Person0")).reward == 1.0


def test_noise_is_answered(options):
    random, world = Random(0), Search(**options)
    tasks = Search.tasks("test", **options)
    pieces = [
        "<action>",
        "search[",
        "answer[",
        "]",
        "</action>",
        "river",
        "\0",
        "<tool_call>",
        '{"name": "search"}',
        "\n",
    ]
    odd = [None, 5, {}, [{"type": "image"}], "", "text"]
    names = ["search", "fly", None, "answer"]
    for _ in range(30):
        world.reset(seed=0, task=random.choice(tasks))
        for _ in range(20):
            call = {
                "function": {"name": random.choice(names), "arguments": random.choice([{}, {"query": 5}, None, "x"])}
            }
            content = random.choice([" ".join(random.choices(pieces, k=5)), random.choice(odd)])
            step = world.step({"content": content, "tool_calls": random.choice([None, [call], [call, call], 7])})
            assert step.info["failure"] in ("", *FAILURES)
            if step.done:
                break


def test_a_saved_index_finds_what_the_file_finds(files):
    one, two = open_index(files["corpus"]), open_index(files["index"])
    for query in [*WORDS, "mayor Town17", "Person3 castle", "nothing here zzz"]:
        found = one.search(query, 5)
        assert [d["id"] for d in found] == [d["id"] for d in two.search(query, 5)]
        assert all(set(query.lower().split()) & set(normalized(f"{d['title']} {d['text']}").split()) for d in found)
    assert len(one.search("mayor", 1000)) == 200


def test_the_index_is_written_from_the_command_line(files, tmp_path):
    command = [sys.executable, "-m", "opdengine.environments.search", files["corpus"], str(tmp_path / "i")]
    assert "indexed 201 documents" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert open_index(str(tmp_path / "i")).search("Town7", 1)[0]["title"] == "Town7"


def test_it_plays_in_a_pool_with_a_shared_index(files):
    options = {"corpus": files["index"], "questions": files["questions"]}
    tasks = load_environment("search").tasks("test", **options)
    with EnvironmentPool("search", options, size=2) as pool:
        pool.reset({slot: (0, tasks[slot]) for slot in range(2)})
        found = pool.step({s: say(f"<action>search[{tasks[s]['title']}]</action>") for s in range(2)})
        assert all(tasks[s]["answers"][0] in found[s].messages[0]["content"] for s in range(2))
        done = pool.step({s: say(f"<action>answer[{tasks[0]['answers'][0]}]</action>") for s in range(2)})
        assert [done[s].reward for s in range(2)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("The Beatles.", ["beatles"], 1.0),
        ("a  U.S.  state", ["US state"], 1.0),
        ("theatre", ["re"], 0.0),
        ("42", ["forty-two", "42"], 1.0),
        ("", ["the"], 1.0),
        ("New York City", ["New York"], 0.0),
        ("don't", ["dont"], 1.0),
    ],
)
def test_exact_match_is_normalised(prediction, answers, score):
    assert exact_match(prediction, answers) == score


def test_files_and_options_are_checked(files, tmp_path):
    good = {"corpus": files["corpus"], "questions": files["questions"]}
    with pytest.raises(ValueError, match=r"no file for split 'dev'.*\['test'\]"):
        Search.tasks("dev", **good)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"question": "q", "answers": []}\n{"question": "q", "answer": "a"}\nnot json\n[]\n{"answers": ["a"]}\n'
    )
    with pytest.raises(ValueError, match=r"4 of 5 rows .*(?s:.*)row 1: no 'answers'"):
        Search.tasks("bad", corpus="x", questions={"bad": str(bad)})
    (task,) = Search.tasks("bad", corpus="x", questions={"bad": str(bad)}, skip_bad_rows=True)
    assert task["answers"] == ["a"] and task["id"] == "bad-2"
    with pytest.raises(ValueError, match="corpus=''"):
        Search()
    with pytest.raises(ValueError, match="top_k=0"):
        Search(corpus="x", top_k=0)
    with pytest.raises(ValueError, match="does not exist"):
        Search(corpus=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="holds no index"):
        Search(corpus=str(tmp_path))


def test_a_missing_package_is_named(monkeypatch, files):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r'pip install "opdengine\[search\]"'):
        Search(corpus=files["corpus"])
