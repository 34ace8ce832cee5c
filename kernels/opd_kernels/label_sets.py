"""The chunked passes behind ``linear_logprob``: one label per row through the row operations of any
implementation, and several labels per row, the mass of all other columns and vocabulary shards in torch.

With G the upstream gradients of L log-probs, of the tail's log-mass (T) and of the entropy H,

    dZ = sum_l G_l 1_{y_l} + G_T p 1_{no label} / P_T - p (sum_l G_l + G_T) - G_H p (log p + H),

in which every factor is bounded: the tail is summed over its own columns, never as 1 - sum_l p_l.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunking import plan_chunks, spans
from .driver import GradientSink, Outcome, Workspace
from .heads import HeadGradient, Wants, gather, half_gradient, needs_upcast
from .row_ops import make_row_ops, row_layout
from .selection import RowPlan, capturing
from .shards import Shards
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
        impl: whose row operations run.
    """

    head: Head
    labels: Tensor
    tail: bool
    workspace_bytes: int
    shards: Shards | None
    impl: str

    def _workspace(self, rows: int, wants: Wants) -> tuple[Workspace, Tensor, int]:
        """Buffers of a pass, an empty tensor of the compute dtype, and the rows of a tile."""
        head, dtype = self.head, compute_dtype_of((self.head,))
        weight, shards = head.weight, self.shards
        columns, scratch_tiles = row_layout(self.impl, head.vocab if shards is None else shards.widest)
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
        like = head.hidden.new_empty(0, dtype=dtype)
        width = columns if shards is None else head.vocab
        return Workspace(plan, head.vocab, like, 1, weight.shape[1], width), like, plan.tile_rows

    def _localise(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.shards is None:
            return labels, torch.ones_like(labels, dtype=torch.bool)
        return self.shards.localise(labels)

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(log-probs [N, L], entropy [N], log-mass of the tail [N], log sum exp [N], largest
        probability [N]); the tail is NaN when it is not asked for. One all-gather per chunk with
        ``shards``."""
        rows, width = self.labels.shape
        workspace, like, tile_rows = self._workspace(rows, Wants())
        ops = TorchRowOps(tile_rows, self.head.vocab, like)
        logprob = workspace.z.new_empty(rows, width)
        entropy, tail, lse, top1_prob = workspace.z.new_full((4, rows), math.nan)
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
            top1_prob[start:stop] = merged.top1_prob()
            if parts.label is not None:
                tail[start:stop] = torch.logsumexp(parts.label + merged.log_mass, 0)
            known = torch.stack(gathered, 2) + merged.log_mass[:, :, None]
            if self.shards is None:
                logprob[start:stop] = known[0]
            else:
                logprob[start:stop] = known.gather(0, self.shards.owner(self.labels[start:stop])[None])[0]
        return logprob, entropy, tail, lse, top1_prob

    def _sweep(self, ops: TorchRowOps, z: Tensor, labels: Tensor) -> tuple[Partials, Tensor]:
        """This shard's partials, the log-mass of its tail as ``label``, and its log-probs [c, L] of
        the labels that lie in it (0 for the others); ``z`` becomes log-probs inside the shard."""
        parts = Partials.empty(z.shape[0], z, True, self.tail, ())
        if self.head.vocab == 0:
            if parts.label is not None:
                parts.label.fill_(-math.inf)
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
        used = upstream.used()
        index = None if capturing(used.device) or bool(used.all()) else torch.nonzero(used)[:, 0]
        rows = RowPlan(index, used.shape[0] if index is None else index.numel(), ())
        gradient = (
            HeadGradient(self.head, wants, rows, entropy.dtype)
            if self.shards is None
            else ShardGradient(self.head, wants, rows, entropy.dtype, self.shards)
        )
        if rows.count:
            workspace, like, tile_rows = self._workspace(rows.count, wants)
            write = self._writer(tile_rows, like)
            sink = GradientSink(workspace, gradient, self.head, rows)
            for start, stop in spans(rows.count, workspace.plan.chunk_rows):
                z = workspace.z[: stop - start]
                hidden = gather(self.head.hidden, rows.index, start, stop)
                own = _Rows(*(gather(x, rows.index, start, stop) for x in (self.labels, entropy, tail, lse)))
                out = sink.reserve(z)
                write(hidden, z, workspace.tile, own, upstream.rows(rows.index, start, stop), out)
                sink.commit(out, hidden, start, stop)
            sink.flush()
        return Outcome(entropy, None, *gradient.finish())

    def _writer(self, tile_rows: int, like: Tensor) -> GradientWriter:
        """What fills dZ of a chunk: (hidden, logits buffer, weight tile, rows, upstream, out)."""
        ops = TorchRowOps(tile_rows, self.head.vocab, like)

        def write(hidden: Tensor, z: Tensor, tile: Tensor | None, own: _Rows, upstream: Upstream, out: Tensor) -> None:
            ops.write_logits(self.head, hidden, z, tile)
            self._gradient(ops, z, own, upstream, out)

        return write

    def _gradient(self, ops: TorchRowOps, z: Tensor, own: _Rows, upstream: Upstream, out: Tensor) -> None:
        """dZ of one chunk into ``out`` [c, V], which may be ``z``, the logits, overwritten."""
        head = self.head
        cap = None if head.softcap is None else head.softcap / head.temperature
        columns, here = self._localise(own.labels)
        arrive = torch.where(here, upstream.logprob, 0.0) * head.factor
        removed = removal(here, z)
        leave = (upstream.logprob.sum(1) + upstream.tail) * head.factor
        from_entropy = torch.zeros_like(leave) if upstream.entropy is None else upstream.entropy * head.factor
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
            x.add_(own.entropy[rows, None]).mul_(-from_entropy[rows, None])
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
    """Upstream gradients: ``logprob`` [N, L], ``tail`` [N], ``entropy`` [N] or None for 0."""

    logprob: Tensor
    entropy: Tensor | None
    tail: Tensor

    @classmethod
    def of(
        cls, logprob: Tensor | None, entropy: Tensor | None, tail: Tensor | None, *, like: Tensor, dtype: torch.dtype
    ) -> Upstream:
        """With zeros for what is None; ``like`` are the labels [N, L]."""
        logprob = like.new_zeros(like.shape, dtype=dtype) if logprob is None else logprob
        return cls(logprob, entropy, logprob.new_zeros(like.shape[0]) if tail is None else tail)

    def used(self) -> Tensor:
        """[N] rows that have any."""
        used = (self.logprob != 0).any(1) | (self.tail != 0)
        return used if self.entropy is None else used | (self.entropy != 0)

    def rows(self, index: Tensor | None, start: int, stop: int) -> Upstream:
        entropy = None if self.entropy is None else gather(self.entropy, index, start, stop)
        return Upstream(gather(self.logprob, index, start, stop), entropy, gather(self.tail, index, start, stop))


GradientWriter = Callable[[Tensor, Tensor, Tensor | None, _Rows, Upstream, Tensor], None]


class SingleLabel(LabelSets):
    """One label per row [N, 1], no tail, no shards: the row operations of ``impl``."""

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        rows = self.labels.shape[0]
        workspace, like, tile_rows = self._workspace(rows, Wants())
        ops = make_row_ops(self.impl, tile_rows, self.head.vocab, like)
        out = workspace.z.new_empty(4, rows)
        for start, stop in spans(rows, workspace.plan.chunk_rows):
            z = workspace.z[: stop - start]
            ops.write_logits(self.head, self.head.hidden[start:stop], z, workspace.tile)
            student = ops.student_rows(self.head, z, self.labels[start:stop, 0], True, joint=False)
            found = (student.logprob, student.entropy, student.lse, student.log_sum)
            for target, values in zip(out, found, strict=True):
                target[start:stop] = values
        logprob, entropy, lse, log_sum = out
        return logprob[:, None], entropy, torch.full_like(entropy, math.nan), lse, log_sum.neg_().exp_()

    def _writer(self, tile_rows: int, like: Tensor) -> GradientWriter:
        head = self.head
        ops = make_row_ops(self.impl, tile_rows, head.vocab, like)

        def write(hidden: Tensor, z: Tensor, tile: Tensor | None, own: _Rows, upstream: Upstream, out: Tensor) -> None:
            ops.write_logits(head, hidden, z, tile)
            ops.logprob_gradient_rows(
                z,
                own.labels[:, 0],
                ops.student_rows(head, z, None, False, joint=False),
                entropy=own.entropy,
                logprob_scale=upstream.logprob[:, 0] * head.factor,
                entropy_scale=None if upstream.entropy is None else upstream.entropy * head.factor,
                softcap=None if head.softcap is None else head.softcap / head.temperature,
                out=out,
            )

        return write


def removal(here: Tensor, like: Tensor) -> Tensor:
    """[c, L] what to add to the log-probs of the labels to take them out of a sum."""
    return torch.where(here, like.new_full((), -math.inf), like.new_zeros(()))
