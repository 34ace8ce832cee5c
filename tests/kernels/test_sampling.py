"""Gradients from sampled columns: unbiased against float64, with the noise that is predicted, in every setting."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_kernels import TeacherHead, linear_divergence, sampling
from opd_kernels.sampling import inclusion, uniforms

KINDS = ["reverse_kl", "forward_kl", "jsd", "skew_kl"]
ROWS, VOCAB, WIDTH, SHARE, SEEDS = 24, 1024, 12, 0.1, 120


def peaked(teachers: int = 1, dtype=torch.float64, rows=ROWS, vocab=VOCAB, width=WIDTH):
    """Rows whose student and teachers agree on a few live columns, drawn by Zipf's law."""
    g = torch.Generator().manual_seed(3)
    zipf = torch.arange(1, vocab + 1).double().reciprocal()
    columns = torch.multinomial(zipf.expand(rows, -1), 6, generator=g)
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64) / width**0.5
    strength = 4.0 + 3 * torch.rand(rows, 6, generator=g, dtype=torch.float64)
    hidden = (torch.linalg.pinv(weight[columns]) @ strength[..., None])[..., 0]

    def teacher():
        nudge = 0.3 * torch.randn(rows, width, generator=g, dtype=torch.float64)
        return TeacherHead((hidden + nudge).to(dtype), weight.to(dtype))

    heads = [teacher() for _ in range(teachers)]
    return hidden.to(dtype).clone().requires_grad_(), weight.to(dtype).clone().requires_grad_(), heads


def gradients(hidden, weight, teachers, **options):
    out = linear_divergence(hidden, weight, teachers, **options)
    loss = out.loss
    if options.get("reduction") == "none":
        loss = (loss * torch.linspace(-1, 2, len(loss), dtype=loss.dtype)).sum()
    asked = [x for x in (hidden, weight, options.get("student_bias")) if x is not None and x.requires_grad]
    return out, torch.autograd.grad(loss, asked)


def labelled():
    g = torch.Generator().manual_seed(5)
    advantage = torch.randn(ROWS, generator=g)
    advantage[::4] = 0.0
    return {"labels": torch.randint(0, VOCAB, (ROWS,), generator=g), "logprob_weight": advantage}


def masked(teachers: int):
    weight, mix = torch.linspace(0.2, 3, ROWS), torch.full((ROWS, teachers), 1.0 / teachers)
    weight[::3], mix[1], mix[4:9, 0] = 0.0, 0.0, 0.0
    return {"token_weight": weight, "mix": mix}


OPTIONS = {
    "plain": {},
    "mean": {"reduction": "mean", **masked(2)},
    "none": {"reduction": "none"},
    "mixture": {"teacher_reduction": "mixture"},
    "masked and routed": masked(2),
    "labels": {**labelled(), **masked(2)},
    "softcap": {"student_softcap": 20.0, "temperature": 0.5, "student_logit_scale": 1.3},
    "blocks": {"workspace_bytes": 900_000},
}


def dz_of(hidden, weight, teachers, options):
    """[N, V] d loss / d (hidden W^T): the gradient of the states of a student whose head is the identity."""
    logits = (hidden @ weight.t()).detach().requires_grad_()
    return gradients(logits, torch.eye(len(weight), dtype=weight.dtype), teachers, **options)[1][0]


def pi_of(problem, options):
    """{first row of a block: [V] its probabilities} of a call that samples."""
    found, starts = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "inclusion", lambda *given: found.append(inclusion(*given)) or found[-1])
        patch.setattr(sampling, "uniforms", lambda ids, seed, at: starts.append(at) or uniforms(ids, seed, at))
        gradients(*problem, vocab_sample=SHARE, **options)
    return dict(zip(starts, found, strict=True))


def ratio_parts(hidden, weight, teachers, options):
    """[N, V] (u p slope, p, g) of the reverse KL, dZ = u p slope (g - E_p[g])."""
    temperature, cap = options.get("temperature", 1.0), options.get("student_softcap")
    factor = options.get("student_logit_scale", 1.0) / temperature
    z, slope = factor * (hidden @ weight.t()), 1.0
    if cap is not None:
        z = cap / temperature * (z * temperature / cap).tanh()
        slope = 1 - (z * temperature / cap) ** 2
    u = options.get("token_weight", torch.ones(ROWS)).double()
    u = u / u.sum() if options.get("reduction") == "mean" else u
    u = torch.linspace(-1, 2, ROWS) if options.get("reduction") == "none" else u
    mix = options.get("mix", torch.full((ROWS, len(teachers)), 1.0 / len(teachers)))
    gaps = torch.stack([z - (head.hidden @ head.weight.t()) / temperature for head in teachers], 2)
    p = z.softmax(1)
    return (factor * u.double()[:, None] * p * slope).detach(), p.detach(), (gaps @ mix.double()[..., None])[..., 0]


def variances(problem, options, kind):
    """(of dX, of dW): E ||estimate - dense||^2, in closed form.

    With x_v = 1 / pi_v where v is drawn and 0 elsewhere, s_v = 1 / pi_v - 1 is the variance of x_v. An estimate that
    is linear in x has the sum over v of s_v ||what v adds||^2. That of the reverse KL with sampled teachers has
    dZ_v = k_v x_v (g_v - r - q_v - sum over w other than v of x_w q_w), with q = p (g - r) and r the mean of g in
    the certain columns: what v adds in expectation, and products of two.
    """
    hidden, weight, teachers = (problem[0].detach(), problem[1].detach(), problem[2])
    dz, (dx, dw) = dz_of(*problem, options), (0.0, 0.0)
    ratio = kind == "reverse_kl" and options.get("teacher_reduction") != "mixture"
    blocks = pi_of(problem, options)
    stops = [*list(blocks)[1:], ROWS]
    for (start, pi), stop in zip(blocks.items(), stops, strict=True):
        d, h, s = dz[start:stop], hidden[start:stop], torch.where(pi > 0, 1 / pi - 1, 0.0)
        if not ratio:
            dx += (s * d.square().sum(0) * weight.square().sum(1)).sum().item()
            dw += (s[:, None] * (d.t() @ h).square()).sum().item()
            continue
        k, p, g = (x[start:stop].detach() for x in ratio_parts(hidden, weight, teachers, options))
        certain = (pi == 1) * p
        q = p * (g - ((certain * g).sum(1) / certain.sum(1).clamp(min=1e-300))[:, None])
        size, kw, skq = weight.square().sum(1), k @ weight, s * k * q
        for i in range(stop - start):
            adds = d[i, :, None] * weight - q[i, :, None] * (kw[i] - k[i, :, None] * weight)
            dx += (s * adds.square().sum(1)).sum().item()
            dx += ((s * k[i] ** 2 * size).sum() * (s * q[i] ** 2).sum()).item()
            dx += ((skq[i] @ weight).square().sum() - 2 * (skq[i] ** 2 * size).sum()).item()
        dw += (s[:, None] * (d.t() @ h).square()).sum().item()
        dw += ((h @ h.t()) * (((1 + s) * k) @ k.t()) * ((s * q) @ q.t())).sum().item()
        dw -= ((s * (1 + s))[:, None] * ((k * q).t() @ h).square()).sum().item()
    return dx, dw


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_mean_over_seeds_is_the_dense_gradient_and_the_noise_as_predicted(kind, name):
    """The distance of the mean from the exact gradient is below twice its expectation for independent draws: a bias
    of a fifth of the noise would be seen. The noise is that of the closed form."""
    problem, options = peaked(2), {"divergence": kind, **OPTIONS[name]}
    _, exact = gradients(*problem, **options)
    expected = variances(problem, options, kind)
    draws, predicted = [], []
    for seed in range(SEEDS):
        out, found = gradients(*problem, vocab_sample=SHARE, sample_seed=seed, **options)
        draws.append(found)
        predicted.append((out.sampling.hidden_noise.item(), out.sampling.weight_noise.item()))
    for place, truth in enumerate(exact):
        every = torch.stack([draw[place] for draw in draws])
        size, variance = truth.norm().item(), expected[place]
        noise = (every - truth).square().sum((1, 2)).mean().sqrt().item() / size
        assert 0.9 < noise * size / math.sqrt(variance) < 1.1
        distance = (every.mean(0) - truth).norm().item()
        # The squared distance of the mean has the expectation variance / SEEDS; a few components dominate it.
        assert distance < 2.0 * math.sqrt(variance / SEEDS), (distance, math.sqrt(variance / SEEDS))
        mean_prediction = math.sqrt(sum(p[place] ** 2 for p in predicted) / SEEDS)
        # Of a reverse KL, whose E_p[g] is drawn too, the op predicts what is linear in the draw.
        low, high = (0.75, 1.33) if kind == "reverse_kl" else (0.9, 1.1)
        assert low < mean_prediction * size / math.sqrt(variance) < high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "none", "mixture", "softcap and log-probs"])
def test_the_mean_over_every_draw_is_the_dense_gradient(kind, name):
    """All 2^V draws of a small vocabulary, each by its probability: nothing is left to chance."""
    g = torch.Generator().manual_seed(3)
    rows, vocab = 5, 6

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    problem = [normal(rows, 4).requires_grad_(), normal(vocab, 4).requires_grad_()]
    problem.append([TeacherHead(normal(rows, d), normal(vocab, d), normal(vocab)) for d in (5, 3)])
    bias = normal(vocab).requires_grad_()
    mix = torch.rand(rows, 2, generator=g)
    mix[0, 0] = mix[1, 1] = 0.0
    options = {"divergence": kind, "mix": mix, "student_bias": bias}
    options |= {
        "plain": {"reduction": "mean", "token_weight": torch.tensor([1.0, 0.0, 2.0, 0.5, -1.0])},
        "none": {"reduction": "none", "temperature": 0.7},
        "mixture": {"teacher_reduction": "mixture"},
        "softcap and log-probs": {
            "student_softcap": 2.0,
            "labels": torch.tensor([0, 5, 5, 2, 1]),
            "logprob_weight": torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0]),
        },
    }[name]
    _, exact = gradients(*problem, **options)
    means, total, found = [torch.zeros_like(x) for x in exact], 0.0, []
    real = sampling.Sampler._columns
    for drawn in map(torch.tensor, itertools.product((False, True), repeat=vocab)):

        def columns(self, keep, pi, most):
            found.append(pi)
            return real(self, keep, pi, most)

        def numbers(*_, drawn=drawn):
            return torch.where(drawn, -1.0, 2.0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "uniforms", numbers)
            patch.setattr(sampling.Sampler, "_columns", columns)
            _, got = gradients(*problem, vocab_sample=0.4, **options)
        chance = torch.where(drawn, found[-1], 1.0 - found[-1]).prod().item()
        total += chance
        if chance:
            means = [mean + chance * x for mean, x in zip(means, got, strict=True)]
    assert total == pytest.approx(1.0) and (found[-1] < 1).sum() > 0
    for mean, want in zip(means, exact, strict=True):
        torch.testing.assert_close(mean, want, rtol=1e-10, atol=1e-12)


def test_few_columns_are_unbiased_too():
    """Where E_p[g] comes from ten columns, without the term for columns that meet themselves the mean would be off."""
    problem = peaked()
    _, exact = gradients(*problem)
    every = torch.stack([gradients(*problem, vocab_sample=0.01, sample_seed=seed)[1][0] for seed in range(400)])
    assert (every.mean(0) - exact[0]).norm() < 1.5 * (every.var(0).sum() / len(every)).sqrt()


def test_bias_gradient_is_unbiased():
    hidden, weight, teachers = peaked()
    bias = torch.zeros(VOCAB, dtype=torch.float64, requires_grad=True)
    _, (_, _, exact) = gradients(hidden, weight, teachers, student_bias=bias)
    every = torch.stack(
        [
            gradients(hidden, weight, teachers, student_bias=bias, vocab_sample=SHARE, sample_seed=seed)[1][2]
            for seed in range(SEEDS)
        ]
    )
    assert (every.mean(0) - exact).norm() < 2.0 * (every.var(0).sum() / SEEDS).sqrt()


def test_the_loss_is_estimated_from_some_rows_and_says_how_well():
    hidden, weight, teachers = peaked(1, rows=400)
    exact = linear_divergence(hidden, weight, teachers, stats=True)
    found, within = [], 0
    for seed in range(60):
        out = linear_divergence(hidden, weight, teachers, vocab_sample=SHARE, sample_seed=seed, stats=True)
        found.append(out.loss.item())
        within += abs(out.loss.item() - exact.loss.item()) < 2.5 * out.sampling.loss_error.item()
        known = ~out.token_loss.isnan()
        assert known.sum() == 32
        torch.testing.assert_close(out.token_loss[known], exact.token_loss[known])
        torch.testing.assert_close(out.stats.student_entropy, exact.stats.student_entropy)
        torch.testing.assert_close(out.stats.forward_kl[known], exact.stats.forward_kl[known])
        assert out.stats.forward_kl[~known].isnan().all()
    values = torch.tensor(found)
    assert abs(values.mean() - exact.loss.item()) < 4 * values.std() / math.sqrt(len(found))
    assert within >= 50


@pytest.mark.parametrize("kind", KINDS[1:])
def test_other_divergences_have_exact_values(kind):
    problem = peaked(2)
    exact = linear_divergence(*problem, divergence=kind, stats=True)
    out = linear_divergence(*problem, divergence=kind, stats=True, vocab_sample=SHARE)
    assert torch.equal(out.loss, exact.loss) and torch.equal(out.stats.reverse_kl, exact.stats.reverse_kl)
    assert out.sampling.loss_error == 0


def test_log_probs_of_labels_are_exact():
    problem, options = peaked(2), {**labelled(), **masked(2)}
    exact = linear_divergence(*problem, **options)
    out = linear_divergence(*problem, vocab_sample=SHARE, **options)
    torch.testing.assert_close(out.logprob, exact.logprob, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_draws_the_same_again(kind):
    problem = peaked(2)
    first, again, other = (
        gradients(*problem, divergence=kind, vocab_sample=SHARE, sample_seed=seed)[1] for seed in (7, 7, 8)
    )
    for x, y, z in zip(first, again, other, strict=True):
        assert torch.equal(x, y) and not torch.equal(x, z)


def test_no_gradient_no_sample():
    problem = peaked()
    exact = linear_divergence(*problem, stats=True)
    with torch.no_grad():
        out = linear_divergence(*problem, stats=True, vocab_sample=SHARE)
    assert out.sampling is None and torch.equal(out.loss, exact.loss)
    assert not out.stats.reverse_kl.isnan().any()
    reference, _ = gradients(*problem, vocab_sample=SHARE, impl="reference")
    assert reference.sampling.columns == 1 and reference.sampling.hidden_noise == 0


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_parts(kind, frozen):
    hidden, weight, teachers = peaked()
    _, both = gradients(hidden, weight, teachers, divergence=kind, vocab_sample=SHARE)
    place = ("hidden", "weight").index(frozen)
    parts = [x.detach().requires_grad_(i != place) for i, x in enumerate((hidden, weight))]
    out, (got,) = gradients(*parts, teachers, divergence=kind, vocab_sample=SHARE)
    torch.testing.assert_close(got, both[1 - place])
    assert (out.sampling.hidden_noise.isnan(), out.sampling.weight_noise.isnan()) == (place == 0, place == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_narrow_dtypes(dtype, kind):
    problem = peaked(dtype=dtype)
    _, exact = gradients(*problem, divergence=kind)
    out, got = gradients(*problem, divergence=kind, vocab_sample=0.3)
    assert out.sampling.hidden_noise.dtype == torch.float32
    for mine, theirs, noise in zip(got, exact, (out.sampling.hidden_noise, out.sampling.weight_noise), strict=True):
        assert mine.dtype == dtype
        assert (mine - theirs).double().norm() <= (3 * noise + 0.02) * theirs.double().norm()


def test_padded_vocabulary():
    hidden, weight, teachers = peaked()
    _, (_, got) = gradients(hidden, weight, teachers, vocab_size=1000, vocab_sample=SHARE)
    assert got[1000:].abs().max() == 0


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_nan_reaches_the_gradient_and_the_loss(kind):
    hidden, weight, teachers = peaked(rows=100)
    with torch.no_grad():
        hidden[50, 0] = math.nan
    out, got = gradients(hidden, weight, teachers, divergence=kind, vocab_sample=SHARE)
    assert out.loss.isnan() and got[0][50].isnan().any()


def test_a_broken_teacher_is_named():
    hidden, weight, teachers = peaked(rows=100)
    teachers[0].hidden[70, 0] = math.nan
    with pytest.raises(ValueError, match=r"teachers\[0\] has NaN or inf logits, first at row 70"):
        linear_divergence(hidden, weight, teachers, vocab_sample=SHARE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_sample": 1.0}, "vocab_sample=1.0 must lie in"),
        ({"vocab_sample": -0.1}, "vocab_sample=-0.1 must lie in"),
        ({"vocab_sample": True}, "vocab_sample=True must lie in"),
        ({"vocab_sample": 0.1, "sample_seed": 0.5}, "sample_seed=0.5 must be an integer"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        linear_divergence(*peaked(), **options)


def test_products_shrink_to_the_share():
    """Counted FLOPs: the student's logits, a tenth of the rest, and the values of 32 rows; those of oneDNN, which takes
    larger products, are not counted."""
    problem = peaked(dtype=torch.float32, rows=256, vocab=4000, width=32)
    counted = []
    for options in ({}, {"vocab_sample": SHARE}):
        with FlopCounterMode(display=False) as counter:
            gradients(*problem, **options)
        counted.append(counter.get_total_flops())
    assert counted[1] / counted[0] < (1 + 3 * 1.1 * SHARE + 2 * 32 / 256 + 0.05) / 4


def test_inclusion_probabilities():
    score = torch.rand(500, generator=torch.Generator().manual_seed(0)).double() ** 8
    pi = inclusion(score, 50.0)
    assert pi.sum().item() == pytest.approx(50.0) and pi.max() <= 1 and pi.min() >= 0
    free = pi < 1
    assert (pi[free] / score[free]).std() < 1e-9 * (pi[free] / score[free]).mean()
    few = torch.zeros(500).double()
    few[:3] = 1.0
    assert inclusion(few, 50.0)[:3].eq(1).all() and inclusion(few, 50.0)[3:].eq(0).all()


def test_random_numbers_are_uniform_and_independent():
    ids = torch.arange(100_000)
    x, y, z = uniforms(ids, 1, 0), uniforms(ids, 2, 0), uniforms(ids, 1, 256)
    assert x.min() >= 0 and x.max() < 1
    counts = torch.histc(x, 100, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-squared with 99 degrees of freedom: 1 in 10,000
    for other in (y, z, x.roll(1)):
        assert abs(torch.corrcoef(torch.stack([x, other]))[0, 1]) < 0.015
    assert torch.equal(x[500:600], uniforms(ids[500:600], 1, 0))
