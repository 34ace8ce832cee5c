"""The verifier of BFCL's single-turn questions: the decoder and the checker of ``bfcl-eval``.

The harness's decoder evaluates sums in arguments as Python, so that a model could run what it likes in the process that
grades it: there, it finds :func:`arithmetic` under the name ``eval``.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from opdengine.data.benchmarks import BENCHMARKS
from opdengine.data.benchmarks.bfcl import MODEL, bfcl_module
from opdengine.models.thoughts import answer_part
from opdengine.types import Message
from opdengine.verifiers.score import NO_ANSWER, Score, VerifierSettings, as_score

NODES = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.UAdd, ast.USub)
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
MOST_POWER = 64
MOST_CHARACTERS = 1000


class BFCLVerifier:
    """1 when the harness takes the calls for right, else 0.

    Args:
        settings: not used; every verifier is made with them.

    Raises:
        ValueError: bfcl-eval is not installed.
    """

    def __init__(self, settings: VerifierSettings) -> None:
        BENCHMARKS["bfcl"].require()
        self._library, self._handler = bfcl_module("utils"), bfcl_module("model_handler.utils")
        vars(self._handler)["eval"] = arithmetic
        self._runner = bfcl_module("eval_checker.eval_runner")
        self._enums = bfcl_module("constants.enums")

    def __call__(self, text: str, answer: Any, messages: Sequence[Message]) -> Score:
        """Grade one completion."""
        said = answer_part(text)
        if said is None:
            return as_score(NO_ANSWER)
        category, entry = answer["category"], {"id": answer["id"], "function": answer["function"]}
        if self._library.is_relevance_or_irrelevance(category):
            found = self._runner._evaluate_single_relevance_entry(self, answer["id"], said, entry, MODEL, category)
        else:
            kind = "PYTHON"
            if self._library.is_java(category) or self._library.is_js(category):
                kind = "JAVA" if self._library.is_java(category) else "JAVASCRIPT"
            language, form = self._enums.Language[kind], self._enums.ReturnFormat[kind]
            found = self._runner._evaluate_single_ast_entry(
                self, answer["id"], said, answer["truth"], entry, MODEL, category, language, form
            )
        return Score(float(found["valid"] is True), detail=str(found.get("error", "")))

    def decode_ast(self, text: str, language: Any, has_tool_call_tag: bool) -> Any:
        """What the harness asks of the handler of a model: calls as data, by its decoder for prompted models."""
        return self._handler.default_decode_ast_prompting(text, language, has_tool_call_tag)


def arithmetic(text: str) -> Any:
    """The value of an expression of numbers, or of a sum of texts.

    Raises:
        ValueError: it is anything else, or large.
    """
    tree = ast.parse(text, mode="eval")
    nodes = list(ast.walk(tree))
    operators = [node for node in nodes if isinstance(node, ast.operator)]
    constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
    numbers = all(type(value) in (int, float) for value in constants)
    texts = all(isinstance(value, str) for value in constants) and all(isinstance(o, ast.Add) for o in operators)
    powers = [ast.unparse(n.right) for n in nodes if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Pow)]
    small = all(power.isdecimal() and int(power) <= MOST_POWER for power in powers) and len(powers) < 2
    sound = all(isinstance(node, (*NODES, *OPERATORS)) for node in nodes)
    if not (sound and small and (numbers or texts) and len(text) <= MOST_CHARACTERS):
        raise ValueError(f"{text[:80]!r} is no plain arithmetic")
    return eval(compile(tree, "argument", "eval"), {"__builtins__": {}})
