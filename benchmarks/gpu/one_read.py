"""A row kernel that reads every logit once: statistics, gradient and value of one or two teachers.

The blocks of a row stay in the registers of the programs that loaded them. A program posts the
partial sums of its block, waits until all blocks of its row are posted, merges them and writes its
part of the gradient: 8 + 2 bytes a logit for one teacher and 12 + 2 for two, where the sweeps of
``opd_kernels.rows`` move 18 and 30. Not part of the library: what waiting costs has to be measured.

Programs take their places by a ticket, so that those of a row that wait only wait for programs that
began before them or that get the next free places; a row has to fit on the device.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd_kernels.rows_math import ABSENT
from opd_kernels.triton_impl import device_of

SETTINGS = [(2048, 4), (4096, 8), (8192, 16)]
"""(BLOCK, warps) that are tried."""
BLOCK = 2048
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
FIELDS = 9
"""Partials: (max, sum e, weighted sum) of the student and of each teacher, e = exp(x - max)."""


@triton.jit(do_not_specialize=["rows"])
def one_read_kernel(
    z_ptr,
    t_ptr,
    u_ptr,
    weight_ptr,
    scale_ptr,
    ticket_ptr,
    partial_ptr,
    value_ptr,
    out_ptr,
    rows,
    splits,
    vocab,
    width,
    z_stride,
    t_stride,
    u_stride,
    out_stride,
    KIND: tl.constexpr,
    TWO: tl.constexpr,
    WAIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``ticket`` [1 + c] counts the programs that began and the blocks of each row that are posted."""
    program = tl.atomic_add(ticket_ptr, 1)
    split, row = program % splits, (program // splits).to(tl.int64)
    cols = split * BLOCK + tl.arange(0, BLOCK)
    stored, valid = cols < width, cols < vocab
    z = tl.where(valid, tl.load(z_ptr + row * z_stride + cols, mask=stored, other=ABSENT), ABSENT)
    t = tl.where(valid, tl.load(t_ptr + row * t_stride + cols, mask=stored, other=ABSENT), ABSENT)
    w = tl.load(weight_ptr + row)
    g = w * (z - t)
    if TWO:
        u = tl.where(valid, tl.load(u_ptr + row * u_stride + cols, mask=stored, other=ABSENT), ABSENT)
        w2 = tl.load(weight_ptr + rows + row)
        g += w2 * (z - u)

    field = tl.cast(rows, tl.int64) * splits
    line = partial_ptr + row * splits
    post(z, g, line + split, field)
    post(t, z - t, line + split + 3 * field, field)
    if TWO:
        post(u, z - u, line + split + 6 * field, field)
    # Every thread has stored before one of them says so.
    tl.debug_barrier()
    posted = ticket_ptr + 1 + row
    tl.atomic_add(posted, 1, sem="release", scope="gpu")
    if WAIT:
        while tl.load(posted, volatile=True) < splits:
            pass
    tl.atomic_add(posted, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()

    block = tl.arange(0, SPLITS)
    top, log, mean = collect(line, field, block, splits)
    q_top, q_log, q_mean = collect(line + 3 * field, field, block, splits)
    p = tl.exp((z - top) - log)
    shift = (top - q_top) + (log - q_log)
    if KIND == "reverse_kl":
        value = mean - w * shift
        d = p * (g - mean)
    else:
        tl.static_assert(KIND == "forward_kl")
        value = w * (shift - q_mean)
        d = w * (p - tl.exp((t - q_top) - q_log))
    if TWO:
        u_top, u_log, u_mean = collect(line + 6 * field, field, block, splits)
        shift = (top - u_top) + (log - u_log)
        if KIND == "reverse_kl":
            value -= w2 * shift
        else:
            value += w2 * (shift - u_mean)
            d += w2 * (p - tl.exp((u - u_top) - u_log))
    if split == 0:
        tl.store(value_ptr + row, value)
    d *= tl.load(scale_ptr + row)
    tl.store(out_ptr + row * out_stride + cols, d.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def post(x, g, place, field):
    """Partials of one block: (max, sum e, sum e g)."""
    top = tl.max(x, 0)
    e = tl.exp(x - top)
    tl.store(place, top)
    tl.store(place + field, tl.sum(e, 0))
    tl.store(place + 2 * field, tl.sum(e * g, 0))


@triton.jit
def collect(line, field, block, splits):
    """(top, log, mean of g) of a row from its blocks; past the first-level cache, which may be stale."""
    present = block < splits
    tops = tl.load(line + block, mask=present, other=ABSENT, cache_modifier=".cg")
    sums = tl.load(line + field + block, mask=present, other=0.0, cache_modifier=".cg")
    dots = tl.load(line + 2 * field + block, mask=present, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 0)
    share = tl.exp(tops - top)
    total = tl.sum(sums * share, 0)
    return top, tl.log(total), tl.sum(dots * share, 0) / total


class OneRead:
    """The kernel on [c, V] float32 logits of a student and one or two teachers; rows as ``TritonRowOps``
    has them.

    Args:
        rows: c.
        vocab: V.
        block: columns of a program.
        warps: of a program.
    """

    def __init__(self, rows: int, vocab: int, like: Tensor, block: int = BLOCK, warps: int = OPTIONS["num_warps"]):
        self.rows, self.vocab, self.block = rows, vocab, block
        self.options = OPTIONS | {"num_warps": warps}
        self.width = -(-vocab // 16) * 16
        self.splits = triton.cdiv(self.width, block)
        self.ticket = torch.zeros(1 + rows, dtype=torch.int32, device=like.device)
        self.partial = like.new_empty(FIELDS, rows, self.splits)
        self.value = like.new_empty(rows)

    def __call__(
        self, kind: str, z: Tensor, teachers: list[Tensor], weight: Tensor, scale: Tensor, out: Tensor
    ) -> Tensor:
        """[c] divergences; the gradient goes to ``out``. ``weight`` [K, c], ``scale`` [c]."""
        self.ticket.zero_()
        return self.launch(kind, z, teachers, weight, scale, out, wait=True)

    def launch(
        self, kind: str, z: Tensor, teachers: list[Tensor], weight: Tensor, scale: Tensor, out: Tensor, wait: bool
    ) -> Tensor:
        with device_of(z):
            one_read_kernel[(self.rows * self.splits,)](
                z,
                teachers[0],
                teachers[-1],
                weight,
                scale,
                self.ticket,
                self.partial,
                self.value,
                out,
                self.rows,
                self.splits,
                self.vocab,
                self.width,
                z.stride(0),
                teachers[0].stride(0),
                teachers[-1].stride(0),
                out.stride(0),
                KIND=kind,
                TWO=len(teachers) > 1,
                WAIT=wait,
                SPLITS=triton.next_power_of_2(self.splits),
                BLOCK=self.block,
                **self.options,
            )
        return self.value
