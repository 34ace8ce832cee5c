"""Where thoughts end, and that nothing is graded on the inside of one."""

from __future__ import annotations

from typing import Any

import pytest

from opdengine.models.thoughts import answer_part, open_thought, without_thoughts
from opdengine.types import Prompt
from opdengine.verifiers import load_verifier
from opdengine.verifiers.grader import Grader
from opdengine.verifiers.score import VerifierSettings, as_score


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5", "5"),
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),
        ("a</think>b</think>c", "c"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>a", None),
        ("x <think>a", None),
        ("<think>a</think>b<think>c", None),
        ("a</think>b\n<think>c", None),
        ("<think></think>", ""),
        ("<THINK>a</Think>b", "b"),
        ("<thinking>a</thinking>b", "b"),
        ("<thinking>a", None),
        ("<reasoning>a", None),
        ("[THINK]a[/THINK]b", "b"),
        ("[THINK]a", None),
        ("<seed:think>a", None),
        ("<|begin_of_thought|>a<|end_of_thought|>b", "b"),
        ("<|begin_of_thought|>a", None),
        ("text.split('<think>')", "text.split('<think>')"),
        ('re.sub(r"<think>.*?</think>", "", text)', 're.sub(r"<think>.*?</think>", "", text)'),
        ("The tag `<think>` opens a thought", "The tag `<think>` opens a thought"),
        ('<think>say "</think>"b', '"b'),
        ('a\n</think>"b"', '"b"'),
        ("<thought>part of an action</thought>b", "<thought>part of an action</thought>b"),
    ],
)
def test_the_answer_stands_behind_the_last_thought(text: str, answer: str | None) -> None:
    assert answer_part(text) == answer


def test_what_stands_between_thoughts_can_be_kept() -> None:
    assert without_thoughts("<think>a</think>x<think>b</think>y") == "xy"
    assert without_thoughts("a</think>x<think>b") is None


@pytest.mark.parametrize(
    ("opening", "thought"),
    [
        ("<|assistant|>\n<think>\n", "<think>\n"),
        ("<|assistant|>\n<think>\n\n</think>\n\n", ""),
        ("<|assistant|>\n", ""),
        ("Use <think> and </think>.<|assistant|><think>", "<think>"),
    ],
)
def test_a_prompt_may_leave_a_thought_open(opening: str, thought: str) -> None:
    assert open_thought(opening) == thought


UNFINISHED = {
    "exact_match": ("<think>5", "<think>5"),
    "numeric": ("<think>Suppose it were 5", "5"),
    "choice": ("<think>Maybe the answer is C, but let me look at B", "C"),
    "math": ("<think>Suppose it were \\boxed{5}. Let me check whether that", "5"),
    "code": ("<think>A first try:\n```python\nprint(7)\n```\nNow is that fast? We", {"inputs": [""], "outputs": ["7"]}),
    "reasoning_gym": ("<think><answer>5</answer>", {"dataset": "chain_sum", "entry": {"dict": []}}),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_a_thought_without_an_end_is_not_graded(name: str) -> None:
    text, answer = UNFINISHED[name]
    score = as_score(load_verifier(name, VerifierSettings())(text, answer, ()))
    assert (score.value, score.failure) == (0, "") and "thought has no end" in score.detail


def test_a_thought_that_the_template_opened_counts() -> None:
    grader = Grader("numeric")
    prompt = Prompt("p", (), answer="5")
    texts = ["It is 5", "It is 4</think>5", "<think>4</think>5"]
    assert [score.value for score in grader.grade(texts, [prompt] * 3)] == [1, 1, 1]
    grader.opening = "<think>\n"
    scores = grader.grade(texts, [prompt] * 3)
    assert [score.value for score in scores] == [0, 1, 1]
    assert "thought has no end" in scores[0].detail and not scores[0].failure


def test_no_verifier_of_a_user_sees_an_unfinished_thought_and_all_see_what_was_sampled() -> None:
    seen: list[str] = []

    def mine(text: str, answer: Any, messages: Any) -> float:
        seen.append(text)
        return 1.0

    grader = Grader(mine)
    grader.opening = "<think>\n"
    scores = grader.grade(["a", "b</think>c", "<think>d"], [Prompt("p", ())] * 3)
    assert [score.value for score in scores] == [0, 1, 0] and seen == ["b</think>c"]
