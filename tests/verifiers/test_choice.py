"""The stated option counts, not the last letter that is mentioned; what is ambiguous counts as none."""

from __future__ import annotations

from typing import Any

import pytest

from opdengine.types import Prompt
from opdengine.verifiers import choice
from opdengine.verifiers.grader import Grader
from opdengine.verifiers.multiple_choice import listed_options

QUESTION = "Which is the capital?\nA. Rome\nB. Berlin\nC. Paris\nD. The Hague"
MESSAGES = ({"role": "system", "content": "A. no"}, {"role": "user", "content": QUESTION})

STATES_C = r"""C|(C)|[C]|C.|C)|C!|**C**|**(C).**|`C`|$C$|c|(c)|c.|\boxed{C}|\boxed{\text{C}}|\boxed{(C)}
\boxed{\mathbf{C}}
\boxed{\textbf{(C)} Paris}|$\boxed{C}$|\boxed{C. Paris}|\boxed{c}|\fbox{C}|answer: c|Answer: C|Answer: (C)|Answer = C
Answer:\n\nC|**Answer:** C|**Answer**: C|**Answer: C**|### Answer\nC|**Final Answer**\n\n(C)|<answer>C</answer>
The final answer is: $\boxed{C}$|The answer is C|The answer is (C).|The answer is **C**.|The answer is **C) Paris**
The answer is C: Paris|The answer is \(C\)|The answer is\nC|ANSWER: C|the answer is option c
Correct answer: **C. Paris**
The correct answer is C. Option A is incorrect because it is hot.|The correct option is C|correct answer: C
Answer: I think it is C|I think it is C|I choose C|I would pick C.|I'll go with C|I'd say C|My choice is C
My answer is C because A is wrong.|the answer isn't A, it's B... no wait, the answer is C|The answer isn't A, it's C
The answer is not A but C|The answer is not A. The answer is C.|It isn't A. It's C.|C is correct
C is the correct answer.
Option C is correct|Option C is the best answer|(C) is right|Option C|Choice C.|C because the others are wrong
C. Because Paris is the capital.|C, since it is the capital|C) Paris|C: Paris|C - Paris|Option C: Paris|c) Paris
Therefore, C.|Thus, the correct answer is option C.|Therefore the answer must be C|The answer would be C
The best answer is C. While A is tempting, it is wrong. B is also wrong.|Answer: A\nAnswer: C
The answer is A. Wait, that is wrong. The answer is C.|The answer is C, not A.|The answer is C rather than A
The answer is C (not A or B).|The answer is C; option A is too hot|The answer is C, and not D
The answer is Paris.|Paris|The answer is **Paris**|\boxed{Paris}|The third option is the correct answer
The answer is the third option.|Let me see: A is hot, B is cold. So C.|A is wrong. B is wrong. So it must be C.
The answer is C.\n\nExplanation:\nA. Rome is in Italy\nB. Berlin is in Germany|C\n\nA is wrong because it is hot
A: no\nB: no\nC: yes\n\nThe answer: C|<think>Answer: A</think>C|After eliminating A and B, the answer is C
I believe the correct answer is C, as A and B are wrong.|None of A, B or D is right, so the answer is C
Both A and B are wrong; the answer is C|Although A is tempting, the correct answer is C
The correct answer is:\n\n**C) Paris**|Answer is option (C).|\boxed{\text{Option C}}|Final Answer: Option C - Paris
The answer is C. A is correct only when it rains. B would be correct if it were cold.|(C) is my answer
Answer: C. B is true
I think the answer is either C or D, but I'd go with C.|The answer is A. Wait, actually C is correct.
A. Rome - incorrect, because it is in Italy\nB. Berlin - no\nC. Paris - yes\n\nTherefore, the correct answer is C.
**A** is incorrect.\n**B** is incorrect.\n**C** is correct.|A is in Italy, B in Germany, so by elimination, C.
The best choice here is option C, Paris.|The only option that fits is C.|That leaves C.|We are left with C.|Ans: C
Ans. C
{"answer": "C"}|答案：C|答案是C|La respuesta es C.|The answer is not A, B, or D, so it's C.|The answer has to be C.
It cannot be A, B, or D; thus C.|The answer is neither A nor B but C.|Answer: C\nConfidence: 95%"""

NO_C = r"""A|B|The answer is A. Option C is tempting but wrong.|The answer is not C|The answer isn't C
The answer is A, not C
The answer is A rather than C|C is wrong|Option C is incorrect|C is not correct|C isn't the answer|It's not C, it's A
Answer: A or C|A or C|C or D|Answer: C or D|The answer is either B or C|Both A and C are correct|Answer: A and C|A, C
\boxed{A, C}|\boxed{A}|\boxed{B or C}|\boxed{}|\boxed{42}|\boxed{A} and C|Answer: A\nBut C is hot|A patient with C|
Cats
clear|The answer is clear|<think>answer: C</think>B|<think>The answer is C|ABCDE|The answer is unclear: vitamin C
If the answer is C, then|Is the answer C?|Is it C? No.|The answer is C? No, A.|Suppose the answer is C.
A. Rome\nB. Berlin\nC. Paris|I don't know|The answer is Rome|Rome|The second option is the answer|I would not choose C
vitamin C|C-section|The answer is C++|the answer is a C major chord|The answer is A because C is wrong
I can't choose C
The answer is B. C is hot.|Answer: D. A, B and C are all wrong.|Why is C correct?|The answer could not be C
neither A nor C
I rule out C. The answer is A.|The answer is all except C|None of the above|Option C is not the answer|It can't be C.
The correct answer is A. C is plausible but wrong.|The answer is B, since C is false|Answer: B (C is wrong)
Answer: D, all of the above. A is correct since it rains, and C is correct since it is hot.|Answer: A. C is true, too
The answer is A. C would be correct if it were cold.|Answer: B. Wrong answers: C|The wrong answer is C
The least likely answer is C|A common wrong answer is C. The right answer is B.|The answer depends on C
Many would answer C, but the correct answer is A.|You might think the answer is C, but it is A.
Some say the answer is C. It is A.|One might choose C, but A is correct.|The answer is C if it rains, otherwise A.
The patient has vitamin C deficiency. The answer is A.|Hepatitis C is the diagnosis; answer: B"""


def cases(text: str) -> list[str]:
    return [case.replace("\\n", "\n") for line in text.split("\n") for case in line.split("|")]


@pytest.mark.parametrize("text", cases(STATES_C))
def test_the_stated_option_is_found(text: str) -> None:
    assert choice(text, "C", MESSAGES) == 1


@pytest.mark.parametrize("text", cases(NO_C))
def test_mentions_denials_and_doubts_state_nothing(text: str) -> None:
    assert choice(text, "C", MESSAGES) == 0


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("The answer is J", "J", 1), ("K", "K", 1), ("The answer is R", "R", 1), ("The answer is x = 3", "C", 0),
        ("A", "A", 1), ("a", "A", 1), ("(a)", "A", 1), ("The answer is a", "A", 1), ("The answer is A because", "A", 1),
        ("The answer is a bit unclear", "A", 0), ("Answer: A patient with fever", "A", 0), ("A dog", "A", 0),
        ("A is the first letter", "A", 0), ("A good answer is hard to find", "A", 0), ("I am not sure", "I", 0),
        ("The answer is I", "I", 1), ("Answer: I am not sure", "I", 0), ("C", "(c)", 1), ("C", "c.", 1),
    ],
)  # fmt: skip
def test_letters_are_not_words(text: str, answer: str, score: float) -> None:
    assert choice(text, answer, ()) == score


def test_why_there_is_no_grade_is_said() -> None:
    scores = Grader("choice").grade(["Answer: A or C", "no idea", "B", "C"], [Prompt("p", MESSAGES, answer="C")] * 4)
    assert [score.value for score in scores] == [0, 0, 0, 1]
    assert [score.detail for score in scores] == [
        "several options are stated: A, C",
        "no option is stated",
        "B is stated",
        "C is stated",
    ]


def test_options_are_read_from_the_question_alone() -> None:
    assert listed_options(MESSAGES) == {"A": "rome", "B": "berlin", "C": "paris", "D": "hague"}
    for content in ("A. only one", "B. no\nC. first", None, [{"type": "image"}]):
        assert listed_options([{"role": "user", "content": content}]) == {}


@pytest.mark.parametrize("answer", ["", "Paris", None, 3, "AB"])
def test_a_reference_that_is_no_letter_is_the_verifiers_failure(answer: Any) -> None:
    (score,) = Grader("choice").grade(["C"], [Prompt("p", (), answer=answer)])
    assert score.failure == "error" and "is not the letter of an option" in score.detail
