"""Correct and incorrect rollouts of a set: how many to keep, and how far their returns lie apart.

Pure functions behind Uni-OPD (arXiv 2605.03677, sections on online balancing and margin calibration,
equations 9 to 11). A return is the mean gap of a rollout's tokens, nats per token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from opdengine.config.method_sections import UniOPDConfig
from opdengine.types import Rollout

ROUNDING = 1e-9
"""Of a product of a count and a ratio: 33 / 0.55 is 60, not the 59 that binary numbers make of it."""

LEAST_KEPT = 0.25
"""Share of each kind that :func:`narrowing` never removes."""


def balanced_counts(correct: int, incorrect: int, ratio: float) -> tuple[int, int]:
    """How many of each kind to keep for ``correct : incorrect = ratio : 1``; never adds, never empties a set.

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


def choose(rollouts: Sequence[Rollout], correct: Sequence[bool], config: UniOPDConfig, seed: int) -> list[bool]:
    """Which rollouts stay after balancing.

    Steps of one episode stay or go together. Who goes is random, but a function of the seed and the sampled
    tokens only: neither the order of the rollouts nor a resumed run changes it.

    Args:
        rollouts: of the whole step.
        correct: one label each.
        config: scope, ratio and cap.
        seed: of the choice.
    """
    units: dict[str, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        units.setdefault(rollout.trajectory or f"\0{rollout.id}", []).append(i)
    order = sorted(units, key=lambda name: min(_lot(rollouts[i], seed) for i in units[name]))
    groups = sets(rollouts, "group")
    place = {i: group for group, members in groups.items() for i in members}
    wide = config.balance == "global"
    alive = set(order)

    def keep(names: Sequence[str], counts: tuple[int, int]) -> None:
        for label, count in zip((True, False), counts, strict=True):
            alive.difference_update([name for name in names if correct[units[name][0]] == label][count:])

    if config.balance != "none":
        for names in [order] if wide else _by(order, units, place):
            keep(names, balanced_counts(*_count(names, units, correct), config.balance_ratio))
    for names in _by([name for name in order if name in alive], units, place):
        keep(names, capped_counts(*_count(names, units, correct), config.keep_per_prompt))
    stays = {i for name in alive for i in units[name]}
    return [i in stays for i in range(len(rollouts))]


def _by(order: Sequence[str], units: Mapping[str, list[int]], place: Mapping[int, str]) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for name in order:
        found.setdefault(place[units[name][0]], []).append(name)
    return list(found.values())


def _count(names: Sequence[str], units: Mapping[str, list[int]], correct: Sequence[bool]) -> tuple[int, int]:
    right = sum(correct[units[name][0]] for name in names)
    return right, len(names) - right


def _lot(rollout: Rollout, seed: int) -> bytes:
    text = f"{seed}:{rollout.prompt.id}:{rollout.id}:".encode()
    return hashlib.sha256(text + rollout.token_ids.tobytes()).digest()


def sets(rollouts: Sequence[Rollout], scope: str) -> dict[str, list[int]]:
    """Indices of the rollouts that are compared with each other: of a prompt, or all."""
    if scope == "global":
        return {"": list(range(len(rollouts)))}
    found: dict[str, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        found.setdefault(rollout.group or rollout.id, []).append(i)
    return found


def margin(correct: np.ndarray, incorrect: np.ndarray, statistic: str) -> float:
    """How far the returns of correct rollouts lie above those of incorrect ones (equation 10, or of means)."""
    if statistic == "mean":
        return float(correct.mean() - incorrect.mean())
    return float(correct.min() - incorrect.max())


def shifts(returns: np.ndarray, correct: np.ndarray, delta: float, statistic: str, direction: str) -> np.ndarray:
    """What to add to every token of each rollout so that the margin is ``delta`` (equation 11).

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
    """float64 [N]: the part of a shift that each rollout takes, with its sign."""
    up, down = {"lift": (1.0, 0.0), "push_down": (0.0, -1.0), "spread": (0.5, -0.5)}[direction]
    return np.where(correct, up, down)


def narrowing(returns: np.ndarray, correct: np.ndarray, delta: float, statistic: str) -> np.ndarray:
    """bool [N]: rollouts to remove, one by one, until the margin is ``delta``.

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
    """Does the teacher rank correct above incorrect answers of a prompt? Shares of groups and of pairs."""
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
