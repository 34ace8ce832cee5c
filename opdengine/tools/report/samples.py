"""What a report shows of a run's logs: a sample of bounded size, whatever the size of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opdengine.training.token_log import Arrays, TokenLog, read_tokens

STEPS = 24
"""Steps of which rollouts and debates are shown, evenly spaced, the first and the last among them."""
ROWS = 24
"""Most rollouts of a step: the first ones, whose tokens are logged, and others over the whole step."""
FIRST = 8
SCANNED = 64 * 2**20
"""Bytes that are read of one file."""
LONGEST = 12_000
"""Characters of one text."""
MOST_TOKENS = 1500
"""Tokens of one rollout in the heat map."""

PER_TOKEN = (
    "student_logprob", "student_entropy", "sampler_logprob", "policy_logratio", "kl_weight", "advantage", "divergence",
)  # fmt: skip
PER_TEACHER = ("teacher_logprob", "teacher_entropy", "reverse_kl", "mix")


@dataclass
class Budget:
    """How many bytes of JSON may still be taken.

    Args:
        left: bytes.
    """

    left: int

    def take(self, value: Any) -> bool:
        """Whether a value fits; if it does, its bytes are taken."""
        size = len(json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")) + 2
        if size > self.left:
            return False
        self.left -= size
        return True


@dataclass
class Texts:
    """Long texts that occur often (prompts, mostly), once each."""

    values: list[Any] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def place(self, value: Any) -> int:
        """Index of a value among all."""
        key = json.dumps(value, sort_keys=True)
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
        return self._places[key]


def step_files(folder: Path, suffix: str = ".jsonl") -> dict[int, Path]:
    """The files ``step_N`` of a folder, by step."""
    found = {}
    for file in folder.glob(f"step_*{suffix}"):
        number = file.stem.removeprefix("step_")
        if number.isdecimal():
            found[int(number)] = file
    return dict(sorted(found.items()))


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / max(most - 1, 1))] for i in range(most)]


def lines_of(path: Path) -> list[bytes]:
    """The lines of a file, as far as it is read."""
    with path.open("rb") as file:
        return file.readlines(SCANNED)


def rows_of(path: Path, most: int, first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Some rows of a JSONL file with the numbers of their lines; what is no row is passed over."""
    lines = lines_of(path)
    chosen = sorted({*range(min(first, len(lines))), *spread(range(len(lines)), most - first)})
    for number in chosen:
        try:
            row = json.loads(lines[number])
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield number, row


def clean(value: Any, depth: int = 0) -> Any:
    """A value as JSON can hold it and a page can show it: no NaN, no endless text, no depth without end."""
    if isinstance(value, str):
        return shortened(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k)[:200]: clean(v, depth + 1) for k, v in value.items()} if depth < 8 else "..."
    if isinstance(value, list | tuple):
        return [clean(v, depth + 1) for v in value[:1000]] if depth < 8 else "..."
    return value if value is None or isinstance(value, bool | int) else shortened(str(value))


def shortened(text: str) -> str:
    """The beginning of a long text, and how much is missing."""
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}\n[{len(text) - LONGEST:,} more characters in the files of the run]"


def as_text(value: Any) -> str:
    """An answer or the content of a message, whatever its form."""
    if isinstance(value, str):
        return shortened(value)
    return "" if value is None else shortened(json.dumps(value, ensure_ascii=False, default=str))


def chat(messages: Any) -> list[list[str]]:
    """Role and text of every message."""
    rows = [m for m in messages if isinstance(m, Mapping)] if isinstance(messages, list) else []
    return [[str(m.get("role", "")), _written(m)] for m in rows]


def _written(message: Mapping[str, Any]) -> str:
    """What a message says: its content, its thoughts and the tools that it calls."""
    parts = [as_text(message.get("reasoning_content")), as_text(message.get("content"))]
    return "\n".join(part for part in (*parts, as_text(message.get("tool_calls"))) if part)


def rollouts(folder: Path, texts: Texts, budget: Budget) -> dict[str, Any]:
    """Rollouts of some steps with what is known of their tokens, as many as the budget holds.

    Returns:
        ``rows``, and how many ``steps`` of how many ``all_steps`` they are of.
    """
    files, logs = step_files(folder / "rollouts"), step_files(folder / "tokens", ".npz")
    steps = spread(list(files), STEPS)
    taken = []
    for step in steps:
        verdicts = _verdicts(folder, step)
        for place, (line, row) in enumerate(rows_of(files[step], ROWS, FIRST)):
            taken.append((place, step, line, _rollout(step, row, texts, verdicts)))
    shown: list[dict[str, Any]] = []
    unread: list[str] = []
    tokens: dict[int, TokenLog | None] = {}
    for _, step, line, row in sorted(taken, key=lambda item: item[:3]):
        if step not in tokens:
            tokens[step] = _read(logs.get(step), unread)
        log = tokens[step]
        if log is not None and line in log.lines:
            full = {**row, "tok": token_view(log.samples[log.lines.index(line)], log.pieces)}
            if budget.take(full):
                shown.append(full)
                continue
        if budget.take(row):
            shown.append(row)
    shown.sort(key=lambda row: row["step"])
    return {"rows": shown, "steps": len({row["step"] for row in shown}), "all_steps": len(files), "unread": unread}


def _read(path: Path | None, unread: list[str]) -> TokenLog | None:
    if path is None:
        return None
    try:
        return read_tokens(path)
    except (ValueError, OSError) as error:
        unread.append(str(error))
        return None


def _rollout(
    step: int, row: Mapping[str, Any], texts: Texts, verdicts: Mapping[tuple[str, int], Mapping[str, Any]]
) -> dict[str, Any]:
    """A row of the viewer from a row of the log; what older runs did not write is left out."""
    names = ("id", "prompt_id", "data_source", "reward", "drop", "stop_reason", "tokens", "policy_version", "group")
    found = {"step": step, **{name: clean(row[name]) for name in names if row.get(name) not in (None, "")}}
    found |= {name: clean(row[name]) for name in ("success", "score", "teachers") if row.get(name) not in (None, [])}
    found["prompt"] = texts.place(chat(row.get("prompt")))
    if row.get("answer") is not None:
        found["answer"] = texts.place(as_text(row["answer"]))
    own = str(row.get("trajectory") or row.get("id", ""))
    if isinstance(row.get("turns"), list):
        found["turns"] = _turns(row["turns"], own, verdicts)
    else:
        found["text"] = as_text(row.get("text"))
    return found


def _turns(turns: Sequence[Any], rollout: str, verdicts: Mapping[tuple[str, int], Any]) -> list[dict[str, Any]]:
    shown, number = [], 0
    for turn in turns:
        if not isinstance(turn, Mapping):
            continue
        told = {name: clean(turn[name]) for name in ("failure", "action", "stop_reason") if turn.get(name)}
        one = {"role": str(turn.get("role", "")), "chat": chat(turn.get("messages")), **told}
        if one["role"] == "assistant":
            if (rollout, number) in verdicts:
                one["verdict"] = verdicts[rollout, number]
            number += 1
        shown.append(one)
    return shown


def _verdicts(folder: Path, step: int) -> dict[tuple[str, int], dict[str, Any]]:
    """What SAGE's judge said, by rollout and turn."""
    path = folder / "verdicts" / f"step_{step}.jsonl"
    if not path.is_file():
        return {}
    rows = (row for _, row in rows_of(path, 10_000))
    return {
        (str(row.get("rollout_id")), int(row["turn"])): {
            "label": as_text(row.get("verdict")), "weight": clean(row.get("weight")), "reply": as_text(row.get("reply"))
        }
        for row in rows
        if isinstance(row.get("turn"), int)
    }  # fmt: skip


def token_view(arrays: Arrays, pieces: Mapping[int, str]) -> dict[str, Any]:
    """The targets of a rollout as numbers: a list for each field (or for each teacher), or one number for all alike."""
    ids = arrays["token_ids"][arrays["is_target"]][:MOST_TOKENS]
    view: dict[str, Any] = {"p": [pieces.get(int(token), f"[{token}]") for token in ids]}
    view["more"] = int(arrays["is_target"].sum()) - len(ids)
    for name in PER_TOKEN:
        if name in arrays:
            view[name] = _numbers(arrays[name][:MOST_TOKENS])
    for name in PER_TEACHER:
        if name in arrays:
            value = arrays[name]
            rows = np.broadcast_to(value, (len(ids), len(value))) if value.ndim == 1 else value[:MOST_TOKENS]
            view[name] = [_numbers(column) for column in rows.T]
    if "alternatives" in arrays:
        listed = zip(arrays["alternatives"][:MOST_TOKENS], arrays["alternatives_logprob"], strict=False)
        view["top"] = [
            [[pieces.get(int(i), f"[{i}]"), round(math.exp(p), 4)] for i, p in zip(a.ravel(), b.ravel(), strict=True)
             if i >= 0 and np.isfinite(p)]
            for a, b in listed
        ]  # fmt: skip
    return view


def _numbers(values: np.ndarray) -> Any:
    """Four decimals; one number where all are alike; null where nothing is known."""
    if len(values) and np.isfinite(values[0]) and (values == values[0]).all():
        return round(float(values[0]), 4)
    rounded = np.round(values.astype(np.float64), 4)
    return [value if math.isfinite(value) else None for value in rounded.tolist()]


def debates(folder: Path, texts: Texts, prompts: Mapping[str, int], budget: Budget) -> list[dict[str, Any]]:
    """Debates of some steps, with the prompt where a shown rollout has it."""
    files, taken = step_files(folder / "debates"), []
    for step in spread(list(files), STEPS):
        for place, (_, row) in enumerate(rows_of(files[step], FIRST)):
            taken.append((place, step, row))
    shown = []
    for _, step, row in sorted(taken, key=lambda item: item[:2]):
        names = ("prompt_id", "teachers", "rounds", "confidences", "weights", "problems", "failed")
        one = {"step": step, **{name: clean(row.get(name)) for name in names}}
        if str(row.get("prompt_id")) in prompts:
            one["prompt"] = prompts[str(row.get("prompt_id"))]
        if budget.take(one):
            shown.append(one)
    return sorted(shown, key=lambda row: row["step"])


def evaluations(folder: Path, texts: Texts, budget: Budget) -> list[dict[str, Any]]:
    """Answers to the evaluation prompts, the same prompts at some steps: how they change."""
    files, taken = step_files(folder / "evaluations"), []
    for step in spread(list(files), 6):
        for place, (_, row) in enumerate(rows_of(files[step], ROWS)):
            taken.append((place, step, row))
    shown = []
    for _, step, row in sorted(taken, key=lambda item: item[:2]):
        one = {
            "step": step, "id": as_text(row.get("prompt_id") or row.get("task")), "score": clean(row.get("score")),
            "split": as_text(row.get("split")), "data_source": as_text(row.get("data_source")),
            "prompt": texts.place(chat(row.get("prompt"))), "answer": texts.place(as_text(row.get("answer"))),
        }  # fmt: skip
        if "messages" in row:
            one |= {"chat": chat(row["messages"]), "success": clean(row.get("success"))}
        else:
            one["text"] = as_text(row.get("text"))
        if budget.take(one):
            shown.append(one)
    return sorted(shown, key=lambda row: (row["id"], row["step"]))
