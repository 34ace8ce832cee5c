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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from opdengine.methods.camopd import CaMOPD
from opdengine.methods.method import Method
from opdengine.models.packing import pack
from opdengine.models.sharding import whole
from opdengine.types import Batch, Prompt, Sample

if TYPE_CHECKING:
    from opdengine.training.step import Engine

PROBE_NUMBER = -1
"""Batch number of the probe: its rollouts have the same seeds each time."""


def coherence(gradients: np.ndarray) -> float:
    """``|sum g_i| / sum |g_i|`` of float [n, d]: 1 where all agree; 0 without gradient."""
    lengths = np.linalg.norm(gradients, axis=1).sum()
    return float(np.linalg.norm(gradients.sum(axis=0)) / lengths) if lengths > 0 else 0.0


def coherence_gain(gradients: np.ndarray, chosen: np.ndarray, draws: int, seed: Sequence[int]) -> dict[str, float]:
    """Return the coherence of all gradients, and by how many percent the chosen ones and random choices exceed it.

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


def gradient_diagnostics(method: Method, prompts: Sequence[Prompt]) -> Coherence | None:
    """Return the diagnostics that ``camopd.diagnose_steps`` asks for; None where it is 0, and for other methods."""
    if not isinstance(method, CaMOPD) or not method.settings.diagnose_steps:
        return None
    return Coherence(method, prompts)


def sample_gradients(engine: Engine, samples: Sequence[Sample], dimensions: int, seed: int) -> np.ndarray:
    """float64 [n, dimensions]: the projected gradient of each sample's own loss, of the samples of all ranks.

    The student's ``grad`` fields are empty afterwards.
    """
    # One sample's gradient, and no noise in it.
    objective, student, ranks = replace(engine.objective(), vocab_sample=0.0), engine.student, engine.ranks
    student.model.eval()
    parameters = probed_parameters(student.model)
    gathered = student.head if student.has_split_head else None  # no rank can ask for it alone

    def loss_of(sample: Sample) -> torch.Tensor:
        (packed,) = pack([sample.token_ids], max_tokens=engine.config.max_tokens_per_batch, layout="padded")
        hidden = student.hidden(packed, [sample.target_positions])
        return objective(hidden, gathered or student.head, [sample])

    def idle() -> torch.Tensor:
        return student.without_tokens(student.idle())

    weighty = ranks.join([(ranks.rank, place, sample.has_weight) for place, sample in enumerate(samples)])
    rows = np.zeros((len(weighty), dimensions))
    student.model.zero_grad(set_to_none=True)
    for row, (owner, place, has_weight) in zip(rows, weighty, strict=True):
        if not has_weight:
            continue
        loss = student.with_weights(partial(loss_of, samples[place]) if owner == ranks.rank else idle)
        # A split model reduces its gradients in a whole backward pass only.
        loss.backward(inputs=parameters if student.sharded is None else None)
        row[:] = sketch([whole(p.grad) for p in parameters if p.grad is not None], dimensions, seed)
        student.model.zero_grad(set_to_none=True)
    return rows


class Coherence:
    """Every ``diagnose_steps`` steps: the cosine between branches, and the selection's gain in each at its next turn.

    Args:
        method: with the settings of the measurement.
        prompts: all training prompts. Of each branch those that come first in an order of their own are the probe.
    """

    def __init__(self, method: CaMOPD, prompts: Sequence[Prompt]) -> None:
        self.method = method
        self.settings = method.settings
        self.seed = method.config.seed
        self.probes: dict[str, list[Prompt]] = {}
        lots = sorted(prompts, key=lambda p: hashlib.sha256(f"{self.seed}:{p.id}".encode()).digest())
        for prompt in lots:
            probe = self.probes.setdefault(method.stream_of(prompt), [])
            if len(probe) < self.settings.diagnose_samples:
                probe.append(prompt)

    async def __call__(self, engine: Engine, batch: Batch) -> Mapping[str, float]:
        metrics = {}
        if due := [branch for branch in self.method.streams if self.is_due(branch, batch.number)]:
            metrics = await engine.run_in_thread(self.selection, engine, due, batch)
        if batch.number % self.settings.diagnose_steps == 0:
            metrics |= await self.opposition(engine)
        return metrics

    def is_due(self, branch: str, step: int) -> bool:
        """Whether this is the branch's first step since the last multiple of ``diagnose_steps``."""
        since = step - step % self.settings.diagnose_steps
        turns = [s for s in range(since, step + 1) if self.method.schedule(s).get(branch)]
        return turns == [step]

    def selection(self, engine: Engine, branches: Sequence[str], batch: Batch) -> dict[str, float]:
        """Coherence of what was selected, against all and against random choices, branch by branch."""
        ranks, metrics = engine.ranks, dict[str, float]()
        for branch in branches:
            # Dropped by the selection or not: what was measured takes part.
            measured = [s for s in batch.samples if s.student_logprob is not None]
            mine = [s for s in measured if self.method.stream_of(s.prompt) == branch]
            members = ranks.join([(s.id, not s.drop) for s in mine])[: self.settings.diagnose_samples]
            if len(members) < 2:
                continue
            names = {name for name, _ in members}
            gradients = self.gradients(engine, [s for s in mine if s.id in names])
            chosen = np.array([kept for _, kept in members])
            found = coherence_gain(gradients, chosen, self.settings.diagnose_draws, [self.seed, batch.number])
            metrics |= {f"coherence/{branch}/{name}": value for name, value in found.items()}
        return metrics

    async def opposition(self, engine: Engine) -> dict[str, float]:
        """Cosine and dot product of the branches' mean gradients on the fixed probe prompts, sampled anew."""
        means = []
        for branch in self.method.streams:
            batch = await engine.ranks.agreed(self.probe(engine, self.probes.get(branch, [])))
            await engine.run_in_thread(engine.measure, batch)
            gradients = await engine.run_in_thread(self.gradients, engine, list(batch))
            means.append(gradients.sum(axis=0) / max(len(gradients), 1))
        dot = float(means[0] @ means[1])
        lengths = [float(np.linalg.norm(mean)) for mean in means]
        if not all(lengths):
            return {"branches/dot": dot}
        return {"branches/dot": dot, "branches/cosine": dot / (lengths[0] * lengths[1])}

    async def probe(self, engine: Engine, prompts: Sequence[Prompt]) -> Batch:
        """Sample and score this rank's share of the prompts."""
        batch = await engine.alone(engine.rollout(prompts, PROBE_NUMBER))
        await engine.alone(engine.annotate(batch))
        await engine.score(batch)
        return batch

    def gradients(self, engine: Engine, samples: Sequence[Sample]) -> np.ndarray:
        """float64 [n, d]: of each sample's token-mean loss; given this rank's, of those of all ranks."""
        alike = Batch(samples=[replace(sample, drop="") for sample in samples])
        self.method.weigh_alike(alike)
        for sample in alike:
            sample.scale = 1 / len(sample.target_ids)
        return sample_gradients(engine, alike.samples, self.settings.diagnose_dimensions, self.seed)
