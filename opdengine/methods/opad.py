"""OPAD: MAD-OPD for agents, step by step (arXiv 2605.01347, section 4.4).

Every step of a live trajectory becomes a training state with its true prefix: the teachers debate the
state that the student was really in, then judge the action that it took there. The loss is the sum
over steps; JSD with beta 0.5 is the paper's divergence for agents (remark 1).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opdengine.chat import written
from opdengine.config import ConfigError, OpadConfig, TrainConfig
from opdengine.methods.mad_opd import PAPER as MAD_OPD
from opdengine.methods.mad_opd import mad_opd
from opdengine.methods.paper import Paper
from opdengine.recipe import Recipe
from opdengine.rollout.episodes import turns_of
from opdengine.types import Rollout, Turn

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


class Steps:
    """Cuts trajectories into steps and chooses among them.

    Args:
        config: how many steps of a trajectory, and which.
        seed: of the choice.
    """

    def __init__(self, config: OpadConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def __call__(self, rollouts: Sequence[Rollout], number: int) -> list[Rollout]:
        return [step for rollout in rollouts for step in self.choose(rollout, number)]

    def choose(self, rollout: Rollout, number: int) -> list[Rollout]:
        """The steps of one trajectory that are trained on, in their order."""
        steps = steps_of(rollout)
        count = self.config.steps_per_trajectory
        if self.config.sampling == "all" or count is None or len(steps) <= count:
            return steps
        weights = np.ones(len(steps))
        if self.config.sampling == "surprise":
            weights = np.array([max(surprise(step), 1e-6) for step in steps])
        generator = np.random.default_rng([self.seed, number, zlib.crc32(rollout.id.encode())])
        chosen = generator.choice(len(steps), size=count, replace=False, p=weights / weights.sum())
        return [steps[i] for i in sorted(chosen)]


def steps_of(rollout: Rollout) -> list[Rollout]:
    """One rollout per turn of the student: everything before it is the prompt, exact ids kept."""
    steps = []
    for number, (index, turn, chat) in enumerate(turns_of(rollout)):
        before = np.concatenate([t.token_ids for t in rollout.turns[:index]])
        steps.append(
            replace(
                rollout,
                id=f"{rollout.id}/step{number}",
                prompt=replace(rollout.prompt, id=f"{rollout.prompt.id}/{rollout.id}/step{number}", messages=chat),
                turns=(Turn("prompt", before), turn),
                text="\n".join(map(written, turn.messages)),
                trajectory=rollout.id,
            )
        )
    return steps


def surprise(step: Rollout) -> float:
    """Mean negative log-prob (nats) of the step's tokens under the policy that sampled them."""
    return 1.0 if step.logprobs is None or not len(step.logprobs) else float(-step.logprobs.mean())


def opad(config: TrainConfig) -> Recipe:
    """MAD-OPD over the steps of live trajectories."""
    if not config.environment.name:
        raise ConfigError(
            "method 'opad' needs an environment to act in; set environment.name, or use 'mad_opd' on recorded "
            "states (opdengine.environments.recorded)"
        )
    return replace(mad_opd(config), name="opad", split=Steps(config.opad, config.seed))
