"""Grades a batch of completions: each prompt's verifier, time limits, failures counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

from opdengine.config.sections import by_key
from opdengine.config.train import TrainConfig
from opdengine.models.thoughts import answer_part
from opdengine.types import Prompt
from opdengine.verifiers import FACTORIES, VERIFIERS, Verifier, load_verifier
from opdengine.verifiers.pool import Task, WorkerPool
from opdengine.verifiers.score import FAILURES, NO_ANSWER, Score, VerifierSettings, as_score

logger = logging.getLogger(__name__)

BUILT_IN = {*VERIFIERS, *FACTORIES}
"""Verifiers that look behind the thoughts of a completion themselves."""


class Grader:
    """Verifiers by routing key, run in worker processes.

    A verifier that raises, crashes or exceeds its time costs that completion the grade (0, with the reason in
    :attr:`Score.failure`) and never ends the run; the first failure for each reason is logged. Verifiers by name
    run in worker processes, except the cheap ``exact_match``, ``numeric`` and ``choice``, which run here, as do
    callables (without time limit).

    Args:
        verifier: a name as for :func:`load_verifier`, a callable, or a mapping from routing key (and
            "default") to these.
        settings: time limit, number of processes, sandbox.

    Raises:
        ValueError: a verifier cannot be loaded, or needs what this machine does not have.
    """

    def __init__(
        self,
        verifier: str | Verifier | Mapping[str, str | Verifier],
        settings: VerifierSettings | None = None,
    ) -> None:
        settings = settings or VerifierSettings()
        self._verifier = verifier
        self._here: dict[str | Verifier, Verifier] = {}
        for each in verifier.values() if isinstance(verifier, Mapping) else [verifier]:
            loaded = load_verifier(each, settings) if isinstance(each, str) else each
            if each in VERIFIERS or not isinstance(each, str):
                self._here[each] = loaded
        self._pool = WorkerPool(settings)
        self.opening = ""
        """The thought that the chat template leaves open before a completion, as ``<think>``; see
        :func:`opdengine.models.rendering.thought_opening`."""
        self._failed: Counter[str] = Counter()
        self._logged: set[str] = set()

    @classmethod
    def from_config(cls, config: TrainConfig) -> Grader:
        """The grader of a run."""
        return cls(
            config.verifier,
            VerifierSettings(config.verifier_timeout, config.verifier_workers, config.verifier_allow_unsandboxed),
        )

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Every prompt needs a verifier.

        Raises:
            ConfigError: names the routing key that has none.
        """
        for key in sorted({prompt.key for prompt in prompts}):
            by_key(self._verifier, key, "verifier")

    def grade(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[Score]:
        """One score per completion; may be called from any thread.

        A completion whose last thought has no end holds no answer: it scores 0 and no verifier is asked.

        Args:
            texts: completions, without the :attr:`opening`.
            prompts: the prompt of each, with its answer.
        """
        scores: dict[int, Score] = {}
        tasks: dict[int, Task] = {}
        for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
            verifier = by_key(self._verifier, prompt.key, "verifier")
            whole = self.opening + text
            if answer_part(whole) is None:
                scores[i] = as_score(NO_ANSWER)
                continue
            given = whole if verifier in BUILT_IN else text
            if verifier in self._here:
                scores[i] = _call(self._here[verifier], given, prompt, _name(verifier))
            else:
                tasks[i] = Task(verifier, given, prompt.answer, prompt.messages)
        scores.update(zip(tasks, self._pool.grade(list(tasks.values())), strict=True))
        for i, score in scores.items():
            if score.failure:
                self._failed[score.failure] += 1
                self._log_first(score, prompts[i])
        return [scores[i] for i in range(len(texts))]

    def _log_first(self, score: Score, prompt: Prompt) -> None:
        if score.failure not in self._logged:
            self._logged.add(score.failure)
            logger.warning(
                "the verifier failed on prompt %r, which scores 0 (%s: %.500s); later failures are only counted",
                prompt.id,
                score.failure,
                score.detail,
            )

    def counts(self) -> dict[str, float]:
        """Verifiers that failed since this was last asked, by reason, as metrics."""
        counts = {f"verifier/failed/{reason}": float(self._failed[reason]) for reason in FAILURES}
        self._failed.clear()
        return counts

    def close(self) -> None:
        """End the worker processes; safe to call twice."""
        self._pool.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _name(verifier: str | Verifier) -> str:
    return f"the verifier {verifier if isinstance(verifier, str) else getattr(verifier, '__name__', verifier)!r}"


def _call(verifier: Verifier, text: str, prompt: Prompt, name: str) -> Score:
    try:
        return as_score(verifier(text, prompt.answer, prompt.messages), name)
    except (Exception, SystemExit) as error:
        return Score(0.0, "error", f"{type(error).__name__}: {error}")
