"""Uni-OPD: outcome-guided on-policy distillation (arXiv 2605.03677).

Every sampled token has the advantage log q(y) - log p(y) (equations 1 and 2). A verifier grades the
rollouts, and its outcomes enter in two places:

- *Balancing.* Each prompt, or the whole step, keeps as many correct as incorrect rollouts. What is dropped
  is not shown to any teacher.
- *Margin calibration.* The return of a rollout is its mean gap (section 2.4). Where the correct rollouts
  of a prompt do not lie ``margin_delta`` above the incorrect ones, all their tokens get a constant that
  makes it so (equations 9 to 11), or the rollouts in the way are left out (the greedy mask).

Prompts go to teachers by routing key; several teachers for one key are mixed by weight (equation 4).
Difficulty-aware balancing of the data comes before training: ``opdengine balance``.

Left out rollouts do not count in the loss denominators, and returns are those of kept rollouts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from opdengine.config.method_sections import UniOPDConfig
from opdengine.config.train import TrainConfig
from opdengine.distributed import Ranks
from opdengine.errors import ConfigError
from opdengine.methods.checks import ROLLOUTS, Check
from opdengine.methods.debate.contexts import contexts_of
from opdengine.methods.method import Method, need_teachers
from opdengine.methods.paper import Paper
from opdengine.methods.policy_gradient import CHECKS, gap_of, policy_gradient
from opdengine.metrics import Mean, mean
from opdengine.types import Batch, Sample

ROUNDING = 1e-9
"""This much is added before a product of a count and a ratio is rounded down: 33 / 0.55 is 60, and binary numbers make
it slightly less."""

LEAST_KEPT = 0.25
"""Share of each kind that :func:`narrowing` never removes."""


PAPER = Paper(
    arxiv="2605.03677",
    defaults={
        "divergence": ("reverse_kl", "equation 1"),
        "loss_normalization": ("sequence", "released code"),
        "advantage.importance": ("clip", "released scripts"),
        "advantage.max_gap": (10.0, "released scripts"),
        "num_generations": (16, "released scripts"),
        "temperature": (1.0, "released scripts"),
        "top_p": (1.0, "released scripts"),
        "top_k": (0, "released scripts"),
        "learning_rate": (1e-6, "released scripts"),
        "lr_scheduler_type": ("constant_with_warmup", "released scripts"),
        "warmup_ratio": (0.1, "released scripts: 5 of about 50 steps"),
        "weight_decay": (0.1, "released scripts"),
        "adam_beta1": (0.9, "released scripts"),
        "adam_beta2": (0.98, "released scripts"),
    },
    choices={
        "train_data": "evened out by opdengine balance",
        "verifier": "math, code",
        "max_prompt_length": "4096",
        "max_completion_length": "16384",
        "prompts_per_step": "64",
        "max_steps": "about 50",
    },
)
"""The paper's balance and margin are the defaults of :class:`opdengine.config.method_sections.UniOPDConfig`."""


class UniOPD(Method):
    """Routed teachers, balanced outcomes, calibrated margins."""

    paper = PAPER

    needs_reward = True

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        need_teachers(config, 1)
        self.settings = config.uni_opd
        self.gradient = policy_gradient(config, PAPER)
        self.needs, self.diverges = self.gradient.needs, self.gradient.exact
        self.contexts = contexts_of(config)
        need_groups(config)
        self.teachers_per_prompt = 2 if config.debates else 1

    @property
    def checks(self) -> tuple[Check, ...]:
        """The ways in which debates, gaps and outcomes can fail without an error."""
        return (*super().checks, *CHECKS, *outcome_checks(self.settings))

    def is_correct(self, sample: Sample) -> bool:
        """Whether the verifier's reward makes it a correct sample; without a reward it is not."""
        return sample.reward is not None and sample.reward >= self.settings.correct_from

    def select(self, batch: Batch) -> None:
        """Balance the outcomes, before any teacher judges a sample."""
        samples = list(batch)
        correct = [self.is_correct(sample) for sample in samples]
        stays = choose(samples, correct, self.settings, self.config.seed, self.ranks)
        for sample, kept in zip(samples, stays, strict=True):
            sample.drop = "" if kept else "balance"
        after = [label for label, kept in zip(correct, stays, strict=True) if kept]
        for name, labels in (("balance/correct_before", correct), ("balance/correct_after", after)):
            if labels:
                batch.metrics[name] = mean(labels)

    def weigh(self, batch: Batch) -> None:
        """Set the gaps as advantages and add the outcome's term."""
        samples, settings = list(batch), self.settings
        gap = [gap_of(sample) for sample in samples]
        # Episodes with a weight of 0 on every turn were not judged: they have no return.
        valid = [i for i, s in enumerate(samples) if s.student_logprob is not None and s.reward is not None]
        rows = self.ranks.join(
            [(samples[i].group or samples[i].id, float(gap[i].mean()), self.is_correct(samples[i])) for i in valid]
        )
        mine = self.ranks.own(len(valid))
        returns = np.array([value for _, value, _ in rows])
        correct = np.array([label for *_, label in rows], dtype=bool)
        groups = [group for group, *_ in rows]
        moves, gone, moved = calibrate(groups, returns, correct, settings)
        shift = np.zeros(len(samples))
        for i, extra, out in zip(valid, moves[mine], gone[mine], strict=True):
            shift[i] = extra
            samples[i].drop = "margin" if out else ""
        kept = [i for i, sample in enumerate(samples) if not sample.drop]
        self.gradient.weigh(batch, self.ranks, [gap[i] for i in kept], shift=shift[kept].tolist())
        found = consistency(returns, correct, list(sets(groups, "group").values()))
        compared = sets(groups, settings.margin_scope if settings.margin != "none" else settings.balance).values()
        found["outcomes/sets"] = float(len(compared))
        found["outcomes/one_sided"] = float(sum(len(set(correct[members].tolist())) == 1 for members in compared))
        if moved and settings.margin in ("shift", "fixed"):
            found["margin/shift"] = float(np.mean(moved))
        batch.metrics |= {name: Mean(value) for name, value in found.items()}  # alike on all processes


def calibrate(
    groups: Sequence[str], returns: np.ndarray, correct: np.ndarray, settings: UniOPDConfig
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Widen the margin between the returns of correct and incorrect samples (equations 9 to 11).

    Args:
        groups: of each of N samples.
        returns: float [N].
        correct: bool [N].
        settings: of the margin.

    Returns:
        float64 [N] what is added to each token's advantage; bool [N] what the greedy mask leaves out; how far the
        two sides of every mixed set were moved apart.
    """
    shift, gone, moved = np.zeros(len(returns)), np.zeros(len(returns), dtype=bool), []
    for members in sets(groups, settings.margin_scope).values():
        mine, labels = returns[members], correct[members]
        is_mixed = bool(labels.any() and not labels.all())
        if settings.margin == "mask":
            gone[members] = narrowing(mine, labels, settings.margin_delta, settings.margin_statistic)
        elif settings.margin == "shift":
            shift[members] = shifts(
                mine, labels, settings.margin_delta, settings.margin_statistic, settings.margin_direction
            )
        elif settings.margin == "fixed" and is_mixed:
            shift[members] = settings.margin_delta * sides(labels, settings.margin_direction)
        if is_mixed:
            moved.append(float(np.ptp(shift[members])))
    return shift, gone, moved


def outcome_checks(config: UniOPDConfig) -> tuple[Check, ...]:
    """Outcomes act only where correct and incorrect rollouts stand side by side."""
    acts = "margin calibration" if config.margin != "none" else "balancing"
    if config.margin == "none" and (config.balance == "none" or config.balance_ratio in (0.0, math.inf)):
        return ()
    scope = config.margin_scope if config.margin != "none" else config.balance
    what = "steps" if scope == "global" else "prompts"
    says = f"{what} have correct rollouts only or incorrect ones only, so {acts} does nothing there: that is plain OPD"
    remedy = (
        "see whether the verifier reads the answers (reward/mean, verifier/failed/...), raise num_generations, or "
        "choose prompts that the student solves now and then (opdengine balance)"
    )
    return (Check("outcomes/one_sided", "outcomes/sets", says, remedy, ROLLOUTS, share=1.0),)


def need_groups(config: TrainConfig) -> None:
    """Raise ConfigError where no prompt can have both a correct and an incorrect rollout."""
    c, acts = config.uni_opd, []
    if c.margin != "none" and c.margin_scope == "group":
        acts.append(f"uni_opd.margin={c.margin!r}")
    if c.balance == "group":
        acts.append("uni_opd.balance='group'")
    if config.num_generations == 1 and acts:
        raise ConfigError(
            f"num_generations=1 is not possible with {' and '.join(acts)}, which compare the rollouts of one prompt: "
            "they would never act. Sample several (the paper has 16), or set them to none or their scope to global"
        )
    one_kind = c.balance != "none" and c.balance_ratio in (0.0, math.inf)
    if c.margin == "none" or not (one_kind or (c.keep_per_prompt == 1 and c.margin_scope == "group")):
        return
    left = f"balance_ratio={c.balance_ratio}" if one_kind else "keep_per_prompt=1"
    if one_kind and c.balance == "group" and c.margin_scope == "global":
        return  # prompts of one kind are kept whole, and may differ in it
    raise ConfigError(
        f"uni_opd.margin={c.margin!r} is not possible with uni_opd.{left}, which leaves nothing to compare: it would "
        "never act. Set uni_opd.margin to none, or another balance"
    )


def balanced_counts(correct: int, incorrect: int, ratio: float) -> tuple[int, int]:
    """Return how many of each kind to keep for ``correct : incorrect = ratio : 1``; never adds, never empties a set.

    A set of one kind is kept whole, as is one that is too small for the ratio. Ratio 0 keeps
    only incorrect ones, infinity only correct ones (where there are any).
    """
    if not correct or not incorrect:
        return correct, incorrect
    if ratio == 0:
        return 0, incorrect
    if math.isinf(ratio):
        return correct, 0
    most_correct, most_incorrect = (math.floor(n + ROUNDING) for n in (incorrect * ratio, correct / ratio))
    if correct > most_correct >= 1:
        return most_correct, incorrect
    if incorrect > most_incorrect >= 1:
        return correct, most_incorrect
    return correct, incorrect


def capped_counts(correct: int, incorrect: int, most: int | None) -> tuple[int, int]:
    """At most ``most`` in the same proportion; a mixed set stays mixed if ``most`` is at least 2."""
    total = correct + incorrect
    if most is None or total <= most:
        return correct, incorrect
    kept = round(most * correct / total)
    if correct and incorrect and most > 1:
        kept = min(max(kept, 1), most - 1)
    return kept, most - kept


def choose(
    samples: Sequence[Sample], correct: Sequence[bool], config: UniOPDConfig, seed: int, ranks: Ranks | None = None
) -> list[bool]:
    """Which samples stay after balancing. All processes call this.

    Steps of one episode stay or go together. Who goes is random, but a function of the seed and the sampled
    tokens only: neither the order of the samples nor a resumed run changes it.

    Args:
        samples: of this process.
        correct: one label each.
        config: scope, ratio and cap.
        seed: of the choice.
        ranks: the processes whose samples are balanced together; default: this one alone.
    """
    ranks = ranks or Ranks()
    own = [
        (s.trajectory or f"\0{s.id}", _lot(s, seed), s.group or s.id, bool(label))
        for s, label in zip(samples, correct, strict=True)
    ]
    rows, mine = ranks.join(own), ranks.own(len(own))
    units: dict[str, list[tuple[bytes, str, bool]]] = {}
    for unit, lot, group, label in rows:
        units.setdefault(unit, []).append((lot, group, label))
    order = sorted(units, key=lambda unit: min(lot for lot, *_ in units[unit]))
    is_correct = {unit: members[0][2] for unit, members in units.items()}
    group_of = {unit: members[0][1] for unit, members in units.items()}
    groups = list(dict.fromkeys(group_of[unit] for unit in order))
    alive = set(order)

    def members_of(names: Sequence[str], group: str) -> list[str]:
        return [name for name in names if group_of[name] == group]

    def keep(names: Sequence[str], counts: tuple[int, int]) -> None:
        for label, count in zip((True, False), counts, strict=True):
            alive.difference_update([name for name in names if is_correct[name] == label][count:])

    def count(names: Sequence[str]) -> tuple[int, int]:
        right = sum(is_correct[name] for name in names)
        return right, len(names) - right

    if config.balance != "none":
        for names in [order] if config.balance == "global" else [members_of(order, group) for group in groups]:
            keep(names, balanced_counts(*count(names), config.balance_ratio))
    for group in groups:
        names = members_of([name for name in order if name in alive], group)
        keep(names, capped_counts(*count(names), config.keep_per_prompt))
    return [unit in alive for unit, *_ in rows[mine]]


def _lot(sample: Sample, seed: int) -> bytes:
    text = f"{seed}:{sample.prompt.id}:{sample.id}:".encode()
    return hashlib.sha256(text + sample.token_ids.tobytes()).digest()


def sets(groups: Sequence[str], scope: str) -> dict[str, list[int]]:
    """Places of the samples that are compared with each other: of a prompt ("group"), or all ("global")."""
    if scope == "global":
        return {"": list(range(len(groups)))}
    found: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        found.setdefault(group, []).append(i)
    return found


def margin(correct: np.ndarray, incorrect: np.ndarray, statistic: str) -> float:
    """How far the returns of correct samples lie above those of incorrect ones (equation 10, or of means)."""
    if statistic == "mean":
        return float(correct.mean() - incorrect.mean())
    return float(correct.min() - incorrect.max())


def shifts(returns: np.ndarray, correct: np.ndarray, delta: float, statistic: str, direction: str) -> np.ndarray:
    """Return what is added to every token of each sample so that the margin is ``delta`` (equation 11).

    Args:
        returns: float [N].
        correct: bool [N].
        delta: the wanted margin.
        statistic: of :func:`margin`.
        direction: "lift", "push_down" or "spread".

    Returns:
        float64 [N]; zeros for a set of one kind or where the margin is wide enough.
    """
    if correct.all() or not correct.any():
        return np.zeros(len(returns))
    missing = max(delta - margin(returns[correct], returns[~correct], statistic), 0.0)
    return missing * sides(correct, direction)


def sides(correct: np.ndarray, direction: str) -> np.ndarray:
    """float64 [N]: the part of a shift that each sample takes, with its sign."""
    up, down = {"lift": (1.0, 0.0), "push_down": (0.0, -1.0), "spread": (0.5, -0.5)}[direction]
    return np.where(correct, up, down)


def narrowing(returns: np.ndarray, correct: np.ndarray, delta: float, statistic: str) -> np.ndarray:
    """bool [N]: samples to remove, one by one, until the margin is ``delta``.

    Each time the worst correct or the best incorrect one goes, whichever widens the margin more (the
    correct one in a tie); it ends when none does or only a quarter of a kind is left.
    """
    gone = np.zeros(len(returns), dtype=bool)
    if correct.all() or not correct.any():
        return gone
    up = [int(i) for i in np.argsort(returns, kind="stable") if correct[i]]
    down = [int(i) for i in np.argsort(-returns, kind="stable") if not correct[i]]
    floors = [max(1, math.floor(LEAST_KEPT * len(side))) for side in (up, down)]
    now = margin(returns[up], returns[down], statistic)
    while now < delta:
        options = []
        for side, floor, (one, other) in zip((up, down), floors, ((up[1:], down), (up, down[1:])), strict=True):
            if len(side) > floor:
                options.append((margin(returns[one], returns[other], statistic), side))
        best, side = max(options, key=lambda option: option[0], default=(now, up))
        if best <= now:
            break
        gone[side.pop(0)] = True
        now = best
    return gone


def consistency(returns: np.ndarray, correct: np.ndarray, groups: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return how often the teacher ranks correct above incorrect answers of a prompt: shares of groups and of pairs."""
    kinds = {"all_correct": 0, "all_wrong": 0, "consistent": 0, "violated": 0}
    inverted = pairs = 0
    for members in groups:
        right, wrong = (returns[[i for i in members if correct[i] == label]] for label in (True, False))
        if not len(wrong):
            kinds["all_correct"] += 1
        elif not len(right):
            kinds["all_wrong"] += 1
        else:
            bad = int((right[:, None] < wrong[None, :]).sum())
            inverted, pairs = inverted + bad, pairs + len(right) * len(wrong)
            kinds["violated" if bad else "consistent"] += 1
    found = {f"order/{kind}": count / max(len(groups), 1) for kind, count in kinds.items()}
    if pairs:
        found["order/inverted_pairs"] = inverted / pairs
    for name, chosen in (("correct", correct), ("incorrect", ~correct)):
        if chosen.any():
            found[f"order/return_{name}"] = float(returns[chosen].mean())
    return found
