"""Log-probs of several labels per row, the mass of all other columns, and vocabulary shards: the
passes behind ``linear_logprob`` where one label of a whole row is not enough.

With G the upstream gradients of L log-probs, of the tail's log-mass (T) and of the entropy H,

    dZ = sum_l G_l 1_{y_l} + G_T p 1_{no label} / P_T - p (sum_l G_l + G_T) - G_H p (log p + H),

in which every factor is bounded: the tail is summed over its own columns, never as 1 - sum_l p_l.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .chunking import SCRATCH_TILES, plan_chunks, spans
from .divergence import cast_gradients, no_autocast
from .driver import GradientSink, Outcome, Workspace
from .heads import HeadGradient, Wants, gather, half_gradient, needs_upcast
from .selection import RowPlan
from .shards import NO_COLUMN, Shards
from .torch_impl import TorchRowOps, dot, softcap_slope
from .types import Head
from .validation import compute_dtype_of
from .vocab_parallel import Merged, Partials, ShardGradient, normalise_shard


@dataclass(frozen=True)
class LabelSets:
    """One validated call.

    Attributes:
        head: head of the rows; its ``vocab`` counts this rank's columns.
        labels: [N, L] int64 global ids.
        tail: also the log-mass of the columns that are not among a row's labels.
        workspace_bytes: budget for temporaries.
        shards: how the vocabulary is split over ranks, or None.
    """

    head: Head
    labels: Tensor
    tail: bool
    workspace_bytes: int
    shards: Shards | None

    def _workspace(self, rows: int, wants: Wants) -> tuple[Workspace, TorchRowOps]:
        head, dtype = self.head, compute_dtype_of((self.head,))
        weight, shards = head.weight, self.shards
        plan = plan_chunks(
            rows=rows,
            vocab=head.vocab if shards is None else shards.widest,
            hidden_sizes=(weight.shape[1],),
            buffers=1,
            scratch_tiles=SCRATCH_TILES,
            upcast=needs_upcast(weight, dtype, gradient=False)
            or (wants.hidden and needs_upcast(weight, dtype, gradient=True)),
            half_gradient=bool(wants) and half_gradient(weight, dtype),
            dtype=dtype,
            device=weight.device,
            workspace_bytes=self.workspace_bytes,
        )
        like = head.hidden.new_empty(0, dtype=dtype)
        workspace = Workspace(plan, head.vocab, like, 1, weight.shape[1])
        return workspace, TorchRowOps(plan.tile_rows, head.vocab, like)

    def _localise(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.shards is None:
            return labels, torch.ones_like(labels, dtype=torch.bool)
        return self.shards.localise(labels)

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log-probs [N, L], entropy [N], log-mass of the tail [N], log sum exp [N]); the tail is
        NaN when it is not asked for. One all-gather per chunk with ``shards``."""
        rows, width = self.labels.shape
        workspace, ops = self._workspace(rows, Wants())
        logprob = workspace.z.new_empty(rows, width)
        entropy, tail, lse = workspace.z.new_full((3, rows), math.nan)
        for start, stop in spans(rows, workspace.plan.chunk_rows):
            z = workspace.z[: stop - start]
            ops.write_logits(self.head, self.head.hidden[start:stop], z, workspace.tile)
            parts, values = self._sweep(ops, z, self.labels[start:stop])
            columns = torch.stack([*parts.present(), *values.unbind(1)])
            everyone = columns[None] if self.shards is None else self.shards.gather(columns)
            gathered = list(everyone.unbind(1))
            parts = parts.unpack(gathered)
            merged = Merged.of(parts)
            lse[start:stop], entropy[start:stop] = merged.lse, merged.entropy(parts)
            if parts.label is not None:
                tail[start:stop] = torch.logsumexp(parts.label + merged.log_mass, 0)
            known = torch.stack(gathered, 2) + merged.log_mass[:, :, None]
            if self.shards is None:
                logprob[start:stop] = known[0]
            else:
                logprob[start:stop] = known.gather(0, self.shards.owner(self.labels[start:stop])[None])[0]
        return logprob, entropy, tail, lse

    def _sweep(self, ops: TorchRowOps, z: Tensor, labels: Tensor) -> tuple[Partials, Tensor]:
        """This shard's partials, the log-mass of its tail as ``label``, and its log-probs [c, L] of
        the labels that lie in it (0 for the others); ``z`` becomes log-probs inside the shard."""
        parts = Partials.empty(z.shape[0], z, True, self.tail, ())
        if self.head.vocab == 0:
            if parts.label is not None:
                parts.label.fill_(NO_COLUMN)
            return parts, z.new_zeros(labels.shape)
        assert parts.entropy is not None
        columns, here = self._localise(labels)
        removed = removal(here, z)
        for rows, s1, s2, _ in ops.tiles(z.shape[0]):
            x = z[rows]
            parts.top[rows], _, parts.log_sum[rows] = normalise_shard(x, s1)
            parts.entropy[rows] = dot(torch.exp(x, out=s1), x, s2).neg_()
            if parts.label is not None:
                s1.copy_(x).scatter_add_(1, columns[rows], removed[rows])
                parts.label[rows] = s1.exp_().sum(1).log_()
        return parts, torch.where(here, z.gather(1, columns), 0.0)

    def backward(self, entropy: Tensor, tail: Tensor, lse: Tensor, upstream: Upstream, wants: Wants) -> Outcome:
        """Gradients of ``sum(logprob * G + tail * G_T + entropy * G_H)``; ``entropy``, ``tail`` and
        ``lse`` as ``forward`` returned them. With ``shards`` one collective, the sum of the hidden
        states' gradient."""
        head, used = self.head, upstream.used()
        index = None if bool(used.all()) else torch.nonzero(used)[:, 0]
        rows = RowPlan(index, used.shape[0] if index is None else index.numel(), ())
        gradient = (
            HeadGradient(head, wants, rows, entropy.dtype)
            if self.shards is None
            else ShardGradient(head, wants, rows, entropy.dtype, self.shards)
        )
        if rows.count:
            workspace, ops = self._workspace(rows.count, wants)
            sink = GradientSink(workspace, gradient, head, rows)
            for start, stop in spans(rows.count, workspace.plan.chunk_rows):
                z = workspace.z[: stop - start]
                hidden = gather(head.hidden, rows.index, start, stop)
                ops.write_logits(head, hidden, z, workspace.tile)
                own = _Rows(*(gather(x, rows.index, start, stop) for x in (self.labels, entropy, tail, lse)))
                out = sink.reserve(z)
                self._gradient(ops, z, own, upstream.rows(rows.index, start, stop), out)
                sink.commit(out, hidden, start, stop)
            sink.flush()
        return Outcome(entropy, None, *gradient.finish())

    def _gradient(self, ops: TorchRowOps, z: Tensor, own: _Rows, upstream: Upstream, out: Tensor) -> None:
        """dZ of one chunk into ``out`` [c, V], which may be ``z``, the logits, overwritten."""
        head = self.head
        cap = None if head.softcap is None else head.softcap / head.temperature
        columns, here = self._localise(own.labels)
        arrive = torch.where(here, upstream.logprob, 0.0) * head.factor
        removed = removal(here, z)
        leave = (upstream.logprob.sum(1) + upstream.tail) * head.factor
        # An empty tail passes nothing on; any finite number serves as its log-mass.
        tail = torch.where(own.tail.isfinite(), own.tail, 0.0)
        for rows, s1, s2, s3 in ops.tiles(z.shape[0]):
            x = z[rows].sub_(own.lse[rows, None])
            if cap is not None:
                softcap_slope(x, own.lse[rows], cap, s3)
            torch.exp(x, out=s1)
            with_tail = self.tail and head.vocab > 0
            if with_tail:
                torch.sub(x, tail[rows, None], out=s2).scatter_add_(1, columns[rows], removed[rows])
                s2.exp_().mul_(upstream.tail[rows, None] * head.factor)
            x.add_(own.entropy[rows, None]).mul_(-upstream.entropy[rows, None] * head.factor)
            x.sub_(leave[rows, None]).mul_(s1)
            if with_tail:
                x.add_(s2)
            if head.vocab:
                x.scatter_add_(1, columns[rows], arrive[rows])
            if cap is not None:
                x.mul_(s3)
            if out is not z:
                out[rows] = x


@dataclass(frozen=True)
class _Rows:
    """What forward knows about the rows of a chunk: labels [c, L], the others [c]."""

    labels: Tensor
    entropy: Tensor
    tail: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Upstream:
    """Upstream gradients: ``logprob`` [N, L], ``entropy`` and ``tail`` [N]."""

    logprob: Tensor
    entropy: Tensor
    tail: Tensor

    def used(self) -> Tensor:
        """[N] rows that have any."""
        return (self.logprob != 0).any(1) | (self.entropy != 0) | (self.tail != 0)

    def rows(self, index: Tensor | None, start: int, stop: int) -> Upstream:
        return Upstream(*(gather(x, index, start, stop) for x in (self.logprob, self.entropy, self.tail)))


def removal(here: Tensor, like: Tensor) -> Tensor:
    """[c, L] what to add to the log-probs of the labels to take them out of a sum."""
    return torch.where(here, like.new_full((), -math.inf), like.new_zeros(()))


class LabelSetLogprob(torch.autograd.Function):
    """(log-probs [N, L], entropy [N], log-mass of the tail [N]) of ``call``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LabelSets, wants: Wants
    ) -> tuple[Tensor, Tensor, Tensor]:
        with no_autocast(hidden.device):
            logprob, entropy, tail, lse = call.forward()
        ctx.call, ctx.wants = call, wants
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(hidden, weight, bias, entropy, tail, lse)
        return logprob, entropy, tail

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple:
        hidden, weight, bias, entropy, tail, lse = ctx.saved_tensors
        call: LabelSets = replace(ctx.call, head=ctx.call.head.with_tensors(hidden, weight, bias))
        logprob, grad_entropy, grad_tail = upstream
        with no_autocast(hidden.device):
            outcome = call.backward(entropy, tail, lse, Upstream(logprob, grad_entropy, grad_tail), ctx.wants)
        return *cast_gradients(ctx, outcome), None, None
