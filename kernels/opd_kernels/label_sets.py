"""The chunked passes behind ``linear_logprob``: one label per row through the row operations of any
implementation, and several labels per row and the mass of all other columns in torch.

With G the upstream gradients of L log-probs, of the tail's log-mass (T) and of the entropy H,

    dZ = sum_l G_l 1_{y_l} + G_T p 1_{no label} / P_T - p (sum_l G_l + G_T) - G_H p (log p + H),

in which every factor is bounded: the tail is summed over its own columns, never as 1 - sum_l p_l.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import table as fields
from .chunk import Chunk, RowOps, Task
from .chunking import plan_chunks, spans
from .driver import GradientSink, Outcome, Workspace
from .heads import HeadGradient, ShardGradient, Wants, gather, half_gradient, needs_upcast
from .problem import STATS_ONLY, Head
from .row_ops import make_row_ops, row_layout
from .selection import RowPlan, capturing
from .shards import Shards
from .table import FIELDS, LABEL_SCALE, LOG, MERGED, TOP
from .torch_impl import TorchRowOps
from .validation import compute_dtype_of


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
            rows=max(1, rows),
            vocab=columns,
            hidden_sizes=(weight.shape[1],),
            buffers=1,
            scratch_tiles=scratch_tiles,
            upcast=needs_upcast(weight, dtype),
            half_gradient=bool(wants) and half_gradient(weight, dtype),
            dtype=dtype,
            device=weight.device,
            workspace_bytes=self.workspace_bytes,
        )
        like = head.hidden.new_empty(0, dtype=dtype)
        width, _ = row_layout(self.impl, head.vocab)
        return Workspace(plan, head.vocab, like, 1, weight.shape[1], width, weight.dtype), like, plan.tile_rows

    def _localise(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.shards is None:
            return labels, torch.ones_like(labels, dtype=torch.bool)
        return self.shards.localise(labels)

    def _task(self, gradient: bool) -> Task:
        head, shards = self.head, self.shards
        cap = None if head.softcap is None else head.softcap / head.temperature
        start = 0 if shards is None else shards.start
        return Task(STATS_ONLY, full=True, gradient=gradient, softcap=cap, first_column=start)

    def _statistics(self, ops: RowOps, chunk: Chunk) -> None:
        """The table of the whole rows of ``chunk``; one all-gather with ``shards``."""
        ops.statistics(chunk)
        if self.shards is not None:
            merged = chunk.table[:, :MERGED]
            merged.copy_(fields.merge(self.shards.gather(merged)))

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log-probs [N, L], log-mass of the tail [N], NaN when it is not asked for, entropy [N], largest
        probability [N]). One all-gather per chunk with ``shards``."""
        rows = self.labels.shape[0]
        workspace, like, tile_rows = self._workspace(rows, Wants())
        ops = make_row_ops(self.impl, self._task(False), tile_rows, self.head.vocab, like)
        logprob, tail = like.new_empty(self.labels.shape), like.new_full((rows,), math.nan)
        table = like.new_zeros(1, FIELDS, rows)
        for start, stop in spans(rows, workspace.plan.chunk_rows):
            chunk = Chunk(workspace.logits[:, : stop - start], table[:, :, start:stop])
            ops.write_logits(self.head, self.head.hidden[start:stop], chunk.logits[0], workspace.tile)
            self._look_up(ops, chunk, self.labels[start:stop], logprob[start:stop], tail[start:stop], tile_rows)
        return logprob, tail, fields.entropy(table, 0), (-table[0, LOG]).exp()

    def _look_up(
        self, ops: RowOps, chunk: Chunk, labels: Tensor, logprob: Tensor, tail: Tensor, tile_rows: int
    ) -> None:
        """Fill the table of ``chunk``, the log-probs [c, L] of its labels and, if asked for, ``tail`` [c]."""
        ops.statistics(chunk)
        z, table = chunk.logits[0], chunk.table[0]
        columns, here = self._localise(labels)
        own = torch.zeros(labels.shape, dtype=z.dtype, device=z.device)
        rest = z.new_full((chunk.rows if self.tail else 0,), -math.inf)
        if self.head.vocab:
            own = torch.where(here, z.gather(1, columns), 0.0)
        if self.head.vocab and self.tail:
            scratch, removed = z.new_empty(tile_rows, self.head.vocab), removal(here, z)
            off = self.head.switched_off()
            for start, stop in spans(chunk.rows, tile_rows):
                part = torch.sub(z[start:stop], table[TOP, start:stop, None], out=scratch[: stop - start])
                part.scatter_add_(1, columns[start:stop], removed[start:stop])
                if off is not None:
                    part.masked_fill_(off, -math.inf)
                # Relative to the tail's own largest logit: relative to the row's, exp would be 0 far below it.
                top = part.amax(1)
                top.masked_fill_(top.isneginf(), 0.0)
                rest[start:stop] = part.sub_(top[:, None]).exp_().sum(1).log_().add_(top)
        if self.shards is not None:
            mine = torch.cat((table[:MERGED], own.t(), rest.view(-1, chunk.rows)))
            everyone = self.shards.gather(mine)
            table[:MERGED] = fields.merge(everyone[:, None, :MERGED])[0]
            own = everyone[:, MERGED : MERGED + labels.shape[1]].sum(0).t()
            if self.tail:
                rest = torch.logsumexp(everyone[:, -1] + (everyone[:, TOP] - table[TOP]), 0)
        logprob.copy_((own - table[TOP, :, None]) - table[LOG, :, None])
        if self.tail:
            tail.copy_(rest - table[LOG])

    def backward(self, tail: Tensor, upstream: Upstream, wants: Wants) -> Outcome:
        """Gradients of ``sum(logprob * G + tail * G_T + entropy * G_H)``; ``tail`` as ``forward`` returned it.
        With ``shards`` one collective per chunk, and the sum of the hidden states' gradient."""
        used = upstream.used()
        index = None if capturing(used.device) or bool(used.all()) else torch.nonzero(used)[:, 0]
        rows = RowPlan(index, used.shape[0] if index is None else index.numel(), ())
        gradient = (
            HeadGradient(self.head, wants, rows, tail.dtype)
            if self.shards is None
            else ShardGradient(self.head, wants, rows, tail.dtype, self.shards)
        )
        if rows.count:
            workspace, like, tile_rows = self._workspace(rows.count, wants)
            ops = make_row_ops(self.impl, self._task(True), tile_rows, self.head.vocab, like)
            sink = GradientSink(workspace, gradient, self.head, rows)
            upstream = upstream.scaled(gradient.choose_scale(workspace.storage, *upstream.parts()))
            for start, stop in spans(rows.count, workspace.plan.chunk_rows):
                z = workspace.logits[:, : stop - start]
                hidden = gather(self.head.hidden, rows.index, start, stop)
                labels, rest = (gather(x, rows.index, start, stop) for x in (self.labels, tail))
                ops.write_logits(self.head, hidden, z[0], workspace.tile)
                chunk = Chunk(z, like.new_zeros(1, FIELDS, stop - start), None, sink.reserve(z[0]))
                self._statistics(ops, chunk)
                self._gradient(ops, chunk, labels, rest, upstream.rows(rows.index, start, stop).times(self.head.factor))
                assert chunk.out is not None
                sink.commit(chunk.out, hidden, start, stop)
            sink.flush()
        return Outcome(tail, None, None, *gradient.finish())

    def _gradient(self, ops: RowOps, chunk: Chunk, labels: Tensor, tail: Tensor, upstream: Upstream) -> None:
        """dZ of one chunk into ``chunk.out``; labels [c, L], ``tail`` [c]."""
        assert isinstance(ops, TorchRowOps) and chunk.out is not None
        columns, here = self._localise(labels)
        arrive, removed = torch.where(here, upstream.logprob, 0.0), removal(here, chunk.table)
        # An empty tail passes nothing on; any finite number serves as its log-mass.
        chunk.table[0, LABEL_SCALE] = upstream.logprob.sum(1) + upstream.tail
        mass = torch.where(tail.isfinite(), tail, 0.0) + chunk.table[0, LOG]
        ops.label_sets_gradient(chunk, columns, arrive, removed, mass, upstream.tail, upstream.entropy, self.tail)


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

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.logprob, self.tail, self.entropy

    def times(self, factor: Tensor | float) -> Upstream:
        entropy = None if self.entropy is None else self.entropy * factor
        return Upstream(self.logprob * factor, entropy, self.tail * factor)

    def scaled(self, factor: Tensor | None) -> Upstream:
        return self if factor is None else self.times(factor)

    def used(self) -> Tensor:
        """[N] rows that have any."""
        used = (self.logprob != 0).any(1) | (self.tail != 0)
        return used if self.entropy is None else used | (self.entropy != 0)

    def rows(self, index: Tensor | None, start: int, stop: int) -> Upstream:
        entropy = None if self.entropy is None else gather(self.entropy, index, start, stop)
        return Upstream(gather(self.logprob, index, start, stop), entropy, gather(self.tail, index, start, stop))


class SingleLabel(LabelSets):
    """One label per row [N, 1] and no tail: the row operations of ``impl``."""

    def _look_up(
        self, ops: RowOps, chunk: Chunk, labels: Tensor, logprob: Tensor, tail: Tensor, tile_rows: int
    ) -> None:
        columns, here = self._localise(labels[:, 0])
        self._statistics(ops, replace(chunk, labels=torch.where(here, columns, -1)))
        logprob[:, 0] = fields.logprob(chunk.table, 0)

    def _gradient(self, ops: RowOps, chunk: Chunk, labels: Tensor, tail: Tensor, upstream: Upstream) -> None:
        columns, here = self._localise(labels[:, 0])
        chunk.table[0, LABEL_SCALE] = -upstream.logprob[:, 0]
        entropy = None if upstream.entropy is None else -upstream.entropy
        ops.logprob_gradient(replace(chunk, labels=torch.where(here, columns, -1)), entropy)


def removal(here: Tensor, like: Tensor) -> Tensor:
    """[c, L] what to add to the log-probs of the labels to take them out of a sum."""
    return torch.where(here, like.new_full((), -math.inf), like.new_zeros(()))
