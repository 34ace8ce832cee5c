"""A worker for tests: says what it is told, after a while, unless it is interrupted."""

from __future__ import annotations

import os
import select
import time

from opdengine.workers.talk import Answer, Question, answer_questions


def serve(channel: int) -> None:
    def answer(question: Question) -> Answer | None:
        if "close" in question:
            return None
        if "exit" in question:
            os._exit(question["exit"])
        print("heard", question["say"], flush=True)
        end = time.monotonic() + question.get("seconds", 0)
        while time.monotonic() < end:
            if select.select([channel], [], [], 0.02)[0]:
                return {"said": "interrupted"}
        return {"said": question["say"]}

    answer_questions(channel, answer)
