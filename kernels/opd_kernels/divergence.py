"""The public op: weighted divergence between a student and K teachers, straight from hidden states
and heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .driver import Outcome, run_divergence
from .heads import Wants
from .row_ops import choose_impl
from .selection import RowPlan, plan_rows
from .types import DivergenceOutput, Problem, TeacherHead, TokenStats
from .validation import check_impl, make_problem, make_student

__all__ = ["DivergenceOutput", "TeacherHead", "TokenStats", "from_trl_beta", "linear_divergence"]


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teachers: Sequence[TeacherHead],
    *,
    divergence: str = "reverse_kl",
    jsd_beta: float = 0.5,
    skew_alpha: float = 0.1,
    teacher_reduction: str = "sum",
    mix: Tensor | Sequence[float] | None = None,
    token_weight: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "sum",
    stats: bool = False,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    backward_tolerance: float = 0.0,
    group: Any = None,
) -> DivergenceOutput:
    """Weighted divergence between a student p and teachers q_k, without ever holding [N, V] logits.

    Logits of a head are ``softcap(logit_scale * (hidden W^T + bias)) / temperature``; p and q_k
    are their softmaxes. The value is not multiplied by ``temperature**2``. Gradients flow to
    ``student_hidden``, ``student_weight`` and ``student_bias``, whichever require them; teachers
    are constants.

    On a GPU the host waits for the device a few times a call, to check values and to select rows, and
    never for a chunk; with ``backward_tolerance`` also for every block of rows whose columns are chosen.
    Forward and backward can be captured in a CUDA graph, where nothing is read: values are not checked,
    every teacher works on every row, rows of weight 0 have to be finite and have a ``token_loss``, each
    row needs a teacher with "mixture", and a tolerance is refused. Warm up with the same shapes and no
    weight of 0, so that no kernel is compiled within the capture.

    Args:
        student_hidden: [N, d_s] float32, bfloat16, float16 (float64 for tests), row-major.
        student_weight: [V, d_s], same dtype.
        teachers: 1 to 8 ``TeacherHead``; hidden sizes and dtypes may differ from the student's.
        divergence: "reverse_kl" KL(p||q), "forward_kl" KL(q||p), "jsd" b KL(q||m) + (1-b) KL(p||m)
            with m = b q + (1-b) p, or "skew_kl" KL(q || a q + (1-a) p) (DistiLLM,
            arXiv:2402.03898).
        jsd_beta: b, the teacher's share of m, in (0, 1); only with "jsd".
        skew_alpha: a, in (0, 1); only with "skew_kl".
        teacher_reduction: "sum" gives sum_k mix_k D(p, q_k), mix used as given; "mixture" gives
            D(p, q_m) with q_m = sum_k mix_k q_k / sum_k mix_k: only the proportions of a row
            matter.
        mix: [K] or [N, K] teacher weights, finite and not negative, default 1/K each. A row of
            zeros has no teacher and is not computed; a teacher costs nothing on rows where its
            weight is 0.
        token_weight: [N] weight of each row in the loss, default 1. Rows with 0 are not computed.
        labels: [N] int64 sampled tokens; needed for the log-prob statistics. Read only on computed
            rows.
        temperature: divides student and teacher logits.
        reduction: "sum" of token_weight * divergence, "mean" the sum over sum(token_weight) (0
            when all are 0), or "none" for [N]. With "none" the backward pass recomputes the
            logits; with the others the gradient is computed together with the value.
        stats: also return ``TokenStats``.
        impl: "triton" (row kernels, CUDA tensors, float32 arithmetic), "torch" (chunked, any
            device), "reference" (materialises), or "auto": triton where it can run, else torch;
            with ``group`` always torch.
        workspace_bytes: budget for temporaries, default 1 GiB. Outputs, gradients and the float32
            accumulator of a half-precision weight gradient are not counted.
        vocab_size: number of valid leading vocabulary rows of every head; required when widths
            differ. With ``group``, of all ranks together.
        student_bias: [V] or None; a -inf entry switches its column off (see ``types.FLOOR``).
        student_logit_scale: positive factor of the student's logits.
        student_softcap: positive cap of the student's logits, or None.
        backward_tolerance: share of each row's gradient that may be dropped, in [0, 1), measured in
            the 1-norm of d loss / d logits: columns whose gradients are small in every row of a
            chunk are left out of the gradient GEMMs (``compaction`` states the bounds that follow).
            0 computes every column. The share that was dropped is ``stats.dropped_mass``; with
            reduction "none" the backward pass fills it in.
        group: ``torch.distributed.ProcessGroup`` whose ranks each hold consecutive vocabulary rows
            of the student's and of every teacher's weight (and bias), split at the same ids; uneven
            shards are allowed, and padding beyond ``vocab_size`` on the last ranks. Everything else
            is the same on all ranks: hidden states, mix, token_weight, labels (global ids) and
            options. Every rank gets the whole loss, statistics and hidden gradient (the op sums it
            over the ranks itself: do not reduce it again) and its own shard's weight gradient. All
            ranks must call the op and its backward pass. See ``vocab_parallel``.

    Returns:
        ``DivergenceOutput``: ``loss``, ``token_loss`` and ``stats``, in float32 (float64 for
        float64 inputs). A student with NaN or inf gives a NaN loss.

    Raises:
        ValueError: an argument is invalid, or a teacher's logits hold NaN or inf on a computed row.
    """
    wants = wanted(student_hidden, student_weight, student_bias)
    student = (student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    options: dict[str, Any] = {
        "divergence": divergence,
        "jsd_beta": jsd_beta,
        "skew_alpha": skew_alpha,
        "teacher_reduction": teacher_reduction,
        "mix": mix,
        "token_weight": token_weight,
        "labels": labels,
        "temperature": temperature,
        "reduction": reduction,
        "stats": stats,
        "impl": impl,
        "workspace_bytes": workspace_bytes,
        "vocab_size": vocab_size,
        "backward_tolerance": backward_tolerance,
        "group": group,
    }
    if torch.compiler.is_compiling() and impl != "reference":
        from . import library

        return library.divergence(student, teachers, wants, options)
    problem = prepare(student, teachers, **options)
    if problem.impl == "reference":
        from .reference import reference_divergence

        return reference_divergence(problem)
    outputs = _LinearDivergence.apply(student_hidden, student_weight, student_bias, problem, wants)
    return DivergenceOutput(outputs[0], outputs[1], TokenStats(*outputs[2:]) if stats else None)


StudentArguments = tuple[Tensor, Tensor, Tensor | None, float, float | None]
"""hidden, weight, bias, logit scale and softcap, as the caller gave them."""


def prepare(
    student: StudentArguments, teachers: Sequence[TeacherHead], *, temperature: float, impl: str, **options: Any
) -> Problem:
    """Validate the arguments of ``linear_divergence`` and choose the implementation."""
    check_impl(impl)
    problem = make_problem(make_student(*student, temperature), teachers, **options)
    sharded = problem.shards is not None
    return replace(problem, impl=choose_impl(impl, student[0].device.type, problem.compute_dtype, sharded))


def from_trl_beta(beta: float) -> dict[str, Any]:
    """Keyword arguments that mean what ``beta`` means in TRL's GKD losses.

    TRL's beta is the teacher's weight in the mixture, with forward KL (teacher || student) at 0
    and reverse KL at 1;
    source: ``trl.GKDConfig.beta``.

    Raises:
        ValueError: ``beta`` lies outside [0, 1].
    """
    if beta == 0.0:
        return {"divergence": "forward_kl"}
    if beta == 1.0:
        return {"divergence": "reverse_kl"}
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta={beta} is outside [0, 1]")
    return {"divergence": "jsd", "jsd_beta": beta}


def no_autocast(device: torch.device) -> torch.autocast:
    """Autocast would round what is computed here to half precision."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products in the precision of their operands: autocast would round them to half precision, and the
    process's settings float32 ones to TF32 or bfloat16."""
    matmul = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")]
    # Where it is missing, torch is older than the settings by backend.
    before = [getattr(setting, "fp32_precision", "ieee") for setting in matmul]
    with no_autocast(device):
        try:
            for setting, precision in zip(matmul, before, strict=True):
                if precision not in ("ieee", "none"):
                    setting.fp32_precision = "ieee"
            yield
        finally:
            for setting, precision in zip(matmul, before, strict=True):
                if precision not in ("ieee", "none"):
                    setting.fp32_precision = precision


def loss_scale(problem: Problem) -> Tensor:
    """[N] factor of each row's divergence in the loss: token_weight, over its sum for "mean"."""
    weight = problem.token_weight
    if weight is None:
        scale = 1.0 / problem.rows if problem.reduction == "mean" else 1.0
        return problem.mix.new_full((problem.rows,), scale)
    if problem.reduction == "mean":
        total = weight.sum()
        return torch.where(total > 0, weight / total, torch.zeros_like(weight))
    return weight


def reduce_loss(problem: Problem, token_loss: Tensor, scale: Tensor) -> Tensor:
    """Loss of per-token values whose rows without weight or teacher are NaN."""
    computed = (scale != 0) & (problem.mix > 0).any(1)
    weighted = torch.where(computed, token_loss * scale, torch.zeros_like(token_loss))
    return weighted if problem.reduction == "none" else weighted.sum()


class _LinearDivergence(torch.autograd.Function):
    """Computes gradients in forward when the row weights are known there, else recomputes in
    backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, wants: Wants) -> tuple:
        ctx.wants = wants
        scale = loss_scale(problem)
        loss, outcome = solve(problem, scale, wants)
        ctx.gradients = outcome if wants and problem.reduction != "none" else None
        ctx.problem, ctx.scale = replace(problem, stats=False), scale
        ctx.dropped = None if ctx.gradients or outcome.stats is None else outcome.stats.dropped_mass
        ctx.save_for_backward(hidden, weight, bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        extras = [outcome.token_loss]
        if outcome.stats is not None:
            extras += [getattr(outcome.stats, f.name) for f in fields(TokenStats)]
        ctx.mark_non_differentiable(*(x for x in extras if x is not None))
        ctx.set_materialize_grads(False)
        return loss, *extras

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple:
        if grad_loss is None:
            return None, None, None, None, None
        outcome, ctx.gradients = ctx.gradients, None
        if outcome is None:
            hidden, weight, bias = ctx.saved_tensors
            student = ctx.problem.student.with_tensors(hidden, weight, bias)
            outcome = recompute(replace(ctx.problem, student=student), ctx.scale, grad_loss, ctx.wants)
            if ctx.dropped is not None and outcome.dropped is not None:
                ctx.dropped.copy_(outcome.dropped)
        else:
            _scale_gradients(outcome, grad_loss)
        return *cast_gradients(ctx, outcome), None, None


def cast_gradients(ctx: Any, outcome: Outcome) -> tuple[Tensor | None, ...]:
    """Gradients in the dtypes of the inputs; only float16 ones were kept in float32, for the loss
    scaler's factor."""
    return tuple(
        None if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip((outcome.hidden, outcome.weight, outcome.bias), ctx.dtypes, strict=True)
    )


def wanted(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Wants:
    """The gradients autograd will ask for."""
    on = torch.is_grad_enabled()
    return Wants(
        on and hidden.requires_grad, on and weight.requires_grad, on and bias is not None and bias.requires_grad
    )


def _scale_gradients(outcome: Outcome, factor: Tensor) -> None:
    """Multiply the gradients in place; on a CPU a factor of 1 costs nothing."""
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return
    for gradient in (outcome.hidden, outcome.weight, outcome.bias):
        if gradient is not None:
            gradient.mul_(factor)


def solve(problem: Problem, scale: Tensor, wants: Wants) -> tuple[Tensor, Outcome]:
    """(loss, outcome) of a problem with ``loss_scale`` [N]; with gradients when they are known in
    forward, that is unless the reduction is "none"."""
    rows = plan_rows(problem.mix, problem.mix_is_uniform, problem.token_weight)
    with exact_products(scale.device):
        outcome = run_divergence(problem, rows, scale, wants if problem.reduction != "none" else Wants())
    return reduce_loss(problem, outcome.token_loss, scale), outcome


def recompute(problem: Problem, scale: Tensor, grad_loss: Tensor, wants: Wants) -> Outcome:
    """Gradients for an upstream gradient [N] or scalar that was unknown in forward, or for a
    second backward; ``scale`` as in ``solve``."""
    scale = scale * grad_loss.to(scale.dtype)
    rows: RowPlan = plan_rows(problem.mix, problem.mix_is_uniform, scale)
    with exact_products(scale.device):
        return run_divergence(replace(problem, labels=None, stats=False), rows, scale, wants)
