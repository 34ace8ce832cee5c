"""The Berkeley Function Calling Leaderboard (v4), whose questions, prompt and checker are in ``bfcl-eval``.

The single-turn parts are here, in the harness's prompting mode: functions stand in the system message and calls are
Python (Java, JavaScript) text, which every model can write. Multi-turn and agentic parts are refused, because the
harness runs the model's calls with ``eval`` in its own process.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections import defaultdict
from copy import deepcopy
from types import ModuleType, SimpleNamespace
from typing import Any

MODEL = "opdengine"
"""What the checker is told that the model is called."""
KEY = "bfcl_"
"""Routing keys are this and the part."""
CONFIG = "bfcl_eval.constants.model_config"
"""The harness's table of models, which imports the clients of all vendors and is asked for one flag alone."""


def bfcl_module(name: str) -> ModuleType:
    """A module of ``bfcl_eval``, imported without the clients of vendors and without folders of its own making."""
    if CONFIG not in sys.modules:
        table = ModuleType(CONFIG)
        vars(table)["MODEL_CONFIG_MAPPING"] = defaultdict(lambda: SimpleNamespace(underscore_to_dot=False))
        sys.modules[CONFIG] = table
    before = os.environ.get("BFCL_PROJECT_ROOT")
    with tempfile.TemporaryDirectory(prefix="opdengine-bfcl-") as folder:  # the package makes folders when imported
        os.environ["BFCL_PROJECT_ROOT"] = folder
        try:
            return importlib.import_module(f"bfcl_eval.{name}")
        finally:
            if before is None:
                del os.environ["BFCL_PROJECT_ROOT"]
            else:
                os.environ["BFCL_PROJECT_ROOT"] = before


def rows(parts: list[str]) -> list[dict[str, Any]]:
    """Questions in our own layout, with the harness's prompt.

    Args:
        parts: categories or collections of the harness ("simple_python", "live", ...); none are all single-turn ones.

    Raises:
        ValueError: a part is unknown, or is played over several turns.
    """
    categories = bfcl_module("constants.category_mapping")
    found: list[str] = []
    for part in parts or ["single_turn"]:
        members = categories.TEST_COLLECTION_MAPPING.get(part, [part])
        for member in members:
            if member not in categories.ALL_CATEGORIES:
                known = sorted({*categories.SINGLE_TURN_CATEGORY, "single_turn", "live", "non_live"})
                raise ValueError(f"bfcl has no part {member!r}; choose among {known}")
            if member not in categories.SINGLE_TURN_CATEGORY:
                raise ValueError(
                    f"the part {member!r} of bfcl is not run: its calls would be executed by the harness in its own "
                    "process; choose single_turn, live, non_live or a category of them"
                )
        found += [member for member in members if member not in found]
    return [row for category in found for row in _rows_of(category)]


def _rows_of(category: str) -> list[dict[str, Any]]:
    library, handler = bfcl_module("utils"), bfcl_module("model_handler.utils")
    entries = library.load_dataset_entry(category)
    plain = library.load_dataset_entry(category, include_language_specific_hint=False)  # as the checker reads them
    if library.is_relevance_or_irrelevance(category):
        truths = [None] * len(entries)
    else:
        truths = [truth["ground_truth"] for truth in library.load_ground_truth_entry(category)]
    written = []
    for entry, functions, truth in zip(entries, [each["function"] for each in plain], truths, strict=True):
        (turn,) = entry["question"]
        messages = handler.system_prompt_pre_processing_chat_model(deepcopy(turn), entry["function"], entry["id"])
        answer = {"category": category, "id": entry["id"], "function": functions, "truth": truth}
        written.append({"id": entry["id"], "messages": messages, "answer": answer, "data_source": KEY + category})
    return written
