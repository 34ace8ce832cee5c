"""Generate and grade: no teacher needed."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from opdengine.config.train import TrainConfig
from opdengine.distributed import Ranks
from opdengine.environments.episodes import Episodes, Job, episode_metrics
from opdengine.rollout import Sampler
from opdengine.types import Prompt, Request, SamplingParams
from opdengine.verifiers import Verifier
from opdengine.verifiers.grader import Grader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Scores of one evaluation.

    Args:
        scores: float64 [N, n], of n answers to each prompt.
        keys: the prompts' routing keys.
        texts: [N][n] what was written.
        mean_length: in tokens.
        clipped_ratio: share that ran into the length limit.
        failed: number of verifiers that failed (and count as score 0), by reason.
    """

    scores: np.ndarray
    keys: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    mean_length: float
    clipped_ratio: float
    failed: Mapping[str, int] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return float(self.scores.mean())

    def by_key(self) -> dict[str, float]:
        """Mean score per routing key."""
        keys = np.array(self.keys)
        return {key: float(self.scores[keys == key].mean()) for key in sorted(set(self.keys))}

    def metrics(self) -> dict[str, float]:
        """As ``eval/...`` metrics."""
        values = {
            "eval/accuracy": self.accuracy,
            "eval/mean_length": self.mean_length,
            "eval/clipped_ratio": self.clipped_ratio,
            **{f"eval/verifier_failed/{reason}": float(n) for reason, n in self.failed.items()},
        }
        if (n := self.scores.shape[1]) > 1:  # prompts that at least one answer solves
            values[f"eval/pass@{n}"] = float((self.scores.max(axis=1) >= 1).mean())
        keyed = self.by_key()
        if len(keyed) > 1:
            values.update({f"eval/accuracy/{key}": score for key, score in keyed.items()})
        return values


def wilson(successes: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; (0, 1) of nothing."""
    if not count:
        return 0.0, 1.0
    share, scale = successes / count, 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(centre - half, 0.0), min(centre + half, 1.0)


def turn_params(config: TrainConfig) -> SamplingParams:
    """Return how an evaluated turn is sampled where its temperature is not 0.

    The same for every command. A repetition penalty belongs to the rollouts of training: over an episode it would
    punish the words of the prompt.
    """
    return SamplingParams(
        max_tokens=config.max_completion_length,
        top_p=config.top_p,
        top_k=config.top_k,
        stop=tuple(config.environment.stop),
    )


def answer_params(config: TrainConfig) -> SamplingParams:
    """Return how evaluation prompts are answered: greedily, or as in training at ``eval_temperature``."""
    greedy = config.eval_temperature == 0
    return SamplingParams(
        max_tokens=config.max_completion_length,
        temperature=config.eval_temperature,
        top_p=1.0 if greedy else config.top_p,
        top_k=0 if greedy else config.top_k,
        n=config.eval_num_generations,
        seed=config.seed,
    )


def evaluate_episodes(
    episodes: Episodes,
    sampler: Sampler,
    splits: Mapping[str, Sequence[Prompt]],
    temperatures: Sequence[float],
    params: SamplingParams,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One episode per task, split and temperature.

    Args:
        episodes: plays them.
        sampler: the policy.
        splits: tasks by name of their split.
        temperatures: 0 is greedy; metrics of the others end in "@temperature".
        params: of a turn; its temperature and seed are replaced.
        seed: of the environments and of the sampling.
        ranks: share the tasks; all get the whole result.

    Returns:
        Metrics ``eval/<split>/{success, success_low, success_high, score, turns,
        invalid_action_rate, repeated_action_rate, broken}`` (95 % Wilson interval; broken episodes are
        left out of all means) and one record per episode for the log.
    """
    ranks = ranks or Ranks()
    metrics: dict[str, float] = {}
    records = []
    for split, prompts in splits.items():
        for temperature in temperatures:
            mine = ranks.share(len(prompts))
            jobs = [Job(f"{split}.{i}", prompts[i], seed=seed * 1_000_003 + i) for i in mine]
            sampling = replace(params, temperature=temperature, n=1, seed=seed)
            if temperature == 0:
                sampling = replace(sampling, top_p=1.0, top_k=0)
            with ranks.agree():
                rollouts, broken = episodes.play(sampler, jobs, sampling)
            rollouts = ranks.join(rollouts)
            broken = sum(ranks.gather(broken), Counter())
            values = {k.removeprefix("episodes/"): v for k, v in episode_metrics(rollouts).items()}
            successes = sum(bool(r.info["success"]) for r in rollouts)
            values["success_low"], values["success_high"] = wilson(successes, len(rollouts))
            values["broken"] = float(sum(broken.values()))
            suffix = f"@{temperature:g}" if temperature else ""
            metrics |= {f"eval/{split}/{name}{suffix}": value for name, value in values.items()}
            records += [
                {
                    "split": split,
                    "temperature": temperature,
                    "task": r.prompt.id,
                    "success": r.info["success"],
                    "score": r.info["score"],
                    "end": r.stop_reason,
                    "prompt": [dict(m) for m in r.prompt.messages],
                    "answer": r.prompt.answer,
                    "messages": [dict(m) for t in r.turns for m in t.messages],
                }
                for r in rollouts
            ]
    return metrics, records


def require_answers(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts, all of which have an answer.

    Raises:
        ValueError: some have none; names the first.
    """
    without = [p.id for p in prompts if p.answer is None]
    if without:
        raise ValueError(
            f"{len(without)} evaluation prompts have no 'answer' (e.g. {without[:3]}); evaluation compares with it"
        )
    return prompts


def warn_of_overlap(held_out: Mapping[str, Sequence[Prompt]], trained: Sequence[Prompt]) -> None:
    """Say where what is evaluated on is trained on, too.

    Args:
        held_out: prompts or tasks to evaluate on, by the setting that names them.
        trained: all training prompts or tasks.
    """
    known = {_content(prompt) for prompt in trained} if held_out else set()
    for name, prompts in held_out.items():
        if count := sum(_content(prompt) in known for prompt in prompts):
            logger.warning(
                "WARNING: %d of the %d prompts of %s are training prompts, word for word: their eval/ metrics show "
                "what was learned by heart as well; name other data there",
                count,
                len(prompts),
                name,
            )


def _content(prompt: Prompt) -> str:
    """Return the content of a prompt or a task, by which two are the same whatever their ids."""
    return json.dumps([prompt.messages, prompt.tools, prompt.extra.get("task")], sort_keys=True, default=str)


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    encode: Callable[[Prompt], list[int]],
    verifier: Verifier | Grader,
    params: SamplingParams,
    ranks: Ranks | None = None,
) -> Evaluation:
    """``params.n`` answers to every prompt, graded by the verifier.

    Args:
        sampler: the policy.
        prompts: with answers.
        encode: prompt -> token ids.
        verifier: grades text against answer; a plain function is called in this process.
        params: how they are sampled.
        ranks: share the prompts; all get the whole result.
    """
    ranks = ranks or Ranks()
    with ranks.agree():
        mine = [(i, prompts[i]) for i in ranks.share(len(prompts))]
        requests = [Request(p.id, encode(p), seed=i) for i, p in mine]
        answers = [answer for completions in sampler.generate(requests, params) for answer in completions]
        grader = verifier if isinstance(verifier, Grader) else Grader(verifier)
        scores = grader.grade([a.text for a in answers], [p for _, p in mine for _ in range(params.n)])
    answers, scores = ranks.join(answers), ranks.join(scores)
    failed = Counter(score.failure for score in scores if score.failure)
    if failed:
        example = next(score for score in scores if score.failure)
        logger.warning(
            "WARNING: %d of %d answers could not be graded and count as wrong: %s, e.g. %s",
            failed.total(),
            len(scores),
            dict(failed),
            example.detail,
        )
    return Evaluation(
        scores=np.array([score.value for score in scores], dtype=np.float64).reshape(-1, params.n),
        keys=tuple(p.key for p in prompts),
        texts=tuple(tuple(a.text for a in answers[i : i + params.n]) for i in range(0, len(answers), params.n)),
        mean_length=float(np.mean([len(a.token_ids) for a in answers])),
        clipped_ratio=float(np.mean([a.stop_reason == "length" for a in answers])),
        failed=failed,
    )
