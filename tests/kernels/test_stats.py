"""Statistics and log-probabilities against the reference."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from opd_kernels import TeacherHead, TokenStats, linear_divergence, linear_logprob, token_stats

NAMES = [f.name for f in fields(TokenStats) if f.name != "dropped_mass"]  # see test_compaction
SMALL = 30_000


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize("teacher_reduction", ["sum", "mixture"])
@pytest.mark.parametrize("train", [True, False])
def test_every_statistic_equals_the_reference(make_case, divergence, teacher_reduction, train):
    case = make_case(3)
    options = {
        "divergence": divergence,
        "teacher_reduction": teacher_reduction,
        "mix": case.mix,
        "token_weight": case.token_weight,
        "labels": case.labels,
        "stats": True,
        "temperature": 0.8,
        "workspace_bytes": SMALL,
    }
    with torch.set_grad_enabled(train):
        got, want = (
            linear_divergence(*case.student, case.teachers, impl=impl, **options).stats
            for impl in ("torch", "reference")
        )
    computed = (case.token_weight != 0)[:, None] & (case.mix > 0)
    for name in NAMES:
        value = getattr(got, name)
        torch.testing.assert_close(value, getattr(want, name), equal_nan=True)
        expected = computed.any(1) if value.dim() == 1 else computed
        assert torch.equal(~value.isnan(), expected), name
        assert not value.requires_grad


def test_statistics_by_hand(make_case):
    case = make_case()
    logp = torch.log_softmax(case.hidden.detach() @ case.weight.detach().t(), -1)
    logq = torch.log_softmax(case.teachers[0].hidden @ case.teachers[0].weight.t(), -1)
    stats = token_stats(*case.student, case.teachers, labels=case.labels)
    pick = case.labels[:, None]
    expected = {
        "student_logprob": logp.gather(1, pick)[:, 0],
        "teacher_logprob": logq.gather(1, pick),
        "gap": (logq - logp).gather(1, pick),
        "student_entropy": torch.distributions.Categorical(logits=logp).entropy(),
        "teacher_entropy": torch.distributions.Categorical(logits=logq).entropy()[:, None],
        "teacher_top1_prob": logq.exp().amax(1, keepdim=True),
        "top1_agreement": (logp.argmax(1) == logq.argmax(1)).double()[:, None],
        "reverse_kl": (logp.exp() * (logp - logq)).sum(1, keepdim=True),
        "forward_kl": (logq.exp() * (logq - logp)).sum(1, keepdim=True),
    }
    assert set(expected) == set(NAMES)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name), value)


def test_agreement_is_one_for_the_same_head(make_case):
    case = make_case()
    same = TeacherHead(case.hidden.detach(), case.weight)
    stats = token_stats(*case.student, [same, case.teachers[0]])
    assert torch.equal(stats.top1_agreement[:, 0], torch.ones(11, dtype=torch.float64))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_token_stats_skips_and_leaves_label_fields_out(make_case, impl):
    case = make_case(2)
    stats = token_stats(*case.student, case.teachers, mix=case.mix, token_weight=case.token_weight, impl=impl)
    assert stats.student_logprob is None
    assert stats.teacher_logprob is None
    assert stats.gap is None
    skipped = (case.token_weight == 0) | (case.mix.sum(1) == 0)
    assert torch.equal(stats.student_entropy.isnan(), skipped)


def test_float32_statistics_are_float32(make_case):
    case = make_case(dtype=torch.bfloat16)
    stats = token_stats(*case.student, case.teachers, labels=case.labels)
    assert all(getattr(stats, name).dtype == torch.float32 for name in NAMES)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "vocab_size": 30},
        {"softcap": 2.0, "logit_scale": 1.3, "temperature": 0.6},
    ],
)
@pytest.mark.parametrize("use", ["logprob", "entropy", "both"])
def test_linear_logprob_equals_reference(make_case, options, use):
    case = make_case()
    bias = torch.linspace(-1, 1, 37, dtype=torch.float64).requires_grad_()
    labels = case.labels % 30
    weight = torch.linspace(-1, 1, 11, dtype=torch.float64)
    results = []
    for impl in ("torch", "reference"):
        out = linear_logprob(*case.student, labels, bias=bias, impl=impl, workspace_bytes=SMALL, **options)
        terms = {"logprob": out.logprob * weight, "entropy": out.entropy * weight.square()}
        loss = sum(terms.values()) if use == "both" else terms[use]
        gradients = torch.autograd.grad(loss.sum(), (*case.student, bias))
        results.append([out.logprob, out.entropy, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("form", ["single", "several", "tail"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_top1_prob_by_hand(make_case, temperature, softcap, form, impl):
    """The largest probability of a float64 softmax; columns beyond ``vocab_size`` are larger and do not count."""
    case = make_case()
    weight = case.weight.detach().clone()
    weight[30:] = 50.0 * case.hidden.detach()[0].sign()
    bias = torch.linspace(-1, 1, 37, dtype=torch.float64)
    bias[2] = -torch.inf
    logits = 1.3 * (case.hidden.detach() @ weight[:30].t() + bias[:30])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    labels = case.labels % 27 + 3
    out = linear_logprob(
        case.hidden,
        weight.requires_grad_(),
        labels if form == "single" else torch.stack((labels, labels.flip(0)), 1),
        bias=bias,
        softcap=softcap,
        logit_scale=1.3,
        temperature=temperature,
        vocab_size=30,
        tail=form == "tail",
        impl=impl,
        workspace_bytes=SMALL,
    )
    torch.testing.assert_close(out.top1_prob, torch.softmax(logits / temperature, 1).amax(1))
    assert out.logprob.requires_grad
    assert not out.top1_prob.requires_grad


def test_linear_logprob_gradcheck(make_case):
    case = make_case(rows=4, vocab=7, width=3)

    def op(hidden, weight):
        out = linear_logprob(hidden, weight, case.labels, softcap=3.0)
        return out.logprob, out.entropy

    assert torch.autograd.gradcheck(op, case.student)


def test_linear_logprob_in_half_precision(make_case):
    case, exact = make_case(dtype=torch.bfloat16), make_case()
    exact.hidden = case.hidden.detach().double().requires_grad_()
    exact.weight = case.weight.detach().double().requires_grad_()
    got = linear_logprob(*case.student, case.labels)
    want = linear_logprob(*exact.student, case.labels, impl="reference")
    torch.testing.assert_close(got.logprob.double(), want.logprob, rtol=1e-5, atol=1e-5)
    assert got.top1_prob.dtype == torch.float32
    torch.testing.assert_close(got.top1_prob.double(), want.top1_prob, rtol=1e-5, atol=0)
    mine = torch.autograd.grad(got.logprob.sum(), case.student)
    theirs = torch.autograd.grad(want.logprob.sum(), exact.student)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-5)
