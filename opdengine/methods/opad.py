"""OPAD: MAD-OPD for agents, step by step (arXiv 2605.01347, section 4.4).

Every step of a live trajectory becomes a training state with its true prefix: the teachers debate the
state that the student was really in, then judge the action that it took there. The loss is the sum
over steps; JSD with beta 0.5 is the paper's divergence for agents (remark 1).
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np

from opdengine.config.train import TrainConfig
from opdengine.environments.episodes import turns_of
from opdengine.errors import ConfigError
from opdengine.methods.mad_opd import MADOPD
from opdengine.methods.mad_opd import PAPER as MAD_OPD
from opdengine.methods.paper import Paper
from opdengine.models.chat import written
from opdengine.types import Batch, Sample, Turn

PAPER = Paper(
    arxiv=MAD_OPD.arxiv,
    defaults={"divergence": ("jsd", "remark 1: agents"), **MAD_OPD.defaults},
    choices={
        "debate.prompts": "tools",
        "environment.max_turns": "10",
        "max_completion_length": "4096 of one turn",
        "prompts_per_step": "trajectories of 128 steps",
        "max_steps": "125",
    },
)


class OPAD(MADOPD):
    """MAD-OPD over the steps of live trajectories."""

    paper = PAPER

    def __init__(self, config: TrainConfig) -> None:
        if not config.environment.name:
            raise ConfigError(
                "method 'opad' needs an environment to act in; set environment.name, or use 'mad_opd' on recorded "
                "states (opdengine.environments.recorded)"
            )
        super().__init__(config)

    def split(self, batch: Batch) -> None:
        """Cut trajectories into steps and choose among them; turns that are left out are counted."""
        trajectories = batch.samples
        batch.samples = [step for sample in trajectories for step in self.choose(sample, batch.number)]
        left_out = sum(s.trained_turns for s in trajectories) - sum(s.trained_turns for s in batch.samples)
        batch.lost["not_chosen"] += left_out

    def choose(self, trajectory: Sample, number: int) -> list[Sample]:
        """The steps of one trajectory that are trained on in batch ``number``, in their order."""
        steps = steps_of(trajectory)
        settings = self.config.opad
        count = settings.steps_per_trajectory
        if settings.sampling == "all" or count is None or len(steps) <= count:
            return steps
        weights = np.ones(len(steps))
        if settings.sampling == "surprise":
            weights = np.array([max(surprise(step), 1e-6) for step in steps])
        generator = np.random.default_rng([self.config.seed, number, zlib.crc32(trajectory.id.encode())])
        chosen = generator.choice(len(steps), size=count, replace=False, p=weights / weights.sum())
        return [steps[i] for i in sorted(chosen)]


def steps_of(trajectory: Sample) -> list[Sample]:
    """One sample per turn of the student: everything before it is the prompt, exact ids kept."""
    steps = []
    for number, (index, turn, chat) in enumerate(turns_of(trajectory)):
        before = trajectory.turns[:index]
        state = Turn(
            "prompt",
            np.concatenate([t.token_ids for t in before]),
            images=tuple(image for t in before for image in t.images),
        )
        prompt = trajectory.prompt
        steps.append(
            replace(
                trajectory,
                id=f"{trajectory.id}/step{number}",
                prompt=replace(prompt, id=f"{prompt.id}/{trajectory.id}/step{number}", messages=chat),
                turns=(state, turn),
                text="\n".join(map(written, turn.messages)),
                trajectory=trajectory.id,
            )
        )
    return steps


def surprise(step: Sample) -> float:
    """Mean negative log-prob (nats) of the step's tokens under the policy that sampled them."""
    logprob = step.sampler_logprob
    return 1.0 if logprob is None or not len(logprob) else float(-logprob.mean())
