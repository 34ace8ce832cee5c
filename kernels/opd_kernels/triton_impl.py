"""Row operations of a GPU: the Triton kernels of ``rows``, behind ``chunk.RowOps``.

Logits are read as they are and never written back, except to finish a head with bias, softcap or floor, 8 bytes a
logit. In bytes read and written a logit of the student, dZ in half precision, K teachers: 4 (1 + K) for the
statistics, the same for the terms of JSD, skew KL and mixtures, and 4 (1 + K) + 2 for the gradient.

One kernel that does all stages with one read of the logits, its programs waiting for each other, moves half the bytes
and takes longer: waiting programs load nothing (``benchmarks/NOTES.md``).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import rows
from . import table as fields
from .chunk import Chunk, Task
from .chunking import ALIGNMENT
from .heads import write_product
from .problem import Head
from .table import MEAN, MERGED, VALUE


class TritonRowOps:
    """``chunk.RowOps`` on [1 + K, c, V] float32 views whose rows are padded to ``ALIGNMENT`` elements."""

    def __init__(self, task: Task, vocab: int) -> None:
        self.task, self.vocab = task, vocab
        self.block = rows.BLOCK
        self.splits = triton.cdiv(-(-vocab // ALIGNMENT) * ALIGNMENT, self.block)
        self.padded_splits = triton.next_power_of_2(max(1, self.splits))

    def write_logits(self, head: Head, hidden: Tensor, out: Tensor, tile: Tensor | None) -> None:
        if self.vocab == 0:
            return
        write_product(head, hidden, out, tile)
        if head.bias is None and head.softcap is None and not head.floor:
            return
        self._launch(
            rows.finish_kernel,
            out.shape[0],
            0,
            out,
            logits_ptr=out,
            bias_ptr=out if head.bias is None else head.bias,
            factor=head.factor,
            cap=1.0 if head.softcap is None else head.softcap / head.temperature,
            stride=out.stride(0) // ALIGNMENT,
            BIAS=head.bias is not None,
            CAP=head.softcap is not None,
            FLOOR=head.floor,
        )

    def statistics(self, chunk: Chunk) -> None:
        if self.vocab == 0:
            fields.clear(chunk.table)
            return
        partial = self._partials(chunk, MERGED * (1 + chunk.teachers))
        self._launch(
            rows.statistics_kernel,
            chunk.rows,
            chunk.teachers,
            chunk.logits,
            partial_ptr=partial,
            rows=chunk.rows,
            **self._labels(chunk),
            **self._logits(chunk),
            **self._statistics(chunk),
        )
        self._merge(chunk, partial)

    def _merge(self, chunk: Chunk, partial: Tensor) -> None:
        """The table from the partials of the statistics."""
        with device_of(partial):
            rows.merge_kernel[(chunk.rows,)](
                partial_ptr=partial,
                rows=chunk.rows,
                splits=self.splits,
                first=self.task.first_column,
                LABELS=chunk.labels is not None,
                SPLITS=self.padded_splits,
                num_warps=1,
                **self._table(chunk),
                **self._statistics(chunk),
            )

    def squares(self, chunk: Chunk, factor: Tensor, out: Tensor, fresh: bool) -> None:
        if fresh:
            self.statistics(chunk)
        if self.vocab:
            out += self.squares_of_blocks(chunk, factor, chunk.rows)[0, : self.vocab]

    def squares_of_blocks(self, chunk: Chunk, factor: Tensor, block_rows: int) -> Tensor:
        """[B, V rounded up] sums of ``factor`` [c] p^2 over every ``block_rows`` rows."""
        blocks, parts = triton.cdiv(chunk.rows, block_rows), triton.cdiv(min(block_rows, chunk.rows), rows.ROWS)
        partial = chunk.table.new_empty(blocks, parts, self.splits * self.block)
        logits, table = self._logits(chunk), self._table(chunk)
        self._launch(
            rows.squares_kernel,
            blocks * parts,
            0,
            chunk.logits,
            logits_ptr=logits["logits_ptr"],
            stride=logits["stride"],
            table_ptr=table["table_ptr"],
            field_stride=table["field_stride"],
            factor_ptr=factor,
            partial_ptr=partial,
            rows=chunk.rows,
            block_rows=block_rows,
            parts=parts,
            ROWS=rows.ROWS,
        )
        return partial.sum(1)

    def terms(self, chunk: Chunk) -> None:
        if self.vocab == 0 or chunk.teachers == 0:
            chunk.table[0, VALUE : MEAN + 1] = 0.0
            return
        partial = self._partials(chunk, 2)
        self._launch(
            rows.terms_kernel,
            chunk.rows,
            chunk.teachers,
            chunk.logits,
            partial_ptr=partial,
            rows=chunk.rows,
            **self._logits(chunk),
            **self._table(chunk),
            **self._rule(chunk),
        )
        chunk.table[0, VALUE : MEAN + 1] = partial.sum(2)

    def gradient(self, chunk: Chunk) -> None:
        if self.vocab == 0:
            return
        self._launch(
            rows.gradient_kernel,
            chunk.rows,
            chunk.teachers,
            chunk.logits,
            label_ptr=chunk.table if chunk.labels is None else chunk.labels,
            LABELS=self.task.label_term,
            **self._out(chunk),
            **self._logits(chunk),
            **self._table(chunk),
            **self._rule(chunk),
        )

    def solve(self, chunk: Chunk) -> None:
        self.statistics(chunk)
        if not self.task.one_sweep and chunk.teachers > 0:
            self.terms(chunk)
        if self.task.gradient:
            self.gradient(chunk)

    def logprob_gradient(self, chunk: Chunk, entropy_scale: Tensor | None) -> None:
        if self.vocab == 0:
            return
        logits, table = self._logits(chunk), self._table(chunk)
        self._launch(
            rows.logprob_gradient_kernel,
            chunk.rows,
            0,
            chunk.logits,
            logits_ptr=logits["logits_ptr"],
            stride=logits["stride"],
            label_ptr=chunk.labels,
            table_ptr=table["table_ptr"],
            field_stride=table["field_stride"],
            entropy_scale_ptr=chunk.table if entropy_scale is None else entropy_scale,
            HAS_ENTROPY=entropy_scale is not None,
            **self._out(chunk),
        )

    def _partials(self, chunk: Chunk, count: int) -> Tensor:
        return chunk.table.new_empty(count, chunk.rows, self.splits)

    def _logits(self, chunk: Chunk) -> dict[str, Any]:
        slot, row, _ = chunk.logits.stride()
        return {"logits_ptr": chunk.logits, "slot_stride": slot // ALIGNMENT, "stride": row // ALIGNMENT}

    def _table(self, chunk: Chunk) -> dict[str, Any]:
        head, field, _ = chunk.table.stride()
        return {"table_ptr": chunk.table, "head_stride": head, "field_stride": field}

    def _labels(self, chunk: Chunk) -> dict[str, Any]:
        return {"label_ptr": chunk.table if chunk.labels is None else chunk.labels, "LABELS": chunk.labels is not None}

    def _statistics(self, chunk: Chunk) -> dict[str, Any]:
        task = self.task
        needs = {"P": task.needs("reverse_kl"), "Q": task.needs("forward_kl")}
        # The mean of g notices a teacher's logit of -inf; where there is none the mean of the logits does.
        dots = task.full or not any(needs.values())
        return {"TEACHERS": chunk.teachers, "FULL": task.full, "DOTS": dots, **needs}

    def _rule(self, chunk: Chunk) -> dict[str, Any]:
        task = self.task
        return {"KIND": task.kind, "MIXTURE": task.mixture, "TEACHERS": chunk.teachers, "parameter": task.parameter}

    def _out(self, chunk: Chunk) -> dict[str, Any]:
        assert chunk.out is not None
        cap = self.task.softcap
        out_stride = chunk.out.stride(0) // ALIGNMENT
        return {
            "out_ptr": chunk.out,
            "out_stride": out_stride,
            "cap": 1.0 if cap is None else cap,
            "CAP": cap is not None,
        }

    def _launch(self, kernel: Any, count: int, teachers: int, like: Tensor, **arguments: Any) -> None:
        """One program per block of columns and row."""
        with device_of(like):
            kernel[(count * self.splits,)](
                splits=self.splits, vocab=self.vocab, BLOCK=self.block, **arguments, **rows.options(teachers)
            )


def scale_on_device(x: Tensor, factor: Tensor) -> None:
    """Multiply a dense ``x`` by a float32 scalar in place; the host does not wait, and a factor of 1 costs nothing."""
    block = 4096
    with device_of(x):
        grid = (triton.cdiv(x.numel(), block),)
        rows.scale_kernel[grid](x, factor, x.numel(), BLOCK=block, num_warps=4)


def device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Kernels start on the current device: make it the tensor's. Does nothing on a CPU."""
    return torch.cuda.device_of(tensor)
