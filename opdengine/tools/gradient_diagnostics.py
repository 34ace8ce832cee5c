"""Do the gradients of rollouts agree? Coherence of a selection, and the two branches against each other.

``coherence(A) = |sum_A g_i| / sum_A |g_i|`` with g_i the gradient of one rollout's loss (arXiv
2605.27115, section 4.4). It grows for any smaller set, about as 1 / sqrt(n) for unrelated
gradients, so a selection is compared with random ones of the same size; without that control the gain says little.

Gradients are those of the last decoder block (of the whole model where it has none), one rollout
at a time, projected to few dimensions by random signs: that keeps inner products. Where ranks split the
model all take part in every pass, each for its own rollouts in turn, so all get all gradients.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from opdengine.config.method_sections import CaMOPDConfig
from opdengine.distributed import whole
from opdengine.loss.objective import Item, make_item
from opdengine.methods.method import Batch, Schedule, Stats, Weigher, combine
from opdengine.models.packing import pack
from opdengine.training.scoring import Judged
from opdengine.types import Prompt

if TYPE_CHECKING:
    from opdengine.training.step import Engine

PROBE_NUMBER = -1
"""Batch number of the probe: its rollouts have the same seeds each time."""


def coherence(gradients: np.ndarray) -> float:
    """``|sum g_i| / sum |g_i|`` of float [n, d]: 1 where all agree; 0 without gradient."""
    lengths = np.linalg.norm(gradients, axis=1).sum()
    return float(np.linalg.norm(gradients.sum(axis=0)) / lengths) if lengths > 0 else 0.0


def coherence_gain(gradients: np.ndarray, chosen: np.ndarray, draws: int, seed: Sequence[int]) -> dict[str, float]:
    """Coherence of all, and what the chosen ones gain on it, in percent, beside random choices.

    Args:
        gradients: float [n, d].
        chosen: bool [n].
        draws: random choices of as many.
        seed: of these.
    """
    whole = coherence(gradients)
    if whole == 0 or not chosen.any():
        return {"full": whole}
    rng = np.random.default_rng(seed)
    control = np.mean([coherence(gradients[rng.permutation(chosen)]) for _ in range(draws)])
    gain, random = (100 * (float(value) / whole - 1) for value in (coherence(gradients[chosen]), control))
    return {"full": whole, "gain": gain, "gain_random": random, "gain_over_random": gain - random}


def sketch(gradients: Sequence[torch.Tensor], dimensions: int, seed: int) -> np.ndarray:
    """float64 [dimensions]: a random projection that keeps inner products in expectation.

    Every entry is added with a random sign to one of the coordinates in turn; the same seed gives the
    same projection.
    """
    total = np.zeros(dimensions)
    for number, gradient in enumerate(gradients):
        flat = gradient.detach().flatten().float()
        generator = torch.Generator(flat.device).manual_seed(seed + number)
        signs = torch.randint(0, 2, flat.shape, generator=generator, device=flat.device, dtype=torch.int8) * 2 - 1
        padded = torch.nn.functional.pad(flat * signs, (0, -len(flat) % dimensions))
        total += padded.view(-1, dimensions).sum(0).double().cpu().numpy()
    return total


def probed_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained parameters of the last block of the longest module list, or of the whole model."""
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    if stacks:
        trained = [p for p in max(stacks, key=len)[-1].parameters() if p.requires_grad]
        if trained:
            return trained
    return [p for p in model.parameters() if p.requires_grad]


def rollout_gradients(engine: Engine, items: Sequence[Item], dimensions: int, seed: int) -> np.ndarray:
    """float64 [n, dimensions]: the projected gradient of each item's own loss, of the items of all ranks.

    The student's ``grad`` fields are empty afterwards.
    """
    objective, student, ranks = engine.objective(), engine.student, engine.ranks
    student.model.eval()
    parameters = probed_parameters(student.model)
    gathered = student.head if student.has_split_head else None  # no rank can ask for it alone

    def loss_of(item: Item) -> torch.Tensor:
        (batch,) = pack([item.rollout.token_ids], max_tokens=engine.config.max_tokens_per_batch, layout="padded")
        hidden = student.hidden(batch, [item.rollout.target_positions])
        return objective(hidden, gathered or student.head, [item])

    def idle() -> torch.Tensor:
        return student.nothing(student.idle())

    weighty = ranks.join([(ranks.rank, place, item.has_weight) for place, item in enumerate(items)])
    rows = np.zeros((len(weighty), dimensions))
    student.model.zero_grad(set_to_none=True)
    for row, (owner, place, has_weight) in zip(rows, weighty, strict=True):
        if not has_weight:
            continue
        loss = student.within(partial(loss_of, items[place]) if owner == ranks.rank else idle)
        # A split model reduces its gradients in a whole backward pass only.
        loss.backward(inputs=parameters if student.sharded is None else None)
        row[:] = sketch([whole(p.grad) for p in parameters if p.grad is not None], dimensions, seed)
        student.model.zero_grad(set_to_none=True)
    return rows


class Coherence:
    """Every ``diagnose_steps`` steps: the cosine between branches, and the selection's gain in each at its next turn.

    Args:
        config: how often, how many rollouts, how many dimensions.
        schedule: tells the branch of a prompt.
        weighers: the loss of a rollout, without selection.
        seed: of projections and random choices.
    """

    def __init__(self, config: CaMOPDConfig, schedule: Schedule, weighers: Sequence[Weigher], seed: int) -> None:
        self.config = config
        self.schedule = schedule
        self.weighers = tuple(weighers)
        self.seed = seed
        self.probes: dict[str, list[Prompt]] = {}

    def watch(self, prompts: Sequence[Prompt]) -> None:
        """Fix the probe: of each branch the prompts that come first in an order of their own."""
        lots = sorted(prompts, key=lambda p: hashlib.sha256(f"{self.seed}:{p.id}".encode()).digest())
        for prompt in lots:
            probe = self.probes.setdefault(self.schedule.stream_of(prompt), [])
            if len(probe) < self.config.diagnose_samples:
                probe.append(prompt)

    async def __call__(
        self, engine: Engine, judged: Sequence[Judged], stats: Sequence[Stats], items: Sequence[Item], step: int
    ) -> Mapping[str, float]:
        metrics = {}
        if due := [branch for branch in self.schedule.streams if self.is_due(branch, step)]:
            metrics = await engine.beside(self.selection, engine, due, judged, stats, items, step)
        if step % self.config.diagnose_steps == 0:
            metrics |= await self.opposition(engine)
        return metrics

    def is_due(self, branch: str, step: int) -> bool:
        """Whether this is the branch's first step since the last multiple of ``diagnose_steps``."""
        since = step - step % self.config.diagnose_steps
        turns = [s for s in range(since, step + 1) if self.schedule.shares(s).get(branch)]
        return turns == [step]

    def selection(
        self,
        engine: Engine,
        branches: Sequence[str],
        judged: Sequence[Judged],
        stats: Sequence[Stats],
        items: Sequence[Item],
        step: int,
    ) -> dict[str, float]:
        """Coherence of what was selected, against all and against random choices, branch by branch."""
        kept = set(engine.ranks.join([item.rollout.id for item in items]))
        metrics: dict[str, float] = {}
        for branch in branches:
            mine = [j.rollout.id for j in judged if self.schedule.stream_of(j.rollout.prompt) == branch]
            members = engine.ranks.join(mine)[: self.config.diagnose_samples]
            if len(members) < 2:
                continue
            places = [i for i, j in enumerate(judged) if j.rollout.id in members]
            gradients = self.gradients(engine, [judged[i] for i in places], [stats[i] for i in places])
            chosen = np.array([member in kept for member in members])
            found = coherence_gain(gradients, chosen, self.config.diagnose_draws, [self.seed, step])
            metrics |= {f"coherence/{branch}/{name}": value for name, value in found.items()}
        return metrics

    async def opposition(self, engine: Engine) -> dict[str, float]:
        """Cosine and dot product of the branches' mean gradients on the fixed probe prompts, sampled anew."""
        means = []
        for branch in self.schedule.streams:
            judged = await engine.ranks.agreed(self.probe(engine, self.probes.get(branch, [])))
            stats = await engine.beside(engine.measure, judged)
            gradients = await engine.beside(self.gradients, engine, judged, stats)
            means.append(gradients.sum(axis=0) / max(len(gradients), 1))
        dot = float(means[0] @ means[1])
        lengths = [float(np.linalg.norm(mean)) for mean in means]
        if not all(lengths):
            return {"branches/dot": dot}
        return {"branches/dot": dot, "branches/cosine": dot / (lengths[0] * lengths[1])}

    async def probe(self, engine: Engine, prompts: Sequence[Prompt]) -> list[Judged]:
        """This rank's share of the prompts, answered and judged."""
        dropped = Counter[str]()
        rollouts, _ = await engine.settled(engine.rollout(prompts, PROBE_NUMBER, dropped))
        notes, _ = await engine.settled(engine.annotate(rollouts))
        return await engine.judge(rollouts, notes, dropped)

    def gradients(self, engine: Engine, judged: Sequence[Judged], stats: Sequence[Stats]) -> np.ndarray:
        """float64 [n, d]: of each rollout's token-mean loss; given this rank's, of those of all ranks."""
        batch = Batch([j.rollout for j in judged], [j.note for j in judged], stats)
        signals = combine([weigher(batch) for weigher in self.weighers]).signals
        items = [
            make_item(j.rollout, signal, j.teachers, j.targets, 1 / len(j.rollout.targets))
            for j, signal in zip(judged, signals, strict=True)
        ]
        return rollout_gradients(engine, items, self.config.diagnose_dimensions, self.seed)
