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

import numpy as np

from opdengine.config.method_sections import CaMOPDConfig
from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.methods.checks import ROLLOUTS, SAMPLED, Check
from opdengine.methods.method import Method, judged_by, need_teachers, plain_room, route
from opdengine.methods.paper import Paper
from opdengine.methods.policy_gradient import CHECKS, gap_of, policy_gradient
from opdengine.methods.room import Need
from opdengine.metrics import Mean, mean
from opdengine.teachers import Teacher
from opdengine.types import Batch, Prompt, Sample

TOLERANCE = 1e-6
"""A share or a count that misses a bound by less than this has reached it: only rounding lies between."""


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
"""The paper's schedule and selection are the defaults of :class:`opdengine.config.method_sections.CaMOPDConfig`."""


class CaMOPD(Method):
    """Alternating branches, selected rollouts, sampled reverse KL."""

    paper = PAPER

    streams = ("general", "domain")

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        check(config)
        self.settings = config.camopd
        self.gradient = policy_gradient(config, PAPER)
        self.needs, self.diverges = self.gradient.needs, self.gradient.exact

    def stream_of(self, prompt: Prompt) -> str:
        """The branch of a prompt."""
        return "domain" if prompt.key in self.settings.domain else "general"

    def schedule(self, step: int) -> Mapping[str, float]:
        """Return the shares of equation 5, or those of a mixture of the two branches."""
        n = self.settings.n_general
        if self.settings.schedule == "mixed":
            return {"general": n / (n + 1), "domain": 1 / (n + 1)}
        general = float(step % (n + 1) < n)
        return {"general": general, "domain": 1 - general}

    async def annotate(self, batch: Batch) -> None:
        """Every rollout is judged under the plain prompt by its branch's teacher."""
        for sample in batch:
            judged_by(sample, self.teachers_of(sample.prompt), self.view(sample.prompt).messages)

    def teachers_of(self, prompt: Prompt) -> list[Teacher]:
        """The routed teachers of the prompt's branch."""
        special = {t.name for t in self.teachers if set(t.keys) & set(self.settings.domain)}
        domain = self.stream_of(prompt) == "domain"
        return [t for t in route(self.teachers, prompt.key) if (t.name in special) == domain]

    @property
    def checks(self) -> tuple[Check, ...]:
        """The ways in which gaps and selection can fail without an error."""
        return (*CHECKS, *selection_checks(self.settings))

    def room(self, prompt: Prompt) -> list[Need]:
        """The tokens that the branch's teachers read."""
        return plain_room(self.config, self.view(prompt), self.teachers_of(prompt))

    def weigh(self, batch: Batch) -> None:
        """Select rollouts by equations 6 to 8 and weigh their tokens by equation 9."""
        self.choose(batch)
        scale = {"general": self.settings.r_g, "domain": self.settings.r_d}
        self.gradient.weigh(batch, self.ranks, scale=[scale[self.stream_of(s.prompt)] for s in batch])

    def weigh_alike(self, batch: Batch) -> None:
        """Weigh every rollout as if all were selected and r_g = r_d = 1, for the gradient diagnostics."""
        self.gradient.weigh(batch, self.ranks)

    def choose(self, batch: Batch) -> None:
        """Drop the rollouts that are not selected, branch by branch over the whole step."""
        c, samples = self.settings, list(batch)
        gap = [gap_of(sample) for sample in samples]
        kinds = {"general": (c.score_g, c.rho_g), "domain": (c.score_d, c.rho_d)}
        streams = [self.stream_of(sample.prompt) for sample in samples]
        scores = [gap_score(own, kinds[stream][0]) for own, stream in zip(gap, streams, strict=True)]
        for sample, own, score in zip(samples, gap, scores, strict=True):
            if not np.isfinite(score):
                sample.drop = "gap_not_finite"
            elif len(own) < c.min_tokens:
                sample.drop = "min_tokens"
        able = [i for i, sample in enumerate(samples) if not sample.drop]
        rows, mine = self.ranks.join([(streams[i], scores[i], len(gap[i])) for i in able]), self.ranks.own(len(able))
        kept = np.ones(len(rows), dtype=bool)
        for number, (branch, (_, rho)) in enumerate(kinds.items()):
            places = [place for place, (stream, *_) in enumerate(rows) if stream == branch]
            if not places:
                continue
            found = np.array([rows[place][1] for place in places])
            lengths = np.array([rows[place][2] for place in places], dtype=np.float64)
            kept[places] = select(found, rho, c.selection, [self.config.seed, batch.number, number])
            if found.std() > 0 and lengths.std() > 0:
                correlation = float(np.corrcoef(found, lengths)[0, 1])
                batch.metrics[f"camopd/{branch}/score_length_correlation"] = Mean(correlation)
        for i, stays in zip(able, kept[mine], strict=True):
            samples[i].drop = "" if stays else "selection"
        for branch in kinds:
            members = [i for i in able if streams[i] == branch]
            if members:
                batch.metrics |= branch_metrics(branch, [samples[i] for i in members], [gap[i] for i in members])
                batch.metrics[f"camopd/{branch}/scored"] = float(len(members))


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


def check(config: TrainConfig) -> None:
    """Raise ConfigError for settings that CaMOPD cannot have."""
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


def gap_score(gap: np.ndarray, kind: str) -> float:
    """Mean over tokens of |gap|, max(gap, 0), gap or gap squared (equations 6 and 7)."""
    values = {"abs": np.abs(gap), "pos": np.maximum(gap, 0), "signed": gap, "sq": gap * gap}[kind]
    return float(values.mean())


def mass_prefix(scores: np.ndarray, rho: float) -> np.ndarray:
    """bool [N]: the fewest largest scores whose sum reaches ``rho`` of the total (equation 8).

    Ties go to the earlier one. Negative scores count as 0; where no score is positive all are kept.
    """
    positive = np.maximum(np.asarray(scores, dtype=np.float64), 0.0)
    if positive.sum() <= 1e-12:
        return np.ones(len(positive), dtype=bool)
    order = np.argsort(-positive, kind="stable")
    share = np.cumsum(positive[order]) / positive.sum()
    count = int(np.argmax(share >= rho - TOLERANCE)) + 1
    chosen = np.zeros(len(positive), dtype=bool)
    chosen[order[:count]] = True
    return chosen


def select(scores: np.ndarray, rho: float, how: str, seed: Sequence[int]) -> np.ndarray:
    """bool [N]: see ``selection`` in :class:`opdengine.config.method_sections.CaMOPDConfig`."""
    chosen = np.ones(len(scores), dtype=bool)
    if how == "none" or not len(scores):
        return chosen
    if how == "topk_frac":
        chosen[np.argsort(-scores, kind="stable")[int(np.ceil(rho * len(scores) - TOLERANCE)) :]] = False
        return chosen
    chosen = mass_prefix(scores, rho)
    return np.random.default_rng(seed).permutation(chosen) if how == "random" else chosen


def branch_metrics(branch: str, samples: Sequence[Sample], gap: Sequence[np.ndarray]) -> dict[str, float]:
    """Gap statistics of this process's samples of a branch (the signed mean is about -KL), and the selected share."""
    every = np.concatenate(gap)
    chosen = [not sample.drop for sample in samples]
    values = {
        "gap_abs": Mean(float(np.abs(every).mean()), len(every)),
        "gap_positive": Mean(float(np.maximum(every, 0).mean()), len(every)),
        "gap_signed": Mean(float(every.mean()), len(every)),
        "selected": float(sum(chosen)),
        "selected_share": mean(chosen),
    }
    return {f"camopd/{branch}/{name}": value for name, value in values.items()}
