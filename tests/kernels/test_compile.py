"""The ops inside ``torch.compile``: one opaque node each, equal to eager."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd_kernels import (
    TeacherHead,
    TokenStats,
    library,
    linear_divergence,
    linear_logprob,
    token_stats,
    topk_divergence,
)

SMALL = 30_000
STATISTICS = [field.name for field in fields(TokenStats)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def assert_same(function, inputs, **options):
    """Values and gradients of the first output, eager and compiled; bitwise, since the code is the same."""
    results = []
    for call in (function, compiled(function, **options)):
        out = call(*inputs)
        gradients = torch.autograd.grad(out[0], inputs, torch.linspace(-1, 2, out[0].numel()).view_as(out[0]))
        results.append([*out, *gradients])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence(make_case, kind, reduction, dtype):
    case = make_case(2, dtype=dtype)
    bias = torch.linspace(-1, 1, 37).to(dtype).requires_grad_()
    teachers = [TeacherHead(case.teachers[0].hidden, case.teachers[0].weight, bias.detach()), case.teachers[1]]

    def call(hidden, weight, bias):
        out = linear_divergence(
            hidden * 1.5,
            weight,
            teachers,
            divergence=kind,
            reduction=reduction,
            mix=case.mix,
            token_weight=case.token_weight,
            labels=case.labels,
            stats=True,
            temperature=0.8,
            student_bias=bias,
            student_softcap=3.0,
            workspace_bytes=SMALL if reduction == "none" else 4 * SMALL,
            vocab_sample=0.0 if reduction == "none" else 0.3,
            sample_seed=3,
        )
        return out.loss * 2.0, out.token_loss, *[getattr(out.stats, name) for name in STATISTICS]

    assert_same(call, (*case.student, bias))


def test_reading_one_statistic(make_case):
    """As a user writes it: an attribute within the compiled function, None where there are no labels."""
    case = make_case(2)

    def call(hidden, weight):
        out = linear_divergence(hidden, weight, case.teachers, stats=True)
        assert out.stats.gap is None
        return (out.token_loss * out.stats.student_entropy).nansum() + out.loss, out.stats.teacher_entropy.mean(1)

    assert_same(call, case.student)


@pytest.mark.parametrize("compile_", [False, True])
def test_the_factor_of_a_loss_is_not_rounded(make_case, compile_):
    """A third of the loss has a third of the gradient, to the last bit of a bfloat16 result."""
    case = make_case(1, dtype=torch.bfloat16)

    def call(hidden, weight):
        return linear_divergence(hidden, weight, case.teachers, impl="torch").loss

    whole = torch.autograd.grad(call(*case.student), case.student)
    third = torch.autograd.grad((compiled(call) if compile_ else call)(*case.student) / 3, case.student)
    for mine, other in zip(third, whole, strict=True):
        torch.testing.assert_close(mine, (other.float() / 3).bfloat16(), rtol=0, atol=0)


def test_ops_stay_out_of_cuda_graphs():
    """They read data on the host."""
    for name in ("linear_divergence", "linear_divergence_backward", "linear_logprob", "token_stats"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.opd_kernels, name).default.tags


@pytest.mark.parametrize("op", ["sum", "none", "logprob"])
def test_second_derivatives_are_refused(make_case, op):
    """By a backend that leaves the backward pass to autograd; the others refuse them themselves."""
    case = make_case(1)

    def loss(hidden, weight):
        if op == "logprob":
            return linear_logprob(hidden, weight, case.labels).logprob.sum()
        return linear_divergence(hidden, weight, case.teachers, reduction=op).loss.sum()

    compiled = torch.compile(loss, backend="eager")
    (gradient,) = torch.autograd.grad(compiled(*case.student), case.hidden, create_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(*case.student), case.hidden)[0])
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.square().sum().backward()


def test_options_that_are_left_out(make_case):
    case = make_case(1)

    def call(hidden, weight):
        out = linear_divergence(hidden, weight, case.teachers, mix=[0.3])
        assert out.stats is None
        return out.loss, out.token_loss

    assert_same(call, case.student)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_input(make_case, frozen):
    case = make_case(1)
    leaves = list(case.student)
    leaves[frozen] = leaves[frozen].detach()

    def call(*tensors):
        return linear_divergence(*tensors, case.teachers).loss

    for function in (call, compiled(call)):
        function(*leaves).backward()
    gradient = leaves[1 - frozen].grad
    (once,) = torch.autograd.grad(call(*leaves), leaves[1 - frozen])
    torch.testing.assert_close(gradient, 2 * once)
    assert leaves[frozen].grad is None


@pytest.mark.parametrize("several", [False, True])
def test_logprob(make_case, several):
    case = make_case()
    labels = torch.stack((case.labels, case.labels.flip(0)), 1) if several else case.labels

    def call(hidden, weight):
        out = linear_logprob(hidden * 1.5, weight, labels, tail=several, temperature=0.8)
        assert not out.top1_prob.requires_grad
        tail = out.tail if several else out.entropy
        loss = out.logprob.sum() + (out.entropy * tail * out.top1_prob).sum()
        return loss, out.logprob, out.entropy, tail, out.top1_prob

    assert_same(call, case.student)


def test_token_stats(make_case):
    case = make_case(2)

    def call(hidden, weight):
        stats = token_stats(hidden, weight, case.teachers, labels=case.labels)
        assert not stats.gap.requires_grad
        none = token_stats(hidden, weight, case.teachers)
        assert none.gap is None
        return (hidden * weight[0]).sum(1) * stats.student_entropy, stats.gap, none.reverse_kl

    assert_same(call, case.student)


def test_numbers_of_rows_that_change(make_case):
    """One compilation serves them all."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def call(hidden, weight, teacher, teacher_weight, labels):
        loss = linear_divergence(hidden, weight, [TeacherHead(teacher, teacher_weight)]).loss
        return loss + linear_logprob(hidden, weight, labels).logprob.sum()

    function = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for rows in (5, 8, 13):
        case = make_case(1, rows=rows)
        inputs = (*case.student, case.teachers[0].hidden, case.teachers[0].weight, case.labels)
        torch.testing.assert_close(function(*inputs), call(*inputs))
    assert len(graphs) == 1


def test_autocast_around(make_case):
    """Logits stay in float32 under autocast, compiled or not."""
    case = make_case(1, dtype=torch.bfloat16)
    projection = torch.eye(6, dtype=torch.float32)

    def call(hidden, weight):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = hidden.float() @ projection
            assert hidden.dtype == torch.bfloat16
            out = linear_divergence(hidden, weight, case.teachers)
            return out.loss, out.token_loss, linear_logprob(hidden, weight, case.labels).logprob

    assert_same(call, case.student)
    plain = linear_divergence(*case.student, case.teachers)
    torch.testing.assert_close(compiled(call)(*case.student)[0], plain.loss, rtol=0, atol=0)


def test_bad_input_raises_when_it_runs(make_case):
    case = make_case(1)

    @compiled
    def call(hidden, weight, labels):
        return linear_divergence(hidden, weight, case.teachers, labels=labels).loss

    call(*case.student, case.labels)
    with pytest.raises(ValueError, match=r"labels\[0\] = 99"):
        call(*case.student, torch.full_like(case.labels, 99))


def test_teacher_that_requires_a_gradient(make_case):
    case = make_case(1)
    teacher = case.teachers[0].hidden.requires_grad_()

    @compiled
    def call(hidden, weight):
        return linear_divergence(hidden, weight, [TeacherHead(teacher, case.teachers[0].weight)]).loss

    with pytest.raises(Exception, match=r"teachers\[0\].hidden"):
        call(*case.student)


@pytest.mark.parametrize("function", [linear_divergence, token_stats, linear_logprob])
def test_every_option_reaches_the_op(function):
    """An option that the op does not know would be dropped in silence."""
    arguments = {
        linear_divergence: library.DIVERGENCE,
        token_stats: library.STATS,
        linear_logprob: library.LOGPROB,
    }[function]
    known = {*library.names_of(arguments), "teachers", "group", "student_logit_scale", "student_softcap"}
    assert set(inspect.signature(function).parameters) <= known


def test_eager_calls_do_not_pass_the_dispatcher(make_case):
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.namespace)
            return function(*args, **(kwargs or {}))

    case = make_case(1)
    with Recorder():
        linear_divergence(*case.student, case.teachers).loss.backward()
        linear_logprob(*case.student, case.labels).logprob.sum().backward()
        token_stats(*case.student, case.teachers)
    assert seen
    assert "opd_kernels" not in seen


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_opcheck_divergence(make_case, reduction):
    case = make_case(2, dtype=torch.float32)
    given = library.flat(
        (*case.student, None, 1.0, None),
        case.teachers,
        {"mix": None, "token_weight": None, "labels": case.labels, "group": None, "logprob_weight": None},
    )
    given |= {"divergence": "jsd", "jsd_beta": 0.3, "skew_alpha": 0.1, "teacher_reduction": "sum"}
    given |= {"reduction": reduction, "stats": True, "temperature": 1.0, "impl": "torch", "workspace_bytes": SMALL}
    given |= {"vocab_size": None, "wants": [True, True, False]}
    if reduction == "sum":
        given["workspace_bytes"] = 4 * SMALL
    given |= {"vocab_sample": 0.3 if reduction == "sum" else 0.0, "sample_seed": 3}
    torch.library.opcheck(
        torch.ops.opd_kernels.linear_divergence.default, [given[n] for n in library.names_of(library.DIVERGENCE)]
    )
    given |= {"student_hidden": case.hidden.detach(), "student_weight": case.weight.detach()}
    torch.library.opcheck(
        torch.ops.opd_kernels.token_stats.default, [given[n] for n in library.names_of(library.STATS)]
    )


def test_opcheck_logprob(make_case):
    case = make_case(dtype=torch.float32)
    labels = torch.stack((case.labels, case.labels), 1)
    given = {"hidden": case.hidden, "weight": case.weight, "bias": None, "labels": labels, "logit_scale": 1.0}
    given |= {"softcap": None, "tail": True, "temperature": 1.0, "impl": "torch", "workspace_bytes": SMALL}
    given |= {"vocab_size": None, "group_name": "", "wants": [True, True, False]}
    torch.library.opcheck(
        torch.ops.opd_kernels.linear_logprob.default, [given[n] for n in library.names_of(library.LOGPROB)]
    )


def test_topk_divergence_breaks_the_graph_and_agrees(make_case):
    """Its list is checked in Python: compiled without ``fullgraph`` it equals eager."""
    case = make_case(1)
    values, ids = torch.log_softmax(case.teachers[0].hidden @ case.teachers[0].weight.t(), 1).topk(4, 1)

    def call(hidden, weight):
        return topk_divergence(hidden * 1.5, weight, ids, values).loss

    got = torch.compile(call, backend="aot_eager")(*case.student)
    torch.testing.assert_close(got, call(*case.student))


@pytest.mark.slow
def test_default_backend(make_case):
    """Inductor generates code around the op; needs a C++ compiler."""
    case = make_case(1, dtype=torch.float32)

    def call(hidden, weight):
        return linear_divergence(hidden * 1.5, weight, case.teachers).loss * 2.0

    got = torch.autograd.grad(torch.compile(call, fullgraph=True)(*case.student), case.student)
    want = torch.autograd.grad(call(*case.student), case.student)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
