"""The public op: weighted divergence between a student and K teachers, straight from hidden states
and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import library
from .call import LinearDivergence, prepare, student_arguments, wanted
from .reference import reference_divergence
from .types import DivergenceOutput, LMHead, SampleReport, TeacherHead, TokenStats

__all__ = ["from_trl_beta", "linear_divergence"]


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor | LMHead,
    teachers: Sequence[TeacherHead],
    *,
    divergence: str = "reverse_kl",
    jsd_beta: float = 0.5,
    skew_alpha: float = 0.1,
    teacher_reduction: str = "sum",
    mix: Tensor | Sequence[float] | None = None,
    token_weight: Tensor | None = None,
    labels: Tensor | None = None,
    logprob_weight: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "sum",
    stats: bool = False,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    vocab_sample: float = 0.0,
    sample_seed: int = 0,
    group: Any = None,
) -> DivergenceOutput:
    """Weighted divergence between a student p and teachers q_k, without ever holding [N, V] logits.

    Logits of a head are ``softcap(logit_scale * (hidden W^T + bias)) / temperature``; p and q_k
    are their softmaxes. The value is not multiplied by ``temperature**2``. Gradients flow to
    ``student_hidden``, ``student_weight`` and ``student_bias``, whichever require them; teachers
    are constants.

    On a GPU the host waits for the device a few times a call, to check values and to select rows, and
    never for a chunk.
    Forward and backward can be captured in a CUDA graph, where nothing is read: values are not checked,
    every teacher works on every row, rows of weight 0 have to be finite and have a ``token_loss``, each
    row needs a teacher with "mixture", and ``vocab_sample`` is refused. Warm up with the same shapes and no
    weight of 0, so that no kernel is compiled within the capture.

    Args:
        student_hidden: [N, d_s] float32, bfloat16, float16 (float64 for tests), row-major. Of no rows the loss is 0
            and the gradients are zeros.
        student_weight: [V, d_s], same dtype, or float32 beside half-precision hidden states: products then use a
            copy in their precision, and its gradient is float32, never rounded; or an ``LMHead``,
            instead of the ``student_`` arguments below.
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
        logprob_weight: [N] weights A_n of a second term of the loss, -A_n log p(label_n), of any sign: advantages
            of a policy gradient, or weights of a cross-entropy. Its gradient, A (p - 1_y), joins dZ before the
            products, so it costs none. p is at ``temperature``. The term counts where A_n is not 0, with or
            without a divergence; "mean" divides it by the sum of token_weight, too. For a clipped ratio pass its
            derivative: with ``ratio = exp(logprob - old_logprob)`` from ``linear_logprob`` without a gradient,
            A * ratio where it is not clipped and 0 elsewhere gives the gradient of the clipped surrogate.
        temperature: divides student and teacher logits.
        reduction: "sum" of token_weight * divergence, "mean" the sum over sum(token_weight) (0
            when all are 0), or "none" for [N]. With "none" the backward pass recomputes the
            logits; with the others the gradient is computed together with the value.
        stats: also return ``TokenStats``.
        impl: "triton" (row kernels, CUDA tensors, float32 arithmetic), "torch" (chunked, any
            device), "reference" (materialises), or "auto": triton where it can run, else torch.
        workspace_bytes: budget for temporaries, default 1 GiB and on a large GPU up to 4. Outputs,
            gradients and the float32 accumulator of a half-precision weight gradient are not counted.
        vocab_size: number of valid leading vocabulary rows of every head; required when widths
            differ. With ``group``, of all ranks together.
        student_bias: [V] or None; a -inf entry switches its column off (see ``types.FLOOR``), but with a softcap,
            which makes its logit -softcap.
        student_logit_scale: positive factor of the student's logits.
        student_softcap: positive cap of the student's logits, or None.
        vocab_sample: share of the vocabulary, in [0, 1), from which gradients are computed: unbiased, with a noise
            that ``sampling`` in the result predicts; 0 computes them from every column. Every block of 256 rows
            draws its own columns, likelier where its gradient is larger. With "reverse_kl" to the sum of teachers
            the teachers work in the drawn columns only: ``loss`` is then estimated from a uniform sample of the
            rows (half the share of them, at least 32), and ``token_loss`` and what ``stats`` say about teachers
            are NaN on the others. Other divergences have exact values and statistics. Calls without a gradient
            and impl="reference" are exact.
        sample_seed: of the draw; give every call another one, micro-batches too: the same seed draws the same again,
            so that the noise of its calls would not average out.
        group: ``torch.distributed.ProcessGroup`` whose ranks each hold consecutive vocabulary rows
            of the student's and of every teacher's weight (and bias), split at the same ids; uneven
            shards are allowed, and padding beyond ``vocab_size`` on the last ranks. Everything else
            is the same on all ranks: hidden states, mix, weights of tokens, labels (global ids) and
            options. Every rank gets the whole loss, statistics and hidden gradient (the op sums it
            over the ranks itself: do not reduce it again) and its own shard's weight gradient. All
            ranks must call the op and its backward pass. See ``shards``.

    Returns:
        ``DivergenceOutput``: ``loss``, ``token_loss``, ``stats``, ``logprob`` and ``sampling``, in float32 (float64 for
        float64 inputs). A student with NaN or inf gives a NaN loss.

    Raises:
        ValueError: an argument is invalid, or a teacher's logits hold NaN or inf on a computed row.
        RuntimeError: in the backward pass, where its gradients are differentiated again, or where what it reads again
            (with ``reduction="none"``, or a second time) was changed in place. ``impl="reference"`` is plain torch:
            differentiable twice, and by ``torch.func``.
    """
    student = student_arguments(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    hidden, weight, bias, *_ = student
    options: dict[str, Any] = {
        "divergence": divergence,
        "jsd_beta": jsd_beta,
        "skew_alpha": skew_alpha,
        "teacher_reduction": teacher_reduction,
        "mix": mix,
        "token_weight": token_weight,
        "labels": labels,
        "logprob_weight": logprob_weight,
        "temperature": temperature,
        "reduction": reduction,
        "stats": stats,
        "impl": impl,
        "workspace_bytes": workspace_bytes,
        "vocab_size": vocab_size,
        "vocab_sample": vocab_sample,
        "sample_seed": sample_seed,
        "group": group,
    }
    if torch.compiler.is_compiling() and impl != "reference":
        return library.divergence(student, teachers, wanted(hidden, weight, bias), options)
    problem = prepare(student, teachers, **options)
    if problem.impl == "reference":
        return reference_divergence(problem)
    wants = wanted(hidden, weight, bias)
    loss, token_loss, logprob, report, *found = LinearDivergence.apply(hidden, weight, bias, problem, wants)  # type: ignore[no-untyped-call]
    sampling = None if report is None else SampleReport(*report.unbind())
    return DivergenceOutput(loss, token_loss, TokenStats(*found) if stats else None, logprob, sampling)


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
