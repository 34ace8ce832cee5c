"""Chunked op against the float64 reference and finite differences."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from opd_kernels import TeacherHead, from_trl_beta, linear_divergence, linear_logprob, token_stats, topk_divergence

KINDS = ["reverse_kl", "forward_kl", "jsd", "skew_kl"]
SMALL = 30_000  # bytes: several chunks at the sizes used here


def upstream(loss):
    if loss.dim():
        return torch.linspace(-1.0, 1.5, loss.numel(), dtype=loss.dtype)
    return torch.tensor(1.7, dtype=loss.dtype)


def loss_and_gradients(case, impl, *, inputs=None, **options):
    out = linear_divergence(*case.student, case.teachers, impl=impl, **options)
    inputs = case.student if inputs is None else inputs
    return [out.loss, out.token_loss, *torch.autograd.grad(out.loss, inputs, upstream(out.loss))]


def assert_same(left, right, **tolerance):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teachers", [1, 2, 3])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("teacher_reduction", ["sum", "mixture"])
@pytest.mark.parametrize("mix", ["rows", "vector", "default"])
def test_equals_reference(make_case, kind, teachers, reduction, teacher_reduction, mix):
    case = make_case(teachers)
    weights = {"rows": case.mix, "vector": [0.9, 0.4, 0.2][:teachers], "default": None}[mix]
    options = {
        "divergence": kind,
        "reduction": reduction,
        "teacher_reduction": teacher_reduction,
        "mix": weights,
        "token_weight": case.token_weight,
        "temperature": 1.3,
        "workspace_bytes": SMALL,
    }
    assert_same(loss_and_gradients(case, "torch", **options), loss_and_gradients(case, "reference", **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_reduction", ["sum", "mixture"])
def test_bias_scale_and_softcap_of_every_head(make_case, kind, teacher_reduction):
    case = make_case(2)
    g = torch.Generator().manual_seed(5)
    bias = torch.randn(3, 37, generator=g, dtype=torch.float64)
    case.teachers = [
        replace(case.teachers[0], bias=bias[1], logit_scale=1.4, softcap=2.0),
        replace(case.teachers[1], bias=bias[2], logit_scale=0.3),
    ]
    student_bias = bias[0].clone().requires_grad_()
    options = {
        "divergence": kind,
        "teacher_reduction": teacher_reduction,
        "student_bias": student_bias,
        "student_logit_scale": 0.6,
        "student_softcap": 1.5,
        "temperature": 0.8,
        "inputs": (*case.student, student_bias),
        "workspace_bytes": SMALL,
    }
    for reduction in ("sum", "none"):
        results = [loss_and_gradients(case, i, reduction=reduction, **options) for i in ("torch", "reference")]
        assert_same(*results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(make_case, kind, reduction):
    """Finite differences; also calls backward more than once on the same graph."""
    case = make_case(2, rows=4, vocab=7, width=3)

    def op(hidden, weight):
        return linear_divergence(
            hidden, weight, case.teachers, divergence=kind, reduction=reduction, mix=[0.7, 0.6], student_softcap=3.0
        ).loss

    assert torch.autograd.gradcheck(op, case.student)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_reduction", ["sum", "mixture"])
def test_eight_teachers(make_case, kind, teacher_reduction):
    case = make_case(8)
    options = {"divergence": kind, "teacher_reduction": teacher_reduction, "mix": case.mix, "workspace_bytes": SMALL}
    assert_same(loss_and_gradients(case, "torch", **options), loss_and_gradients(case, "reference", **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_reduction", ["sum", "mixture"])
def test_extreme_logits_in_float32(make_case, kind, teacher_reduction):
    """Logits of +-100 and more: probabilities underflow, the result must not."""
    case = make_case(2, dtype=torch.float32, spread=30.0)
    logits = case.hidden @ case.weight.t()
    assert logits.abs().max() > 100
    options = {"divergence": kind, "teacher_reduction": teacher_reduction}
    got = loss_and_gradients(case, "torch", **options)
    exact = make_case(2, dtype=torch.float64, spread=30.0)
    exact.hidden = case.hidden.detach().double().requires_grad_()
    exact.weight = case.weight.detach().double().requires_grad_()
    exact.teachers = [TeacherHead(t.hidden.double(), t.weight.double()) for t in case.teachers]
    want = loss_and_gradients(exact, "reference", **options)
    plain = loss_and_gradients(case, "reference", **options)
    for mine, theirs, exact_value in zip(got, plain, want, strict=True):
        assert mine.isfinite().all()
        lost = (theirs.double() - exact_value).norm()
        assert (
            mine.double() - exact_value
        ).norm() <= 3 * lost + 1e-5 * exact_value.norm() + 1e-7 * case.hidden.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_columns_switched_off_by_minus_infinity(make_case, kind):
    """-inf bias in the padding columns of all heads equals leaving those columns out."""
    case = make_case(2)
    bias = torch.zeros(37, dtype=torch.float64)
    bias[30:] = -torch.inf
    sliced = loss_and_gradients(case, "torch", divergence=kind, vocab_size=30)
    case.teachers = [replace(t, bias=bias) for t in case.teachers]
    for impl in ("torch", "reference"):
        assert_same(loss_and_gradients(case, impl, divergence=kind, student_bias=bias), sliced)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_vocab_size_cuts_every_head(make_case, reduction):
    case = make_case(2)
    wide = torch.cat([case.teachers[1].weight, torch.full((5, 8), 50.0, dtype=torch.float64)])
    padded = [case.teachers[0], TeacherHead(case.teachers[1].hidden, wide)]
    short = case.weight.detach()[:35].clone().requires_grad_()
    cut = [TeacherHead(t.hidden, t.weight[:35]) for t in case.teachers]
    got = linear_divergence(*case.student, padded, vocab_size=35, reduction=reduction)
    want = linear_divergence(case.hidden, short, cut, reduction=reduction)
    torch.testing.assert_close(got.loss, want.loss)
    got_grad = torch.autograd.grad(got.loss, case.weight, upstream(got.loss))[0]
    want_grad = torch.autograd.grad(want.loss, short, upstream(want.loss))[0]
    torch.testing.assert_close(got_grad[:35], want_grad)
    assert torch.equal(got_grad[35:], torch.zeros_like(got_grad[35:]))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("cause", ["token_weight", "mix"])
def test_nothing_to_compute_is_exactly_zero(make_case, reduction, cause):
    case = make_case(2)
    zeros = {"token_weight": torch.zeros(11)} if cause == "token_weight" else {"mix": torch.zeros(11, 2)}
    for impl in ("torch", "reference"):
        loss, token_loss, *gradients = loss_and_gradients(case, impl, reduction=reduction, **zeros)
        assert torch.equal(loss, torch.zeros_like(loss))
        assert token_loss.isnan().all()
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("op", ["divergence", "sampled", "logprob", "tail", "topk"])
def test_no_rows_are_a_loss_of_zero_with_gradients_of_zero(make_case, impl, op):
    """So that a micro-batch without a token that counts is no special case of a trainer."""
    case, bias = make_case(2), torch.zeros(37, dtype=torch.float64, requires_grad=True)
    inputs = [case.hidden, case.weight, bias]
    hidden, labels = case.hidden[:0], case.labels[:0]
    if op in ("logprob", "tail"):
        labels = labels if op == "logprob" else labels[:, None]
        out = linear_logprob(hidden, case.weight, labels, bias=bias, tail=op == "tail", impl=impl)
        assert out.logprob.shape == labels.shape and out.entropy.shape == (0,)
        losses = [out.logprob.sum() + out.entropy.sum()]
    else:
        teachers = [TeacherHead(head.hidden[:0], head.weight) for head in case.teachers]
        options = {"student_bias": bias, "impl": impl}
        losses = []
        for reduction in ("sum", "mean", "none"):
            if op == "topk":
                listed = torch.zeros(0, 3)
                out = topk_divergence(hidden, case.weight, listed.long(), listed, reduction=reduction, **options)
            else:
                share = {"vocab_sample": 0.2} if op == "sampled" else {"stats": True, "labels": labels}
                out = linear_divergence(hidden, case.weight, teachers, reduction=reduction, **share, **options)
                assert op == "sampled" or out.stats.gap.shape == (0, 2)
            assert out.token_loss.shape == (0,) and out.loss.shape == ((0,) if reduction == "none" else ())
            losses.append(out.loss.sum())
        assert token_stats(hidden, case.weight, teachers, impl=impl).forward_kl.shape == (0, 2)
    for loss in losses:
        gradients = torch.autograd.grad(loss, inputs)
        assert all(torch.equal(x, torch.zeros_like(x)) for x in (loss, *gradients))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_skipped_rows_and_teachers_may_hold_anything(make_case, impl, reduction):
    """NaN where the weight is 0 neither raises nor leaks; labels there may be -100."""
    case = make_case(2)
    options = {"mix": case.mix, "token_weight": case.token_weight, "reduction": reduction, "stats": True}
    clean = loss_and_gradients(case, impl, labels=case.labels, **options)
    skipped = (case.token_weight == 0) | (case.mix.sum(1) == 0)
    dirty = make_case(2)
    dirty.hidden.data[skipped] = torch.nan
    dirty.labels[skipped] = -100
    for k, teacher in enumerate(dirty.teachers):
        teacher.hidden[skipped | (case.mix[:, k] == 0)] = torch.nan
    assert skipped.any()
    assert_same(loss_and_gradients(dirty, impl, labels=dirty.labels, **options), clean)


def test_token_loss_is_before_the_weights(make_case):
    case = make_case()
    out = linear_divergence(*case.student, case.teachers, token_weight=case.token_weight, reduction="mean")
    plain = linear_divergence(*case.student, case.teachers, reduction="none")
    used = case.token_weight != 0
    torch.testing.assert_close(out.token_loss[used], plain.loss.detach()[used])
    assert out.token_loss[~used].isnan().all()
    weight = case.token_weight[used].double()
    torch.testing.assert_close(out.loss.detach(), (out.token_loss[used] * weight).sum() / weight.sum())
    assert not out.token_loss.requires_grad


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_frozen_inputs_and_repeated_backward(make_case, reduction):
    case = make_case(2)
    out = linear_divergence(*case.student, case.teachers, reduction=reduction)
    hidden, weight = torch.autograd.grad(out.loss, case.student, upstream(out.loss), retain_graph=True)
    again = torch.autograd.grad(out.loss, case.student, 2.0 * upstream(out.loss))
    assert_same(again, (2.0 * hidden, 2.0 * weight))
    frozen_weight = linear_divergence(case.hidden, case.weight.detach(), case.teachers, reduction=reduction)
    torch.testing.assert_close(torch.autograd.grad(frozen_weight.loss, case.hidden, upstream(out.loss))[0], hidden)
    frozen_hidden = linear_divergence(case.hidden.detach(), case.weight, case.teachers, reduction=reduction)
    torch.testing.assert_close(torch.autograd.grad(frozen_hidden.loss, case.weight, upstream(out.loss))[0], weight)
    with torch.no_grad():
        assert not linear_divergence(*case.student, case.teachers).loss.requires_grad


@pytest.mark.parametrize("op", ["divergence", "rows", "logprob", "topk"])
def test_second_derivatives_are_refused(make_case, op):
    """The gradient would count as a constant where a penalty of it is differentiated."""
    case = make_case(1)
    if op in ("divergence", "rows"):
        reduction = "none" if op == "rows" else "sum"
        loss = linear_divergence(*case.student, case.teachers, reduction=reduction).loss.sum()
    elif op == "logprob":
        loss = linear_logprob(*case.student, case.labels).logprob.sum()
    else:
        loss = topk_divergence(*case.student, case.labels[:, None], torch.full((11, 1), -1.0)).loss
    plain = torch.autograd.grad(loss, case.student, retain_graph=True)
    gradients = torch.autograd.grad(loss, case.student, create_graph=True)
    assert_same(gradients, plain)
    with pytest.raises(RuntimeError, match="first derivatives only: use impl='reference'"):
        (case.hidden.square().sum() + gradients[0].square().sum()).backward()
    exact = linear_divergence(*case.student, case.teachers, impl="reference").loss
    (gradient,) = torch.autograd.grad(exact, case.hidden, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), case.hidden)[0].abs().sum() > 0


CONSTANTS = ["mix", "token_weight", "labels", "logprob_weight", "teachers[1].hidden", "teachers[0].weight"]


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_constants_that_a_backward_pass_reads_again_may_not_change(make_case, name, reduction):
    """A buffer that is filled anew before the backward pass would give another loss's gradient."""
    case = make_case(2)
    given = {"mix": case.mix.double(), "token_weight": case.token_weight.double(), "labels": case.labels}
    given["logprob_weight"] = case.token_weight.double() + 1.0
    out = linear_divergence(*case.student, case.teachers, reduction=reduction, **given)
    if reduction == "sum":  # has its gradients already, for one backward pass
        first = torch.autograd.grad(out.loss, case.student, retain_graph=True)
    k = int(name[9]) if name.startswith("teachers") else 0
    changed = given.get(name, getattr(case.teachers[k], name.rpartition(".")[2], None))
    changed.mul_(1)
    with pytest.raises(RuntimeError, match=rf"{re.escape(name)} was changed in place"):
        torch.autograd.grad(out.loss.sum(), case.student)
    if reduction == "sum":
        again = linear_divergence(*case.student, case.teachers, reduction=reduction, **given)
        changed.mul_(1)
        assert_same(torch.autograd.grad(again.loss, case.student), first)


def test_labels_of_log_probs_may_not_change_before_the_backward_pass(make_case):
    case = make_case()
    out = linear_logprob(*case.student, case.labels)
    case.labels.zero_()
    with pytest.raises(RuntimeError, match="labels was changed in place"):
        out.logprob.sum().backward()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_teachers_of_inference_mode(make_case, reduction):
    case = make_case(2)
    with torch.inference_mode():
        teachers = [TeacherHead(head.hidden.clone(), head.weight.clone()) for head in case.teachers]
    case.teachers, plain = teachers, loss_and_gradients(case, "torch", reduction=reduction)
    assert_same(loss_and_gradients(case, "torch", reduction=reduction), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_half_precision_inputs_lose_only_the_final_rounding(make_case, dtype, reduction):
    case, exact = make_case(2, dtype=dtype), make_case(2)
    exact.hidden = case.hidden.detach().double().requires_grad_()
    exact.weight = case.weight.detach().double().requires_grad_()
    exact.teachers = [TeacherHead(t.hidden.double(), t.weight.double()) for t in case.teachers]
    got = loss_and_gradients(case, "torch", divergence="jsd", reduction=reduction, workspace_bytes=SMALL)
    want = loss_and_gradients(exact, "reference", divergence="jsd", reduction=reduction)
    assert got[0].dtype == torch.float32
    assert got[2].dtype == got[3].dtype == dtype
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)
    for gradient, target in zip(got[2:], want[2:], strict=True):
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(gradient.double(), target, rtol=rounding, atol=1e-6)


def test_float16_gradients_survive_small_weights_under_a_loss_scaler(make_case):
    """Row weights of 1e-8 would flush to 0 if the gradient were stored in float16 before the scale factor."""
    case = make_case(dtype=torch.float16)
    tiny = torch.full((11,), 1e-8)
    out = linear_divergence(*case.student, case.teachers, token_weight=tiny)
    scaled = torch.autograd.grad(out.loss * 1e8, case.student)
    plain = torch.autograd.grad(linear_divergence(*case.student, case.teachers).loss, case.student)
    assert_same(scaled, plain, rtol=2e-3, atol=1e-5)


def test_autocast_does_not_reach_the_logits(make_case):
    case = make_case(2, dtype=torch.float32)
    for options in ({}, {"token_weight": case.token_weight, "reduction": "none"}):
        plain = loss_and_gradients(case, "torch", **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(loss_and_gradients(case, "torch", **options), plain, rtol=0, atol=0)


def test_chunking_does_not_change_the_result(make_case):
    case = make_case(3, rows=50, dtype=torch.float32)
    small = loss_and_gradients(case, "torch", divergence="jsd", mix=case.mix.repeat(1, 1), workspace_bytes=SMALL)
    large = loss_and_gradients(case, "torch", divergence="jsd", mix=case.mix)
    assert_same(small, large, rtol=1e-5, atol=1e-6)


def test_nan_in_student_makes_the_loss_nan(make_case):
    """Gradient scalers look for it; only a teacher's NaN is an error."""
    case = make_case()
    case.hidden.data[3, 0] = torch.nan
    out = linear_divergence(*case.student, case.teachers)
    assert out.loss.isnan()


@pytest.mark.parametrize(
    ("beta", "options"),
    [(0.0, {"divergence": "forward_kl"}), (1.0, {"divergence": "reverse_kl"}), (0.3, {"jsd_beta": 0.3})],
)
def test_from_trl_beta(beta, options):
    assert from_trl_beta(beta) == {"divergence": "jsd", **options}


def test_from_trl_beta_outside():
    with pytest.raises(ValueError, match=r"beta=1\.5"):
        from_trl_beta(1.5)
