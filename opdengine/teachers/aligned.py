"""What a teacher with another tokenizer reads: the student's words in its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from opdengine.models.alignment import Alignment
from opdengine.teachers import Teacher
from opdengine.types import Message, Sample, Spans, TeacherContext, images_in


def read_aligned(teacher: Teacher, alignment: Alignment, sample: Sample, messages: Sequence[Message]) -> TeacherContext:
    """The sample as such a teacher reads it: ``messages`` in place of its prompt, all of it in the teacher's tokens.

    What trains is translated turn by turn; answers of an environment are rendered in the teacher's chat template.
    """
    tools = sample.prompt.tools
    prefix = teacher.encode(messages, tools)
    parts, trains, spans = [np.asarray(prefix, dtype=np.int64)], [np.zeros(len(prefix), dtype=bool)], list[Spans]()
    said: list[int] = []
    for before, turn in pairwise(sample.turns):
        if turn.trains or turn.role == "assistant":
            said, own = alignment.turn(turn.token_ids.tolist())
            spans += [own] if turn.trains else []
        else:
            said = teacher.encode_answer(turn.messages, tools, said if before.role == "assistant" else ())
        parts.append(np.array(said, dtype=np.int64))
        trains.append(np.full(len(said), turn.trains))
    context = TeacherContext(
        sample.id, teacher.name, np.concatenate(parts), np.flatnonzero(np.concatenate(trains)), images_in(prefix),
        Spans.joined(spans, alignment.pairs, alignment.vocabulary), sample.is_sampled, sample.prompt.name,
    )  # fmt: skip
    context.check(sample)
    return context
