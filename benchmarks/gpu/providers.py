"""Ours and its peers, as steps: forward and backward of one problem, returning (loss, gradients).

All compute the sum over rows of the mean over teachers of one divergence. Peers with one teacher are
called once per teacher.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from problems import Problem
from torch import Tensor

from opd_kernels import cpu_gemm, linear_divergence

Step = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]
TRL_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def available() -> dict[str, bool]:
    return {name: importlib.util.find_spec(module) is not None for name, module in PACKAGES.items()}


PACKAGES = {"trl": "trl", "liger": "liger_kernel"}


def describe(found: BaseException) -> str:
    """One line of what a provider failed with."""
    return f"{type(found).__name__}: {found}"[:300]


def output(problem: Problem, kind: str, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """What our op returns, and the gradients of its loss."""
    out = linear_divergence(
        problem.hidden,
        problem.weight,
        problem.teachers,
        divergence=kind,
        token_weight=problem.token_weight,
        **options,
    )
    return out, torch.autograd.grad(out.loss, (problem.hidden, problem.weight))


def ours(problem: Problem, kind: str, **options: Any) -> Step:
    def step():
        out, gradients = output(problem, kind, **options)
        return out.loss, gradients

    return step


def one_call_per_teacher(problem: Problem, kind: str) -> Step:
    """Ours, used as a single-teacher op."""
    parts = [problem.with_teachers([teacher]) for teacher in problem.teachers]

    def step():
        share = [1.0 / len(parts)]
        losses = [
            linear_divergence(p.hidden, p.weight, p.teachers, divergence=kind, mix=share, token_weight=p.token_weight)
            for p in parts
        ]
        loss = torch.stack([x.loss for x in losses]).sum()
        return loss, torch.autograd.grad(loss, (problem.hidden, problem.weight))

    return step


def eager_loss(problem: Problem, kind: str) -> Tensor:
    """Materialised logits; log-softmax and divergence in float32."""

    def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden @ weight.t()).float().log_softmax(-1)

    p = log_probs(problem.hidden, problem.weight)
    total = p.new_zeros(p.shape[0])
    for teacher in problem.teachers:
        with torch.no_grad():
            q = log_probs(teacher.hidden, teacher.weight)
        if kind == "reverse_kl":
            rows = (p.exp() * (p - q)).sum(-1)
        elif kind == "forward_kl":
            rows = (q.exp() * (q - p)).sum(-1)
        else:
            m = torch.logaddexp(p, q) - math.log(2.0)
            rows = 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1))
        total = total + rows / len(problem.teachers)
    return (total if problem.token_weight is None else total * problem.token_weight).sum()


def eager(problem: Problem, kind: str) -> Step:
    def step():
        loss = eager_loss(problem, kind)
        return loss, torch.autograd.grad(loss, (problem.hidden, problem.weight))

    return step


def compiled(problem: Problem, kind: str) -> Step:
    function = torch.compile(eager_loss)

    def step():
        loss = function(problem, kind)
        return loss, torch.autograd.grad(loss, (problem.hidden, problem.weight))

    return step


def trl(problem: Problem, kind: str, token_chunk: int | None = None, vocab_chunk: int | None = None) -> Step:
    """TRL's chunked divergence; the chunks are constants of its module."""
    from trl.kernels import chunked_divergence as module

    default = module.TOKEN_CHUNK_SIZE, module.VOCAB_CHUNK_SIZE

    def step():
        module.TOKEN_CHUNK_SIZE, module.VOCAB_CHUNK_SIZE = token_chunk or default[0], vocab_chunk or default[1]
        try:
            total = 0.0
            for teacher in problem.teachers:
                rows, _ = module.ChunkedDivergenceFunction.apply(
                    problem.hidden, problem.weight, None, teacher.hidden, teacher.weight, None, TRL_BETA[kind]
                )
                weighted = rows if problem.token_weight is None else rows * problem.token_weight
                total = total + weighted.sum() / len(problem.teachers)
            return total, torch.autograd.grad(total, (problem.hidden, problem.weight))
        finally:
            module.TOKEN_CHUNK_SIZE, module.VOCAB_CHUNK_SIZE = default

    return step


def liger(problem: Problem, kind: str, chunk: int = 1024, compile_: bool = True) -> Step:
    """Liger's fused linear JSD, soft loss only; rows of weight 0 are its ignored labels."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(0.0, 1.0, beta=TRL_BETA[kind], compiled=compile_, chunk_size=chunk)
    labels = torch.zeros(problem.hidden.shape[0], dtype=torch.int64, device=problem.hidden.device)
    if problem.token_weight is not None:
        labels[problem.token_weight == 0] = -100
    count = int((labels != -100).sum())

    def step():
        total = 0.0
        for teacher in problem.teachers:
            out = function(problem.hidden, problem.weight, teacher.hidden, teacher.weight, labels)
            total = total + out * (count / len(problem.teachers))
        return total, torch.autograd.grad(total, (problem.hidden, problem.weight))

    return step


def gemms(problem: Problem, kind: str, chunk: int | None = None) -> Step:
    """The products alone, with the library and the chunks that ours uses: the bound from below."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    heads = [(teacher.hidden, teacher.weight) for teacher in problem.teachers]
    if problem.token_weight is not None:
        used = problem.token_weight != 0
        hidden, heads = hidden[used], [(h[used], w) for h, w in heads]
    rows, vocab = hidden.shape[0], weight.shape[0]
    if chunk is None:
        chunk = 1024 if hidden.is_cuda else -(-rows // max(1, rows * vocab // (10 << 20)))
    half = hidden.dtype != torch.float32

    def product(left: Tensor, right: Tensor, out: Tensor) -> None:
        if half:
            torch.mm(left, right.t(), out_dtype=torch.float32, out=out)
        else:
            cpu_gemm.logits(left, right, out) if not hidden.is_cuda else torch.mm(left, right.t(), out=out)

    super_rows = min(rows, 4 * chunk if half else chunk)
    # Not zeros, on which a GPU draws less power and runs faster.
    dz = torch.randn(super_rows, vocab, device=hidden.device, dtype=hidden.dtype)

    def step():
        z = torch.empty(chunk, vocab, device=hidden.device)
        dx = torch.empty_like(hidden)
        dw = torch.empty(weight.shape, device=weight.device, dtype=torch.float32)
        for start in range(0, rows, super_rows):
            stop = min(start + super_rows, rows)
            for first in range(start, stop, chunk):
                last = min(first + chunk, stop)
                product(hidden[first:last], weight, z[: last - first])
                for states, head in heads:
                    product(states[first:last], head, z[: last - first])
            part, states = dz[: stop - start], hidden[start:stop]
            if half:
                dx[start:stop] = torch.mm(part, weight, out_dtype=torch.float32)
                if start:
                    torch.addmm(dw, part.t(), states, out_dtype=torch.float32, out=dw)
                else:
                    torch.mm(part.t(), states, out_dtype=torch.float32, out=dw)
            else:
                cpu_gemm.hidden_gradient(part, weight, dx[start:stop])
                cpu_gemm.weight_gradient(part, states, dw, add=start > 0)
        return dx.new_zeros(()), (dx, dw.to(weight.dtype))

    return step


def float64(problem: Problem, kind: str, chunk: int = 512) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(loss, gradients) in float64, a few rows at a time, by autograd."""
    weight = problem.weight.detach().double().requires_grad_()
    hidden = problem.hidden.detach().double().requires_grad_()
    heads = [(t.hidden, t.weight) for t in problem.teachers]
    total, dx, dw = weight.new_zeros(()), torch.zeros_like(hidden), torch.zeros_like(weight)
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        used = slice(None) if problem.token_weight is None else problem.token_weight[rows] != 0
        states = hidden[rows][used]
        p = (states @ weight.t()).log_softmax(-1)
        loss = weight.new_zeros(())
        for theirs, head in heads:
            # The teacher's head a block of columns at a time: its float64 copy would be large.
            q = torch.cat([theirs[rows][used].double() @ w.double().t() for w in head.split(1 << 14)], 1).log_softmax(
                -1
            )
            if kind == "reverse_kl":
                value = (p.exp() * (p - q)).sum()
            elif kind == "forward_kl":
                value = (q.exp() * (q - p)).sum()
            else:
                m = torch.logaddexp(p, q) - math.log(2.0)
                value = 0.5 * ((p.exp() * (p - m)).sum() + (q.exp() * (q - m)).sum())
            loss = loss + value / len(heads)
        mine, whole = torch.autograd.grad(loss, (hidden, weight))
        total += loss.detach()
        dx += mine
        dw += whole
    return total, (dx, dw)


def error(got: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative error, in the Frobenius norm, of the gradients of hidden states and weight."""
    names = ("hidden", "weight")
    return {
        name: ((mine.double() - want).norm() / want.norm()).item()
        for name, mine, want in zip(names, got, exact, strict=True)
    }
