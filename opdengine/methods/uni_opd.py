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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opdengine.checks import ROLLOUTS, Check
from opdengine.config import ConfigError, TrainConfig
from opdengine.method_sections import UniOPDConfig
from opdengine.methods import outcome
from opdengine.methods.advantage import CHECKS, PolicyGradient, gaps, resolve
from opdengine.methods.mad_opd import contexts_of, debate_checks, room_of
from opdengine.methods.opd import need_teachers
from opdengine.methods.paper import Paper
from opdengine.recipe import Batch, Note, Recipe, Weighed
from opdengine.types import Rollout

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
"""Those of balance and margin are the defaults of :class:`opdengine.method_sections.UniOPDConfig`."""


@dataclass(frozen=True)
class Balance:
    """Leaves out rollouts by their outcomes, before any teacher judges them.

    Args:
        config: scope and ratio of the balance.
        seed: of the choice.
    """

    config: UniOPDConfig
    seed: int

    def __call__(
        self, rollouts: Sequence[Rollout], notes: Sequence[Note], step: int
    ) -> tuple[list[Note], Mapping[str, float]]:
        able = [i for i, note in enumerate(notes) if not note.drop]
        correct = [is_correct(rollouts[i], self.config) for i in able]
        stays = outcome.choose([rollouts[i] for i in able], correct, self.config, self.seed)
        revised = list(notes)
        for i, kept in zip(able, stays, strict=True):
            revised[i] = notes[i] if kept else Note(drop="balance")
        right = [label for label, kept in zip(correct, stays, strict=True) if kept]
        return revised, {
            name: float(np.mean(labels))
            for name, labels in (("balance/correct_before", correct), ("balance/correct_after", right))
            if labels
        }


def is_correct(rollout: Rollout, config: UniOPDConfig) -> bool:
    """Whether the verifier's reward makes it a correct rollout; without a reward it is not."""
    return rollout.reward is not None and rollout.reward >= config.correct_from


@dataclass(frozen=True)
class Calibrated:
    """Gaps plus the outcome's term.

    Args:
        gradient: makes signals of them.
        config: of the margin.
    """

    gradient: PolicyGradient
    config: UniOPDConfig

    def __call__(self, batch: Batch) -> Weighed:
        gap, c, count = gaps(batch), self.config, len(batch.rollouts)
        shift, gone = np.zeros(count), np.zeros(count, dtype=bool)
        # Episodes with a weight of 0 on every turn were not judged: they have no return.
        valid = [i for i, (r, s) in enumerate(zip(batch.rollouts, batch.stats, strict=True))
                 if s.student_logprob is not None and r.reward is not None]  # fmt: skip
        returns = np.array([gap[i].mean() for i in valid])
        correct = np.array([is_correct(batch.rollouts[i], c) for i in valid], dtype=bool)
        rollouts, moved = [batch.rollouts[i] for i in valid], []
        for members in outcome.sets(rollouts, c.margin_scope).values():
            mine, labels, places = returns[members], correct[members], np.array(valid)[members]
            if c.margin == "mask":
                gone[places] = outcome.narrowing(mine, labels, c.margin_delta, c.margin_statistic)
            elif c.margin == "shift":
                shift[places] = outcome.shifts(mine, labels, c.margin_delta, c.margin_statistic, c.margin_direction)
            elif c.margin == "fixed" and labels.any() and not labels.all():
                shift[places] = c.margin_delta * outcome.sides(labels, c.margin_direction)
            if labels.any() and not labels.all():
                moved.append(np.ptp(shift[places]))
        weighed = self.gradient.signals(batch, gap, np.ones(count), shift, ["margin" if g else "" for g in gone])
        metrics = outcome.consistency(returns, correct, list(outcome.sets(rollouts, "group").values()))
        compared = outcome.sets(rollouts, c.margin_scope if c.margin != "none" else c.balance).values()
        metrics["outcomes/sets"] = float(len(compared))
        metrics["outcomes/one_sided"] = float(sum(len(set(correct[members])) == 1 for members in compared))
        if moved and c.margin in ("shift", "fixed"):
            metrics["margin/shift"] = float(np.mean(moved))
        return Weighed(weighed.signals, {**weighed.metrics, **metrics})


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


def uni_opd(config: TrainConfig) -> Recipe:
    """Routed teachers, balanced outcomes, calibrated margins."""
    need_teachers(config, 1)
    base, gradient = resolve(config, PAPER["advantage.importance"], PAPER["advantage.max_gap"])
    contexts = contexts_of(config)
    need_groups(config)
    return Recipe(
        "uni_opd",
        contexts,
        (base, Calibrated(gradient, config.uni_opd)),
        teachers_per_prompt=2 if config.debates else 1,
        measures=gradient.measures,
        needs_reward=True,
        revise=Balance(config.uni_opd, config.seed),
        checks=(*debate_checks(config), *CHECKS, *outcome_checks(config.uni_opd)),
        room=room_of(config),
    )
