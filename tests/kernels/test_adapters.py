"""Modules with other libraries' call signatures, against the op they wrap."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from opd_kernels import TeacherHead, linear_divergence, linear_logprob
from opd_kernels.adapters import (
    LigerFusedLinearJSD,
    LigerFusedLinearJSDLoss,
    LinearDivergence,
    trl_chunked_divergence_loss,
)

IGNORED = -100


@pytest.fixture
def case(make_case):
    case = make_case(2, rows=12)
    case.labels[[1, 4, 11]] = IGNORED
    return case


def grads(loss, case):
    return torch.autograd.grad(loss, case.student)


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_module_with_leading_axes(case, reduction):
    """[B, T, d] hidden states, labels that are ignored, weights and mix of the same axes."""
    module = LinearDivergence("jsd", jsd_beta=0.3, reduction=reduction, temperature=1.5, stats=True)
    got = module(
        case.hidden.view(3, 4, -1),
        case.weight,
        [replace(teacher, hidden=teacher.hidden.view(3, 4, -1)) for teacher in case.teachers],
        labels=case.labels.view(3, 4),
        token_weight=case.token_weight.view(3, 4),
        mix=case.mix.view(3, 4, 2),
    )
    weight = case.token_weight * (case.labels != IGNORED)
    options = {"divergence": "jsd", "jsd_beta": 0.3, "reduction": reduction, "temperature": 1.5, "stats": True}
    labels = case.labels.clamp(min=0)
    want = linear_divergence(*case.student, case.teachers, labels=labels, token_weight=weight, mix=case.mix, **options)
    if reduction == "none":
        assert got.loss.shape == (3, 4)
        want.loss.sum()
    torch.testing.assert_close(got.loss.flatten(), want.loss.flatten())
    assert_same(grads(got.loss.sum(), case), grads(want.loss.sum(), case))
    torch.testing.assert_close(got.stats.gap, want.stats.gap, equal_nan=True)


def test_module_defaults(case):
    module = LinearDivergence(temperature=2.0)
    assert repr(module) == "LinearDivergence(divergence='reverse_kl', reduction='mean', temperature=2.0)"
    assert not list(module.parameters())
    want = linear_divergence(*case.student, case.teachers, reduction="mean", temperature=2.0).loss
    torch.testing.assert_close(module(*case.student, case.teachers).loss, want)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_liger_transformers_signature(case, labels, beta):
    teacher = case.teachers[0]
    shift_labels = case.labels if labels else None
    module = LigerFusedLinearJSD(jsd_beta=beta, temperature=2.0, accum_dtype=torch.float32)
    loss = module(*case.student, teacher.hidden, teacher.weight, shift_labels)
    rule = {0.0: {"divergence": "forward_kl"}, 0.25: {"divergence": "jsd", "jsd_beta": 0.25}, 1.0: {}}[beta]
    weight = (case.labels != IGNORED).double() if labels else None
    want = linear_divergence(
        *case.student, [teacher], reduction="mean", temperature=2.0, token_weight=weight, impl="reference", **rule
    ).loss
    torch.testing.assert_close(loss, want)
    assert_same(grads(loss, case), grads(want, case))


def test_one_seed_for_every_call_is_refused():
    with pytest.raises(ValueError, match="each call needs a seed of its own; call linear_divergence"):
        LinearDivergence(vocab_sample=0.1, sample_seed=3)


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_trl_loss_of_a_step_without_tokens_is_zero(case, items):
    hidden, weight = (x.detach().requires_grad_() for x in case.student)
    teacher = case.teachers[0]
    loss, entropy, tokens = trl_chunked_divergence_loss(
        hidden[None], teacher.hidden[None], weight, teacher.weight, torch.zeros(1, 12), 0.5, items
    )
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss == entropy == tokens == 0 and not any(g.any() for g in gradients)


def test_liger_hard_loss_is_at_temperature_one(case):
    teacher = case.teachers[0]
    module = LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=0.0, temperature=3.0)
    loss = module(*case.student, teacher.hidden, teacher.weight, case.labels)
    rows = case.labels != IGNORED
    want = -linear_logprob(case.hidden[rows], case.weight, case.labels[rows]).logprob.mean()
    torch.testing.assert_close(loss, want)
    assert_same(grads(loss, case), grads(want, case))


def test_teacher_tensors_may_require_a_gradient(case):
    """Peers cut the graph there in silence, and callers rely on it."""
    teacher = case.teachers[0]
    teacher.hidden.requires_grad_()
    LigerFusedLinearJSDLoss()(*case.student, teacher.hidden, teacher.weight, case.labels).backward()
    assert teacher.hidden.grad is None


@pytest.mark.parametrize("beta", [-0.1, 1.5])
def test_beta_outside_its_range(beta):
    for module in (LigerFusedLinearJSDLoss, LigerFusedLinearJSD):
        with pytest.raises(ValueError, match=f"beta={beta} is outside"):
            module(**{"beta" if module is LigerFusedLinearJSDLoss else "jsd_beta": beta})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trl_loss_with_float32_heads(case, dtype):
    """Products run in autocast's dtype, without it in that of the hidden states; gradients are float32."""
    teacher = case.teachers[0]
    hidden, other = case.hidden.detach().to(dtype), teacher.hidden.to(dtype)
    weight, other_weight = case.weight.detach().float().requires_grad_(), teacher.weight.float()
    for on, used in ((True, torch.bfloat16), (False, dtype)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            loss, _, tokens = trl_chunked_divergence_loss(
                hidden.view(3, 4, -1), other.view(3, 4, -1), weight, other_weight, torch.ones(3, 4), 1.0
            )
        judge = TeacherHead(other.to(used), other_weight.to(used))
        want = linear_divergence(hidden.to(used), weight.to(used), [judge], reduction="mean").loss
        torch.testing.assert_close(loss, want)
        assert tokens == 12
        assert torch.autograd.grad(loss, weight)[0].dtype == torch.float32


def test_trl_loss_gathers_a_sharded_weight(case, tmp_path):
    """A ``DTensor`` weight of FSDP2, here on one rank; its gradient is sharded again."""
    teacher = case.teachers[0]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        weight = distribute_tensor(case.weight.detach(), mesh, [Shard(0)]).requires_grad_()
        hidden = (case.hidden.view(3, 4, -1), teacher.hidden.view(3, 4, -1))
        loss, *_ = trl_chunked_divergence_loss(*hidden, weight, teacher.weight, torch.ones(3, 4), 0.0)
        loss.backward()
        want = linear_divergence(*case.student, [teacher], divergence="forward_kl", reduction="mean").loss
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(weight.grad.full_tensor(), grads(want, case)[1])
    finally:
        dist.destroy_process_group()
