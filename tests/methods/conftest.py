"""Helpers of the engine's tests are used here too."""

import json
import sys
from pathlib import Path

import pytest

for room in ("engine", "agents"):
    sys.path.append(str(Path(__file__).parents[1] / room))


@pytest.fixture(scope="session")
def shown_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompts with an answer and a demonstration."""
    path = tmp_path_factory.mktemp("shown") / "shown.jsonl"
    rows = [
        {"id": f"p{i}", "prompt": f"What is {i} + {i}?", "answer": str(2 * i), "privileged_context": f"It is {2 * i}."}
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
