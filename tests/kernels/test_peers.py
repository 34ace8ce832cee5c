"""The installed trl and liger-kernel, their torch paths, on the same input: agreement where the definitions agree."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

from opd_kernels import TeacherHead, adapters, from_trl_beta, linear_divergence, linear_logprob, topk_divergence

BETAS = [0.0, 0.3, 0.5, 1.0]
IGNORED = -100


def peer(module: str, name: str):
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        pytest.fail(
            f"{module}.{name} is not there ({error}): install the peers that pyproject.toml pins, "
            "pip install -e '.[dev]', or adapt this test to the version you pin"
        )


@pytest.fixture
def case(make_case):
    """float32, as the peers compute; labels with ignored rows."""
    case = make_case(1, dtype=torch.float32, rows=12)
    case.labels[[1, 4, 11]] = IGNORED
    return case


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def with_gradients(loss, inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_liger_chunked_loss(case, beta, temperature, hard):
    """Values, all gradients, the denominator of ignored tokens, soft and hard parts."""
    liger = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    bias = torch.linspace(-1, 1, 37).requires_grad_()
    teacher = case.teachers[0]
    arguments = (*case.student, teacher.hidden, teacher.weight, case.labels, bias, bias.detach().flip(0))
    options = {"weight_hard_loss": hard, "weight_soft_loss": 0.8, "beta": beta, "temperature": temperature}
    options |= {"compiled": False, "chunk_size": 5, "return_soft_hard_loss": True}
    results = []
    for module in (adapters.LigerFusedLinearJSDLoss(**options), liger(**options)):
        loss, soft, hard_part = module(*arguments)
        results.append([*with_gradients(loss, (*case.student, bias)), soft.detach(), hard_part.detach()])
    assert_same(*results)


def test_liger_chunked_loss_without_tokens(case):
    liger = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    teacher = case.teachers[0]
    for module in (adapters.LigerFusedLinearJSDLoss(compiled=False), liger(compiled=False)):
        loss = module(*case.student, teacher.hidden, teacher.weight, torch.full((12,), IGNORED))
        assert_same(with_gradients(loss, case.student), [torch.zeros(()), *map(torch.zeros_like, case.student)])


def test_no_rows_and_ignored_rows_that_are_not_finite(case):
    teacher, module = case.teachers[0], adapters.LigerFusedLinearJSDLoss()
    hidden = torch.full_like(case.student[0], torch.inf).requires_grad_()
    loss = module(hidden, case.student[1], teacher.hidden, teacher.weight, torch.full((12,), IGNORED))
    inputs = hidden, case.student[1]
    assert_same(with_gradients(loss, inputs), [torch.zeros(()), *map(torch.zeros_like, inputs)])
    loss = module(hidden[:0], case.student[1], teacher.hidden[:0], teacher.weight, torch.full((0,), IGNORED))
    assert_same(with_gradients(loss, (case.student[1],)), [torch.zeros(()), torch.zeros_like(case.student[1])])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss"),
        ("liger_kernel.transformers", "LigerFusedLinearJSD"),
        ("trl.trainer.distillation_trainer", "_chunked_divergence_loss"),
    ],
)
def test_signatures_are_the_peers(module, name):
    """Same names in the same order with the same defaults; ours may take more, by keyword."""
    theirs, ours = peer(module, name), getattr(adapters, name.replace("_chunked", "trl_chunked"))
    pairs = [(theirs, ours)]
    if inspect.isclass(theirs):
        pairs = [(theirs.__init__, ours.__init__), (theirs.forward, ours.forward)]
    for their, our in pairs:
        expected = [(p.name, p.default) for p in inspect.signature(their).parameters.values()]
        mine = [(p.name, p.default) for p in inspect.signature(our).parameters.values()]
        if their is getattr(theirs, "forward", None):
            # Liger's annotations make shift_labels required; None is what it does without.
            expected, mine = [n for n, _ in expected], [n for n, _ in mine]
        assert mine[: len(expected)] == expected


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("head", [False, True])
def test_trl_chunked_divergence(case, beta, head):
    """TRL's function on tiles: per-token divergence with an arbitrary upstream gradient, and the entropy."""
    function = peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    teacher, upstream = case.teachers[0], torch.linspace(-1, 2, 12)
    bias = torch.linspace(-1, 1, 37).requires_grad_()
    scales = (
        {"student": (0.7, 2.0), "teacher": (1.3, 3.0)} if head else {"student": (1.0, None), "teacher": (1.0, None)}
    )
    divergence, entropy = function.apply(
        *case.student, bias, teacher.hidden, teacher.weight, None, beta, 1.5, *scales["student"], *scales["teacher"]
    )
    theirs = [divergence.detach(), entropy, *torch.autograd.grad(divergence, (*case.student, bias), upstream)]
    out = linear_divergence(
        *case.student,
        [TeacherHead(teacher.hidden, teacher.weight, None, *scales["teacher"])],
        **from_trl_beta(beta),
        temperature=1.5,
        reduction="none",
        stats=True,
        student_bias=bias,
        student_logit_scale=scales["student"][0],
        student_softcap=scales["student"][1],
    )
    ours = torch.autograd.grad(out.loss, (*case.student, bias), upstream)
    assert_same([out.loss.detach(), out.stats.student_entropy, *ours], theirs)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("empty", [False, True])
def test_trl_distillation_loss(case, beta, items, empty):
    theirs = peer("trl.trainer.distillation_trainer", "_chunked_divergence_loss")
    teacher = case.teachers[0]
    mask = torch.zeros(3, 4) if empty else (case.labels != IGNORED).view(3, 4).long()
    results = []
    for function in (adapters.trl_chunked_divergence_loss, theirs):
        loss, entropy, tokens = function(
            case.hidden.view(3, 4, -1),
            teacher.hidden.view(3, 4, -1),
            case.weight,
            teacher.weight,
            mask,
            beta,
            items,
            temperature=0.7,
        )
        results.append([*with_gradients(loss, case.student), entropy.detach(), tokens])
    assert_same(*results)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "items"])
def test_trl_gkd_loss(case, beta, reduction):
    """GKD's loss on logits: "batchmean" over labels is our "mean", ``num_items_in_batch`` our sum over it."""
    trainer = peer("trl.experimental.gkd.gkd_trainer", "GKDTrainer")
    teacher = case.teachers[0]
    logits = (case.hidden @ case.weight.t()).view(3, 4, -1)
    loss = trainer.generalized_jsd_loss(
        logits,
        (teacher.hidden @ teacher.weight.t()).view(3, 4, -1),
        labels=case.labels.view(3, 4),
        beta=beta,
        temperature=2.0,
        reduction="batchmean" if reduction == "items" else reduction,
        num_items_in_batch=40 if reduction == "items" else None,
    )
    module = adapters.LinearDivergence(
        **from_trl_beta(beta), reduction="mean" if reduction == "batchmean" else "sum", temperature=2.0
    )
    ours = module(
        case.hidden.view(3, 4, -1),
        case.weight,
        [TeacherHead(teacher.hidden.view(3, 4, -1), teacher.weight)],
        labels=case.labels.view(3, 4),
    ).loss
    ours = ours / 40 if reduction == "items" else ours
    assert_same(with_gradients(ours, case.student), with_gradients(loss, case.student))


def test_trl_gkd_mean_is_not_a_mean_over_tokens(case):
    """Documented difference: their "mean" also divides by the vocabulary."""
    trainer = peer("trl.experimental.gkd.gkd_trainer", "GKDTrainer")
    teacher = case.teachers[0]
    logits, teacher_logits = case.hidden @ case.weight.t(), teacher.hidden @ teacher.weight.t()
    theirs = trainer.generalized_jsd_loss(logits[None], teacher_logits[None], beta=1.0, reduction="mean")
    ours = linear_divergence(*case.student, case.teachers, reduction="mean").loss
    torch.testing.assert_close(theirs * 37, ours)


def test_liger_pads_a_narrow_student_with_zero_logits(case):
    """Documented difference: here unequal widths are an error, there the padding ids get probability."""
    liger = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    teacher = case.teachers[0]
    wide = torch.cat((teacher.weight, torch.full((3, teacher.weight.shape[1]), -50.0)))
    arguments = (*case.student, teacher.hidden, wide, case.labels)
    ours = adapters.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    with pytest.raises(ValueError, match="vocab_size="):
        ours(*arguments)
    cut = adapters.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, vocab_size=37)
    theirs = liger(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
    assert (cut(*arguments) - theirs(*arguments)).abs() > 0.1


def test_ignored_rows_that_are_not_finite(case):
    """Documented difference: there they are computed and masked afterwards, and reach the gradient."""
    liger = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    teacher = case.teachers[0]
    with torch.no_grad():
        case.hidden[1] = torch.nan
    arguments = (*case.student, teacher.hidden, teacher.weight, case.labels)
    ours = adapters.LigerFusedLinearJSDLoss()(*arguments)
    theirs = liger(compiled=False)(*arguments)
    assert torch.autograd.grad(ours, case.weight)[0].isfinite().all()
    assert torch.autograd.grad(theirs, case.weight)[0].isnan().any()


def test_bias_of_minus_infinity(case):
    """Documented difference: a column that both models switch off is NaN there."""
    liger = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    function = peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    teacher, bias = case.teachers[0], torch.zeros(37)
    bias[36] = -torch.inf
    case.labels[case.labels == 36] = 0
    arguments = (*case.student, teacher.hidden, teacher.weight, case.labels, bias, bias)
    ours = adapters.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)(*arguments)
    counted = (case.labels != IGNORED).float()
    head = TeacherHead(teacher.hidden, teacher.weight[:36])
    options = {"divergence": "jsd", "token_weight": counted, "reduction": "mean"}
    cut = linear_divergence(case.hidden, case.weight[:36], [head], **options)
    torch.testing.assert_close(ours, cut.loss)
    assert liger(compiled=False)(*arguments).isnan()
    theirs, _ = function.apply(*case.student, bias, teacher.hidden, teacher.weight, bias, 0.5)
    assert theirs.isnan().any()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_trl_tail_bucket(case, alpha):
    """Top-k with a tail bucket, on the student's own largest log-probs as in TRL's self-distillation."""
    theirs = peer("trl.experimental.sdft.loss_utils", "compute_topk_self_distillation_loss")
    teacher = case.teachers[0]
    logits, teacher_logits = case.hidden @ case.weight.t(), teacher.hidden @ teacher.weight.t()
    want = theirs(logits, teacher_logits, distillation_topk=5, distillation_alpha=alpha, distillation_add_tail=True)
    ids = logits.topk(5, 1).indices
    listed = torch.log_softmax(teacher_logits, 1).gather(1, ids)
    got = topk_divergence(*case.student, ids, listed, reduction="none", **from_trl_beta(alpha)).loss
    upstream = torch.linspace(-1, 2, 12)
    gradients = [torch.autograd.grad(x, case.student, upstream) for x in (got, want)]
    assert_same([got.detach(), *gradients[0]], [want.detach(), *gradients[1]])


def test_trl_chunked_logprob(case):
    """Log-probs of sampled tokens and the entropy, as TRL's policy-gradient trainers compute them."""
    function = peer("trl.trainer.utils", "selective_log_softmax")
    logits, labels = case.hidden @ case.weight.t(), case.labels.clamp(min=0)
    torch.testing.assert_close(linear_logprob(*case.student, labels).logprob, function(logits, labels))
