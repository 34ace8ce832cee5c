"""One call of an op, from its validated arguments to autograd.

``linear_divergence`` and ``token_stats`` come here directly in eager mode and through ``library`` while they are
compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .driver import Outcome, Scales
from .heads import Wants
from .problem import Problem
from .row_ops import choose_impl, has_triton
from .run import run_divergence
from .selection import RowPlan, plan_rows
from .types import LMHead, TeacherHead, TokenStats
from .validation import check_impl, make_problem, make_student

StudentArguments = tuple[Tensor, Tensor, Tensor | None, float, float | None]
"""hidden, weight, bias, logit scale and softcap, as the caller gave them."""
Gradients = Sequence[Tensor | None]
"""One for each input, None where there is none."""


def prepare(
    student: StudentArguments, teachers: Sequence[TeacherHead], *, temperature: float, impl: str, **options: Any
) -> Problem:
    """Validate the arguments of ``linear_divergence`` and choose the implementation."""
    check_impl(impl)
    problem = make_problem(make_student(*student, temperature), teachers, **options)
    sharded = problem.shards is not None
    return replace(problem, impl=choose_impl(impl, student[0].device.type, problem.compute_dtype, sharded))


def student_arguments(
    hidden: Tensor, weight: Tensor | LMHead, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> StudentArguments:
    """The student of a public call, whose head may come as one ``LMHead``.

    Raises:
        ValueError: a part of the head is given twice.
    """
    if not isinstance(weight, LMHead):
        return hidden, weight, bias, logit_scale, softcap
    if bias is not None or logit_scale != 1.0 or softcap is not None:
        raise ValueError("the head is an LMHead, which holds bias, logit_scale and softcap: do not pass them beside it")
    return hidden, weight.weight, weight.bias, weight.logit_scale, weight.softcap


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


def loss_scales(problem: Problem) -> Scales:
    """Factors of each row's terms in the loss: the weights, for "mean" over the sum of token_weight."""
    weight, labels = problem.token_weight, problem.logprob_weight
    if weight is None:
        weight = problem.mix.new_ones(problem.rows)
    if problem.reduction != "mean":
        return Scales(weight, labels)
    total = weight.sum()
    share = torch.where(total > 0, total.reciprocal(), torch.zeros_like(total))
    return Scales(weight * share, None if labels is None else labels * share)


def reduce_loss(problem: Problem, outcome: Outcome, scales: Scales) -> tuple[Tensor, Tensor]:
    """(loss of per-token values, which are NaN where they do not count; its standard error)."""
    some, error = outcome.some, scales.divergence.new_zeros(())
    weighted = outcome.token_loss * scales.divergence
    if problem.token_weight is not None or some is not None or not problem.known_teachers:
        computed = (scales.divergence != 0) & (problem.mix > 0).any(1)
        if some is not None:
            computed = computed & some.chosen
        weighted = torch.where(computed, weighted, 0.0)
    if some is not None:
        error = some.error(weighted)
        weighted = weighted * (some.exact * (some.total / some.count))
    if scales.logprob is not None and outcome.logprob is not None:
        weighted = weighted - torch.where(scales.logprob != 0, outcome.logprob * scales.logprob, 0.0)
    return weighted if problem.reduction == "none" else weighted.sum(), error


class Unchanged:
    """The constants of a call, by name, which a backward pass may read again and autograd does not watch."""

    def __init__(self, constants: dict[str, Tensor | None]) -> None:
        self.seen = [(name, x, x._version) for name, x in constants.items() if x is not None and not x.is_inference()]

    def check(self) -> None:
        """Raise RuntimeError where one was changed in place since."""
        for name, tensor, version in self.seen:
            if tensor._version != version:
                raise RuntimeError(
                    f"{name} was changed in place after the forward pass, and this backward pass reads it again: "
                    "change it after the backward pass, or give the op a copy"
                )


def constants_of(problem: Problem) -> dict[str, Tensor | None]:
    """The tensors of a problem that have no gradient, by the names of the arguments."""
    found = {name: getattr(problem, name) for name in ("mix", "token_weight", "logprob_weight")}
    if problem.logprob_weight is not None:
        found["labels"] = problem.labels
    for k, head in enumerate(problem.teachers):
        found |= {f"teachers[{k}].{name}": getattr(head, name) for name in ("hidden", "weight", "bias")}
    return found


class FirstDerivative(torch.autograd.Function):
    """Pass ``count`` gradients on, where the graph of the backward pass is recorded (``create_graph=True``): to
    differentiate them again is refused, since they would count as constants.

    The other arguments are what they depend on.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(
            "opd_kernels has first derivatives only: use impl='reference' for a loss that is differentiated twice"
        )


def recorded(
    ctx: Any, gradients: Sequence[Tensor | None], upstream: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """``gradients``, as ``FirstDerivative`` passes them on where autograd records the backward pass."""
    if not torch.is_grad_enabled():
        return gradients
    found: Gradients = FirstDerivative.apply(len(gradients), *gradients, *ctx.saved_tensors, *upstream)  # type: ignore[no-untyped-call]
    return found


class LinearDivergence(torch.autograd.Function):
    """Computes gradients in forward when the row weights are known there, else recomputes in
    backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, wants: Wants
    ) -> tuple[Any, ...]:
        ctx.wants = wants
        scales = loss_scales(problem)
        loss, outcome = solve(problem, scales, wants)
        ctx.gradients = outcome if wants and problem.reduction != "none" else None
        ctx.problem, ctx.scales = replace(problem, stats=False), scales
        ctx.constants = Unchanged(constants_of(problem))
        ctx.report = outcome.report if problem.reduction == "none" else None
        ctx.save_for_backward(hidden, weight, bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        extras: list[Tensor | None] = [outcome.token_loss, outcome.logprob, outcome.report]
        if outcome.stats is not None:
            extras += [getattr(outcome.stats, f.name) for f in fields(TokenStats)]
        ctx.mark_non_differentiable(*(x for x in extras if x is not None))
        ctx.set_materialize_grads(False)
        return loss, *extras

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        if grad_loss is None:
            return None, None, None, None, None
        with torch.no_grad():
            gradients = LinearDivergence._gradients(ctx, grad_loss)
        return *recorded(ctx, gradients, [grad_loss]), None, None

    @staticmethod
    def _gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        outcome, ctx.gradients = ctx.gradients, None
        if outcome is None:
            ctx.constants.check()
            hidden, weight, bias = ctx.saved_tensors
            student = ctx.problem.student.with_tensors(hidden, weight, bias)
            outcome = recompute(replace(ctx.problem, student=student), ctx.scales, grad_loss, ctx.wants)
            if ctx.report is not None and outcome.sampling is not None:
                ctx.report[:3] = outcome.sampling
        else:
            _scale_gradients(outcome, grad_loss)
        return cast_gradients(ctx, outcome)


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
    """Multiply the gradients in place; a factor of 1 costs nothing."""
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return
    for gradient in (outcome.hidden, outcome.weight, outcome.bias):
        if gradient is not None:
            scale_(gradient, factor)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place by a scalar that is not rounded to the dtype of ``gradient``."""
    if gradient.dtype == factor.dtype:
        gradient.mul_(factor)
        return
    if gradient.is_cuda and has_triton():
        from .triton_impl import scale_on_device

        scale_on_device(gradient, factor)
        return
    rows = max(1, SCALED_ELEMENTS // max(1, gradient[:1].numel()))
    for part in gradient.split(rows):
        part.copy_(part.to(factor.dtype).mul_(factor))


SCALED_ELEMENTS = 1 << 22
"""Of a gradient that are in float32 at a time."""


def solve(problem: Problem, scales: Scales, wants: Wants) -> tuple[Tensor, Outcome]:
    """(loss, outcome) of a problem with its ``loss_scales``; with gradients when they are known in
    forward, that is unless the reduction is "none"."""
    known = problem.known_teachers
    rows = plan_rows(problem.mix, problem.mix_is_uniform, problem.token_weight, problem.logprob_weight, known)
    with exact_products(problem.mix.device):
        outcome = run_divergence(problem, rows, scales, wants if problem.reduction != "none" else Wants())
    loss, error = reduce_loss(problem, outcome, scales)
    if problem.sampling is not None and wants:
        unknown = error.new_full((3,), float("nan"))
        outcome.report = torch.cat([unknown if outcome.sampling is None else outcome.sampling, error[None]])
    outcome.check()
    return loss, outcome


def recompute(problem: Problem, scales: Scales, grad_loss: Tensor, wants: Wants) -> Outcome:
    """Gradients for an upstream gradient [N] or scalar that was unknown in forward, or for a
    second backward; ``scales`` as in ``solve``."""
    scales = scales.times(grad_loss.to(scales.divergence.dtype))
    weights = scales.divergence, scales.logprob
    rows: RowPlan = plan_rows(problem.mix, problem.mix_is_uniform, *weights, problem.known_teachers)
    labels = None if scales.logprob is None else problem.labels
    with exact_products(problem.mix.device):
        outcome = run_divergence(replace(problem, labels=labels, stats=False), rows, scales, wants, values=False)
    outcome.check()
    return outcome
