"""Compacted backward: the stated bounds on the gradient error, and the work that is saved."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_kernels import TeacherHead, compaction, linear_divergence

KINDS = ["reverse_kl", "forward_kl", "jsd", "skew_kl"]
ROWS, VOCAB, WIDTH = 24, 2048, 16


def peaked(teachers: int = 1, dtype=torch.float64, rows=ROWS, vocab=VOCAB, width=WIDTH, flat=0, live=6):
    """Rows whose student and teachers agree on a few live columns, drawn by Zipf's law; the first
    ``flat`` rows are nearly uniform."""
    g = torch.Generator().manual_seed(3)
    zipf = torch.arange(1, vocab + 1).double().reciprocal()
    columns = torch.multinomial(zipf.expand(rows, -1), live, generator=g)
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64) / width**0.5
    strength = 18.0 + 3 * torch.rand(rows, live, generator=g, dtype=torch.float64)
    steer = torch.linalg.pinv(weight[columns]) @ strength[..., None]
    hidden = steer[..., 0]
    hidden[:flat] = 0.05 * torch.randn(flat, width, generator=g, dtype=torch.float64)

    def teacher():
        nudge = 0.3 * torch.randn(rows, width, generator=g, dtype=torch.float64)
        return TeacherHead((hidden + nudge).to(dtype), weight.to(dtype))

    heads = [teacher() for _ in range(teachers)]
    return hidden.to(dtype).clone().requires_grad_(), weight.to(dtype).clone().requires_grad_(), heads


def gradients(hidden, weight, teachers, **options):
    reduction = options.get("reduction", "sum")
    out = linear_divergence(hidden, weight, teachers, **options)
    loss = out.loss if reduction != "none" else (out.loss * torch.linspace(-1, 2, len(out.loss))).sum()
    return out, torch.autograd.grad(loss, (hidden, weight))


def row_mass(hidden, weight, teachers, **options):
    """[N] 1-norm of d loss / d logits, by autograd through a head of size V."""
    logits = (hidden @ weight.t()).detach().requires_grad_()
    out = linear_divergence(
        logits, torch.eye(weight.shape[0], dtype=weight.dtype), teachers, **{**options, "impl": "reference"}
    )
    loss = out.loss if options.get("reduction") != "none" else (out.loss * torch.linspace(-1, 2, len(out.loss))).sum()
    return torch.autograd.grad(loss, logits)[0].abs().sum(1)


def masks(teachers: int):
    weight, mix = torch.ones(ROWS), torch.full((ROWS, teachers), 1.0 / teachers)
    weight[::3], mix[1] = 0.0, 0.0
    mix[4, 0] = 0.0
    return {"token_weight": weight * torch.linspace(0.2, 3, ROWS), "mix": mix}


@pytest.mark.parametrize("tolerance", [1e-3, 3e-2, 0.3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teachers", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "mean"}, {"reduction": "none"}, {"teacher_reduction": "mixture"}, {"masked": True}, {"flat": 5}],
    ids=lambda o: next(iter(o), "plain"),
)
def test_gradient_error_is_within_the_stated_bounds(kind, teachers, tolerance, options):
    options = dict(options)
    flat, masked = options.pop("flat", 0), options.pop("masked", False)
    problem = peaked(teachers, flat=flat)
    options |= {"divergence": kind, "workspace_bytes": 700_000} | (masks(teachers) if masked else {})
    _, exact = gradients(*problem, **options)
    out, got = gradients(*problem, **options, backward_tolerance=tolerance, stats=True)
    dropped = out.stats.dropped_mass
    mass = row_mass(*problem, **options)
    computed = ~out.token_loss.isnan()
    assert torch.equal(dropped.isnan(), ~computed)
    dropped = torch.where(computed, dropped, 0.0)
    assert dropped.max() <= tolerance
    assert dropped.max() > 0, "nothing was dropped"
    hidden, weight = problem[0].detach(), problem[1].detach()
    slack = 1e-9
    hidden_error = (got[0] - exact[0]).norm(dim=1)
    assert (hidden_error <= dropped * mass * weight.norm(dim=1).max() + slack).all()
    weight_error = (got[1] - exact[1]).norm(dim=1).sum()
    assert weight_error <= (dropped * mass * hidden.norm(dim=1)).sum() + slack
    assert weight_error > 1e-3 * (dropped * mass * hidden.norm(dim=1)).sum(), "the statistic is not the dropped mass"


def test_loss_and_statistics_do_not_change():
    problem = peaked(2)
    dense, _ = gradients(*problem, stats=True)
    out, _ = gradients(*problem, stats=True, backward_tolerance=0.01)
    assert torch.equal(out.loss, dense.loss)
    assert torch.equal(out.stats.reverse_kl, dense.stats.reverse_kl)
    assert dense.stats.dropped_mass is None


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_parts(frozen):
    hidden, weight, teachers = peaked()
    _, full = gradients(hidden, weight, teachers, backward_tolerance=0.01)
    place = ("hidden", "weight").index(frozen)
    parts = [x.detach().requires_grad_(i != place) for i, x in enumerate((hidden, weight))]
    out = linear_divergence(*parts, teachers, backward_tolerance=0.01)
    (got,) = torch.autograd.grad(out.loss, [parts[1 - place]])
    torch.testing.assert_close(got, full[1 - place])


def test_bias_gradient_is_exact():
    hidden, weight, teachers = peaked()
    bias = torch.zeros(VOCAB, dtype=torch.float64, requires_grad=True)
    exact, got = (
        torch.autograd.grad(
            linear_divergence(hidden, weight, teachers, student_bias=bias, backward_tolerance=t).loss, bias
        )[0]
        for t in (0.0, 0.3)
    )
    torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    hidden, weight, teachers = peaked(dtype=dtype)
    _, exact = gradients(hidden, weight, teachers)
    out, got = gradients(hidden, weight, teachers, backward_tolerance=0.01, stats=True)
    assert out.stats.dropped_mass.dtype == torch.float32
    assert 0 < out.stats.dropped_mass.max() <= 0.01
    for mine, theirs in zip(got, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine - theirs).double().norm() <= 0.02 * theirs.double().norm()


def test_padded_vocabulary_and_no_gradient():
    hidden, weight, teachers = peaked()
    out, (_, got) = gradients(hidden, weight, teachers, vocab_size=2000, backward_tolerance=0.01, stats=True)
    assert got[2000:].abs().max() == 0
    assert out.stats.dropped_mass.max() <= 0.01
    with torch.no_grad():
        out = linear_divergence(hidden, weight, teachers, backward_tolerance=0.01, stats=True)
    assert out.stats.dropped_mass.isnan().all()
    reference = linear_divergence(hidden, weight, teachers, backward_tolerance=0.01, stats=True, impl="reference")
    assert reference.stats.dropped_mass.eq(0).all()


def test_dense_where_nothing_can_be_dropped():
    """Flat rows: same gradients to the last bit, and no dropped mass."""
    problem = peaked(flat=ROWS)
    _, exact = gradients(*problem)
    out, got = gradients(*problem, backward_tolerance=1e-4, stats=True)
    assert torch.equal(got[0], exact[0])
    assert torch.equal(got[1], exact[1])
    assert out.stats.dropped_mass.eq(0).all()


def test_rows_without_gradient_drop_nothing():
    hidden, weight, _ = peaked()
    same = TeacherHead(hidden.detach().clone(), weight.detach())
    out, (dx, dw) = gradients(hidden, weight, [same], backward_tolerance=0.01, stats=True)
    assert not out.stats.dropped_mass.isnan().any()
    assert dx.isfinite().all()
    assert dw.isfinite().all()


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("flat", "groups"), [(0, 1), (12, 2)])
def test_flops_fall_with_the_share_of_kept_columns(monkeypatch, flat, groups):
    """dX and dW cost 4 c k d for each group of c rows and k columns; the choice itself costs one
    product with L columns."""
    rows, vocab, width = 64, 4096, 256
    hidden, weight, teachers = peaked(rows=rows, vocab=vocab, width=width, flat=flat, dtype=torch.float32)
    parts = []
    choose = compaction.Compactor.choose

    def watched(self, dz):
        found = choose(self, dz)
        assert found[0] is not None, "dense"
        parts.extend(found[0])
        return found

    monkeypatch.setattr(compaction.Compactor, "choose", watched)

    def step(tolerance):
        loss = linear_divergence(hidden, weight, teachers, backward_tolerance=tolerance).loss
        return flops(loss.backward) + flops(
            lambda: linear_divergence(hidden, weight, teachers, backward_tolerance=tolerance)
        )

    forward = 2 * 2 * rows * vocab * width
    dense = 4 * rows * vocab * width
    selection = 2 * rows * vocab * compaction.LEVELS
    assert step(0.0) == forward + dense
    measured = step(0.02)
    found = parts[: len(parts) // 2]
    kept = sum(
        (rows if p.rows is None else p.rows.numel()) * (vocab if p.columns is None else p.columns.numel())
        for p in found
    )
    assert len(found) == groups
    assert measured == forward + selection + 4 * kept * width
    assert kept < (0.1 if groups == 1 else 0.4) * rows * vocab


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan"), True, "0"])
def test_bad_tolerance(tolerance):
    hidden, weight, teachers = peaked()
    with pytest.raises(ValueError, match=r"backward_tolerance=.*must lie in"):
        linear_divergence(hidden, weight, teachers, backward_tolerance=tolerance)


@pytest.mark.parametrize("budget", [8 << 20, 24 << 20])
def test_peak_memory_stays_within_the_budget(peak_bytes, budget):
    hidden, weight, teachers = peaked(rows=128, vocab=16384, width=32, flat=16, dtype=torch.float32)

    def step():
        out = linear_divergence(hidden, weight, teachers, workspace_bytes=budget, backward_tolerance=0.02)
        return out, torch.autograd.grad(out.loss, (hidden, weight))

    assert peak_bytes(step) - (hidden.numel() + weight.numel()) * 4 <= budget + 64 * 128 * 3
