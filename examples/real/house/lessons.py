"""The lessons of the tiny agents in the chat template and the tokens of a real model.

What is taught is that of :class:`tiny.agents.lessons.Pupil`: whole episodes with wrong actions among the right ones,
the judge's questions, and single steps of a debate. Here an action is a handful of tokens instead of two.
"""

from __future__ import annotations

from collections.abc import Sequence

from tiny.agents.lessons import Moment, Pupil
from tiny.lessons import IGNORE, Lesson

JUDGE_PROMPT = (
    "{history}Task: {task_goal}\nThe agent sees: {last_obs}\nIt can: {admissible}\nIt does: {llm_text}\n{next_obs}\n"
    "Answer SKIP if that is fine, WEAK if it costs a little, STRONG if it is wrong."
)
"""For ``sage.judge_prompt``, in the words that the teacher is taught."""
MAX_TOKENS = 6
"""Of one turn: an action has at most four tokens and an end; one more shows that a model goes on too long."""
MAX_PROMPT = 768
"""Tokens of the longest chat that is played."""


class RealPupil(Pupil):
    """Draws the lessons of one model, see :class:`tiny.agents.lessons.Pupil`."""

    def _episode(self, moments: Sequence[Moment]) -> Lesson:
        ids: list[int] = []
        labels: list[int] = []
        read = ""
        for moment in moments:
            text = self._text(moment.chat)
            assert text.startswith(read)
            new = self._ids(text.removeprefix(read))
            done, wanted = self._turn(moment)
            ids += [*new, *done]
            labels += [IGNORE] * len(new) + wanted
            read = text + moment.action + self.end
        return Lesson(ids[:-1], labels[1:])

    def _turn(self, moment: Moment) -> tuple[list[int], list[int]]:
        """Ids of what was done, and of what should follow at each place, up to the first token that is wrong."""
        done, right = self._ids(moment.action + self.end), self._ids(moment.right + self.end)
        if done == right:
            return done, right
        apart = next(i for i, (a, b) in enumerate(zip(done, right, strict=False)) if a != b)
        return done, [*right[: apart + 1], *[IGNORE] * (len(done) - apart - 1)]
