"""Token signals become one scalar. The only place where losses are normalised.

Every reduction is expressed as token weights with denominators over the whole step, and the fused
op only sums; so the loss and its gradient do not depend on how a step is cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opd_kernels import LogprobOutput, TeacherHead, linear_divergence, linear_logprob, topk_divergence
from opdengine.backbone import Head
from opdengine.tally import Tally
from opdengine.types import Hidden, Rollout, TeacherTargets, TokenSignal, TopK


@dataclass(frozen=True)
class Item:
    """One kept rollout, ready for the loss.

    Args:
        rollout: whose targets are trained.
        teachers: names of the teachers that judge it, in the order of ``mix``.
        targets: what the teachers say about the rollout's target tokens, one entry each.
        kl_weight: float32 [T] weight of the divergence, normalised over the step.
        mix: float32 [T, K].
        advantage: float32 [T] weight of -log p(target), normalised over the step, or None.
    """

    rollout: Rollout
    teachers: tuple[str, ...]
    targets: tuple[TeacherTargets, ...]
    kl_weight: np.ndarray
    mix: np.ndarray
    advantage: np.ndarray | None

    @property
    def has_weight(self) -> bool:
        """Whether any token adds to the loss."""
        return bool(np.any(self.kl_weight)) or (self.advantage is not None and bool(np.any(self.advantage)))


@dataclass(frozen=True)
class Strand:
    """Items that share one forward pass of the student: the steps of one trajectory, or one rollout.

    Args:
        token_ids: int64 [L], the longest of their sequences; the others are prefixes of it.
        items: in the order of their targets.
    """

    token_ids: np.ndarray
    items: tuple[Item, ...]

    @property
    def target_positions(self) -> np.ndarray:
        """int64 [T] of all items, one after the other."""
        return np.concatenate([item.rollout.target_positions for item in self.items])


def fold(items: Sequence[Item]) -> list[Strand]:
    """Join the steps of a trajectory, so that the student reads each trajectory once.

    Raises:
        ValueError: a step's ids are not a prefix of its trajectory's; names the rollout.
    """
    groups: dict[str, list[Item]] = {}
    for i, item in enumerate(items):
        groups.setdefault(item.rollout.trajectory or f"\0{i}", []).append(item)
    strands = []
    for members in groups.values():
        longest = max((item.rollout.token_ids for item in members), key=len)
        for item in members:
            ids = item.rollout.token_ids
            if not np.array_equal(ids, longest[: len(ids)]):
                raise ValueError(
                    f"rollout {item.rollout.id!r} is no prefix of its trajectory {item.rollout.trajectory!r}; "
                    "steps must keep the exact token ids"
                )
        strands.append(Strand(longest, tuple(members)))
    return strands


def normalisers(rollouts: Sequence[Rollout], mode: str) -> list[float]:
    """What every token weight of a rollout is multiplied with.

    Args:
        rollouts: all kept rollouts of the step.
        mode: "token": 1 / total targets; "sequence": 1 / (rollouts * own targets).
    """
    lengths = [len(r.targets) for r in rollouts]
    if mode == "token":
        return [1 / max(sum(lengths), 1)] * len(rollouts)
    return [1 / (len(rollouts) * max(length, 1)) for length in lengths]


def make_item(
    rollout: Rollout,
    signal: TokenSignal,
    teachers: Sequence[str],
    targets: Sequence[TeacherTargets],
    normaliser: float,
) -> Item:
    """Check that every per-token array aligns with the targets, and apply the normaliser.

    Raises:
        ValueError: an array has another length; names the rollout.
    """
    count, k = len(rollout.targets), len(teachers)
    mix = signal.mix if signal.mix is not None else np.full((count, k), 1 / max(k, 1))
    arrays = {"kl_weight": signal.kl_weight, "mix": mix, "advantage": signal.advantage}
    for name, array in arrays.items():
        if array is not None and len(array) != count:
            raise ValueError(f"rollout {rollout.id!r}: {name} has {len(array)} entries for {count} target tokens")
    if mix.shape != (count, k) or any(len(t) != count for t in targets):
        raise ValueError(
            f"rollout {rollout.id!r}: {count} targets and {k} teachers need mix [{count}, {k}] and "
            f"{count} rows from each, got {mix.shape} and {[len(t) for t in targets]}"
        )
    return Item(
        rollout=rollout,
        teachers=tuple(teachers),
        targets=tuple(targets),
        kl_weight=(signal.kl_weight * normaliser).astype(np.float32),
        mix=mix.astype(np.float32),
        advantage=None if signal.advantage is None else signal.advantage * normaliser,
    )


@dataclass(frozen=True)
class Objective:
    """The loss of a micro-batch.

    Args:
        heads: the heads of the teachers that judge by hidden states, by name.
        divergence_of: divergence for a routing key.
        jsd_beta: weight of the teacher in the middle of the JSD.
        skew_alpha: weight of the teacher in the middle of the skew KL.
        teacher_reduction: "sum" of divergences or divergence to the "mixture" of teachers.
        temperature: divides both sides' logits in the divergence; log p(target) is the model's own.
        vocab_size: valid leading columns of every head.
        impl, workspace_bytes: of the fused op.
        group: process group over which all heads are split by vocabulary, or None.
    """

    heads: dict[str, Head]
    divergence_of: Callable[[str], str]
    jsd_beta: float = 0.5
    skew_alpha: float = 0.1
    teacher_reduction: str = "sum"
    temperature: float = 1.0
    vocab_size: int | None = None
    impl: str = "auto"
    workspace_bytes: int | None = None
    group: Any = None

    def __call__(
        self, hidden: torch.Tensor, head: Head, items: Sequence[Item], tally: Tally | None = None
    ) -> torch.Tensor:
        """Sum of all weighted terms.

        Args:
            hidden: [T, d] student hidden states of the items' targets, in order.
            head: the student's head.
            items: rollouts of the micro-batch.
            tally: collects statistics when given.
        """
        loss = hidden.new_zeros((), dtype=torch.float32)
        head = head.to(hidden.dtype)
        starts = np.cumsum([0] + [len(item.rollout.targets) for item in items])
        for (divergence, teachers), members in self._groups(items).items():
            rows = torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i + 1]) for i in members])).to(
                hidden.device
            )
            # index_select copies; the common case of one group needs none.
            part = hidden if len(rows) == len(hidden) else hidden.index_select(0, rows)
            chosen = [items[i] for i in members]
            if teachers and any(np.any(item.kl_weight) for item in chosen):
                loss = loss + self._divergence(part, head, chosen, divergence, tally)
            if any(item.advantage is not None and np.any(item.advantage) for item in chosen):
                loss = loss + self._advantage(part, head, chosen, tally)
        return loss

    def _groups(self, items: Sequence[Item]) -> dict[tuple[str, tuple[str, ...]], list[int]]:
        """Items that share divergence and teachers go through one call."""
        groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for i, item in enumerate(items):
            divergence = self.divergence_of(item.rollout.prompt.key) if item.teachers else ""
            groups.setdefault((divergence, item.teachers), []).append(i)
        # Rows keep their order within a group; a single group keeps all of them.
        return groups

    def _shape(self, divergence: str) -> dict[str, Any]:
        """The parameter of a divergence that has one."""
        shapes = {"jsd": {"jsd_beta": self.jsd_beta}, "skew_kl": {"skew_alpha": self.skew_alpha}}
        return shapes.get(divergence, {})

    def _divergence(
        self,
        hidden: torch.Tensor,
        head: Head,
        items: Sequence[Item],
        divergence: str,
        tally: Tally | None,
    ) -> torch.Tensor:
        """Sum over teachers: the exact divergence to those with a head, its lower bound to the others."""
        names = items[0].teachers
        exact = [k for k, name in enumerate(names) if name in self.heads]
        listed = [k for k, name in enumerate(names) if name not in self.heads]
        loss = hidden.new_zeros((), dtype=torch.float32)
        if exact:
            loss = loss + self._exact(hidden, head, items, exact, divergence, tally)
        if listed:
            loss = loss + self._listed(hidden, head, items, listed, divergence, tally)
        return loss

    def _exact(
        self,
        hidden: torch.Tensor,
        head: Head,
        items: Sequence[Item],
        exact: Sequence[int],
        divergence: str,
        tally: Tally | None,
    ) -> torch.Tensor:
        device, names = hidden.device, [items[0].teachers[k] for k in exact]
        teachers = []
        for k, name in zip(exact, names, strict=True):
            their = self.heads[name]
            states = [_hidden(item.targets[k]).to(device, their.weight.dtype) for item in items]
            teachers.append(
                TeacherHead(
                    hidden=torch.cat(states),
                    weight=their.weight,
                    bias=their.bias,
                    logit_scale=their.logit_scale,
                    softcap=their.softcap,
                )
            )
        output = linear_divergence(
            hidden,
            head.weight,
            teachers,
            divergence=divergence,
            **self._shape(divergence),
            teacher_reduction=self.teacher_reduction,
            mix=_tensor([item.mix[:, exact] for item in items], device),
            token_weight=_tensor([item.kl_weight for item in items], device),
            labels=_labels(items, device),
            temperature=self.temperature,
            student_bias=head.bias,
            student_logit_scale=head.logit_scale,
            student_softcap=head.softcap,
            stats=tally is not None,
            impl=self.impl,
            workspace_bytes=self.workspace_bytes,
            vocab_size=self.vocab_size,
            group=self.group,
        )
        if tally is not None and output.stats is not None:
            tally.add_divergence(names, items, output.stats)
        return output.loss

    def _listed(
        self,
        hidden: torch.Tensor,
        head: Head,
        items: Sequence[Item],
        listed: Sequence[int],
        divergence: str,
        tally: Tally | None,
    ) -> torch.Tensor:
        """Teachers of which only the likeliest tokens are known; the rest is one tail bucket."""
        device = hidden.device
        loss = hidden.new_zeros((), dtype=torch.float32)
        student = None
        if tally is not None:
            with torch.no_grad():
                student = self._logprob(hidden, head, _labels(items, device))
            if len(listed) == len(items[0].teachers):  # else the exact part has noted them
                tally.add_student(items, student.logprob, student.entropy)
        for k in listed:
            ids, logprobs = (x.to(device) for x in _lists([item.targets[k] for item in items]))
            output = topk_divergence(
                hidden,
                head.weight,
                ids,
                logprobs,
                divergence=divergence,
                **self._shape(divergence),
                token_weight=_tensor([item.kl_weight * item.mix[:, k] for item in items], device),
                temperature=self.temperature,
                student_bias=head.bias,
                student_logit_scale=head.logit_scale,
                student_softcap=head.softcap,
                impl="auto" if self.impl == "triton" else self.impl,  # there is no Triton form
                workspace_bytes=self.workspace_bytes,
                vocab_size=self.vocab_size,
                group=self.group,
            )
            loss = loss + output.loss
            if tally is not None and student is not None:
                width = head.weight.shape[0] if self.vocab_size is None else self.vocab_size
                kl = output.token_loss if divergence == "reverse_kl" else None
                tally.add_listed(items[0].teachers[k], logprobs, width, student.logprob, kl)
        return loss

    def _advantage(self, hidden: torch.Tensor, head: Head, items: Sequence[Item], tally: Tally | None) -> torch.Tensor:
        """Sum of -advantage * log p(target); only tokens that have an advantage go through the head."""
        device = hidden.device
        weights = _tensor(
            [i.advantage if i.advantage is not None else np.zeros(len(i.rollout.targets)) for i in items], device
        )
        labels = _labels(items, device)
        if not bool((weights != 0).all()):
            rows = weights.nonzero().squeeze(1)
            hidden, labels, weights = hidden.index_select(0, rows), labels[rows], weights[rows]
        logprob = self._logprob(hidden, head, labels).logprob
        if tally is not None:
            tally.add_logprob(logprob.detach())
        return -(weights * logprob).sum()

    def _logprob(self, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> LogprobOutput:
        return linear_logprob(
            hidden,
            head.weight,
            labels,
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            impl=self.impl,
            workspace_bytes=self.workspace_bytes,
            vocab_size=self.vocab_size,
            group=self.group,
        )


def _tensor(arrays: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.float32)).to(device)


def _labels(items: Sequence[Item], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([item.rollout.targets for item in items])).to(device)


def _hidden(targets: TeacherTargets) -> torch.Tensor:
    assert isinstance(targets, Hidden), "a teacher with a head judges by hidden states"
    return targets.states


def _lists(targets: Sequence[TeacherTargets]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probs [T, k] of several contexts; every row keeps all that it lists."""
    lists = [t for t in targets if isinstance(t, TopK)]
    assert len(lists) == len(targets), "a teacher without a head judges by log-probs"
    width = max(t.ids.shape[1] for t in lists)
    wide = [t.widened(width) for t in lists]
    ids, logprobs = np.concatenate([t.ids for t in wide]), np.concatenate([t.logprobs for t in wide])
    return torch.from_numpy(ids), torch.from_numpy(logprobs)
