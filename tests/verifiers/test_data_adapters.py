"""Small files in the layout of public data sets become prompts with answers that their verifiers accept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opdengine.config.loading import from_mapping, load_config, to_mapping
from opdengine.config.sections import DataConfig
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.data.prompts import DataError, PromptSet, load_prompts
from opdengine.types import Prompt
from opdengine.verifiers.grader import Grader
from opdengine.verifiers.score import VerifierSettings

SUM = "def total(xs):\n    return sum(xs)\n"
SUM_PROGRAM = "n = int(input())\nprint(sum(map(int, input().split())))\n"
CHAT = [{"role": "system", "content": "Think in steps."}, {"role": "user", "content": "What is 2 + 2?"}]


def verl(ability: str, truth: Any, **more: Any) -> dict[str, Any]:
    return {
        "data_source": "numina_olympiads",
        "prompt": CHAT,
        "ability": ability,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": 0, "split": "train"},
        **more,
    }


FUNCTION_TESTS = json.dumps({"fn_name": "total", "inputs": [[[1, 2]], [[]]], "outputs": [[3], [0]]})
PROGRAM_TESTS = json.dumps({"inputs": ["2\n1 2\n", ["1", "5"]], "outputs": ["3\n", ["5"]]})
HUMAN_EVAL = {
    "task_id": "HumanEval/900",
    "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum."""\n',
    "canonical_solution": "    return sum(xs)\n",
    "test": "M = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    "entry_point": "total",
}
MBPP = {
    "task_id": 601,
    "text": "Write a function total that adds up a list.",
    "code": SUM,
    "test_list": ["assert total([1, 2]) == 3", "assert total([]) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
MEDQA = {"question": "Which vitamin?", "answer": "C", "options": {"A": "B12", "B": "K", "C": "C"}, "answer_idx": "C"}
MEDMCQA = {"id": "x1", "question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2, "exp": None}
NEMOTRON = {
    "uuid": "u-1",
    "category": "stem",
    "reasoning": "on",
    "messages": [
        {"role": "user", "content": "Why?", "tool_calls": []},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "And why that?"},
        {"role": "assistant", "content": "The data's own answer."},
    ],
    "metadata": "{}",
}
DEEPMATH = {
    "question": "Halve one.",
    "final_answer": "\\frac{1}{2}",
    "difficulty": 6.5,
    "topic": "X",
    "r1_solution_1": "s",
}

# format, row, a right completion, a wrong one, verifier, data_source, and a part of the prompt.
CASES: dict[str, tuple[str, dict[str, Any], str, str, str, str, str]] = {
    "deepmath": ("deepmath", DEEPMATH, "So \\boxed{0.5}.", "\\boxed{2}", "math", "math", "\\boxed{}"),
    "verl": ("verl", verl("math", "4", images=None), "\\boxed{4}", "\\boxed{5}", "math", "math", "What is 2 + 2?"),
    "eurus_math": ("eurus", verl("math", "4"), "\\boxed{4}", "\\boxed{5}", "math", "math", "What is 2 + 2?"),
    "eurus_function": ("eurus", verl("code", FUNCTION_TESTS), SUM, "def total(xs): return 3", "code", "code", "2 + 2"),
    "eurus_program": ("eurus", verl("code", PROGRAM_TESTS), SUM_PROGRAM, "print(3)", "code", "code", "2 + 2"),
    "openmmreasoner": ("openmmreasoner", verl("", "4", images=[]), "$4$", "$5$", "math", "math", "2 + 2"),
    "medqa": ("medqa", MEDQA, "Answer: C", "Answer: A", "choice", "medical", "A. B12\nB. K\nC. C"),
    "medmcqa": ("medmcqa", MEDMCQA, "Answer: C", "Answer: D", "choice", "medical", "D. d"),
    "mmlu": (
        "multiple_choice",
        {"question": "Which?", "choices": ["x", "y"], "answer": 1, "subject": "s"},
        "(B)",
        "(A)",
        "choice",
        "",
        "B. y",
    ),
    "humaneval": ("humaneval", HUMAN_EVAL, f"```python\n{SUM}```", "    return 3\n", "code", "code", "def total(xs"),
    "mbpp": ("mbpp", MBPP, f"```\n{SUM}```", "def total(xs): return 3", "code", "code", "assert total([1, 2]) == 3"),
}


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def load(folder: Path, rows: list[Any], skip: bool = False, **settings: Any) -> PromptSet:
    return load_prompts([DataConfig(write(folder, rows), **settings)], skip_bad_rows=skip)


def one(folder: Path, row: Any, **settings: Any) -> Prompt:
    (prompt,) = load(folder, [row], **settings).prompts
    return prompt


@pytest.fixture(scope="module")
def grader() -> Any:
    verifiers = {name: name for name in ("math", "code", "choice")}
    with Grader(verifiers, VerifierSettings(workers=1)) as grader:
        yield grader


@pytest.mark.parametrize("name", CASES)
def test_a_row_becomes_a_prompt_that_its_verifier_can_grade(name: str, tmp_path: Path, grader: Grader) -> None:
    form, row, right, wrong, verifier, key, part = CASES[name]
    prompt = one(tmp_path, row, format=form)
    assert prompt.key == key and part in prompt.messages[-1]["content"]
    scores = grader.grade([right, wrong], 2 * [Prompt(prompt.id, prompt.messages, key=verifier, answer=prompt.answer)])
    assert [(s.value, s.failure) for s in scores] == [(1, ""), (0, "")], scores


LETTERED = ["A", "B", "C", "D"]


@pytest.mark.parametrize(
    ("labels", "key", "expected"),
    [
        (LETTERED, "C", "C"),
        (["1", "2", "3", "4"], "1", "A"),
        (["1", "2", "3", "4"], "4", "D"),
        ([1, 2, 3, 4], 4, "D"),
        (["0", "1", "2", "3"], "0", "A"),
        ([0, 1, 2, 3], 3.0, "D"),
        (["a", "b", "c", "d"], "c", "C"),
        (["A.", "B.", "C.", "D."], "C", "C"),
        (LETTERED, "(c)", "C"),
        (["i)", "ii)", "iii)", "iv)"], "iii", "C"),
        (["D", "C", "B", "A"], "D", "D"),  # printed first
        (LETTERED, "Y ", "C"),
        (None, "Y", "C"),
        (None, "c", "C"),
        (None, 2, "C"),
        (None, "2", "C"),
        (LETTERED, 2, "C"),
        (["1", "2", "3", "4"], "0", None),
        (["1", "2", "3", "4"], 5, None),
        (LETTERED, "E", None),
        (LETTERED, True, None),
        (LETTERED, None, None),
        (["A", "A", "B", "C"], "A", None),
        (["A", "B"], "A", None),
    ],
)
def test_an_answer_is_found_by_label_place_or_text(tmp_path: Path, labels: Any, key: Any, expected: Any) -> None:
    texts = ["w", "x", "y", "z"]
    choices: Any = texts if labels is None else {"text": texts, "label": labels}
    shapes = [{"question": "Which?", "choices": choices, "answerKey": key}]
    if labels is not None and len(labels) == len(texts):
        pairs = [{"label": label, "text": text} for label, text in zip(labels, texts, strict=True)]
        shapes.append({**shapes[0], "choices": pairs})
    for row in shapes:
        if expected is None:
            reasons = "the answer is none of the options|the labels of the options|no row has anything at 'answerKey'"
            with pytest.raises(DataError, match=reasons):
                one(tmp_path, row, format="multiple_choice", columns={"answer": "answerKey"})
            continue
        prompt = one(tmp_path, row, format="multiple_choice", columns={"answer": "answerKey"})
        assert prompt.answer == expected
        place = labels.index("D") if labels == ["D", "C", "B", "A"] else "ABCD".index(expected)
        assert f"\n{expected}. {texts[place]}" in prompt.messages[0]["content"]


def test_a_number_that_is_a_place_and_another_options_text_is_refused(tmp_path: Path) -> None:
    row = {"question": "1 + 1?", "choices": ["4", "3", "2", "1"], "answer": "1"}
    with pytest.raises(DataError, match="the answer is more than one of the options"):
        one(tmp_path, row, format="multiple_choice")
    assert one(tmp_path, {**row, "answer": 1}, format="multiple_choice").answer == "B"
    assert one(tmp_path, {**row, "choices": ["0", "1", "2"]}, format="multiple_choice").answer == "B"


def test_parquet_files_are_read_in_the_same_layout(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "eurus.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([verl("code", PROGRAM_TESTS), verl("math", "4")]), file)
    code, mathematics = load_prompts([DataConfig(str(file), format="eurus")]).prompts
    assert code.answer == {"inputs": ["2\n1 2\n", "1\n5"], "outputs": ["3\n", "5"]} and mathematics.answer == "4"
    assert [m["role"] for m in code.messages] == ["system", "user"]


def test_nemotron_rows_end_with_the_last_question(tmp_path: Path) -> None:
    prompt = one(tmp_path, NEMOTRON, format="nemotron")
    assert (prompt.id, prompt.key, prompt.answer) == ("u-1", "stem", None)
    assert [m["content"] for m in prompt.messages] == ["Why?", "Because.", "And why that?"]
    older = {
        "input": [{"role": "user", "content": "Hi"}],
        "output": "Hello",
        "category": "chat",
        "system_prompt": "Be kind",
    }
    prompt = one(tmp_path, older, format="nemotron")
    assert [m["content"] for m in prompt.messages] == ["Be kind", "Hi"]
    assert (
        one(tmp_path, {**older, "input": "Hi", "system_prompt": ""}, format="nemotron").messages[0]["content"] == "Hi"
    )


def test_rows_are_selected_by_their_values_and_counted(tmp_path: Path) -> None:
    rows = [
        {**DEEPMATH, "difficulty": d, "topic": t} for d, t in ((5, "a"), (6, "a"), (7.5, "b"), (None, "a"), (9, "c"))
    ]
    found = load(tmp_path, rows, format="deepmath", where={"difficulty": {"min": 6}, "topic": ["a", "b"]})
    assert len(found.prompts) == 2
    assert found.dropped == {"not_selected/where difficulty": 2, "not_selected/where topic": 1}
    nested = load(tmp_path, [verl("math", "4"), verl("code", PROGRAM_TESTS)], format="eurus", where={"ability": "math"})
    assert len(nested.prompts) == 1
    with pytest.raises(DataError, match="not_selected/where topic"):
        load(tmp_path, rows, format="deepmath", where={"topic": "z"})


def test_rows_with_pictures_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [verl("math", "4", images=[{"bytes": "x"}]), verl("math", "4", images=[])]
    found = load(tmp_path, rows, format="openmmreasoner")
    assert len(found.prompts) == 1 and found.dropped == {"not_selected/with images": 1}


@pytest.mark.parametrize("source", [{"format": "prompts"}, {"format": "deepmath", "columns": {"data_source": "tag"}}])
def test_a_data_source_of_0_is_one(tmp_path: Path, source: dict[str, Any]) -> None:
    row = {"prompt": "2 + 2?", "question": "2 + 2?", "final_answer": "4", "data_source": 0, "tag": 0}
    assert one(tmp_path, row, **source).key == "0"


def test_columns_of_ones_own(tmp_path: Path) -> None:
    row = {"q": {"text": "2 + 2?"}, "solution": json.dumps({"final": ["4", "four"]}), "tag": "sums", "n": 17}
    columns = {"id": "n", "prompt": "q.text", "answer": "solution.final.1", "data_source": "tag"}
    prompt = one(tmp_path, row, columns=columns)
    assert (prompt.id, prompt.answer, prompt.key) == ("17", "four", "sums")
    assert prompt.messages == ({"role": "user", "content": "2 + 2?"},) and prompt.extra == row
    chat = one(tmp_path, {"conversation": CHAT}, columns={"prompt": "conversation"}, data_source="mine")
    assert len(chat.messages) == 2 and chat.key == "mine"
    with pytest.raises(ConfigError, match=r"data.columns=.*\['question'\] are no columns of ours"):
        DataConfig("x.jsonl", columns={"question": "q"})


def test_columns_beside_those_that_are_named_keep_their_names(tmp_path: Path) -> None:
    row = {
        "question": "2 + 2?",
        "answer": "4",
        "response": "It is 4.",
        "messages": [{"role": "user", "content": "Hm?"}],
    }
    prompt = one(tmp_path, row, columns={"prompt": "question", "completion": "response"})
    assert prompt.messages == ({"role": "user", "content": "2 + 2?"},) and prompt.answer == "4"
    assert prompt.extra["completion"] == prompt.extra["response"] == "It is 4."


def test_a_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    rows = [{"question": "2 + 2?", "gold": None}, {"question": "1 + 1?", "gold": "2"}]
    found = load(tmp_path, rows, columns={"prompt": "question", "answer": "gold"})
    assert [p.answer for p in found.prompts] == [None, "2"]
    with pytest.raises(
        DataError, match=r"at 'gould', which columns.answer names; its columns are \['gold', 'question'\]"
    ):
        load(tmp_path, rows, columns={"prompt": "question", "answer": "gould"})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*CHAT, {"role": "assistant", "content": "4"}], "source": "a"},
        {
            "conversations": [
                {"from": "system", "value": "Think in steps."},
                {"from": "human", "value": "What is 2 + 2?"},
                {"from": "gpt", "value": "4"},
            ],
            "source": "a",
        },
    ],
)
def test_chats_for_supervised_training_end_with_the_given_answer(tmp_path: Path, row: dict[str, Any]) -> None:
    prompt = one(tmp_path, row, format="sft")
    assert [*prompt.messages] == CHAT
    assert prompt.extra == {"completion": {"role": "assistant", "content": "4"}, "source": "a"}
    unanswered = {"messages": CHAT}
    with pytest.raises(DataError, match="the last message is not the assistant's, so there is no answer"):
        load(tmp_path, [unanswered], format="sft")


def test_rows_without_a_prompt_or_with_an_answer_are_told_the_way(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"columns: \{prompt: ITS_NAME\}"):
        load(tmp_path, [{"question": "2 + 2?"}])
    with pytest.raises(DataError, match="path: FILE, format: sft"):
        load(tmp_path, [{"messages": [*CHAT, {"role": "assistant", "content": "4"}]}])


def test_system_and_suffix_replace_those_of_the_data(tmp_path: Path) -> None:
    prompt = one(tmp_path, verl("math", "4"), format="verl", system="Be brief.", suffix=" Please.")
    assert [m["content"] for m in prompt.messages] == ["Be brief.", "What is 2 + 2? Please."]
    assert len(one(tmp_path, verl("math", "4"), format="verl", system="").messages) == 1
    assert one(tmp_path, DEEPMATH, format="deepmath", suffix="").messages[-1]["content"] == "Halve one."


BAD = [
    ("deepmath", {"final_answer": "1"}, "neither 'prompt' nor 'messages'"),
    ("eurus", verl("code", "no JSON"), "Expecting value"),
    ("eurus", verl("code", json.dumps({"inputs": ["1"], "outputs": []})), "1 test inputs but 0 outputs"),
    ("eurus", verl("code", "{}"), "holds no 'inputs'"),
    ("medqa", {**MEDQA, "answer_idx": "E"}, "the answer is none of the options"),
    ("medqa", {**MEDQA, "options": None}, "no options to choose from"),
    ("medmcqa", {**MEDMCQA, "cop": -1}, "the answer is none of the options"),
    ("medmcqa", {**MEDMCQA, "opd": None}, "no options to choose from"),
    ("humaneval", {**HUMAN_EVAL, "test": None}, "no 'test'"),
    ("mbpp", {**MBPP, "test_list": []}, "no 'test_list'"),
    (
        "nemotron",
        {**NEMOTRON, "messages": [{"role": "assistant", "content": "x"}]},
        "neither text nor a non-empty list",
    ),
    ("nemotron", {"uuid": "1"}, "no list of messages"),
    ("deepmath", ["no", "mapping"], "not a JSON object"),
]


@pytest.mark.parametrize(("form", "row", "problem"), BAD, ids=[f"{form}{i}" for i, (form, _, _) in enumerate(BAD)])
def test_malformed_rows_are_named_or_skipped_with_a_count(form: str, row: Any, problem: str, tmp_path: Path) -> None:
    good = {row[0]: row[1] for row in CASES.values()} | {"nemotron": NEMOTRON}
    with pytest.raises(
        DataError, match=r"1 of 2 rows cannot be used:\n.*rows.jsonl, row 2: .*" + problem.replace("(", ".")
    ):
        load(tmp_path, [good[form], row], format=form)
    found = load(tmp_path, [good[form], row], skip=True, format=form)
    assert len(found.prompts) == 1 and sum(found.dropped.values()) == 1


def test_an_unknown_format_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="data format 'deepmaths' is not known; choose one of"):
        load_prompts([DataConfig("missing.jsonl", format="deepmaths")])


def test_sources_in_the_configuration_are_paths_or_sections(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\noutput_dir: o\nteachers: [{model: t}]\nmethod: opd\ntrain_data:\n"
        "  - plain.jsonl\n  - {path: deep.parquet, format: deepmath, where: {difficulty: {min: 6}}}\n"
        "verifier: {math: math, default: exact_match}\n"
    )
    config = load_config(str(file), ["--train_data.1.data_source", "hard"])
    section = DataConfig("deep.parquet", "deepmath", "hard", where={"difficulty": {"min": 6}})
    assert config.train_data == ["plain.jsonl", section]
    assert from_mapping(TrainConfig, to_mapping(config)) == config
    with pytest.raises(ConfigError, match=r"unknown setting 'train_data.0.fromat'; did you mean 'train_data.0.format'"):
        load_config(str(file), ["--train_data", "[{path: x, fromat: deepmath}]"])
