"""Log-probs of several labels per row, and the divergence from a teacher's k largest log-probs."""

from __future__ import annotations

import math

import pytest
import torch

from opd_kernels import LMHead, TeacherHead, linear_divergence, linear_logprob, topk_divergence

KINDS = ["reverse_kl", "forward_kl", "jsd", "skew_kl"]
SMALL = 30_000


def listed(teacher, k, temperature=1.0):
    logp = torch.log_softmax(teacher.hidden @ teacher.weight.t() / temperature, 1)
    values, ids = logp.topk(k, 1)
    return ids, values


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tail", [False, True])
def test_label_sets_equal_reference(make_case, softcap, tail):
    """Gradients of log-probs, entropy and tail; labels may repeat; several chunks."""
    case = make_case()
    labels = torch.randint(0, 37, (11, 5), generator=torch.Generator().manual_seed(0))
    labels[3, 1] = labels[3, 0]
    bias = torch.linspace(-1, 1, 37, dtype=torch.float64)
    bias[2] = -torch.inf
    labels[labels == 2] = 3
    bias.requires_grad_()
    results = []
    for impl in ("torch", "reference"):
        out = linear_logprob(
            *case.student,
            labels,
            bias=bias,
            softcap=softcap,
            logit_scale=1.3,
            temperature=0.7,
            impl=impl,
            tail=tail,
            workspace_bytes=SMALL,
        )
        values = [x for x in (out.logprob, out.entropy, out.tail) if x is not None]
        total = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in values)
        results.append([*values, *torch.autograd.grad(total, (*case.student, bias))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_one_column_is_the_plain_call(make_case):
    case = make_case()
    plain = linear_logprob(*case.student, case.labels)
    column = linear_logprob(*case.student, case.labels[:, None], tail=True)
    torch.testing.assert_close(column.logprob[:, 0], plain.logprob)
    torch.testing.assert_close(column.entropy, plain.entropy)
    torch.testing.assert_close(column.logprob[:, 0].exp() + column.tail.exp(), torch.ones(11, dtype=torch.float64))


def test_a_small_tail_keeps_its_precision(make_case):
    """A tail below 1e-8: 1 - sum p would be all rounding error in float32, and so would its gradient."""
    case = make_case(dtype=torch.float32, rows=3)
    with torch.no_grad():
        case.weight[:2] = 0.0
        case.weight[:2, 0] = 5.0
        case.hidden[:] = 0.0
        case.hidden[:, 0] = 9.0
    labels = torch.tensor([[0, 1]] * 3)
    got = linear_logprob(*case.student, labels, tail=True)
    exact = [x.detach().double().requires_grad_() for x in case.student]
    want = linear_logprob(*exact, labels, tail=True, impl="reference")
    assert want.tail.exp().max() < 1e-8
    torch.testing.assert_close(got.tail.double(), want.tail, rtol=1e-6, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(got.tail.sum(), case.student), torch.autograd.grad(want.tail.sum(), exact), strict=True
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gap", [95.0, 104.0, 2000.0])
def test_a_tail_below_the_smallest_float_keeps_its_log(make_case, gap):
    """exp of it is denormal, or 0."""
    case = make_case(dtype=torch.float32, rows=3)
    bias = torch.full((37,), -gap)
    bias[7], bias[11] = 0.0, -torch.inf
    hidden, weight = (x.detach() * 0 for x in case.student)
    for impl in ("torch", "reference"):
        own = bias.clone().requires_grad_()
        out = linear_logprob(hidden, weight, torch.full((3, 1), 7), bias=own, tail=True, impl=impl)
        torch.testing.assert_close(out.tail, torch.full((3,), math.log(35) - gap), rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(out.tail.sum(), own)
        want = torch.full((37,), 3 / 35)
        want[7], want[11] = -3.0, 0.0
        torch.testing.assert_close(gradient, want, rtol=2e-4, atol=1e-6)
        listed = torch.full((3, 1), math.log(0.5))
        loss = topk_divergence(hidden, weight, torch.full((3, 1), 7), listed, divergence="forward_kl", student_bias=own)
        assert loss.token_loss.tolist() == pytest.approx([0.5 * (gap - math.log(35)) - math.log(2)] * 3, rel=1e-5)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_columns_that_are_switched_off_are_no_tail(make_case, impl):
    case = make_case(rows=3, vocab=5)
    bias = torch.zeros(5, dtype=torch.float64)
    bias[3:] = -torch.inf
    labels = torch.arange(3).expand(3, 3).contiguous()
    assert linear_logprob(*case.student, labels, bias=bias, tail=True, impl=impl).tail.isneginf().all()


def test_tail_without_columns(make_case):
    case = make_case(rows=3, vocab=5)
    out = linear_logprob(*case.student, torch.arange(5).expand(3, 5).contiguous(), tail=True)
    assert out.tail.isneginf().all()
    gradients = torch.autograd.grad(out.tail.sum() + out.logprob.sum(), case.student)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[0, 37]] * 3), r"labels\[0, 1\] = 37 is outside"),
        (torch.zeros(2, 4, dtype=torch.int64), r"labels must have shape \[3\] or \[3, L\], got \[2, 4\]"),
        (torch.zeros(3, 0, dtype=torch.int64), r"got \[3, 0\]"),
        (torch.zeros(3, 2, dtype=torch.int32), "int64"),
    ],
)
def test_bad_label_sets(make_case, labels, message):
    with pytest.raises(ValueError, match=message):
        linear_logprob(*make_case(rows=3).student, labels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_whole_list_is_the_exact_divergence(make_case, kind, reduction):
    case = make_case(1)
    ids, values = listed(case.teachers[0], 37, 1.3)
    options = {"divergence": kind, "reduction": reduction, "token_weight": case.token_weight, "temperature": 1.3}
    got = topk_divergence(*case.student, ids, values, **options)
    want = linear_divergence(*case.student, case.teachers, impl="reference", **options)
    torch.testing.assert_close(got.token_loss, want.token_loss, equal_nan=True)
    torch.testing.assert_close(got.loss, want.loss)
    gradients = [torch.autograd.grad(out.loss.sum(), case.student) for out in (got, want)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lower_bound_that_grows_with_the_list(make_case, kind, dtype):
    """Merging events never increases an f-divergence: nested lists give a growing bound."""
    case = make_case(1, dtype=dtype, spread=2.0)
    exact = linear_divergence(*case.student, case.teachers, divergence=kind).token_loss
    slack = 1e-12 if dtype == torch.float64 else 1e-4
    before = torch.zeros_like(exact)
    for k in (1, 3, 8, 20, 36):
        bound = topk_divergence(*case.student, *listed(case.teachers[0], k), divergence=kind).token_loss
        assert (bound >= before - slack).all()
        before = bound
    assert (before <= exact + slack).all()
    assert (exact - before).max() < 0.1 * exact.max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 4])
def test_gradcheck(make_case, kind, k):
    case = make_case(1, rows=4, vocab=7, width=3)
    ids, values = listed(case.teachers[0], k)
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()

    def op(hidden, weight, bias):
        return topk_divergence(
            hidden,
            weight,
            ids,
            values,
            divergence=kind,
            reduction="none",
            token_weight=torch.tensor([0.5, 0.0, 1.0, 2.0]),
            student_bias=bias,
            student_softcap=3.0,
            temperature=0.8,
        ).loss

    assert torch.autograd.gradcheck(op, (*case.student, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_tails_of_certain_models_in_float32(make_case, kind):
    """Both models nearly certain: finite values and gradients, whichever tail is the smaller one."""
    for student_scale, teacher_scale in ((40.0, 1.0), (1.0, 40.0), (40.0, 40.0)):
        case = make_case(1, dtype=torch.float32)
        case.hidden = (case.hidden.detach() * student_scale).requires_grad_()
        teacher = case.teachers[0]
        ids, values = listed(TeacherHead(teacher.hidden * teacher_scale, teacher.weight), 4)
        out = topk_divergence(*case.student, ids, values.clamp(max=0.0), divergence=kind)
        assert out.token_loss.isfinite().all()
        assert (out.token_loss > -1e-5).all()
        gradients = torch.autograd.grad(out.loss, case.student)
        assert all(g.isfinite().all() for g in gradients)


def test_rows_without_weight_are_not_read(make_case):
    case = make_case(1)
    ids, values = listed(case.teachers[0], 4)
    want = topk_divergence(*case.student, ids, values, token_weight=case.token_weight)
    skipped = case.token_weight == 0
    ids[skipped], values[skipped] = -1, torch.nan
    got = topk_divergence(*case.student, ids, values, token_weight=case.token_weight)
    torch.testing.assert_close(got.loss, want.loss)
    assert got.token_loss.isnan().equal(skipped)
    none = topk_divergence(*case.student, ids, values, token_weight=torch.zeros(11), reduction="mean")
    none.loss.backward()
    assert none.loss == 0
    assert case.hidden.grad.eq(0).all()


def ragged(case, widths, k=6):
    """The same teacher's lists in one array: row n lists ``widths[n]`` ids."""
    ids, values = listed(case.teachers[0], k)
    unused = torch.arange(k) >= torch.tensor(widths)[:, None]
    return ids.masked_fill(unused, -1), values.masked_fill(unused, -torch.inf)


WIDTHS = (6, 1, 3, 3, 5, 6, 2, 1, 4, 6, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_every_row_keeps_its_own_width(make_case, kind, impl):
    """One call on ragged lists is one call for every row with its own list."""
    case = make_case(1)
    ids, values = ragged(case, WIDTHS)
    options = {"divergence": kind, "temperature": 0.8, "student_softcap": 3.0, "impl": impl}
    together = topk_divergence(*case.student, ids, values, token_weight=case.token_weight, **options)
    total = torch.zeros((), dtype=torch.float64)
    for n, width in enumerate(WIDTHS):
        row = topk_divergence(case.hidden[n : n + 1], case.weight, ids[n : n + 1, :width], values[n : n + 1, :width],
                              reduction="none", **options)  # fmt: skip
        if case.token_weight[n]:
            torch.testing.assert_close(together.token_loss[n], row.token_loss[0])
        total = total + case.token_weight[n] * row.loss[0]
    torch.testing.assert_close(together.loss, total)
    gradients = [torch.autograd.grad(loss, case.student) for loss in (together.loss, total)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_list_beside_a_short_one(make_case, kind):
    """A row that lists the vocabulary has the exact divergence, though another row has a tail."""
    case = make_case(1)
    ids, values = ragged(case, (37, *(2,) * 10), k=37)
    got = topk_divergence(*case.student, ids, values, divergence=kind).token_loss
    exact = linear_divergence(*case.student, case.teachers, divergence=kind).token_loss
    torch.testing.assert_close(got[0], exact[0])
    assert (got[1:] < exact[1:]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_ragged_lists(make_case, kind):
    case = make_case(1, rows=4, vocab=7, width=3)
    ids, values = ragged(case, (4, 1, 2, 3), k=4)

    def op(hidden, weight):
        return topk_divergence(hidden, weight, ids, values, divergence=kind, reduction="none", temperature=0.8).loss

    assert torch.autograd.gradcheck(op, case.student)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_lists_in_low_precision_and_under_autocast(make_case, kind, dtype):
    case = make_case(1, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in case.student]
    full = TeacherHead(case.teachers[0].hidden.double(), case.teachers[0].weight.double())
    case.teachers = [full]
    ids, values = ragged(case, WIDTHS)
    want = topk_divergence(*exact, ids, values, divergence=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = topk_divergence(*case.student, ids, values.float(), divergence=kind)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
    pairs = zip(torch.autograd.grad(got.loss, case.student), torch.autograd.grad(want.loss, exact), strict=True)
    for a, b in pairs:
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, v: (i.index_fill(1, torch.tensor([0, 1]), 5), v), "row 0 of the teacher's list lists an id twice"),
        (lambda i, v: (i, v + 2.0), "row 0 .* NaN, infinite or above 0"),
        (lambda i, v: (i, torch.full_like(v, -1.0)), "row 0 .* sums to a probability above 1"),
        (lambda i, v: (i, v.index_fill(0, torch.tensor([2]), -torch.inf)), "row 2 .* infinite"),
        (lambda i, v: (i[:, :2], v), r"topk_ids is \[3, 2\], topk_logprobs \[3, 4\]"),
        (lambda i, v: (i.int(), v), "int64"),
        (lambda i, v: (i, v.long()), "floating point"),
        (lambda i, v: (i[:2], v), r"topk_ids must be a tensor \[N, k\] = \[3, k\], got \[2, 4\]"),
        (lambda i, v: (i + 37, v), "row 0 .* outside the vocabulary of 37"),
        (lambda i, v: (i.index_fill(0, torch.tensor([1]), -2), v), "row 1 .* outside the vocabulary"),
        (lambda i, v: (i.index_fill(0, torch.tensor([1]), -1), v), "row 1 .* lists no id"),
        (lambda i, v: (i.index_fill(1, torch.tensor([3]), -1), v), "row 0 .* log-prob at the id -1"),
        (lambda i, v: (i, v * torch.nan), "row 0 .* NaN"),
        (lambda i, v: (i, v.clone().requires_grad_()), "topk_logprobs requires a gradient"),
    ],
)
def test_bad_lists(make_case, change, message):
    case = make_case(1, rows=3)
    with pytest.raises(ValueError, match=message):
        topk_divergence(*case.student, *change(*listed(case.teachers[0], 4)))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_without_weight_do_not_reach_a_loss_of_no_rows(make_case, reduction, dtype):
    """Neither inf in them nor a sum of them that overflows; every parameter has its gradient of zeros."""
    case = make_case(1, dtype=dtype)
    with torch.no_grad():
        case.hidden[:] = 6e4
        case.hidden[3] = torch.inf
    bias = torch.zeros(37, dtype=dtype, requires_grad=True)
    listed = torch.full((11, 1), -1.0), case.labels[:, None]
    options = {"token_weight": torch.zeros(11), "reduction": reduction, "student_bias": bias}
    out = topk_divergence(*case.student, *reversed(listed), **options)
    assert torch.equal(out.loss, torch.zeros_like(out.loss)) and out.token_loss.isnan().all()
    gradients = torch.autograd.grad(out.loss.sum(), (*case.student, bias))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    with pytest.raises(ValueError, match=r"temperature=-1\.0"):
        topk_divergence(*case.student, *reversed(listed), **options, temperature=-1.0)


def test_a_head_as_one_argument(make_case):
    case = make_case(1)
    bias = torch.linspace(-1, 1, 37, dtype=torch.float64)
    ids, values = listed(case.teachers[0], 4)
    head = LMHead(case.weight, bias, 1.3, 4.0)
    got = topk_divergence(case.hidden, head, ids, values)
    options = {"student_bias": bias, "student_logit_scale": 1.3, "student_softcap": 4.0}
    assert torch.equal(got.loss, topk_divergence(*case.student, ids, values, **options).loss)
    with pytest.raises(ValueError, match="do not pass them beside it"):
        topk_divergence(case.hidden, head, ids, values, student_bias=bias)
    with pytest.raises(ValueError, match=r"student_weight must be a torch\.Tensor.*got Linear"):
        topk_divergence(case.hidden, torch.nn.Linear(6, 37), ids, values)
