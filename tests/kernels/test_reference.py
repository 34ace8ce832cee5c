"""The reference against closed forms, so that everything else may be tested against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from opd_kernels import TeacherHead, linear_divergence, linear_logprob


def one_hot_problem(p: list[float], q: list[float]):
    """Hidden state 1 and weights log p, log q: the logits are the log-probabilities."""
    one = torch.ones(1, 1, dtype=torch.float64)
    student = torch.tensor(p, dtype=torch.float64).log()[:, None]
    teacher = torch.tensor(q, dtype=torch.float64).log()[:, None]
    return one, student, [TeacherHead(one, teacher)]


P, Q = [0.5, 0.25, 0.25], [0.125, 0.125, 0.75]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def blend(share):
    return [share * b + (1 - share) * a for a, b in zip(P, Q, strict=True)]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"divergence": "reverse_kl"}, kl(P, Q)),
        ({"divergence": "forward_kl"}, kl(Q, P)),
        ({"divergence": "jsd", "jsd_beta": 0.3}, 0.3 * kl(Q, blend(0.3)) + 0.7 * kl(P, blend(0.3))),
        ({"divergence": "skew_kl", "skew_alpha": 0.2}, kl(Q, blend(0.2))),
    ],
)
def test_value_by_hand(impl, options, expected):
    out = linear_divergence(*one_hot_problem(P, Q), impl=impl, **options)
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_sum_and_mixture_are_different_objectives(impl):
    one, student, (first,) = one_hot_problem(P, Q)
    second = TeacherHead(one, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()[:, None])
    mixed = [0.25 * a + 0.75 * b for a, b in zip(Q, [0.6, 0.3, 0.1], strict=True)]
    expected = {
        "sum": 0.5 * kl(P, Q) + 1.5 * kl(P, [0.6, 0.3, 0.1]),  # as given: the weights sum to 2
        "mixture": kl(P, mixed),  # only proportions count
    }
    for reduction, value in expected.items():
        out = linear_divergence(one, student, [first, second], mix=[0.5, 1.5], teacher_reduction=reduction, impl=impl)
        assert out.loss.item() == pytest.approx(value, rel=1e-12)


def test_head_order_matches_a_plain_model(make_case):
    """scale, then softcap, then temperature; bias inside the scale."""
    case = make_case()
    g = torch.Generator().manual_seed(3)
    bias = torch.randn(37, generator=g, dtype=torch.float64)
    logits = 0.5 * (case.hidden @ case.weight.t() + bias)
    logp = log_softmax(4.0 * torch.tanh(logits / 4.0) / 1.5, -1)
    teacher = case.teachers[0]
    logq = log_softmax((teacher.hidden @ teacher.weight.t()) / 1.5, -1)
    out = linear_divergence(
        *case.student,
        case.teachers,
        divergence="forward_kl",
        temperature=1.5,
        student_bias=bias,
        student_logit_scale=0.5,
        student_softcap=4.0,
        impl="reference",
    )
    torch.testing.assert_close(out.loss, kl_div(logp, logq, log_target=True, reduction="sum"))


def test_logprob_and_entropy_match_log_softmax(make_case):
    case = make_case()
    logp = log_softmax(case.hidden @ case.weight.t() / 0.7, -1)
    out = linear_logprob(*case.student, case.labels, temperature=0.7, impl="reference")
    torch.testing.assert_close(out.logprob, logp.gather(1, case.labels[:, None])[:, 0])
    torch.testing.assert_close(out.entropy, torch.distributions.Categorical(logits=logp).entropy())
