"""CaMOPD: counteraction-aware multi-teacher on-policy distillation (arXiv 2605.27115).

A student that was specialised on a domain recovers its general skills from the model it came from (the
general teacher) and keeps the domain from a frozen copy of itself (the domain teacher). The two teachers'
gradients oppose each other, hence:

- *Alternating schedule* (equation 5): ``n_general`` steps on general prompts, then one on the domain's.
- *Gap scores* (equations 6 and 7): mean |gap| of a rollout in the general branch, mean positive gap in the domain.
- *Mass-target selection* (equation 8): the largest scores that hold ``rho`` of the sum. Only these
  rollouts are run forward and backward in the update.
- *Loss* (equation 9): mean over the selected of ``1/T sum_t w_t r_b gap_t log p(y_t)``, with
  ``loss_normalization: sequence``, w the importance band.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from opdengine.checks import ROLLOUTS, SAMPLED, Check
from opdengine.config import ConfigError, TrainConfig
from opdengine.method_sections import CaMOPDConfig
from opdengine.methods.advantage import CHECKS, PolicyGradient, gaps, resolve
from opdengine.methods.gap_selection import branch_metrics, gap_score, select
from opdengine.methods.opd import need_teachers, plain_note, plain_room
from opdengine.methods.paper import Paper
from opdengine.recipe import Annotations, Batch, Inspector, Recipe, Weighed, Weigher, route
from opdengine.room import Need
from opdengine.teachers import Teacher
from opdengine.types import Prompt, Rollout

PAPER = Paper(
    arxiv="2605.27115",
    defaults={
        "divergence": ("reverse_kl", "equation 2"),
        "loss_normalization": ("sequence", "equation 9"),
        "advantage.importance": ("band", "equation 2"),
        "advantage.max_gap": (float("inf"), "equation 2"),
        "num_generations": (1, "appendix A"),
        "temperature": (1.0, "unstated: samples of the student itself"),
        "top_p": (1.0, "unstated: samples of the student itself"),
        "top_k": (0, "unstated: samples of the student itself"),
        "learning_rate": (2e-6, "appendix A"),
        "max_grad_norm": (1000.0, "unstated: where every step is clipped r_g and r_d do nothing"),
    },
    choices={
        "max_prompt_length": "4096",
        "max_completion_length": "32768",
        "prompts_per_step": "512",
        "max_steps": "120",
        "lr_scheduler_type": "unstated",
        "weight_decay": "unstated",
    },
)
"""Those of schedule and selection are the defaults of :class:`opdengine.method_sections.CaMOPDConfig`."""


@dataclass(frozen=True)
class Branches:
    """The schedule, and who judges which branch.

    Args:
        config: domain keys and schedule.
    """

    config: CaMOPDConfig
    streams: tuple[str, ...] = ("general", "domain")

    def stream_of(self, prompt: Prompt) -> str:
        """The branch of a prompt."""
        return "domain" if prompt.key in self.config.domain else "general"

    def shares(self, step: int) -> Mapping[str, float]:
        """Equation 5, or the mixture of the two branches."""
        n = self.config.n_general
        if self.config.schedule == "mixed":
            return {"general": n / (n + 1), "domain": 1 / (n + 1)}
        general = float(step % (n + 1) < n)
        return {"general": general, "domain": 1 - general}

    async def annotate(self, rollouts: Sequence[Rollout], teachers: Sequence[Teacher]) -> Annotations:
        """Every rollout under the plain prompt of its branch's teacher."""
        return Annotations([plain_note(r, self.teachers_of(r.prompt, teachers)) for r in rollouts])

    def teachers_of(self, prompt: Prompt, teachers: Sequence[Teacher]) -> list[Teacher]:
        """The routed teachers of the prompt's branch."""
        special = {t.name for t in teachers if set(t.keys) & set(self.config.domain)}
        domain = self.stream_of(prompt) == "domain"
        return [t for t in route(teachers, prompt.key) if (t.name in special) == domain]

    def room(self, config: TrainConfig, prompt: Prompt, teachers: Sequence[Teacher]) -> list[Need]:
        """What the branch's teachers read."""
        return plain_room(config, prompt, self.teachers_of(prompt, teachers))


@dataclass(frozen=True)
class Selected:
    """Scores, selection and loss weights of each branch.

    Args:
        gradient: makes signals of the gaps.
        config: of the method.
        branches: tells the branch of a prompt.
        seed: of the random selection.
    """

    gradient: PolicyGradient
    config: CaMOPDConfig
    branches: Branches
    seed: int

    def __call__(self, batch: Batch) -> Weighed:
        c, gap, count = self.config, gaps(batch), len(batch.rollouts)
        scale, reasons = np.ones(count), [""] * count
        metrics: dict[str, float] = {}
        streams = [self.branches.stream_of(r.prompt) for r in batch.rollouts]
        kinds = (("general", c.score_g, c.rho_g, c.r_g), ("domain", c.score_d, c.rho_d, c.r_d))
        for number, (branch, kind, rho, r) in enumerate(kinds):
            members = [i for i in range(count) if streams[i] == branch]
            scores = {i: gap_score(gap[i], kind) for i in members}
            for i in members:
                if not np.isfinite(scores[i]):
                    reasons[i] = "gap_not_finite"
                    gap[i] = np.zeros_like(gap[i])
                elif len(gap[i]) < c.min_tokens:
                    reasons[i] = "min_tokens"
            able = [i for i in members if not reasons[i]]
            if not able:
                continue
            mine = np.array([scores[i] for i in able])
            chosen = select(mine, rho, c.selection, [self.seed, batch.step, number])
            for i, stays in zip(able, chosen, strict=True):
                scale[i], reasons[i] = r, "" if stays else "selection"
            metrics |= branch_metrics(branch, [gap[i] for i in able], mine, chosen)
            metrics[f"camopd/{branch}/scored"] = float(len(able))
        weighed = self.gradient.signals(batch, gap, scale, np.zeros(count), reasons)
        return Weighed(weighed.signals, {**weighed.metrics, **metrics})


def selection_checks(config: CaMOPDConfig) -> tuple[Check, ...]:
    """Selection acts only where it leaves rollouts out and where there are scores."""
    found = [
        Check(
            "dropped/min_tokens", SAMPLED, "rollouts are shorter than camopd.min_tokens and were left out",
            "lower camopd.min_tokens", ROLLOUTS,
        ),
        Check(
            "dropped/gap_not_finite", SAMPLED, "rollouts have a gap that is not finite and were left out",
            "check the teachers' weights and dtypes", ROLLOUTS,
        ),
    ]  # fmt: skip
    for branch, rho in (("general", config.rho_g), ("domain", config.rho_d)):
        if config.selection != "none" and rho < 1:
            says = f"rollouts of the {branch} branch were selected: selection leaves nothing out"
            remedy = f"take more prompts in a step, or lower camopd.rho_{branch[0]}={rho}"
            failed, total = f"camopd/{branch}/selected", f"camopd/{branch}/scored"
            found.append(Check(failed, total, says, remedy, share=1.0))
    return tuple(found)


def camopd(config: TrainConfig) -> Recipe:
    """Alternating branches, selected rollouts, sampled reverse KL."""
    need_teachers(config, 2)
    c = config.camopd
    special = [t.name for t in config.teachers if set(t.key) & set(c.domain)]
    torn = [t.name for t in config.teachers if t.name in special and set(t.key) - set(c.domain)]
    if not c.domain or not special or len(special) == len(config.teachers) or torn:
        raise ConfigError(
            f"camopd.domain={c.domain} does not part the teachers {[(t.name, t.key) for t in config.teachers]}; name "
            "the routing keys of the domain there, give the domain's teacher only these as 'key' and the "
            "general teacher none or others"
        )
    known = {key for t in config.teachers if t.name in special for key in t.key}
    if alone := sorted(set(c.domain) - known):
        raise ConfigError(
            f"camopd.domain names {alone}, but no domain teacher has that 'key': nobody would judge these prompts; add "
            f"it to one of {special} or take it out of camopd.domain"
        )
    base, gradient = resolve(config, PAPER["advantage.importance"], PAPER["advantage.max_gap"])
    branches = Branches(c)
    return Recipe(
        "camopd",
        branches,
        (base, Selected(gradient, c, branches, config.seed)),
        measures=gradient.measures,
        schedule=branches,
        checks=(*CHECKS, *selection_checks(c)),
        room=partial(branches.room, config),
        inspector=_inspector(c, branches, (base, gradient), config.seed) if c.diagnose_steps else None,
    )


def _inspector(config: CaMOPDConfig, branches: Branches, weighers: tuple[Weigher, Weigher], seed: int) -> Inspector:
    from opdengine.coherence import Coherence  # needs torch, which reading the settings does not

    return Coherence(config, branches, weighers, seed)
