"""Rows of public data sets as rows of ours: ``id, prompt or messages, tools, answer, data_source``.

A format is mostly a table of columns; see :data:`FORMATS`. Use one with
``train_data: [{path: deepmath.parquet, format: deepmath}]``, or map columns of your own with
``columns: {prompt: question, answer: solution.final}``.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opdengine.config.sections import DataConfig
from opdengine.data.benchmarks import evalplus, livecodebench
from opdengine.data.files import parse_json
from opdengine.data.rows import chat_of_text
from opdengine.errors import ConfigError

Row = Mapping[str, Any]

BOXED = "\n\nReason step by step and put the final answer into \\boxed{}."
LETTER = '\n\nThink first; the last line is "Answer: " and the letter of the right option.'
PROGRAM = "\n\nWrite the whole program in Python, in one code block."
TAGGED = "\n\nGive the final answer between <answer> and </answer>."


class NotSelected(Exception):
    """A sound row that the source leaves out; the text is the reason, counted."""


@dataclass(frozen=True)
class Format:
    """The layout of the rows of one kind of data set.

    Args:
        columns: our name -> dotted places in the row; the first that is there counts.
        change: makes the rest out of the row and what the columns gave.
        data_source: routing key where neither the row nor the source says one.
        suffix: appended to the last user message.
    """

    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    change: Callable[[Row, dict[str, Any]], None] | None = None
    data_source: str = ""
    suffix: str = ""


def adapt(row: Any, source: DataConfig) -> Any:
    """One row in our columns; what is not a mapping passes, to be refused with all other bad rows.

    Raises:
        NotSelected: ``where`` or the format leaves it out.
        ValueError: a column is missing or malformed; says which.
    """
    if not isinstance(row, Mapping):
        return row
    for place, wanted in source.where.items():
        if not _matches(look_up(row, place), wanted):
            raise NotSelected(f"where {place}")
    form = find_format(source.format)
    columns = {**form.columns, **{name: [place] for name, place in source.columns.items()}}
    found = {} if form.columns else dict(row)
    if {"prompt", "messages"} & {*columns}:  # what the student is asked stands there and nowhere else
        found = {name: value for name, value in found.items() if name not in ("prompt", "messages")}
    found |= {name: _first(row, places) for name, places in columns.items()}
    if columns and "prompt" in found and not isinstance(found["prompt"], str):
        found["messages"] = found.pop("prompt")
    if form.change is not None:
        form.change(row, found)
    if source.data_source is not None:
        found["data_source"] = source.data_source
    elif form.data_source and found.get("data_source") in (None, ""):
        found["data_source"] = form.data_source
    suffix = form.suffix if source.suffix is None else source.suffix
    if suffix or source.system is not None:
        found["messages"] = _reword(found, source.system, suffix)
        found.pop("prompt", None)
    return found


def find_format(name: str) -> Format:
    """A format by name.

    Raises:
        ConfigError: there is none.
    """
    if name not in FORMATS:
        raise ConfigError(f"data format {name!r} is not known; choose one of {sorted(FORMATS)}, or set 'columns'")
    return FORMATS[name]


def look_up(row: Any, place: str) -> Any:
    """Return the value at a dotted place, or None; JSON text is read on the way."""
    for part in place.split("."):
        if isinstance(row, str):
            try:
                row = parse_json(row)
            except ValueError:
                return None
        if isinstance(row, Sequence) and part.isdigit() and int(part) < len(row):
            row = row[int(part)]
        elif isinstance(row, Mapping):
            row = row.get(part)
        else:
            return None
    return row


def _first(row: Row, places: Sequence[str]) -> Any:
    return next((value for place in places if (value := look_up(row, place)) is not None), None)


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return False
        return bool(wanted.get("min", number) <= number <= wanted.get("max", number))
    return value in wanted if isinstance(wanted, list) else bool(value == wanted)


def _reword(row: dict[str, Any], system: str | None, suffix: str) -> Any:
    """The messages with another system message (none if it is empty) and an addition to the last user message."""
    column = "messages" if row.get("messages") is not None else "prompt"
    content = row.get(column)
    if isinstance(content, str):
        content = chat_of_text(content, column)
    if not isinstance(content, (list, tuple)) or not all(isinstance(m, Mapping) for m in content):
        return content
    messages = [dict(m) for m in content if system is None or m.get("role") != "system"]
    users = [m for m in messages if m.get("role") == "user" and isinstance(m.get("content"), (str, list, tuple))]
    if users and suffix:
        content = users[-1]["content"]
        more = [{"type": "text", "text": suffix}]
        users[-1]["content"] = content + suffix if isinstance(content, str) else [*content, *more]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _text_only(row: Row, found: dict[str, Any]) -> None:
    """Leave out rows with pictures."""
    if any(row.get(name) is not None and len(row[name]) for name in ("images", "image", "videos")):
        raise NotSelected("with images")


def _eurus(row: Row, found: dict[str, Any]) -> None:
    """Tests of programs are JSON text of ``inputs``, ``outputs`` and, where a function is asked for, ``fn_name``."""
    if found["data_source"] != "code":
        return
    tests = look_up(row, "reward_model.ground_truth")
    tests = parse_json(tests) if isinstance(tests, str) else tests
    if not isinstance(tests, Mapping) or not tests.get("inputs"):
        raise ValueError("reward_model.ground_truth holds no 'inputs'")
    inputs, outputs = tests["inputs"], tests.get("outputs", [])
    if tests.get("fn_name"):
        inputs = [[parse_json(line) for line in i.splitlines()] if isinstance(i, str) else i for i in inputs]
        outputs = [parse_json(o) if isinstance(o, str) else o for o in outputs]
        found["answer"] = {"entry": tests["fn_name"], "inputs": inputs, "outputs": outputs, "alternatives": True}
    else:
        joined = [["\n".join(map(str, t)) if isinstance(t, list) else str(t) for t in ts] for ts in (inputs, outputs)]
        found["answer"] = {"inputs": joined[0], "outputs": joined[1]}
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} test inputs but {len(outputs)} outputs")


def _until_last_question(row: Row, found: dict[str, Any]) -> None:
    """Answers at the end are the data's, not the student's."""
    messages = found["messages"]
    if isinstance(messages, str):
        messages = chat_of_text(messages, "messages")
    if not isinstance(messages, (list, tuple)):
        raise ValueError("no list of messages")
    messages = list(messages)
    while messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
        messages.pop()
    system = row.get("system_prompt")
    if system and messages and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": system})
    found["messages"] = messages


def _answered(row: Row, found: dict[str, Any]) -> None:
    """The answer at the end of a chat is the column ``completion``; what stands before it is the prompt."""
    names = ("messages", "conversations", "conversation")
    messages = next((found.pop(name) for name in names if found.get(name) is not None), None)
    if isinstance(messages, str):
        messages = chat_of_text(messages, "messages")
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"no list of messages in any of {list(names)} (columns: {sorted(map(str, row))})")
    messages = [_in_roles(message) for message in messages]
    last = messages[-1] if messages else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise ValueError("the last message is not the assistant's, so there is no answer")
    found.update(messages=messages[:-1], completion=last)


def _in_roles(message: Any) -> Any:
    """A message of ``from`` and ``value`` in the names of everybody else."""
    if not isinstance(message, Mapping) or "role" in message or "from" not in message:
        return message
    role = {"human": "user", "gpt": "assistant"}.get(message["from"], message["from"])
    return {"role": role, "content": message.get("value")}


def _options(row: Row, found: dict[str, Any]) -> None:
    """Question and options as text; the answer as a letter."""
    options, labels = found.pop("options", None), found.pop("labels", None)
    if options is None:
        options = [row.get(name) for name in ("opa", "opb", "opc", "opd")]
    texts, labels = _labelled(options, labels)
    place = _place(found.get("answer"), texts, labels)
    if not isinstance(found.get("prompt"), str):
        raise ValueError("no question")
    # The verifier looks for a letter.
    letters = labels if {*labels} <= {*string.ascii_uppercase} else string.ascii_uppercase[: len(texts)]
    found["answer"] = letters[place]
    found["prompt"] += "\n\n" + "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))


def _labelled(options: Any, labels: Any) -> tuple[list[Any], list[str]]:
    """Texts and labels of options; without labels of their own the letters stand for them.

    Args:
        options: a list of texts, of mappings of a label and a text, or a mapping from labels to texts.
        labels: of the texts, where they are given apart.

    Raises:
        ValueError: there are fewer than two, or labels do not tell them apart.
    """
    if isinstance(options, Mapping) and {"text", "label"} <= {*options}:
        options, labels = options["text"], options["label"]
    if isinstance(options, Sequence) and options and all(isinstance(o, Mapping) for o in options):
        labels = [o.get("key", o.get("label")) for o in options]
        options = [o.get("value", o.get("text")) for o in options]
    elif isinstance(options, Mapping):
        labels, options = list(options), list(options.values())
    if not isinstance(options, Sequence) or isinstance(options, str) or any(o is None for o in options):
        raise ValueError("no options to choose from")
    if not 2 <= len(options) <= len(string.ascii_uppercase):
        raise ValueError(f"no options to choose from ({len(options)} of them; from 2 to 26 have letters)")
    if labels is None:
        labels = string.ascii_uppercase[: len(options)]
    labels = [_bare(label) for label in labels]
    if len(set(labels)) < len(labels) or len(labels) != len(options) or not all(labels):
        raise ValueError(f"the labels of the options do not tell them apart ({labels})")
    return list(options), labels


def _place(answer: Any, texts: Sequence[Any], labels: Sequence[str]) -> int:
    """Which option an answer names: by its label, by its place from 0 where labels are letters, or by its text.

    Raises:
        ValueError: none, or more than one.
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, (str, int)):
        raise ValueError("the answer is none of the options")
    said = _bare(answer)
    if said in labels:
        return labels.index(said)
    places = {i for i, text in enumerate(texts) if isinstance(answer, str) and _same(answer, text)}
    # Beside labels that are numbers, a number is a label and never a place.
    if said.isdecimal() and int(said) < len(texts) and not any(label.isdecimal() for label in labels):
        places.add(int(said))
    if len(places) > 1:
        raise ValueError(f"the answer is more than one of the options ({answer!r})")
    if not places:
        raise ValueError("the answer is none of the options")
    return places.pop()


def _bare(label: Any) -> str:
    """A label without its punctuation, in capitals: "b", "(b)", "B." and "B)" are all "B"."""
    text = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
    return re.sub(r"^[\s(\[]*(.*?)[\s.):\]]*$", r"\1", text, flags=re.DOTALL).upper()


def _same(one: str, other: Any) -> bool:
    return one.strip().casefold() == str(other).strip().casefold()


def _human_eval(row: Row, found: dict[str, Any]) -> None:
    for name in ("test", "entry_point"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"no {name!r}")
    entry = row["entry_point"]
    test = f"{row['test']}\ncheck({entry})"
    found["answer"] = {"entry": entry, "prefix": f"{found['prompt']}\n", "test": test}
    found["prompt"] = f"Complete this function.\n\n```python\n{found['prompt']}\n```"


def _mbpp(row: Row, found: dict[str, Any]) -> None:
    tests = row.get("test_list")
    if not isinstance(tests, (list, tuple)) or not tests:
        raise ValueError("no 'test_list'")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    found["answer"] = {"test": "\n".join([setup, *tests])}
    found["prompt"] = f"{found['prompt']}\n\nYour code should pass this test:\n{tests[0]}"


_VERL = {
    "messages": ("prompt", "problem", "question"),
    "answer": ("reward_model.ground_truth", "answer"),
    "data_source": ("ability", "data_source"),
}

FORMATS: dict[str, Format] = {
    # Ours: nothing is changed.
    "prompts": Format(),
    # Chats as for supervised fine-tuning, in the layout of TRL or of ShareGPT.
    "sft": Format(change=_answered),
    # zwhe99/DeepMath-103K
    "deepmath": Format({"prompt": ["question"], "answer": ["final_answer"]}, data_source="math", suffix=BOXED),
    # What is made for verl: a chat, an ability, a reference answer.
    "verl": Format(_VERL, _text_only),
    # PRIME-RL/Eurus-2-RL-Data: mathematics and programs.
    "eurus": Format(_VERL, _eurus),
    # The same with the rows that have pictures, marked with <image> in the question.
    "verl_images": Format({**_VERL, "images": ("images", "image")}),
    # OpenMMReasoner: the rows without pictures, and all of them.
    "openmmreasoner_images": Format({**_VERL, "images": ("images", "image")}, data_source="math"),
    "openmmreasoner": Format(_VERL, _text_only, data_source="math"),
    # nvidia/Nemotron-Post-Training-Dataset-v1, -v2 and Llama-Nemotron-Post-Training-Dataset: questions only.
    "nemotron": Format(
        {"id": ["uuid"], "messages": ["messages", "input"], "tools": ["tools"], "data_source": ["category"]},
        _until_last_question,
    ),
    # GBaker/MedQA-USMLE-4-options, bigbio and the original: options as a mapping or as key and value.
    "medqa": Format(
        {"prompt": ["question"], "options": ["options"], "answer": ["answer_idx", "answer"]},
        _options,
        data_source="medical",
        suffix=LETTER,
    ),
    # openlifescienceai/medmcqa
    "medmcqa": Format(
        {"id": ["id"], "prompt": ["question"], "answer": ["cop"]}, _options, data_source="medical", suffix=LETTER
    ),
    # MMLU and its like: a list of choices and the number of the right one.
    "multiple_choice": Format(
        {
            "id": ["id"],
            "prompt": ["question"],
            "options": ["choices.text", "choices", "options"],
            "labels": ["choices.label"],
            "answer": ["answer"],
        },
        _options,
        suffix=LETTER,
    ),
    # Generated: see opdengine.verifiers.reasoning_tasks.
    "reasoning_gym": Format(suffix=TAGGED),
    "humaneval": Format({"id": ["task_id"], "prompt": ["prompt"]}, _human_eval, data_source="code", suffix=PROGRAM),
    # HumanEval+ and MBPP+, as evalplus keeps them.
    "evalplus": Format({"id": ["task_id"]}, evalplus.problem, data_source="code", suffix=PROGRAM),
    # livecodebench/code_generation_lite
    "livecodebench": Format({"id": ["question_id"]}, livecodebench.problem, data_source="code", suffix=PROGRAM),
    "mbpp": Format({"id": ["task_id"], "prompt": ["text", "prompt"]}, _mbpp, data_source="code", suffix=PROGRAM),
}
"""By name."""
