"""Row operations in plain torch: the CPU path, and the living reference of the Triton row kernels.

The driver owns the buffers; these functions own what is in them. ``write_logits`` fills a buffer;
here it holds normalised log-probabilities afterwards: ``z`` after ``student_rows``, ``t`` after
``teacher_rows``. All sweeps go tile by tile over a few rows, so that
on a CPU the operands stay in cache from one sweep to the next.

Symbols: z student logits / T, p its softmax; t teacher logits / T, q its softmax; r = log q - log
p; a = d divergence / d p up to a constant per row, so that d divergence / d z = p (a - E_p[a]).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunking import SCRATCH_TILES, spans
from .heads import write_logits
from .types import STATS_ONLY, Head, Rule


@dataclass
class StudentRows:
    """Per-row results of the student, [c] in the compute dtype; all but ``lse`` only with ``full``.

    ``log_sum`` is log sum exp(logit - largest logit), minus the log of the largest probability.
    """

    lse: Tensor
    entropy: Tensor | None = None
    top1: Tensor | None = None
    logprob: Tensor | None = None
    log_sum: Tensor | None = None

    def part(self, start: int, stop: int) -> StudentRows:
        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[start:stop]

        others = (self.entropy, self.top1, self.logprob, self.log_sum)
        return StudentRows(self.lse[start:stop], *map(cut, others))


@dataclass
class TeacherRows:
    """Per-row results of one teacher, [c] in the compute dtype.

    ``value`` is the unweighted divergence, ``acc_mean`` the unweighted E_p[a] (None for the
    forward KL, which needs none), ``finite`` False where the teacher's logits hold NaN or inf. The
    rest only with ``full``.
    """

    value: Tensor
    acc_mean: Tensor | None
    finite: Tensor
    entropy: Tensor | None = None
    top1_prob: Tensor | None = None
    agreement: Tensor | None = None
    reverse_kl: Tensor | None = None
    forward_kl: Tensor | None = None
    logprob: Tensor | None = None


class TorchRowOps:
    """Row operations on [c, V] views of a chunk; see the module docstring for the symbols."""

    def __init__(self, tile_rows: int, vocab: int, like: Tensor) -> None:
        self.tile_rows = tile_rows
        self.scratch = like.new_empty(SCRATCH_TILES, tile_rows, vocab)
        self.clamp = 83.0 if like.dtype == torch.float32 else 700.0

    def tiles(self, rows: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        for start, stop in spans(rows, self.tile_rows):
            s1, s2, s3 = self.scratch[:, : stop - start]
            yield slice(start, stop), s1, s2, s3

    def write_logits(self, head: Head, hidden: Tensor, out: Tensor, tile: Tensor | None) -> None:
        """Fill ``out`` [c, V] from ``hidden`` [c, d], for the operations below."""
        write_logits(head, hidden, out, tile)

    def student_rows(self, head: Head, z: Tensor, labels: Tensor | None, full: bool, joint: bool) -> StudentRows:
        """Normalise ``z`` [c, V]; ``labels`` [c] int64; ``full`` adds the other fields of
        ``StudentRows``.

        With ``joint``, ``teacher_rows`` or ``mixture_rows`` follows for every row, and the results
        may be empty until then.
        """
        out = StudentRows(z.new_empty(z.shape[0]))
        if full:
            out.entropy, out.log_sum = z.new_empty(2, z.shape[0])
            out.top1 = torch.empty(z.shape[0], dtype=torch.int64, device=z.device)
        for rows, s1, s2, _ in self.tiles(z.shape[0]):
            x = z[rows]
            out.lse[rows], log_sum = _normalise(x, s1)
            if full:
                out.log_sum[rows] = log_sum  # type: ignore[index]
                torch.exp(x, out=s1)
                out.entropy[rows] = dot(s1, x, s2).neg_()  # type: ignore[index]
                out.top1[rows] = x.argmax(1)  # type: ignore[index]
        if labels is not None and full:
            out.logprob = z.gather(1, labels[:, None])[:, 0]
        return out

    def teacher_rows(
        self,
        rule: Rule,
        student_head: Head,
        head: Head,
        z: Tensor,
        t: Tensor,
        student: StudentRows,
        *,
        acc: Tensor | None,
        before: int,
        last: bool,
        weight: Tensor,
        labels: Tensor | None,
        full: bool,
    ) -> TeacherRows:
        """Divergence of one teacher and, with ``acc``, its weighted contribution to the
        accumulator.

        Args:
            rule: the divergence.
            student_head: the head of ``z``.
            head: the head of ``t``.
            z: [c, V] as ``student_rows`` left it.
            t: [c, V] as ``write_logits`` left it, overwritten. The first teacher's ``t`` is
                ``acc``, if there is one.
            student: rows of ``z``.
            acc: [c, V] accumulator of ``weight * a`` (forward KL: ``weight * q``), or None when no
                gradient follows.
            before: teachers of these rows that came before; with 0 the accumulator is written, not
                added to.
            last: no other teacher of these rows follows.
            weight: [c] weight of this teacher.
            labels: [c] int64 or None.
            full: also return the statistics.
        """
        count = z.shape[0]
        value, mean = z.new_empty(count), z.new_empty(count)
        finite = torch.empty(count, dtype=torch.bool, device=z.device)
        out = TeacherRows(value, None if rule.kind == "forward_kl" else mean, finite)
        if full:
            _allocate(out, z, labels)
        for rows, s1, s2, s3 in self.tiles(count):
            x, y = z[rows], t[rows]
            finite[rows] = torch.isfinite(_normalise(y, s1)[1])
            if full:
                self._teacher_stats(out, rows, x, y, student, labels, (s1, s2))
            tile = Tile(
                x=x,
                y=y,
                acc=None if acc is None else acc[rows],
                first=before == 0,
                weight=weight[rows, None],
                value=value[rows],
                mean=mean[rows],
                scratch=(s1, s2, s3),
                clamp=self.clamp,
            )
            SWEEPS[rule.kind](rule, tile)
        finite &= torch.isfinite(value if out.reverse_kl is None else value + out.reverse_kl)
        return out

    def mixture_rows(
        self,
        student_head: Head,
        head: Head,
        z: Tensor,
        t: Tensor,
        student: StudentRows,
        *,
        acc: Tensor,
        before: int,
        weight: Tensor,
        labels: Tensor | None,
        full: bool,
    ) -> TeacherRows:
        """Fold ``weight * q`` of one teacher into ``acc`` = log sum_k weight_k q_k. Arguments as
        ``teacher_rows``."""
        count = z.shape[0]
        finite = torch.empty(count, dtype=torch.bool, device=z.device)
        out = TeacherRows(z.new_empty(0), None, finite)
        if full:
            _allocate(out, z, labels)
        log_weight = weight.log()[:, None]
        for rows, s1, s2, _ in self.tiles(count):
            y = t[rows]
            finite[rows] = torch.isfinite(_normalise(y, s1)[1])
            if full:
                self._teacher_stats(out, rows, z[rows], y, student, labels, (s1, s2))
            y.add_(log_weight[rows])
            if before:
                torch.logaddexp(acc[rows], y, out=acc[rows])
        return out

    def mixture_value(self, rule: Rule, z: Tensor, acc: Tensor, student: StudentRows, keep: bool) -> TeacherRows:
        """Divergence from the mixture that ``mixture_rows`` left in ``acc``; with ``keep`` a
        gradient follows."""
        value, mean = z.new_empty(z.shape[0]), z.new_empty(z.shape[0])
        one = value.new_ones(1, 1)
        for rows, *scratch in self.tiles(z.shape[0]):
            x, y, (s1, s2, s3) = z[rows], acc[rows], scratch
            _normalise(y, s1)
            kept = y if keep else None
            SWEEPS[rule.kind](rule, Tile(x, y, kept, True, one, value[rows], mean[rows], (s1, s2, s3), self.clamp))
        return TeacherRows(value, None if rule.kind == "forward_kl" else mean, torch.isfinite(value))

    def gradient_rows(
        self,
        rule: Rule,
        z: Tensor,
        acc: Tensor,
        t: Tensor,
        student: StudentRows,
        *,
        teachers: int,
        acc_mean: Tensor,
        total_weight: Tensor,
        row_scale: Tensor,
        softcap: float | None,
        out: Tensor,
    ) -> None:
        """dZ of the head's product: ``row_scale * slope * p (acc - acc_mean)``, forward KL ``W p -
        acc``.

        Args:
            rule: the divergence.
            z: [c, V] as ``student_rows`` left it, overwritten.
            acc: [c, V] accumulator, overwritten.
            t: [c, V] as the last teacher of the rows left it.
            student: rows of ``z``.
            teachers: teachers of these rows, 3 for more; 1 for a mixture.
            acc_mean: [c] E_p[acc]; unused by the forward KL.
            total_weight: [c] sum of the teachers' weights.
            row_scale: [c] loss weight of the row times d logits / d (hidden W^T).
            softcap: the cap divided by the temperature, or None; its slope is 1 - (logits /
                softcap)^2.
            out: [c, V] of any floating dtype; may be ``acc``.
        """
        in_place = out.data_ptr() == acc.data_ptr()
        for rows, s1, s2, _ in self.tiles(z.shape[0]):
            x, a = z[rows], acc[rows]
            torch.exp(x, out=s1)
            if rule.kind == "forward_kl":
                torch.sub(s1.mul_(total_weight[rows, None]), a, out=a)
            else:
                a.sub_(acc_mean[rows, None]).mul_(s1)
            a.mul_(row_scale[rows, None])
            if softcap is not None:
                softcap_slope(x, student.lse[rows], softcap, s2)
                a.mul_(s2)
            if not in_place:
                out[rows] = a

    def logprob_gradient_rows(
        self,
        z: Tensor,
        labels: Tensor,
        student: StudentRows,
        *,
        entropy: Tensor,
        logprob_scale: Tensor,
        entropy_scale: Tensor | None,
        softcap: float | None,
        out: Tensor,
    ) -> None:
        """dZ of ``logprob_scale * log p(label) + entropy_scale * entropy``: ``entropy`` and
        scales [c], ``out`` [c, V] may be ``z``.

        d log p(y) / d z = 1_y - p and d H / d z = -p (log p + H).
        """
        for rows, s1, s2, _ in self.tiles(z.shape[0]):
            x, up = z[rows], logprob_scale[rows, None]
            if softcap is not None:
                softcap_slope(x, student.lse[rows], softcap, s2)
            torch.exp(x, out=s1)
            if entropy_scale is None:
                torch.mul(s1, -up, out=x)
            else:
                x.add_(entropy[rows, None]).mul_(-entropy_scale[rows, None]).sub_(up).mul_(s1)
            x.scatter_add_(1, labels[rows, None], up)
            if softcap is not None:
                x.mul_(s2)
            if out is not z:
                out[rows] = x

    def _teacher_stats(
        self,
        out: TeacherRows,
        rows: slice,
        x: Tensor,
        y: Tensor,
        student: StudentRows,
        labels: Tensor | None,
        scratch: tuple[Tensor, Tensor],
    ) -> None:
        """Fill the statistics of one tile; ``x`` and ``y`` are normalised log-probabilities."""
        s1, s2 = scratch
        torch.exp(y, out=s1)
        out.entropy[rows] = dot(s1, y, s2).neg_()  # type: ignore[index]
        torch.sub(y, x, out=s2)
        out.forward_kl[rows] = s1.mul_(s2).sum(1)  # type: ignore[index]
        torch.exp(x, out=s1)
        out.reverse_kl[rows] = s1.mul_(s2).sum(1).neg_()  # type: ignore[index]
        best, where = y.max(1)
        out.top1_prob[rows] = best.exp()  # type: ignore[index]
        out.agreement[rows] = (where == student.top1[rows]).to(y.dtype)  # type: ignore[index]
        if labels is not None:
            out.logprob[rows] = y.gather(1, labels[rows, None])[:, 0]  # type: ignore[index]


@dataclass
class Tile:
    """Operands of one divergence sweep over r rows.

    Attributes:
        x: [r, V] log p.
        y: [r, V] log q, overwritten.
        acc: [r, V] accumulator, or None; the same memory as ``y`` when ``first``.
        first: write the accumulator instead of adding to it.
        weight: [r, 1] teacher weight.
        value: [r] divergence, written.
        mean: [r] E_p[a], written (not by the forward KL).
        scratch: three [r, V] buffers.
        clamp: largest exponent.
    """

    x: Tensor
    y: Tensor
    acc: Tensor | None
    first: bool
    weight: Tensor
    value: Tensor
    mean: Tensor
    scratch: tuple[Tensor, Tensor, Tensor]
    clamp: float

    def accumulate(self, term: Tensor, factor: float = 1.0) -> None:
        """Add ``factor * weight * term``; ``term`` is overwritten."""
        if self.acc is None:
            return
        weight = self.weight if factor == 1.0 else self.weight * factor
        if self.first:
            torch.mul(term, weight, out=self.acc)
        else:
            self.acc.addcmul_(term, weight)


def _reverse_kl(rule: Rule, tile: Tile) -> None:
    """a = log p - log q."""
    s1, s2, _ = tile.scratch
    gap = torch.sub(tile.x, tile.y, out=tile.y)
    torch.exp(tile.x, out=s1)
    tile.value.copy_(dot(s1, gap, s2))
    tile.mean.copy_(tile.value)
    tile.accumulate(gap)


def _forward_kl(rule: Rule, tile: Tile) -> None:
    """The accumulator holds weight * q itself."""
    s1, _, _ = tile.scratch
    torch.exp(tile.y, out=s1)
    tile.y.sub_(tile.x).mul_(s1)
    torch.sum(tile.y, 1, out=tile.value)
    tile.accumulate(s1)


def _jsd(rule: Rule, tile: Tile) -> None:
    """With L = log(1 - b + b e^r): log(p/m) = -L, log(q/m) = r - L, a = -(1 - b) L.

    The exponent is clamped; where it is, p is 0 to the precision of the dtype.
    """
    s1, s2, s3 = tile.scratch
    torch.exp(tile.y, out=s3)
    r = torch.sub(tile.y, tile.x, out=tile.y).clamp_(max=tile.clamp)
    torch.expm1(r, out=s1).mul_(rule.beta).log1p_()
    tile.value.copy_(s3.mul_(r.sub_(s1)).sum(1)).mul_(rule.beta)
    torch.exp(tile.x, out=s2)
    torch.sum(s2.mul_(s1), 1, out=tile.mean)
    tile.mean.mul_(rule.beta - 1.0)
    tile.value.add_(tile.mean)
    tile.accumulate(s1, rule.beta - 1.0)


def _skew_kl(rule: Rule, tile: Tile) -> None:
    """With D = alpha + (1 - alpha) e^-r: log(q/m) = -log D, a = -(1 - alpha) / D."""
    s1, s2, s3 = tile.scratch
    torch.exp(tile.y, out=s3)
    torch.sub(tile.x, tile.y, out=tile.y).clamp_(max=tile.clamp)
    torch.expm1(tile.y, out=s1).mul_(1.0 - rule.alpha)
    torch.log1p(s1, out=s2)
    tile.value.copy_(s3.mul_(s2).sum(1).neg_())
    s1.add_(1.0).reciprocal_()
    torch.exp(tile.x, out=s2)
    torch.sum(s2.mul_(s1), 1, out=tile.mean)
    tile.mean.mul_(rule.alpha - 1.0)
    tile.accumulate(s1, rule.alpha - 1.0)


def _stats_only(rule: Rule, tile: Tile) -> None:
    """No divergence is asked for."""
    tile.value.zero_()


SWEEPS = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    STATS_ONLY.kind: _stats_only,
}


def _normalise(x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits ``x`` [r, V] into log-probabilities in place; return (lse [r], log sum exp(x -
    max) [r]).

    ``torch.log_softmax`` sums in one running vector, an error near 1e-5 at V = 150k; this pairwise
    sum stays at 1e-7.
    """
    top = x.amax(1, keepdim=True)
    x.sub_(top)
    log_sum = torch.exp(x, out=scratch).sum(1, keepdim=True).log_()
    x.sub_(log_sum)
    return (top + log_sum)[:, 0], log_sum[:, 0]


def dot(left: Tensor, right: Tensor, scratch: Tensor) -> Tensor:
    """Row-wise inner product [r]; a product and a pairwise sum, since a GEMM would neither be as
    accurate nor free."""
    return torch.mul(left, right, out=scratch).sum(1)


def softcap_slope(log_probs: Tensor, lse: Tensor, softcap: float, out: Tensor) -> None:
    """1 - (logits / softcap)^2 into ``out``; the logits are ``log_probs + lse``."""
    torch.add(log_probs, lse[:, None], out=out)
    out.square_().mul_(-1.0 / softcap**2).add_(1.0)


def _allocate(out: TeacherRows, like: Tensor, labels: Tensor | None) -> None:
    names = ["entropy", "top1_prob", "agreement", "reverse_kl", "forward_kl"]
    for name in names if labels is None else [*names, "logprob"]:
        setattr(out, name, like.new_empty(like.shape[0]))
