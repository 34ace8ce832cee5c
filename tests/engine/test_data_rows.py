"""Rows of every shape: what a file means reaches the prompt, and what cannot be used is named with its number."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from opdengine.config.sections import DataConfig
from opdengine.data.prompts import DataError, drop_long, load_prompts, read_rows
from opdengine.models.chat import encode_chat

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def refused(path: str, message: str) -> None:
    """The file is refused with this message; with skipped bad rows the first row, a good one, is left."""
    with pytest.raises(DataError, match=message):
        load_prompts([path])
    kept = load_prompts([path], skip_bad_rows=True)
    assert [p.messages[0]["content"] for p in kept.prompts] == ["fine"] and sum(kept.dropped.values()) == 1


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


# ------------------------------------------------------------------------------------------- nulls

CALLS = [
    {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}},
    {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "unit": {"name": "m"}}}},
]
ROW = {
    "id": "1",
    "messages": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "content": "20"},
        {"role": "user", "content": "thanks"},
    ],
    "tools": [tool("get_weather", city={"type": "string", "enum": ["Paris"]}), tool("add", x={"type": "integer"})],
    "answer": {"inputs": ["1"], "outputs": ["2"]},
    "extra_info": {"a": {"b": 1}},
}
OTHER = {
    **ROW,
    "id": "2",
    "answer": {"entry": "f", "inputs": ["1"], "outputs": [None]},
    "extra_info": {"a": {"c": [{"d": 1}, {"e": None}]}},
}


def test_fields_that_arrow_fills_with_null_are_left_out_at_every_level(tmp_path: Path) -> None:
    import datasets

    expected = load_prompts([write(tmp_path / "rows.jsonl", ROW, OTHER)]).prompts
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW, OTHER]), tmp_path / "rows.parquet")
    saved = datasets.Dataset.from_list([ROW, OTHER])
    saved.save_to_disk(str(tmp_path / "rows"))
    saved.with_format("numpy").save_to_disk(str(tmp_path / "arrays"))
    for name in ("rows.parquet", "rows", "arrays"):
        found = load_prompts([str(tmp_path / name)]).prompts
        assert [(p.messages, p.tools, p.answer) for p in found] == [(p.messages, p.tools, p.answer) for p in expected]
        assert found[0].extra == {"extra_info": {"a": {"b": 1}}}
        assert found[1].extra == {"extra_info": {"a": {"c": [{"d": 1}, {}]}}}
        assert type(found[0].answer["inputs"]) is list


def test_nulls_that_a_json_file_states_stay(tmp_path: Path) -> None:
    schema = tool("f", x={"type": "string", "default": None})
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    row = {
        "messages": [*CHAT, said, {"role": "tool", "content": "1"}],
        "tools": [schema],
        "answer": {"expected": None},
    }
    (prompt,) = load_prompts([write(tmp_path / "a.jsonl", row)]).prompts
    assert prompt.tools == (schema,) and prompt.answer == {"expected": None}
    assert prompt.messages[2] == {"role": "assistant", "tool_calls": [call]}


# --------------------------------------------------------------------------------------- JSON text


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_a_chat_as_json_text_is_a_chat(tmp_path: Path, column: str) -> None:
    texts = [json.dumps(CHAT), json.dumps(CHAT, indent=2), json.dumps(CHAT[1])]
    found = load_prompts([write(tmp_path / "a.jsonl", *({column: text} for text in texts))]).prompts
    assert [list(p.messages) for p in found] == [CHAT, CHAT, CHAT[1:]]
    changed = DataConfig(write(tmp_path / "b.jsonl", {column: texts[0]}), system="New.", suffix=" Please.")
    (prompt,) = load_prompts([changed]).prompts
    assert [m["content"] for m in prompt.messages] == ["New.", "hi Please."]
    (mapped,) = load_prompts(
        [DataConfig(write(tmp_path / "c.jsonl", {"c": texts[0]}), columns={"prompt": "c"})]
    ).prompts
    assert list(mapped.messages) == CHAT


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": str(CHAT)}, "row 2: 'messages' looks like a chat written as JSON text, but is not JSON"),
        ({"prompt": str(CHAT)}, "row 2: 'prompt' looks like a chat written as JSON text, but is not JSON"),
        ({"messages": json.dumps(CHAT)[:-5]}, "row 2: 'messages' looks like a chat written as JSON text"),
        ({"messages": "[]"}, "row 2: 'messages' is neither text nor a non-empty list"),
        ({"messages": '[{"from": "human", "value": "x"}]'}, "row 2: a message without 'role'"),
        ({"messages": {"0": CHAT[0]}}, "row 2: 'messages' is neither text nor a non-empty list"),
        ({"messages": {"role": ["user"], "content": ["x"]}}, "row 2: 'messages' is neither text nor"),
    ],
)
def test_what_looks_like_a_chat_is_never_the_users_words(tmp_path: Path, row: Any, message: str) -> None:
    refused(write(tmp_path / "a.jsonl", {"prompt": "fine"}, row), message)


@pytest.mark.parametrize(
    "text", ["[1, 2, 3] sorted?", "[1, 2, 3]", '{"role": "x", "employees": []}', "{'role': 1} in Python?", "[{}]"]
)
def test_a_prompt_that_only_holds_json_stays_text(tmp_path: Path, text: str) -> None:
    (prompt,) = load_prompts([write(tmp_path / "a.jsonl", {"prompt": text})]).prompts
    assert list(prompt.messages) == [{"role": "user", "content": text}]


def test_tools_may_be_json_text_at_each_level(tmp_path: Path) -> None:
    schema = tool("f", x={"type": "integer"})
    text = {**schema, "function": {**schema["function"], "parameters": json.dumps(schema["function"]["parameters"])}}
    rows = [{"prompt": "x", "tools": tools} for tools in (json.dumps([schema]), [json.dumps(schema)], [text])]
    rows += [{"prompt": "x", "tools": tools} for tools in ("", "[]", "null", None, [])]
    found = [p.tools for p in load_prompts([write(tmp_path / "a.jsonl", *rows)]).prompts]
    assert found == 3 * [(schema,)] + 5 * [()]


# ------------------------------------------------------------------------------------ hostile rows

DEEP = "[" * 2000 + "]" * 2000


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "cut \\ud83d emoji"}', r"row 2: not text \(a lone surrogate, half of a character, behind 'cut "),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "row 2: not text .a lone surrogate"),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\udc00"}]}]}', "a lone surrogate"),
        ('{"prompt": "x", "answer": {"inputs": ["\\ud83d"]}}', "row 2: not text .a lone surrogate"),
        ('{"prompt": "x", "tools": [{"\\ud83d": 1}]}', "row 2: not text .a lone surrogate"),
        ({"prompt": "x", "tools": '[{"name": "\\ud83d"}]'}, "row 2: 'tools' is not text .a lone surrogate"),
        ('{"id": "\\ud83d", "prompt": "x"}', "row 2: not text .a lone surrogate"),
        (f'{{"prompt": "x", "answer": {DEEP}}}', "row 2: not JSON that can be used .nested more than 100 levels"),
        (f'{{"prompt": "x", "answer": {50 * DEEP}}}', "row 2: not JSON"),
        ('{"prompt": "x", "answer": ' + "[" * 100_000, "row 2: not JSON that can be used .nested more than 100"),
        (f'{{"prompt": "x", "answer": {"[" * 101 + "]" * 101}}}', "row 2: not JSON that can be used .nested"),
        ({"prompt": "x", "tools": DEEP}, "row 2: 'tools' is not JSON that can be used .nested more than 100 levels"),
        ('{"prompt": "x", "answer": ' + "1" * 5000 + "}", "row 2: not JSON that can be used .*5000 digits|integer"),
        ('{"prompt": "x", "answer": NaN}', "row 2: 'answer' holds a number that is NaN or infinite"),
        ('{"prompt": "x", "answer": {"outputs": [-Infinity]}}', "row 2: 'answer' holds a number that is NaN"),
        ('{"prompt": "x", "prompt": "y"}', "row 2: not JSON that can be used .the key 'prompt' occurs twice"),
        ('{"messages": [{"role": "user", "content": "x", "content": "y"}]}', "the key 'content' occurs twice"),
        ({"messages": [{"role": "human", "content": "x"}]}, "row 2: a message of the unknown role 'human' .roles are"),
        ({"messages": [{"role": "user"}]}, "row 2: a message without 'content' .role 'user'"),
        ({"messages": [{"role": "user", "content": None}, CHAT[1]]}, "row 2: a message without 'content'"),
        ({"messages": [{"role": "assistant", "tool_calls": []}, CHAT[1]]}, "row 2: a message without 'content'"),
        ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "row 2: message content of type dict"),
        ({"messages": [{"role": "user", "content": True}]}, "row 2: message content of type bool"),
        ({"messages": ["x"]}, "row 2: a message without 'role'"),
        ({"prompt": "x", "data_source": ["a"]}, "row 2: 'data_source' is of type list, not text"),
        ('{"prompt": "x\x00"}', "row 2: not JSON .Invalid control character"),
        ("\x00" * 40, "row 2: not JSON"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named_or_skipped(tmp_path: Path, row: Any, message: str) -> None:
    refused(write(tmp_path / "a.jsonl", {"prompt": "fine"}, row), message)


def test_a_json_list_is_checked_row_by_row(tmp_path: Path) -> None:
    rows = ['{"prompt": "fine"}', '{"prompt": "\\ud83d"}']
    (tmp_path / "a.json").write_text(f"[{', '.join(rows)}]")
    refused(str(tmp_path / "a.json"), "row 2: not text")


def test_what_is_odd_but_right_is_read(tmp_path: Path, tokenizer: Any) -> None:
    lines = [
        '{"prompt": "pair \\ud83d\\ude00"}', '{"prompt": "line \\u2028 separator"}', '{"prompt": "nul \\u0000"}',
        '{"messages": [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "hi"}], "noise": NaN}',
        f'{{"prompt": "x", "answer": {"9" * 4000}}}', f'{{"prompt": "x", "answer": {"[" * 90 + "]" * 90}}}',
    ]  # fmt: skip
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")
    prompts = load_prompts([str(file)])
    assert [p.id for p in prompts.prompts] == [f"a:{i + 1}" for i in range(6)]
    assert prompts.prompts[0].messages[0]["content"] == "pair \U0001f600"
    assert prompts.fingerprint and len(
        drop_long(prompts, lambda p: len(encode_chat(tokenizer, p.messages)), 99).prompts
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", gzip.compress(b'{"prompt": "x"}', mtime=0), "is compressed with gzip; unpack it"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}', mtime=0), "is compressed with gzip; unpack it"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x00", "is compressed with zstd"),
        ("a.parquet", b"PK\x03\x04rest", "is a zip archive"),
        ("a.jsonl", '{"prompt": "x"}'.encode("utf-16"), "is UTF-16 or UTF-32 text; save it as UTF-8"),
        ("a.jsonl", '{"prompt": "x"}'.encode("utf-16-be"), "is UTF-16 text; save it as UTF-8"),
        ("a.json", '[{"prompt": "x"}]'.encode("utf-16-le"), "is UTF-16 text; save it as UTF-8"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS.*git lfs pull"),
        ("a.json", b'{"prompt": "x"}\n{"prompt": "y"}\n', "cannot be read: Extra data.*is called .jsonl"),
        ("a.json", b'"text"', "holds one value of type str; one list of rows is needed"),
        ("a.json", b"[" * 100_000, "cannot be read: it is nested too deeply"),
        ("a.json", b'[{"prompt": "x", "prompt": "y"}]', "the key 'prompt' occurs twice"),
        ("a.json", b"", "cannot be read: Expecting value"),
        ("a.jsonl", b"", "no prompts in"),
        ("a.parquet", b"", "cannot be read"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_prompts([str(tmp_path / name)], skip_bad_rows=True)


def test_parquet_columns_of_wrong_types(tmp_path: Path) -> None:
    def load(**columns: Any) -> None:
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        load_prompts([str(tmp_path / "a.parquet")])

    for column in ([1], [[1]], [b"x"], [{"role": "user"}]):
        with pytest.raises(DataError, match=r"row 1: ('prompt' is neither text nor|a message without 'role')"):
            load(prompt=pyarrow.array(column))
    both = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], ["prompt", "prompt"])
    pyarrow.parquet.write_table(both, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has several columns with the name 'prompt'"):
        load_prompts([str(tmp_path / "a.parquet")])


def test_a_parquet_row_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    column = pyarrow.array([b"fine", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "a.parquet")
    refused(str(tmp_path / "a.parquet"), "row 2: not UTF-8")


def test_a_data_set_of_several_splits_is_refused(tmp_path: Path) -> None:
    import datasets

    part = datasets.Dataset.from_list([{"prompt": "x"}])
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"holds a mapping with \['test', 'train'\]"):
        list(read_rows(str(tmp_path / "d")))
