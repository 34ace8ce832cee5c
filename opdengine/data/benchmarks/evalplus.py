"""HumanEval+ and MBPP+, whose problems ``evalplus`` downloads from GitHub and keeps in its cache.

Rows of their files: ``task_id, prompt, entry_point, canonical_solution, base_input, plus_input, atol``.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opdengine.data.benchmarks import without_parts
from opdengine.workers.plain import encode

SECONDS = 30.0
"""Without a sign of life a download has failed."""


def human_eval_rows(parts: list[str]) -> list[Any]:
    """The problems of HumanEval+."""
    from evalplus.data.humaneval import _ready_human_eval_plus_path

    without_parts("humaneval_plus", parts)
    return _read(_ready_human_eval_plus_path)


def mbpp_rows(parts: list[str]) -> list[Any]:
    """The problems of MBPP+."""
    from evalplus.data.mbpp import _ready_mbpp_plus_path

    without_parts("mbpp_plus", parts)
    return _read(_ready_mbpp_plus_path)


def _read(place: Callable[[], str]) -> list[Any]:
    """The rows of the file that the package has, or gets."""
    from evalplus.data.utils import stream_jsonl

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)
    try:
        path = place()
    except OSError as error:
        raise ValueError(
            f"evalplus could not download the problems ({error}); where GitHub can be reached, get the .jsonl.gz of "
            "its release, unpack it, and name it with --data FILE"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return list(stream_jsonl(str(Path(path))))


def problem(row: Mapping[str, Any], found: dict[str, Any]) -> None:
    """Fill in prompt and answer of a row of either set."""
    for name in ("task_id", "prompt", "entry_point", "canonical_solution"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"no {name!r}")
    inputs: list[Any] = [row.get("base_input"), row.get("plus_input")]
    if not all(isinstance(each, Sequence) for each in inputs) or not inputs[0]:
        raise ValueError("no 'base_input' and 'plus_input'")
    kind = row["task_id"].partition("/")[0].lower()
    if kind == "mbpp":
        from evalplus.data.mbpp import mbpp_deserialize_inputs

        inputs = [mbpp_deserialize_inputs(row["task_id"], each) for each in inputs]
        found["prompt"] = row["prompt"].strip().strip('"').strip()
    else:
        found["prompt"] = f"Complete this function.\n\n```python\n{row['prompt']}\n```"
    found["answer"] = {
        "dataset": kind,
        "entry": row["entry_point"],
        "prefix": f"{row['prompt']}\n",
        "reference": f"{row['prompt']}{row['canonical_solution']}",
        "inputs": [[encode(argument) for argument in given] for each in inputs for given in each],
        "atol": row.get("atol", 0),
    }
