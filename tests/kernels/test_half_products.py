"""bfloat16 heads as a GPU runs them: library products with a float32 result, dZ gathered in bfloat16.

A CPU has no such products, so stand-ins take their place that check what the CUDA ones accept.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd_kernels import TeacherHead, heads, linear_divergence, linear_logprob

ROWS, VOCAB, WIDTH = 40, 515, 24
LIVE = 64
MM, ADDMM = torch.mm, torch.addmm


def product(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    assert left.dtype == right.dtype in (torch.bfloat16, torch.float16)
    assert out_dtype == torch.float32
    return MM(left.float(), right.float())


def mm(left, right, *, out_dtype=None, out=None):
    if out_dtype is None:
        return MM(left, right) if out is None else MM(left, right, out=out)
    found = product(left, right, out_dtype)
    return found if out is None else write(out, found)


def addmm(start, left, right, *, out_dtype=None, beta=1, alpha=1, out=None):
    if out_dtype is None:
        return ADDMM(start, left, right, beta=beta, alpha=alpha, out=out)
    assert start.dtype in (out_dtype, left.dtype)
    found = alpha * product(left, right, out_dtype)
    return write(out, found if beta == 0 else found + beta * start)


def write(out: Tensor, values: Tensor) -> Tensor:
    assert (out.dtype, out.shape) == (values.dtype, values.shape)
    return out.copy_(values)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    halves = (torch.bfloat16, torch.float16)
    monkeypatch.setattr(heads, "native_half", lambda weight, to: weight.dtype in halves and to == torch.float32)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, list[TeacherHead]]:
    """Nearly all probability lies in the first columns."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    def weight(width: int) -> Tensor:
        return torch.cat([normal(LIVE, width), normal(VOCAB - LIVE, width, scale=0.05)])

    teachers = [TeacherHead(normal(ROWS, d), weight(d)) for d in (WIDTH, 32)]
    return normal(ROWS, WIDTH, scale=2.0).requires_grad_(), weight(WIDTH).requires_grad_(), teachers


def wide(hidden: Tensor, weight: Tensor, teachers: list[TeacherHead]):
    heads = [TeacherHead(t.hidden.double(), t.weight.double()) for t in teachers]
    return *(x.detach().double().requires_grad_() for x in (hidden, weight)), heads


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("budget", [None, 100_000])
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_divergence(dtype, kind, budget, share, masked):
    """All rows in one block of dZ and few of them, dense and sampled gradients."""
    options = {"divergence": kind, "workspace_bytes": budget and budget * (7 if share else 1)}
    if masked:
        options["token_weight"] = torch.linspace(0.5, 2.0, ROWS) * (torch.arange(ROWS) % 3 > 0)
    call = problem(dtype)
    out = linear_divergence(*call, vocab_sample=share, stats=True, **options)
    exact_call = wide(*call)
    exact = linear_divergence(*exact_call, impl="reference", **options)
    if not share or kind != "reverse_kl":  # whose value then comes from some of the rows
        assert relative(out.loss.detach(), exact.loss.detach()) < 1e-5
    noises = (out.sampling.hidden_noise, out.sampling.weight_noise) if share else (0.0, 0.0)
    gradients = torch.autograd.grad(out.loss, call[:2])
    for got, want, noise in zip(gradients, torch.autograd.grad(exact.loss, exact_call[:2]), noises, strict=True):
        assert got.dtype == dtype and (noise > 0) == (share > 0)
        # float16 keeps 11 bits of dZ and of the result; on few live columns their errors do not average out.
        assert relative(got, want) < (6e-4 if dtype == torch.float16 and not share else 5e-3) + 3 * noise


@pytest.mark.parametrize("scale", [1e-7, 1.0, 3e4])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "skew_kl"])
def test_float16_gradients_of_any_size(kind, scale):
    """dZ has a factor that is taken out again: weights that would be denormal or inf lose nothing."""
    hidden, weight, teachers = problem(torch.float16)
    # Flat enough that many columns carry gradient.
    call = [(hidden.detach() / 8).requires_grad_(), weight.detach().requires_grad_(), teachers]
    token_weight = torch.linspace(0.5, 2.0, ROWS) * scale
    bias = torch.zeros(VOCAB).requires_grad_()
    leaves = [*call[:2], bias]
    loss = linear_divergence(*call, divergence=kind, token_weight=token_weight, student_bias=bias).loss / scale
    got = torch.autograd.grad(loss, leaves)
    exact_call = wide(*call)
    exact_bias = bias.detach().double().requires_grad_()
    exact = linear_divergence(
        *exact_call, divergence=kind, token_weight=token_weight / scale, student_bias=exact_bias, impl="reference"
    )
    for mine, want in zip(got, torch.autograd.grad(exact.loss, (*exact_call[:2], exact_bias)), strict=True):
        # Beside what rounding the exact gradient to float16 costs.
        assert relative(mine, want) < 3e-4 + relative(want.half(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weight_beside_half_precision_states(dtype):
    """Its gradient is float32 and has dZ's rounding only."""
    hidden, weight, teachers = problem(dtype)
    master = weight.detach().float().requires_grad_()
    out = linear_divergence(hidden, master, teachers, workspace_bytes=100_000)
    exact_call = wide(hidden, weight, teachers)
    exact = linear_divergence(*exact_call, impl="reference")
    got = torch.autograd.grad(out.loss, (hidden, master))
    for mine, want in zip(got, torch.autograd.grad(exact.loss, exact_call[:2]), strict=True):
        assert relative(mine, want) < (6e-4 if dtype == torch.float16 else 3e-3)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert not torch.equal(got[1], got[1].to(dtype).float())


def test_one_block_of_a_gradient_needs_no_accumulator(monkeypatch):
    """dW of a bfloat16 head is one product, rounded once."""
    calls = []
    monkeypatch.setattr(heads, "accumulate", lambda *a: calls.append(a))
    call = problem(torch.bfloat16)
    gradients = torch.autograd.grad(linear_divergence(*call).loss, call[:2])
    exact_call = wide(*call)
    exact = torch.autograd.grad(linear_divergence(*exact_call, impl="reference").loss, exact_call[:2])
    assert not calls
    for mine, want in zip(gradients, exact, strict=True):
        assert relative(mine, want) < 3e-3


def test_logprob():
    hidden, weight, _ = problem(torch.bfloat16)
    labels = torch.arange(ROWS) * 11
    states = [[hidden, weight], list(wide(hidden, weight, [])[:2])]
    results = [
        torch.autograd.grad(linear_logprob(*pair, labels, workspace_bytes=100_000).logprob.sum(), pair)
        for pair in states
    ]
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < 5e-3
