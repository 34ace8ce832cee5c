"""``logprob_weight``: a weighted log-prob in the same pass as the divergence."""

from __future__ import annotations

import pytest
import torch

from opd_kernels import LMHead, TeacherHead, linear_divergence, linear_logprob

KINDS = ["reverse_kl", "forward_kl", "jsd", "skew_kl"]
SMALL = 30_000


def weights(case) -> torch.Tensor:
    """Advantages of both signs, some 0."""
    out = torch.linspace(-1.5, 2.0, len(case.labels), dtype=torch.float64)
    out[::4] = 0.0
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_reduction", ["sum", "mixture"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_two_passes(make_case, kind, teacher_reduction, reduction, masked):
    """Float64, value and gradients, against the divergence and ``linear_logprob``."""
    case, bias = make_case(2), torch.linspace(-1, 1, 37, dtype=torch.float64).requires_grad_()
    options = {"divergence": kind, "teacher_reduction": teacher_reduction, "reduction": reduction}
    options |= {"mix": case.mix, "token_weight": case.token_weight} if masked else {}
    options |= {"student_softcap": 4.0, "temperature": 0.8, "student_bias": bias, "workspace_bytes": SMALL}
    advantage, inputs = weights(case), (*case.student, bias)
    up = torch.linspace(0.5, 2, len(advantage)).double() if reduction == "none" else torch.ones((), dtype=torch.float64)
    out = linear_divergence(*case.student, case.teachers, labels=case.labels, logprob_weight=advantage, **options)
    apart = linear_divergence(*case.student, case.teachers, **options)
    logprob = linear_logprob(*case.student, case.labels, bias=bias, softcap=4.0, temperature=0.8).logprob
    total = options["token_weight"].double().sum() if masked else len(advantage)
    terms = advantage * logprob / (total if reduction == "mean" else 1)
    want = apart.loss - (terms if reduction == "none" else terms.sum())
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(out.token_loss, apart.token_loss, equal_nan=True)
    used = (advantage != 0) | ~apart.token_loss.isnan()
    torch.testing.assert_close(out.logprob[used], logprob.detach()[used])
    assert out.logprob[~used].isnan().all() and (masked or used.all())
    got, other = (torch.autograd.grad(x, inputs, up, retain_graph=True) for x in (out.loss, want))
    for mine, theirs in zip(got, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_finite_differences(make_case, impl):
    case = make_case(2, rows=5, vocab=11, width=3)

    def loss(hidden, weight):
        return linear_divergence(
            hidden,
            weight,
            case.teachers,
            labels=case.labels,
            logprob_weight=weights(case),
            token_weight=case.token_weight,
            divergence="jsd",
            impl=impl,
        ).loss

    assert torch.autograd.gradcheck(loss, case.student)


def test_clipped_ratio(make_case):
    """The documented pattern has the gradient of the clipped surrogate."""
    case = make_case(1)
    hidden, weight = case.student
    advantage, old = weights(case), torch.linspace(-6, -1, len(case.labels)).double()
    ratio = (linear_logprob(hidden, weight, case.labels).logprob - old).exp()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    want = torch.autograd.grad(-clipped.sum(), case.student, retain_graph=True)
    with torch.no_grad():
        active = torch.where(advantage > 0, ratio <= 1.2, ratio >= 0.8)
        up = advantage * ratio * active
    assert 0 < active.sum() < len(active)
    nothing = torch.zeros(len(up))
    call = {"labels": case.labels, "logprob_weight": up, "token_weight": nothing}
    got = torch.autograd.grad(linear_divergence(hidden, weight, case.teachers, **call).loss, case.student)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_one_head_instead_of_its_parts(make_case):
    case, bias = make_case(1), torch.linspace(-1, 1, 37, dtype=torch.float64)
    head = LMHead(case.weight, bias, 0.7, 3.0)
    teacher = TeacherHead.of(case.teachers[0].hidden, LMHead(case.teachers[0].weight, bias))
    got = linear_divergence(case.hidden, head, [teacher], labels=case.labels, logprob_weight=weights(case))
    want = linear_divergence(
        *case.student,
        [teacher],
        labels=case.labels,
        logprob_weight=weights(case),
        student_bias=bias,
        student_logit_scale=0.7,
        student_softcap=3.0,
    )
    torch.testing.assert_close(got.loss, want.loss)
    found = linear_logprob(case.hidden, head, case.labels).logprob
    torch.testing.assert_close(found, got.logprob)
    with pytest.raises(ValueError, match="do not pass them beside it"):
        linear_divergence(case.hidden, head, [teacher], student_softcap=2.0)


def test_bad_weights(make_case):
    case = make_case(1)
    call = {"labels": case.labels, "logprob_weight": torch.ones(len(case.labels))}
    with pytest.raises(ValueError, match="logprob_weight needs labels="):
        linear_divergence(*case.student, case.teachers, logprob_weight=call["logprob_weight"])
    call["logprob_weight"][3] = torch.nan
    with pytest.raises(ValueError, match=r"logprob_weight\[3\] = nan: weights must be finite"):
        linear_divergence(*case.student, case.teachers, **call)
    with pytest.raises(ValueError, match=r"logprob_weight must have shape \[11\], got \[2\]"):
        linear_divergence(*case.student, case.teachers, **{**call, "logprob_weight": torch.ones(2)})
    nothing = {"token_weight": torch.zeros(len(case.labels)), "reduction": "mean"}
    with pytest.raises(ValueError, match="no denominator for reduction='mean'"):
        linear_divergence(
            *case.student, case.teachers, labels=case.labels, logprob_weight=torch.ones(len(case.labels)), **nothing
        )
