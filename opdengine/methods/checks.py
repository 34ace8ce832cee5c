"""A method that fails without an error is warned about once; a run that trains nothing ends with a failure.

A method declares what it counts and from which share on that means trouble (:class:`Check`).
Counts are those of all processes, so all come to the same end; the first one speaks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opdengine.errors import NothingTrainedError, ServiceError

logger = logging.getLogger(__name__)

DROPPED = "dropped/"
STILL_TRAINED = ("not_chosen", "teacher_not_finite/", "teacher_without_answer/")
"""Reasons under ``dropped/`` that leave their rollout in the update."""

STALLS = {
    "not_finite": "a loss or gradient that is not finite",
    "broken": "no episode that came to its end",
    "nothing": "no rollout with any weight",
    "no_gradient": "a gradient of exactly 0",
    "lost": "an update that rounding loses",
}
"""Why a step trains nothing."""


@dataclass(frozen=True)
class Check:
    """A share of something in a step that is small where all is well.

    Args:
        failed: the metric that counts what is not; a name that ends in "/" stands for all below it.
        total: the metric that counts everything; steps without it are passed over.
        says: follows "3 of 4": what they are, and what the run does about it.
        remedy: what to do.
        look: a file in the run's folder that shows more; ``{step}`` is its step.
        share: from this share on there is trouble.
    """

    failed: str
    total: str
    says: str
    remedy: str
    look: str = ""
    share: float = 0.5

    def counts(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        """Return how many failed, and of how many."""
        return _count(metrics, self.failed), metrics.get(self.total, 0.0)

    def fires(self, metrics: Mapping[str, float]) -> bool:
        """Whether a step with these metrics is in trouble."""
        failed, total = self.counts(metrics)
        return total > 0 and failed > 0 and failed >= self.share * total


ROLLOUTS = "rollouts/step_{step}.jsonl"
SAMPLED = "completions/sampled"

GENERAL = (
    Check(
        "dropped/teacher_window/", SAMPLED, "rollouts exceed a teacher's window and were dropped",
        "lower max_completion_length or max_prompt_length (and debate.max_tokens, where it reads a debate), or take "
        "a teacher with a longer window", ROLLOUTS,
    ),
    Check(
        "dropped/debate_too_long", SAMPLED, "rollouts have no debate, since the next turn might not fit a teacher's "
        "window, and were dropped", "lower debate.max_tokens or debate.rounds, or take teachers with longer windows",
    ),
    Check(
        "dropped/teacher_failure", SAMPLED, "rollouts were dropped because every teacher's call failed",
        "look at the teachers' servers (teacher_failures/... in metrics.jsonl names the reasons)",
    ),
    Check(
        "dropped/teacher_without_answer/", SAMPLED, "rollouts were judged without a teacher whose call failed",
        "look at its server (teacher_failures/... in metrics.jsonl names the reasons)",
    ),
    Check(
        "dropped/teacher_not_finite/", SAMPLED, "rollouts were judged without a teacher whose states were NaN or inf",
        "check its weights and dtype (float16 overflows where bfloat16 does not)",
    ),
    Check(
        "dropped/empty", SAMPLED, "rollouts have no token and were dropped",
        "check that the student's chat template ends where its answer begins", ROLLOUTS,
    ),
    Check(
        "dropped/token_beyond_vocabulary", SAMPLED, "rollouts hold a token that no tokenizer knows and were dropped",
        "check that the student's tokenizer belongs to its model", ROLLOUTS,
    ),
    Check(
        "dropped/environment/", "episodes/begun", "episodes broke and were dropped",
        "try the environment alone: opdengine eval with the same settings",
    ),
    Check(
        "verifier/failed/", "verifier/graded", "completions could not be graded and count as wrong",
        "try the verifier alone on some of them, or raise verifier_timeout", ROLLOUTS,
    ),
)  # fmt: skip
"""The checks of every method."""


@dataclass
class Watch:
    """Looks at the metrics of every step.

    Args:
        checks: of the method, besides :data:`GENERAL`.
        folder: of the run.
        limit: the run ends when more steps than this in a row train nothing (``max_bad_steps``).
        speaks: whether this process is the one that logs.
        logs: whether the files to look at are written (``log_completions``).
        trained: whether an earlier part of the run has moved a weight.
    """

    checks: Sequence[Check]
    folder: Path
    limit: int
    speaks: bool = True
    logs: bool = True
    trained: bool = False
    row: list[str] = field(default_factory=list)
    steps: int = 0
    stalled: int = 0
    _last: str = ""
    _said: set[object] = field(default_factory=set)

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warn of what is wrong for the first time; end the run when nothing has been trained for too long.

        Raises:
            FloatingPointError: losses or gradients were not finite in more steps in a row than the limit.
            ServiceError: no episode came to its end in as many.
            NothingTrainedError: as many trained nothing, for another reason or for several.
        """
        self.steps += 1
        stall = stall_of(metrics)
        if stall:
            self.stalled += 1
            self.row.append(stall)
            self._last = self._why(stall, step, metrics)
            if stall not in self._said:
                self._said |= {stall, *self._causes(metrics)}
                self._warn(
                    f"WARNING, step {step} trains nothing: {self._last}. More than max_bad_steps={self.limit} such "
                    "steps in a row end the run"
                )
        else:
            self.row, self.trained = [], True
        for check in (*GENERAL, *self.checks):
            if check not in self._said and check.fires(metrics):
                self._said.add(check)
                self._warn(f"WARNING, step {step}: {self._sentence(check, step, metrics)}")
        if len(self.row) > self.limit:
            self._end(step)

    def finish(self, step: int) -> None:
        """Called after the last step.

        Raises:
            NothingTrainedError: not one step of the run has moved a weight.
        """
        if not self.trained:
            why = f" The last one: {self._last}" if self._last else ""
            raise NothingTrainedError(f"none of the {step} steps of this run has trained anything.{why}")
        if self.stalled:
            self._warn(
                f"{self.stalled} of the {self.steps} steps trained nothing (skipped_steps, bad_steps, lost_updates or "
                "a grad_norm of 0 in metrics.jsonl)"
            )

    def _end(self, step: int) -> None:
        count, kinds = len(self.row), Counter(self.row)
        row = f"{count} steps in a row, up to step {step}"
        limit = f"max_bad_steps={self.limit}"
        if kinds["not_finite"] == count:
            raise FloatingPointError(
                f"loss or gradient was not finite in {row} ({limit}); the weights are those before the first of them. "
                f"Look at {self.folder / 'bad_steps'} and at the rollouts; a lower learning_rate may help in a new run"
            )
        if kinds["broken"] == count:
            raise ServiceError(
                f"every episode of {count} steps in a row broke, up to step {step} ({limit}): {self._last}"
            )
        reasons = ", ".join(f"{number} of {STALLS[kind]}" for kind, number in kinds.items())
        raise NothingTrainedError(f"{row} trained nothing ({reasons}; {limit}). The last one: {self._last}")

    def _why(self, stall: str, step: int, metrics: Mapping[str, float]) -> str:
        """Why a step trained nothing: counts by reason, and what to do."""
        if stall == "not_finite":
            return f"{STALLS[stall]} (look at {self.folder / 'bad_steps' / f'step_{step}.jsonl'})"
        if stall == "no_gradient":
            return (
                f"its loss is {metrics.get('loss', 0.0):g} and its gradient exactly 0: student and teachers agree on "
                "every token that counts. Is a teacher the student itself?"
            )
        if stall == "lost":
            return (
                f"its update, of learning_rate={metrics.get('learning_rate', 0.0):g}, changes no weight: it is lost in "
                "the rounding of the parameters. Raise learning_rate, or set dtype: float32 (with bf16: true on a GPU)"
            )
        dropped = {
            name: count
            for name, count in metrics.items()
            if name.startswith(DROPPED) and count and not name.removeprefix(DROPPED).startswith(STILL_TRAINED)
        }
        parts = [f"{sum(dropped.values()):g} were dropped ({_listing(dropped)})"] if dropped else []
        if kept := metrics.get("completions/kept", 0.0):
            parts.append(f"{kept:g} have no token with any weight")
        what = "episodes" if stall == "broken" else "rollouts"
        whole = sum(dropped.values()) + kept
        counts = f"of {whole:g} {what} {' and '.join(parts)}" if parts else f"there are no {what}"
        remedies = "".join(f"; {self._sentence(check, step, metrics)}" for check in self._causes(metrics))
        return counts + remedies

    def _causes(self, metrics: Mapping[str, float]) -> list[Check]:
        """The checks that explain a step without any weight: those that fire, else the one with the largest share."""
        found = [c for c in (*GENERAL, *self.checks) if c.counts(metrics)[0] > 0 and c.counts(metrics)[1] > 0]
        firing = [check for check in found if check.fires(metrics)]
        return firing or sorted(found, key=lambda c: c.counts(metrics)[0] / c.counts(metrics)[1])[-1:]

    def _sentence(self, check: Check, step: int, metrics: Mapping[str, float]) -> str:
        failed, total = check.counts(metrics)
        look = ""
        if check.look:
            look = f"; look at {self.folder / check.look.format(step=step)}"
            look += "" if self.logs else " (with log_completions: true)"
        return f"{failed:g} of {total:g} {check.says}; {check.remedy}{look}"

    def _warn(self, message: str) -> None:
        if self.speaks:
            logger.warning("%s", message)


def stall_of(metrics: Mapping[str, float]) -> str:
    """Why a step with these metrics has trained nothing, as a key of :data:`STALLS`; empty where it has."""
    if metrics.get("bad_steps"):
        return "not_finite"
    if metrics.get("skipped_steps"):
        return "broken" if not metrics.get(SAMPLED) and _count(metrics, "dropped/environment/") else "nothing"
    if metrics.get("grad_norm") == 0:
        return "no_gradient"
    return "lost" if metrics.get("lost_updates") else ""


def _count(metrics: Mapping[str, float], name: str) -> float:
    if not name.endswith("/"):
        return metrics.get(name, 0.0)
    return sum(value for key, value in metrics.items() if key.startswith(name))


def _listing(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {count:g}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
