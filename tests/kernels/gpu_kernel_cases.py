"""The kernels that only the GPU session uses, in Triton's interpreter; run by ``test_gpu_session.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime import interpreter

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "gpu")]

import ceilings  # noqa: E402
import gpu_rows  # noqa: E402
from gap_gemm import gap_kernel  # noqa: E402

from opd_kernels import rows  # noqa: E402


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 16)


@pytest.fixture
def loops_over_numbers(monkeypatch):
    """The interpreter holds a number as an array of one. Triton 3.6 gives it to ``int``, which NumPy refuses from 2.4
    on, where a kernel loops up to an argument; later ones squeeze it first, as is done here."""
    patch = interpreter._patch_lang_tensor

    def patch_and_squeeze(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_squeeze)


@pytest.mark.usefixtures("loops_over_numbers")
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
