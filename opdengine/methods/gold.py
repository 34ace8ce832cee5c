"""Teachers with another tokenizer: GOLD (as in TRL), ULD (Boizard et al., arXiv 2402.12030), and sampled spans.

A teacher with ``tokenizer_alignment: spans`` reads the student's words in its own tokens. Both sides' tokens are merged
to spans of equal text, whose probability is the product of their tokens'. Its judgement is either the divergence over
whole distributions of :mod:`opdengine.loss.gold`, or, with ``advantage.kl_mode: sampled``, the gap
``log q(span) - log p(span)``, which is the advantage of every token of the span: a sample of the gradient of the
reverse KL between the texts that both write, one span at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from opdengine.config.method_sections import GoldConfig
from opdengine.config.section import fields_of
from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.methods.checks import ROLLOUTS, Check
from opdengine.methods.method import Method
from opdengine.methods.opd import OPD
from opdengine.methods.paper import Paper
from opdengine.methods.policy_gradient import CHECKS, policy_gradient
from opdengine.methods.unused import refuse_unused
from opdengine.metrics import Mean
from opdengine.types import Batch

PAPER = Paper(
    arxiv="2402.12030",
    defaults={
        "advantage.kl_mode": ("full_vocab", "equation 6, and as in TRL"),
        "advantage.importance": ("none", "unstated: one update per rollout"),
        "advantage.max_gap": (float("inf"), "unstated: no bound"),
        "loss_normalization": ("sequence", "as in TRL"),
        "num_generations": (1, "as in TRL"),
        "temperature": (0.9, "as in TRL"),
        "top_p": (0.95, "as in TRL"),
        "learning_rate": (1e-7, "as in TRL"),
    },
    choices={
        "gold.uld_use_hybrid_loss": "false, which is TRL's default, too; true is GOLD",
        "divergence": "jsd in TRL",
    },
)

METHODS = ("opd", "mt_opd", "mt_seqkd", "mad_opd", "opad", "gkd", "g_opd", "gold")
"""Methods that may have such teachers."""

SETTINGS = tuple(f"gold.{name}" for name in fields_of(GoldConfig))
"""Settings that change nothing where no divergence is taken over spans."""

LOST = Check(
    "alignment/unaligned", "alignment/tokens", "tokens are of text that a teacher's tokenizer changes (it normalises "
    "it, or does not know its characters), so that teacher says nothing of them",
    "take a teacher whose tokenizer keeps the text (alignment/share/... in metrics.jsonl names it)", ROLLOUTS,
    share=0.2,
)  # fmt: skip


class CrossTokenizer(Method):
    """Is put before a method of whose teachers some have another tokenizer: it says how much of the text they share."""

    def __init__(self, config: TrainConfig, **options: Any) -> None:
        super().__init__(config, **options)
        names = [t.name for t in config.teachers if t.tokenizer_alignment != "none"]
        setting = f"tokenizer_alignment: spans of teacher {names[0]!r}"
        if config.method not in METHODS and ":" not in config.method:
            raise ConfigError(
                f"method={config.method!r} is not possible with {setting}: it reads a teacher's judgement token by "
                f"token; use one of {list(METHODS)}"
            )
        if self.diverges:
            _need_distributions(config, setting)
        else:
            refuse_unused(config, SETTINGS, f"method {config.method!r} as it is set, which has no divergence")

    @property
    def checks(self) -> tuple[Check, ...]:
        """The run warns where a tokenizer changes much of the text."""
        return (*super().checks, LOST)

    async def annotate(self, batch: Batch) -> None:
        """Count the tokens whose text a teacher keeps, and those that are one token of its own."""
        await super().annotate(batch)
        found: dict[str, list[np.ndarray]] = {}
        for sample in batch:
            for context in sample.contexts:
                if (spans := context.spans) is not None:
                    counts = [len(spans.student), (spans.student >= 0).sum(), spans.one_to_one.sum()]
                    found.setdefault(context.teacher, []).append(np.array(counts, dtype=np.float64))
        if not found:
            return
        total = np.zeros(3)
        for name, rows in found.items():
            count, inside, single = np.sum(rows, axis=0)
            total += (count, inside, single)
            batch.metrics[f"alignment/share/{name}"] = Mean(inside / max(count, 1), count)
            batch.metrics[f"alignment/one_to_one/{name}"] = Mean(single / max(count, 1), count)
        batch.metrics["alignment/tokens"] = float(total[0])
        batch.metrics["alignment/unaligned"] = float(total[0] - total[1])


def _need_distributions(config: TrainConfig, setting: str) -> None:
    """Raise ConfigError for what the divergence over spans cannot be taken with."""
    kinds = config.divergence.values() if isinstance(config.divergence, dict) else [config.divergence]
    served = [t.name for t in config.teachers if t.tokenizer_alignment != "none" and t.base_url is not None]
    refused = (
        ("skew_kl" in kinds, "divergence='skew_kl'", "use reverse_kl, forward_kl or jsd"),
        (config.teacher_reduction == "mixture", "teacher_reduction='mixture'", "distributions over different "
         "vocabularies have no mixture; use sum"),
        (config.vocab_sample > 0, f"vocab_sample={config.vocab_sample}", "spans are compared over all tokens; use 0"),
        (config.vocab_parallel_head, "vocab_parallel_head", "spans are compared over whole heads; leave it out"),
        (bool(served), f"base_url of teacher {served[:1]}", "a served teacher tells its likeliest tokens only: take "
         "method 'gold' with advantage.kl_mode sampled, or a local teacher"),
    )  # fmt: skip
    for bad, what, remedy in refused:
        if bad:
            raise ConfigError(f"{what} is not possible with {setting}: {remedy}")


class GOLD(OPD):
    """One teacher per prompt, whose tokenizer may be another, judges spans of equal text."""

    paper = PAPER

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        if all(t.tokenizer_alignment == "none" for t in config.teachers):
            raise ConfigError(
                "method 'gold' is for teachers with another tokenizer, and none has tokenizer_alignment: spans; set "
                "it, or use 'opd'"
            )
        self.gradient = policy_gradient(config, PAPER)
        self.needs, self.diverges = self.gradient.needs, self.gradient.exact

    @property
    def checks(self) -> tuple[Check, ...]:
        """The ways in which gaps can fail without an error."""
        return (*super().checks, *CHECKS)

    def weigh(self, batch: Batch) -> None:
        """The divergence at every token, or its span's gap as its advantage."""
        self.gradient.weigh(batch, self.ranks)
