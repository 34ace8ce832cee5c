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

from gap_gemm import gap_kernel  # noqa: E402
from gpu_rows import two_reads  # noqa: E402
from one_read import OneRead  # noqa: E402

from opd_kernels import rows  # noqa: E402
from opd_kernels.reference import divergence_of  # noqa: E402
from opd_kernels.types import Rule  # noqa: E402


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 16)


def logits(count: int, vocab: int, seed: int) -> torch.Tensor:
    """Rows 16 elements apart at least, NaN beyond the vocabulary."""
    wide = torch.full((count, -(-vocab // 16) * 16 + 16), torch.nan)
    wide[:, :vocab] = 3 * torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed))
    return wide[:, :vocab]


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("vocab", [16, 37, 150])
def test_one_read(kind, teachers, vocab):
    z, *theirs = (logits(3, vocab, seed) for seed in range(1 + teachers))
    weight, scale = torch.tensor([[0.3, 1.2, 0.0], [0.9, 0.4, 0.7]])[:teachers], torch.tensor([0.5, 2.0, -1.0])
    out = torch.full((3, 192), torch.nan)[:, :vocab]
    kernel = OneRead(3, vocab, z, block=16)
    kernel.launch(kind, z, theirs, weight, scale, out, wait=False)
    kernel.ticket[0] = 0
    value = kernel.launch(kind, z, theirs, weight, scale, out, wait=True)

    exact = z.double().requires_grad_()
    p = exact.log_softmax(1)
    terms = [
        w.double() * divergence_of(Rule(kind), p, t.double().log_softmax(1))
        for w, t in zip(weight, theirs, strict=True)
    ]
    want = torch.stack(terms).sum(0)
    (gradient,) = torch.autograd.grad((scale.double() * want).sum(), exact)
    mine = torch.full((3, 192), torch.nan)[:, :vocab]
    for found, d in ((value, out), (two_reads(kind, z, theirs, weight, scale, mine), mine)):
        torch.testing.assert_close(found.double(), want.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(d.double(), gradient, rtol=1e-4, atol=1e-6)


def test_gap_product():
    """Odd numbers of rows and columns; widths of several blocks."""
    x, w, y, v = (torch.randn(*shape) for shape in ((19, 32), (37, 32), (19, 48), (37, 48)))
    z, gap = torch.full((2, 19, 48), torch.nan)[..., :37]
    blocks = {"BM": 16, "BN": 16, "BK": 16, "GROUP": 2}
    grid = (triton.cdiv(19, 16) * triton.cdiv(37, 16),)
    gap_kernel.fn[grid](x, w, y, v, z, gap, 19, 37, 32, 48, z.stride(0), **blocks)
    torch.testing.assert_close(z, x @ w.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gap, x @ w.t() - y @ v.t(), rtol=1e-4, atol=1e-4)
