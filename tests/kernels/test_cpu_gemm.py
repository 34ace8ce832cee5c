"""The blocked oneDNN products equal ``torch.mm``, and are left alone where they do not pay."""

from __future__ import annotations

import pytest
import torch

from opd_kernels import TeacherHead, chunking, cpu_gemm, linear_divergence

ROWS, VOCAB, WIDTH = 70, 120_001, 24


@pytest.fixture
def operands():
    """The weight is a view of wider rows."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH + 8, generator=g)[:, :WIDTH]
    return torch.randn(ROWS, WIDTH, generator=g), weight, torch.randn(ROWS, VOCAB, generator=g)


def close(got, want):
    assert (got.double() - want).norm() <= 2e-6 * want.norm()


@pytest.mark.parametrize("available", [True, False])
def test_products_equal_float64(monkeypatch, operands, available):
    hidden, weight, dz = operands
    if not available:
        monkeypatch.setattr(cpu_gemm, "linear", lambda: None)
    out = torch.full((ROWS, VOCAB), float("nan"))
    assert (cpu_gemm.blocks(out, WIDTH) is not None) == (available and cpu_gemm.linear() is not None)
    cpu_gemm.logits(hidden, weight, out)
    close(out, hidden.double() @ weight.double().t())
    out = torch.full((ROWS, WIDTH), float("nan"))
    cpu_gemm.hidden_gradient(dz, weight, out)
    close(out, dz.double() @ weight.double())
    out, want = torch.full((VOCAB, WIDTH), float("nan")), dz.double().t() @ hidden.double()
    cpu_gemm.weight_gradient(dz, hidden, out, add=False)
    close(out, want)
    cpu_gemm.weight_gradient(dz, hidden, out, add=True)
    close(out, 2 * want)


def test_small_and_float64_products_stay_with_torch(operands):
    hidden, weight, _ = operands
    assert cpu_gemm.blocks(hidden @ weight[:1000].t(), WIDTH) is None
    assert cpu_gemm.blocks(torch.empty(ROWS, VOCAB, dtype=torch.float64), WIDTH) is None


def test_divergence_of_a_large_vocabulary(operands):
    hidden, weight, _ = operands
    teacher = TeacherHead(hidden + 0.1, weight)

    def gradients(dtype, **options):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        head = TeacherHead(teacher.hidden.to(dtype), teacher.weight.to(dtype))
        return torch.autograd.grad(linear_divergence(h, w, [head], **options).loss, (h, w))

    for mine, exact in zip(gradients(torch.float32), gradients(torch.float64, impl="reference"), strict=True):
        assert (mine.double() - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("rows", [1, 9, 32, ROWS])
def test_blocks_take_no_more_than_the_plan_leaves_them(rows):
    """A block of the result is at most a quarter of the logits, which share a budget with it."""
    matrix = torch.empty(rows, VOCAB)
    block = cpu_gemm.blocks(matrix, WIDTH)
    assert (block is None) == (4 * matrix.numel() < chunking.LARGE_BYTES)
    if block is not None:
        assert 4 * block * max(rows, WIDTH) <= min(chunking.PRODUCT_BLOCK_BYTES, matrix.numel())
