"""The kernels that only the GPU session uses, in Triton's interpreter; run by ``test_gpu_session.py``.

The programs of a launch run one after the other there, so none can wait for a later one: a first
launch without waiting posts every block, and the second finds them all.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import triton

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "gpu")]

import ceilings  # noqa: E402
import choose_columns  # noqa: E402
import gpu_rows  # noqa: E402
from gap_gemm import gap_kernel  # noqa: E402

from opd_kernels import TeacherHead, linear_divergence, rows  # noqa: E402
from opd_kernels.chunking import ChunkPlan  # noqa: E402
from opd_kernels.compaction import Compactor  # noqa: E402
from opd_kernels.selection import RowPlan  # noqa: E402


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 16)


def logits(count: int, vocab: int, seed: int) -> torch.Tensor:
    """Rows 16 elements apart at least, NaN beyond the vocabulary."""
    wide = torch.full((count, -(-vocab // 16) * 16 + 16), torch.nan)
    wide[:, :vocab] = 3 * torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed))
    return wide[:, :vocab]


def test_gap_product():
    """Odd numbers of rows and columns; widths of several blocks."""
    x, w, y, v = (torch.randn(*shape) for shape in ((19, 32), (37, 32), (19, 48), (37, 48)))
    z, gap = torch.full((2, 19, 48), torch.nan)[..., :37]
    blocks = {"BM": 16, "BN": 16, "BK": 16, "GROUP": 2}
    grid = (triton.cdiv(19, 16) * triton.cdiv(37, 16),)
    gap_kernel.fn[grid](x, w, y, v, z, gap, 19, 37, 32, 48, z.stride(0), **blocks)
    torch.testing.assert_close(z, x @ w.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gap, x @ w.t() - y @ v.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "vocab"), [(5, 37), (19, 300)])
def test_choice_of_columns(count, vocab, monkeypatch):
    """Mass, scores and dropped mass as the plain choice has them; what is beyond the vocabulary is not read."""
    monkeypatch.setattr(choose_columns, "BLOCK", 64)
    monkeypatch.setattr(choose_columns, "TILES", 2)
    monkeypatch.setattr(choose_columns, "TILE_COLUMNS", 32)
    dz = logits(count, vocab, 0)
    dz.copy_(((2 * dz).exp() * torch.randn(count, vocab).sign()).bfloat16())
    dz[1] = 0.0
    kinds = (Compactor, choose_columns.FusedCompactor)
    plan, all_rows = ChunkPlan(count, 3, 0, count), RowPlan(None, count, ())
    plain, fused = (kind(0.05, all_rows, count, plan, torch.empty(0)) for kind in kinds)
    parts, dropped = plain.choose(dz)
    others, also = fused.choose(dz)
    assert parts is not None and 0 < dropped.max() <= 0.05
    torch.testing.assert_close(also, dropped)
    for mine, other in zip(others, parts, strict=True):
        torch.testing.assert_close(mine.columns, other.columns)
        assert (mine.rows is None) == (other.rows is None)


def test_calls_with_the_fused_choice():
    torch.manual_seed(0)
    hidden, weight = (4 * torch.randn(6, 8)).requires_grad_(), torch.randn(64, 8).requires_grad_()
    teacher = TeacherHead(torch.randn(6, 9), torch.randn(64, 9))

    def step():
        out = linear_divergence(hidden, weight, [teacher], backward_tolerance=0.1, impl="torch")
        return torch.autograd.grad(out.loss, (hidden, weight))

    want = step()
    with choose_columns.fused_choice():
        got = step()
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other)


def test_ceilings_of_the_row_kernels(monkeypatch):
    """What the session asks of them on a device; one block a row, so that nothing waits."""

    def once(call) -> float:
        call()
        return 1.0

    monkeypatch.setattr(rows, "BLOCK", 2048)
    monkeypatch.setattr(gpu_rows, "DEVICE", "cpu")
    monkeypatch.setattr(ceilings, "median_ms", once)
    assert set(ceilings.row_kernels(2, 515)["sweeps"]) >= {"statistics, reverse_kl, K=1", "one read, jsd, K=2"}
    for kind, teachers in (("reverse_kl", 1), ("jsd", 2)):
        found = ceilings.one_read(2, 515, kind, teachers)
        assert found["error"] <= 1e-3 and found["value_error"] <= 1e-4
