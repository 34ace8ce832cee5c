"""Log-probabilities and statistics from hidden states: ``linear_logprob`` and ``token_stats``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .chunking import plan_chunks, spans
from .divergence import cast_gradients, no_autocast, wanted
from .driver import GradientSink, Outcome, Workspace, run_divergence
from .heads import HeadGradient, Wants, gather, half_gradient, needs_upcast
from .label_sets import LabelSetLogprob, LabelSets
from .row_ops import RowOps, choose_impl, make_row_ops, row_layout
from .selection import RowPlan, plan_rows
from .types import STATS_ONLY, Head, LogprobOutput, TeacherHead, TokenStats
from .validation import (
    check_impl,
    check_labels,
    check_positive,
    compute_dtype_of,
    make_head,
    make_problem,
    make_student,
    make_workspace_bytes,
    split_vocabularies,
)

__all__ = ["LogprobOutput", "linear_logprob", "token_stats"]


@torch.compiler.disable
def token_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teachers: Sequence[TeacherHead],
    *,
    labels: Tensor | None = None,
    mix: Tensor | Sequence[float] | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    group: Any = None,
) -> TokenStats:
    """Per-token statistics of a student and K teachers, forward only; nothing of size V is kept.

    Arguments mean what they mean in ``linear_divergence``. ``mix`` and ``token_weight`` only
    select: where either is 0 nothing is computed and the statistics are NaN.

    Returns:
        ``TokenStats``, detached.

    Raises:
        ValueError: an argument is invalid, or a teacher's logits hold NaN or inf on a computed row.
    """
    check_impl(impl)
    student = make_student(
        student_hidden, student_weight, student_bias, student_logit_scale, student_softcap, temperature
    )
    problem = make_problem(
        student,
        teachers,
        divergence="reverse_kl",
        jsd_beta=0.5,
        skew_alpha=0.1,
        teacher_reduction="sum",
        mix=mix,
        token_weight=token_weight,
        labels=labels,
        reduction="sum",
        stats=True,
        workspace_bytes=workspace_bytes,
        vocab_size=vocab_size,
        group=group,
    )
    with torch.no_grad(), no_autocast(student_hidden.device):
        chosen = choose_impl(impl, student_hidden.device.type, problem.compute_dtype, problem.shards is not None)
        if chosen == "reference":
            from .reference import reference_divergence

            stats = reference_divergence(problem).stats
        else:
            rows = plan_rows(problem.mix, problem.mix_is_uniform, problem.token_weight)
            stats = run_divergence(replace(problem, rule=STATS_ONLY, impl=chosen), rows, None, Wants()).stats
    assert stats is not None
    return stats


@torch.compiler.disable
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    vocab_size: int | None = None,
    tail: bool = False,
    group: Any = None,
) -> LogprobOutput:
    """Differentiable log p(label) and entropy of every row, without [N, V] logits.

    The backward pass recomputes the logits, since the upstream gradient (for example an importance
    ratio times an advantage) is unknown in forward; rows whose upstream gradients are 0 are left
    out of it.

    Args:
        hidden: [N, d] float32, bfloat16, float16 or float64, row-major.
        weight: [V, d], same dtype.
        labels: [N] or [N, L] int64 token ids in [0, V); L ids per row share the row's logits.
        bias: [V] or None.
        logit_scale: positive factor of the logits.
        softcap: positive cap of the logits, or None.
        temperature: divides the logits.
        impl: "torch", "reference", "triton" or "auto"; "triton" takes labels [N] without ``tail``
            or ``group``, where "auto" uses "torch".
        workspace_bytes: budget for temporaries, default 1 GiB.
        vocab_size: number of valid leading vocabulary rows, default all; with ``group``, of all
            ranks together.
        tail: also return the log of the probability that is not on a row's labels, summed over
            those columns themselves, so that a small tail keeps its precision.
        group: process group whose ranks hold consecutive vocabulary rows of ``weight`` and
            ``bias``, as in ``linear_divergence``; labels are global ids.

    Returns:
        ``LogprobOutput`` with ``logprob`` of the shape of ``labels``, ``entropy`` [N] and ``tail``
        [N] or None, float32 (float64 for float64 inputs). A tail of no column is -inf.

    Raises:
        ValueError: an argument is invalid.
    """
    check_impl(impl)
    check_positive("temperature", temperature)
    head = make_head("", hidden, weight, bias, logit_scale, softcap, temperature)
    budget = make_workspace_bytes(workspace_bytes)
    (head,), shards = split_vocabularies((head,), vocab_size, group, (tail, budget, "linear_logprob"))
    check_labels(labels, head.vocab if shards is None else shards.vocab, hidden)
    chosen = choose_impl(impl, hidden.device.type, compute_dtype_of((head,)), shards is not None)
    if chosen == "reference":
        from .reference import reference_logprob

        return reference_logprob(head, labels, tail)
    wants = wanted(hidden, weight, bias)
    if labels.dim() == 1 and not tail and shards is None:
        logprob, entropy = _LinearLogprob.apply(hidden, weight, bias, _LogprobCall(head, labels, budget, chosen), wants)
        return LogprobOutput(logprob, entropy)
    if impl == "triton":
        raise ValueError("impl='triton' takes labels [N] without tail: use impl='auto' or 'torch'")
    call = LabelSets(head, labels if labels.dim() == 2 else labels[:, None], tail, budget, shards)
    logprob, entropy, mass = LabelSetLogprob.apply(hidden, weight, bias, call, wants)
    return LogprobOutput(logprob if labels.dim() == 2 else logprob[:, 0], entropy, mass if tail else None)


@dataclass(frozen=True)
class _LogprobCall:
    """One validated call: the chunked passes over its rows."""

    head: Head
    labels: Tensor
    workspace_bytes: int
    impl: str

    def workspace(self, rows: int, wants: Wants) -> tuple[Workspace, RowOps]:
        head, dtype = self.head, compute_dtype_of((self.head,))
        like, weight = head.hidden.new_empty(0, dtype=dtype), head.weight
        columns, scratch_tiles = row_layout(self.impl, head.vocab)
        plan = plan_chunks(
            rows=rows,
            vocab=columns,
            hidden_sizes=(weight.shape[1],),
            buffers=1,
            scratch_tiles=scratch_tiles,
            upcast=needs_upcast(weight, dtype, gradient=False)
            or (wants.hidden and needs_upcast(weight, dtype, gradient=True)),
            half_gradient=bool(wants) and half_gradient(weight, dtype),
            dtype=dtype,
            device=weight.device,
            workspace_bytes=self.workspace_bytes,
        )
        workspace = Workspace(plan, head.vocab, like, 1, weight.shape[1], columns)
        return workspace, make_row_ops(self.impl, plan.tile_rows, head.vocab, like)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """(log p(label), entropy, log sum exp), each [N]."""
        rows = self.labels.shape[0]
        workspace, ops = self.workspace(rows, Wants())
        out = workspace.z.new_empty(3, rows)
        for start, stop in spans(rows, workspace.plan.chunk_rows):
            z = workspace.z[: stop - start]
            ops.write_logits(self.head, self.head.hidden[start:stop], z, workspace.tile)
            student = ops.student_rows(self.head, z, self.labels[start:stop], True, joint=False)
            for target, values in zip(out, (student.logprob, student.entropy, student.lse), strict=True):
                target[start:stop] = values
        return out[0], out[1], out[2]

    def backward(self, entropy: Tensor, logprob_scale: Tensor, entropy_scale: Tensor | None, wants: Wants) -> Outcome:
        """Gradients of ``sum(logprob_scale * logprob + entropy_scale * entropy)``; all tensors
        [N]."""
        head = self.head
        used = logprob_scale != 0 if entropy_scale is None else (logprob_scale != 0) | (entropy_scale != 0)
        rows = RowPlan(None, used.shape[0], ())
        if not bool(used.all()):
            index = torch.nonzero(used)[:, 0]
            rows = RowPlan(index, index.numel(), ())
        gradient = HeadGradient(head, wants, rows, entropy.dtype)
        if rows.count:
            workspace, ops = self.workspace(rows.count, wants)
            sink = GradientSink(workspace, gradient, head, rows)
            cap = None if head.softcap is None else head.softcap / head.temperature
            for start, stop in spans(rows.count, workspace.plan.chunk_rows):
                z = workspace.z[: stop - start]
                hidden = gather(head.hidden, rows.index, start, stop)
                ops.write_logits(head, hidden, z, workspace.tile)
                student = ops.student_rows(head, z, None, False, joint=False)
                out = sink.reserve(z)
                ops.logprob_gradient_rows(
                    z,
                    gather(self.labels, rows.index, start, stop),
                    student,
                    entropy=gather(entropy, rows.index, start, stop),
                    logprob_scale=gather(logprob_scale, rows.index, start, stop) * head.factor,
                    entropy_scale=None
                    if entropy_scale is None
                    else gather(entropy_scale, rows.index, start, stop) * head.factor,
                    softcap=cap,
                    out=out,
                )
                sink.commit(out, hidden, start, stop)
            sink.flush()
        return Outcome(entropy, None, *gradient.finish())


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _LogprobCall, wants: Wants
    ) -> tuple[Tensor, Tensor]:
        with no_autocast(hidden.device):
            logprob, entropy, _ = call.forward()
        ctx.call, ctx.wants = call, wants
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(hidden, weight, bias, entropy)
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple:
        if grad_logprob is None and grad_entropy is None:
            return None, None, None, None, None
        hidden, weight, bias, entropy = ctx.saved_tensors
        call = replace(ctx.call, head=ctx.call.head.with_tensors(hidden, weight, bias))
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(entropy)
        with no_autocast(hidden.device):
            outcome = call.backward(entropy, grad_logprob, grad_entropy, ctx.wants)
        return *cast_gradients(ctx, outcome), None, None
