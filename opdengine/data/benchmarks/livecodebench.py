"""LiveCodeBench, whose questions are files of the hub (``livecodebench/code_generation_lite``); no package has them.

Rows of these files: ``question_id, question_content, starter_code, contest_date, difficulty, public_test_cases,
private_test_cases, metadata``. Only some of the private tests are packed, as a pickle of JSON text.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from typing import Any

IMPORTS = (
    "from typing import *\nimport bisect, collections, functools, heapq, itertools, math, random, re, string, sys\n"
    "from collections import Counter, defaultdict, deque\n"
)
"""What solutions may use without importing it, as on the sites that the questions come from."""
SECONDS = 6.0
"""For one case."""
MOST_BYTES = 1 << 30


class _Plain(pickle.Unpickler):
    """Reads values without classes: a pickle can run nothing here."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def problem(row: Mapping[str, Any], found: dict[str, Any]) -> None:
    """Fill in prompt and answer."""
    if not isinstance(row.get("question_content"), str):
        raise ValueError("no 'question_content'")
    cases = [*_cases(row, "public_test_cases"), *_cases(row, "private_test_cases")]
    if not cases:
        raise ValueError("no test cases")
    starter = row.get("starter_code") or ""
    found["prompt"] = row["question_content"]
    if starter:
        found["prompt"] += f"\n\nComplete this code:\n\n```python\n{starter}\n```"
    else:
        found["prompt"] += "\n\nThe program reads from standard input and writes to standard output."
    tests: dict[str, Any] = {"prefix": IMPORTS, "time_limit": SECONDS}
    if starter:
        tests["entry"] = _metadata(row).get("func_name")
        if not isinstance(tests["entry"], str):
            raise ValueError("no 'func_name' in 'metadata'")
        tests["inputs"] = [[json.loads(line) for line in case["input"].splitlines()] for case in cases]
        tests["outputs"] = [json.loads(case["output"]) for case in cases]
    else:
        tests["inputs"] = [case["input"] for case in cases]
        tests["outputs"] = [case["output"] for case in cases]
    found["answer"] = tests


def _metadata(row: Mapping[str, Any]) -> Mapping[str, Any]:
    given = row.get("metadata") or {}
    value = json.loads(given) if isinstance(given, str) else given
    return value if isinstance(value, Mapping) else {}


def _cases(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Test cases: a list, JSON text of one, or that pickled, compressed and in base64."""
    given = row.get(name) or []
    try:
        if isinstance(given, str) and not given.lstrip().startswith("["):
            packed = zlib.decompressobj().decompress(base64.b64decode(given, validate=True), MOST_BYTES)
            given = _Plain(io.BytesIO(packed)).load()
        given = json.loads(given) if isinstance(given, str) else given
    except (ValueError, EOFError, zlib.error, binascii.Error, pickle.UnpicklingError) as error:
        raise ValueError(f"{name!r} cannot be read ({error})") from error
    if not isinstance(given, list) or not all(isinstance(c, Mapping) and {"input", "output"} <= {*c} for c in given):
        raise ValueError(f"{name!r} is no list of 'input' and 'output'")
    return list(given)
