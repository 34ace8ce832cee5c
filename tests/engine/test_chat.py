"""Messages of every shape become the ids that the template means; verifiers grade what they say."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import PROMPTS, make_config, make_engine, make_samples

from opdengine.config.train import TeacherConfig
from opdengine.data.prompts import load_prompts
from opdengine.environments.actions import Action, tool_action
from opdengine.models.chat import (
    encode_chat,
    kept_marks,
    load_tokenizer,
    require_same_tokenizer,
    text_of,
    text_of_completion,
)
from opdengine.models.reply import own_turn
from opdengine.models.thoughts import answer_part
from opdengine.teachers.server import ServedTeacher
from opdengine.types import Request, SamplingParams
from opdengine.verifiers import load_verifier

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t.function.name }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}call:{{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not thinking %}<think></think>{% endif %}{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Rome?"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "get_weather", "arguments": "{}"}}]},
    {"role": "tool", "content": "rain"},
]


@pytest.fixture
def strict(models: dict[str, str]) -> Any:
    """A tokenizer whose template, like many, prints only plain strings."""
    return load_tokenizer(models["student"], chat_template=TEMPLATE)


@pytest.mark.parametrize("special", [True, False])
def test_marks_of_thoughts_stay_in_a_text_also_where_they_are_special_tokens(
    models: dict[str, str], special: bool
) -> None:
    tokenizer = load_tokenizer(models["student"])
    tokenizer.add_tokens(["[THINK]", "[/THINK]"], special_tokens=special)
    eos = tokenizer.eos_token
    ids = tokenizer.encode(f"[THINK]is it 4?[/THINK]It is{eos} 5.{eos}", add_special_tokens=False)
    assert set(kept_marks(tokenizer).values()) == ({"[THINK]", "[/THINK]"} if special else set())
    text = text_of_completion(tokenizer, ids, [tokenizer.eos_token_id])
    assert text == "[THINK]is it 4?[/THINK]It is 5."
    assert answer_part(text) == "It is 5."
    assert text_of_completion(tokenizer, [], [1]) == ""
    served = ServedTeacher(TeacherConfig("m", name="t", base_url="http://127.0.0.1:1/v1"), tokenizer, len(tokenizer))
    told = {"text": "is it 4?It is 5." if special else text, "finish_reason": "stop", "token_ids": ids}
    answer = served._completion(Request("a", (1,)), SamplingParams(max_tokens=99), {"choices": [told]})
    assert answer.text == text


def test_markup_stays_in_a_text_also_where_it_is_of_special_tokens(tiny: Any) -> None:
    """What has a role or no partner is no markup."""
    tokenizer = tiny.make_tokenizer(("<answer>", "</answer>", "<tool_call>", "</tool_call>", "<s>", "</s>", "<u0>"))
    tokenizer.bos_token, tokenizer.unk_token = "<s>", "</s>"
    said = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    ids = tokenizer.encode(f"<s>{said} <u0><answer>4</answer></s><|im_end|>", add_special_tokens=False)
    text = text_of_completion(tokenizer, ids, [tokenizer.eos_token_id])
    assert text == f"{said} <answer>4</answer>"
    assert tool_action({"role": "assistant", "content": text}) == Action("f")


def test_parts_tools_and_tool_results_are_rendered(strict: Any) -> None:
    ids = encode_chat(strict, CONVERSATION, TOOLS, {"thinking": True})
    assert strict.decode(ids) == (
        "<tools>get_weather</tools><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWeather in Rome?<|im_end|>\n"
        "<|im_start|>assistant\ncall:get_weather<|im_end|>\n"
        "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n"
    )
    assert strict.decode(encode_chat(strict, CONVERSATION[:2])).endswith("<|im_start|>assistant\n<think></think>")


def test_parts_mean_the_same_as_their_text(tokenizer: Any) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a "}, "b"]}]
    assert encode_chat(tokenizer, parts) == encode_chat(tokenizer, [{"role": "user", "content": "a b"}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "image": "x"}], "part of type 'image'"),
        ([{"type": "text"}], "part of type 'text'"),
        (7, "content of type int"),
        ([3], "part of type 'int'"),
    ],
)
def test_what_is_not_text_is_refused(tokenizer: Any, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_of(content)
    with pytest.raises(ValueError, match=message):
        encode_chat(tokenizer, [{"role": "user", "content": content}])


def test_a_template_from_a_file(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}é")
    tokenizer = load_tokenizer(models["student"], chat_template=str(tmp_path / "chat.jinja"))
    assert tokenizer.decode(encode_chat(tokenizer, [{"role": "user", "content": "x"}])) == "[x]é"


def test_the_same_tokenizer_with_another_template_is_the_same_tokenizer(tiny: Any, tokenizer: Any) -> None:
    other = tiny.make_tokenizer()
    other.chat_template = TEMPLATE
    require_same_tokenizer(tokenizer, other, "t")
    other.eos_token = "<|im_start|>"
    require_same_tokenizer(tokenizer, other, "t")
    other.chat_template = TEMPLATE.replace("<|im_end|>", "<|im_start|>")
    with pytest.raises(ValueError, match="eos: student 300, t 302"):
        require_same_tokenizer(tokenizer, other, "t")
    other.chat_template = TEMPLATE.replace("<|im_end|>", "")
    with pytest.raises(ValueError, match="eos: student 300, t 302"):
        require_same_tokenizer(tokenizer, other, "t")


def test_a_base_model_is_judged_by_the_chat_model_beside_it(
    tiny: Any, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    """The eos of the one is that of texts, of the other that of turns; both templates end turns alike."""
    base = tiny.make_tokenizer()
    base.eos_token = "<|pad|>"
    student = tiny.make_model(tmp_path / "base", base, seed=5)
    config = make_config({**models, "student": student}, prompt_file, tmp_path / "run", method="opd",
                         teachers=[{"model": models["big"]}])  # fmt: skip
    engine = make_engine(config)
    ends = {base.eos_token_id, base.convert_tokens_to_ids("<|im_end|>")}
    assert {*engine.sampler.stop_ids} == ends
    assert all({*s.target_ids[:-1]}.isdisjoint(ends) for s in make_samples(engine, load_prompts([prompt_file]).prompts))


def test_a_mode_that_only_one_side_is_told_of_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    """Silence would have the teacher expect a thought where the student's answer begins."""

    def build(student: dict[str, Any], teacher: dict[str, Any], template: str = TEMPLATE) -> None:
        teachers = [{"model": models["big"], "chat_template": template, "chat_template_kwargs": teacher}]
        make_engine(
            make_config(
                models, "d.jsonl", tmp_path, method="opd", chat_template=TEMPLATE, chat_template_kwargs=student,
                teachers=teachers,
            )
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"of teacher 'big' lack 'thinking', which the student has \(True\).*</think>"):
        build({"thinking": True}, {})
    with pytest.raises(ValueError, match=r"of the student lack 'thinking', which teacher 'big' has \(True\)"):
        build({}, {"thinking": True})
    build({"thinking": True}, {"thinking": False})  # on purpose
    build({"thinking": True}, {}, template=TEMPLATE.replace("not thinking", "false"))  # a template without modes
    build({"thinking": False, "date": "today"}, {})  # nothing differs


@pytest.mark.parametrize("method", ["mt_opd", "mad_opd", "mt_seqkd"])
def test_conversations_train_from_end_to_end(models: dict[str, str], strict: Any, tmp_path: Path, method: str) -> None:
    """A debate that continues after a tool result, every model in its own template."""
    data = tmp_path / "d.jsonl"
    rows = [
        {"id": "tool", "messages": CONVERSATION, "tools": TOOLS},
        {"id": "text", "messages": CONVERSATION[:2], "tools": json.dumps(TOOLS)},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        models, str(data), tmp_path / "out", method=method, chat_template=TEMPLATE,
        chat_template_kwargs={"thinking": True}, debate={"prompts": PROMPTS},
        teachers=[
            {"model": models["big"], "chat_template": TEMPLATE, "chat_template_kwargs": {"thinking": False}},
            {"model": models["small"], "chat_template": TEMPLATE, "chat_template_kwargs": {"thinking": True}},
        ],
    )  # fmt: skip
    engine = make_engine(config)
    contexts: dict[str, list[str]] = {}
    for teacher in engine.teachers:
        plain = teacher.score

        async def score(queue: Any, plain: Any = plain, name: str = teacher.name) -> Any:
            contexts[name] = [strict.decode(c.token_ids[: c.target_positions[0]]) for c in queue]
            return await plain(queue)

        teacher.score = score
    result = asyncio.run(engine.step(load_prompts([str(data)]).prompts))
    assert result.metrics["loss"] > 0 and result.metrics["completions/kept"] == 2
    student = strict.decode(result.samples[0].turns[0].token_ids)
    assert student.startswith("<tools>get_weather</tools><|im_start|>system\nBe brief.")
    assert student.endswith("<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n")
    if method == "mt_opd":
        assert contexts["small"][0] == student
        assert contexts["big"][0] == student + "<think></think>"
    if method == "mad_opd":
        for name, letter in (("big", "A"), ("small", "B")):
            after_tool, plain_text = contexts[name]
            assert after_tool.startswith(student.removesuffix("<|im_start|>assistant\n"))
            assert f"<|im_start|>user\nS Decide on the next step of the conversation above. | {letter} |" in after_tool
            assert f"<|im_start|>user\nS Weather in Rome? | {letter} | [Debate Start]" in plain_text
            assert plain_text.count("Weather in Rome?") == 1


def test_spaces_of_a_completion_stay(tiny: Any) -> None:
    """Many tokenizers are told to clean up spaces, as the first ones were made to: other programs would be run."""
    tokenizer, text = tiny.make_tokenizer(), "if x != 'a .' : f( 's , t ' ) ."
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) != text
    assert text_of_completion(tokenizer, ids, ()) == text


def test_the_end_of_a_turn_is_added_where_a_server_does_not_tell_it(tokenizer: Any) -> None:
    said, end = tokenizer.encode("I go", add_special_tokens=False), tokenizer.eos_token_id
    other = tokenizer.convert_tokens_to_ids("<|pad|>")
    for ids in ([*said, end], [*said, other], said):
        assert own_turn(tokenizer, {}, "I go", ids, ended=True) == [*said, end]
    assert own_turn(tokenizer, {}, "I go", said, ended=False) == said


def test_verifiers(tmp_path: Path) -> None:
    exact, numeric = load_verifier("exact_match"), load_verifier("numeric")
    assert exact(" 4\n", 4, ()) == 1 and exact("four", ["4", "four"], ()) == 1 and exact("5", "4", ()) == 0
    # A column of whole numbers of which one is missing is read as floats; nothing said answers no question.
    assert exact("4", 4.0, ()) == exact("4.0", 4.0, ()) == exact("4", [3.0, 4.0], ()) == 1
    assert exact("4", 4.5, ()) == 0
    for empty in ("", " ", [], ["4", ""]):
        with pytest.raises(ValueError, match="is empty"):
            exact("", empty, ())
    assert numeric("so 3 + 1 = 4.0", "4", ()) == 1 and numeric("1,234", 1234, ()) == 1
    assert numeric("nothing", "4", ()) == 0 and numeric("4 or 5", "4", ()) == 0
    assert numeric("-2e3", "-2,000", ()) == 1
    (tmp_path / "mine.py").write_text("def grade(text, answer, messages):\n    return len(messages) / 10\n")
    assert load_verifier(f"{tmp_path / 'mine.py'}:grade")("x", "y", ({}, {})) == 0.2
    assert load_verifier("opdengine.verifiers:numeric") is numeric
