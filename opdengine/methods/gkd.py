"""GKD: sequences of the student mixed with recorded ones (Agarwal et al., arXiv 2306.13649, algorithm 1).

In every step the student answers a share ``lmbda`` of the prompts itself; for the others it is given an answer, one of
the data or one that a teacher has written (``seq_kd``), and the teachers judge it there, too. ``sft_alpha`` adds the
cross-entropy of the given answers. ``gkd.lmbda`` below 1 mixes beside any method that has a divergence on whatever
sequence; the method ``gkd`` has nothing else. Names and defaults are those of TRL, ``sft_alpha`` is that of ms-swift.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opdengine.config.train import TrainConfig
from opdengine.data.prompts import PromptSet, drop_long
from opdengine.data.rows import THOUGHTS
from opdengine.errors import ConfigError
from opdengine.methods.method import Method
from opdengine.methods.mt_seqkd import MTSeqKD
from opdengine.methods.opd import OPD
from opdengine.methods.paper import Paper
from opdengine.methods.privileged import column
from opdengine.methods.room import Need
from opdengine.metrics import Mean
from opdengine.models.chat import text_of
from opdengine.types import Batch, Prompt, Sample, Turn

PAPER = Paper(
    arxiv="2306.13649",
    defaults={
        "gkd.lmbda": (0.5, "as in TRL; the paper compares 0, 0.5 and 1"),
        "divergence": ("jsd", "as in TRL; the paper compares both KLs and the JSD"),
        "jsd_beta": (0.5, "as in TRL"),
        "loss_normalization": ("token", "as in TRL"),
        "num_generations": (1, "as in TRL"),
        "temperature": (0.9, "as in TRL"),
    },
)

SAMPLED_ALONE = frozenset({"student_logprob", "policy_logratio", "sampler_logratio"})
"""Measures of methods that weigh tokens by how likely the student was to sample them."""


class GKD(OPD):
    """On-policy distillation from one teacher per prompt; the mixture stands before it."""

    paper = PAPER


class Mixture(Method):
    """Is put before a method whose run has a ``gkd.lmbda`` below 1."""

    mixes = True

    def __init__(self, config: TrainConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.settings = config.gkd
        self._refuse(config)
        self.author = MTSeqKD(config) if self.settings.seq_kd else None
        self._answers: dict[str, list[int]] = {}

    def _refuse(self, config: TrainConfig) -> None:
        where = f"gkd.lmbda={self.settings.lmbda:g} is not possible with"
        if config.environment.name:
            raise ConfigError(f"{where} environment.name={config.environment.name!r}: nobody has recorded episodes")
        if config.num_generations != 1:
            raise ConfigError(
                f"{where} num_generations={config.num_generations}: a prompt has one given answer, so the share of "
                "sequences would be another; use 1"
            )
        if not self.diverges or self.needs_reward or self.needs & SAMPLED_ALONE:
            raise ConfigError(
                f"{where} method {config.method!r} as it is set, which learns from what the student itself sampled; "
                "leave it out, or take 'opd', 'mt_opd', 'mad_opd', 'sdft' or 'opsd' without distillation_is_clip"
            )

    # Before the first step.

    def lack(self, prompt: Prompt) -> str:
        """A row has an answer to give, where no teacher writes it."""
        if (problem := super().lack(prompt)) or self.author is not None:
            return problem
        try:
            if not self._text(prompt).strip():
                return (
                    f"{prompt.name} has no answer in the column {self.settings.completion_column!r}, which "
                    f"gkd.lmbda={self.settings.lmbda:g} gives the student; fill it in, name another with "
                    "gkd.completion_column, or let teachers write with gkd.seq_kd"
                )
        except ValueError as error:
            return f"{prompt.name}: the column {self.settings.completion_column!r} {error}"
        return ""

    def fit(self, prompts: PromptSet, encode: Callable[..., list[int]]) -> PromptSet:
        """Prompts of which the recorded answer is no longer than the student's may be."""
        prompts = super().fit(prompts, encode)
        if self.author is not None:
            return prompts
        limit = self.config.max_completion_length
        why = f"max_completion_length, in the column {self.settings.completion_column!r}"
        return drop_long(prompts, lambda prompt: len(self._recorded(prompt, encode)), limit, why)

    def room(self, prompt: Prompt) -> list[Need]:
        """What the teachers judge, and what an author writes."""
        needs = super().room(prompt)
        return needs if self.author is None else [*needs, *self._asked(self.author).room(prompt)]

    # In a step.

    def is_written(self, prompt: Prompt, number: int) -> bool:
        """Whether a prompt is given its answer in a step: a draw that the seed, the step and its id decide."""
        digest = hashlib.sha256(f"{self.config.seed}:{number}:{prompt.id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 >= self.settings.lmbda

    async def write(self, prompts: Sequence[Prompt], encode: Callable[..., list[int]]) -> Batch:
        """One sample for each of these prompts, whose answer is given."""
        if self.author is not None:
            batch = await self._asked(self.author).write(prompts, encode)
            await self.author.annotate(batch)  # drops what was not written
        else:
            batch = Batch(samples=[self._sample(prompt, encode) for prompt in prompts])
        for sample in batch.samples:
            sample.info = {**sample.info, "given": True}
        return batch

    def _asked(self, author: MTSeqKD) -> MTSeqKD:
        """The author with the teachers, which a run knows only once it has loaded them."""
        author.teachers = self.teachers
        return author

    def _sample(self, prompt: Prompt, encode: Callable[..., list[int]]) -> Sample:
        answer = Turn("assistant", np.array(self._recorded(prompt, encode)), trains=True)
        turns = (Turn.of_prompt(encode(prompt)), answer)
        return Sample("", prompt, turns, stop_reason="recorded", text=self._text(prompt))

    def _recorded(self, prompt: Prompt, encode: Callable[..., list[int]]) -> list[int]:
        if prompt.id not in self._answers:
            self._answers[prompt.id] = encode(prompt, self._text(prompt))
        return self._answers[prompt.id]

    def _text(self, prompt: Prompt) -> str:
        return given_text(column(prompt, self.settings.completion_column))

    def weigh(self, batch: Batch) -> None:
        """The method's weights; given answers have the advantage ``sft_alpha`` on every token beside them."""
        super().weigh(batch)
        alpha = self.settings.sft_alpha
        for sample in batch:
            if alpha and sample.info.get("given"):
                sample.advantage = alpha * sample.target_turn_weight
        count = len(batch.samples)
        given = sum(bool(sample.info.get("given")) for sample in batch.samples)
        batch.metrics["gkd/given"] = float(given)
        batch.metrics["gkd/on_policy"] = Mean(1 - given / max(count, 1), count)


def given_text(value: Any) -> str:
    """An answer of the data as text: a text, or the assistant's one message.

    Raises:
        ValueError: it is neither, or has a thought apart from its words; follows the name of its column.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], dict):
        message = value[0]
        if thought := next((field for field in THOUGHTS if message.get(field)), None):
            raise ValueError(
                f"has a thought beside the words ({thought!r}), which the student would not be given; write it before "
                "them into 'content', between the tags of the student's model, or leave it out of the data"
            )
        if message.get("role") == "assistant" and not message.get("tool_calls") and message.get("content") is not None:
            return text_of(message["content"])
    raise ValueError("holds neither text nor one message of the assistant in words alone")
