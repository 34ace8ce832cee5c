"""Work that is not needed is not done, and memory is a budget."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_kernels import TeacherHead, linear_divergence, linear_logprob, token_stats
from opd_kernels.chunking import balanced, plan_chunks

ROWS, VOCAB, WIDTH, WIDTHS = 32, 101, 16, (24, 8, 40)


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def problem(teachers: int, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=g).to(dtype).requires_grad_()
    heads = [
        TeacherHead(torch.randn(ROWS, d, generator=g).to(dtype), torch.randn(VOCAB, d, generator=g).to(dtype))
        for d in WIDTHS[:teachers]
    ]
    return hidden, weight, heads


def half_masked() -> torch.Tensor:
    weight = torch.ones(ROWS)
    weight[1::2] = 0
    return weight


def gemm(rows: int, width: int) -> int:
    return 2 * rows * VOCAB * width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize("teacher_reduction", ["sum", "mixture"])
@pytest.mark.parametrize("teachers", [1, 2, 3])
def test_flops_are_minimal_with_half_of_the_rows_masked(teachers, teacher_reduction, divergence, dtype):
    hidden, weight, heads = problem(teachers, dtype)
    options = {"divergence": divergence, "teacher_reduction": teacher_reduction, "token_weight": half_masked()}

    def step():
        linear_divergence(hidden, weight, heads, workspace_bytes=60_000, **options).loss.backward()

    rows = ROWS // 2
    assert flops(step) == 3 * gemm(rows, WIDTH) + sum(gemm(rows, d) for d in WIDTHS[:teachers])


def test_frozen_parts_have_no_gemm():
    hidden, weight, heads = problem(1)
    forward = gemm(ROWS, WIDTH) + gemm(ROWS, WIDTHS[0])
    fixed = weight.detach()
    assert flops(lambda: linear_divergence(hidden, fixed, heads).loss.backward()) == forward + gemm(ROWS, WIDTH)
    still = hidden.detach()
    assert flops(lambda: linear_divergence(still, weight, heads).loss.backward()) == forward + gemm(ROWS, WIDTH)
    assert flops(lambda: linear_divergence(still, fixed, heads)) == forward
    with torch.no_grad():
        assert flops(lambda: linear_divergence(hidden, weight, heads)) == forward
        assert flops(lambda: token_stats(hidden, weight, heads)) == forward


def test_routing_costs_one_teacher():
    """Interleaved routes: every row has one of three teachers."""
    hidden, weight, heads = problem(3)
    route = torch.arange(ROWS) % 3
    mix = torch.nn.functional.one_hot(route, 3).float()
    expected = 3 * gemm(ROWS, WIDTH) + sum(gemm(int((route == k).sum()), d) for k, d in enumerate(WIDTHS))

    def step():
        linear_divergence(hidden, weight, heads, mix=mix, workspace_bytes=60_000).loss.backward()

    assert flops(step) == expected


def test_arbitrary_upstream_recomputes_only_rows_with_a_gradient():
    hidden, weight, heads = problem(1)
    out = linear_divergence(hidden, weight, heads, reduction="none")
    once = gemm(8, WIDTH) + gemm(8, WIDTHS[0])
    assert flops(lambda: out.loss[:8].sum().backward()) == once + 2 * gemm(8, WIDTH)


def test_logprob_recomputes_only_rows_with_a_gradient():
    hidden, weight, _ = problem(0)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    out = linear_logprob(hidden, weight, labels)
    assert flops(lambda: out.logprob[4:10].sum().backward()) == 3 * gemm(6, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize("teachers", [1, 3])
@pytest.mark.parametrize("budget", [4 << 20, 12 << 20])
def test_peak_memory_stays_within_the_budget(peak_bytes, divergence, teachers, budget, dtype):
    rows, vocab, width = 256, 16384, 8
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).to(dtype).requires_grad_()
    heads = [TeacherHead(torch.randn(rows, 4).to(dtype), torch.randn(vocab, 4).to(dtype)) for _ in range(teachers)]
    token_weight = torch.ones(rows)
    token_weight[::5] = 0

    def step():
        out = linear_divergence(
            hidden, weight, heads, divergence=divergence, token_weight=token_weight, workspace_bytes=budget
        )
        return out, torch.autograd.grad(out.loss, (hidden, weight))

    gradients = (hidden.numel() + vocab * width) * dtype.itemsize
    accumulator = vocab * width * 4 if dtype != torch.float32 else 0
    per_token = 64 * rows * (teachers + 2)
    peak = peak_bytes(step) - gradients - accumulator
    assert peak <= budget + per_token
    assert peak >= budget // 3, "the budget is not used: chunks are smaller than they could be"


def test_a_teacher_of_its_own_rows_takes_no_buffer(peak_bytes):
    """The workspace grows with the teachers of a row, not with all of them."""
    rows, vocab = 64, 16384
    hidden, weight = torch.randn(rows, 8).requires_grad_(), torch.randn(vocab, 8).requires_grad_()

    def peak(teachers, **options):
        heads = [TeacherHead(torch.randn(rows, 4), torch.randn(vocab, 4)) for _ in range(teachers)]
        mix = torch.nn.functional.one_hot(torch.arange(rows) % teachers, teachers).float()
        return peak_bytes(lambda: linear_divergence(hidden, weight, heads, mix=mix, **options).loss.backward())

    for options in ({}, {"divergence": "jsd"}, {"teacher_reduction": "mixture"}):
        two, eight = peak(2, **options), peak(8, **options)
        assert eight < 1.02 * two


@pytest.mark.parametrize("buffers", [2, 3])
@pytest.mark.parametrize("gigabytes", [0.5, 1, 2, 4, 100])
@pytest.mark.parametrize("rows", [100, 770, 8192])
def test_chunks_on_a_gpu_fill_the_tiles_of_a_product(rows, gigabytes, buffers):
    """At the size of real models; within the budget."""
    budget, vocab, widest = int(gigabytes * 2**30), 151936, 5120
    plan = plan_chunks(
        rows=rows,
        vocab=vocab,
        hidden_sizes=(2560, widest),
        buffers=buffers,
        scratch_tiles=0,
        upcast=False,
        half_gradient=True,
        dtype=torch.float32,
        device=torch.device("cuda"),
        workspace_bytes=budget,
    )
    assert plan.chunk_rows == rows or plan.chunk_rows % 64 == 0
    assert plan.gradient_rows == rows or plan.gradient_rows % plan.chunk_rows == 0
    assert 4 * buffers * vocab * plan.chunk_rows + 2 * vocab * plan.gradient_rows <= budget
    if gigabytes == 100:
        assert plan.chunk_rows == rows


def test_chunk_sizes():
    """No thin last chunk; steps where they fit."""
    assert [balanced(100, n) for n in (100, 99, 40, 1)] == [100, 50, 34, 1]
    assert [balanced(1000, n, 128) for n in (1000, 999, 400, 128, 100)] == [1000, 512, 384, 128, 100]
