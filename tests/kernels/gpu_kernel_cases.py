"""The kernels that only the GPU session uses, in Triton's interpreter; run by ``test_gpu_session.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import triton

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "gpu")]

import ceilings  # noqa: E402
import gpu_rows  # noqa: E402
from gap_gemm import gap_kernel  # noqa: E402

from opd_kernels import rows  # noqa: E402


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 16)


def test_gap_product():
    """Odd numbers of rows and columns; widths of several blocks."""
    x, w, y, v = (torch.randn(*shape) for shape in ((19, 32), (37, 32), (19, 48), (37, 48)))
    z, gap = torch.full((2, 19, 48), torch.nan)[..., :37]
    blocks = {"BM": 16, "BN": 16, "BK": 16, "GROUP": 2}
    grid = (triton.cdiv(19, 16) * triton.cdiv(37, 16),)
    gap_kernel.fn[grid](x, w, y, v, z, gap, 19, 37, 32, 48, z.stride(0), **blocks)
    torch.testing.assert_close(z, x @ w.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gap, x @ w.t() - y @ v.t(), rtol=1e-4, atol=1e-4)


def test_ceilings_of_the_row_kernels(monkeypatch):
    """What the session asks of them on a device."""

    def once(call) -> float:
        call()
        return 1.0

    monkeypatch.setattr(rows, "BLOCK", 2048)
    monkeypatch.setattr(gpu_rows, "DEVICE", "cpu")
    monkeypatch.setattr(ceilings, "median_ms", once)
    assert set(ceilings.row_kernels(2, 515)["sweeps"]) >= {"statistics, reverse_kl, K=1", "all stages, jsd, K=2"}
