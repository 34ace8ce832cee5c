"""impl="triton" against the float64 reference, on a GPU or in Triton's interpreter.

Not collected under this name: ``test_triton_interpreter.py`` runs it in a process of its own with
TRITON_INTERPRET=1, ``tests/gpu`` on a CUDA device. Sizes are small, blocks smaller where they are
interpreted, so that a row has several blocks and an incomplete last one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import jit

from opd_kernels import (
    TeacherHead,
    columns,
    driver,
    linear_divergence,
    linear_logprob,
    rows,
    sampled,
    sampling,
    selection,
    token_stats,
    triton_columns,
    triton_impl,
    validation,
)
from opd_kernels import table as table_fields
from opd_kernels.chunk import Chunk, Task
from opd_kernels.problem import Rule
from opd_kernels.reference import divergence_of
from opd_kernels.triton_impl import TritonRowOps

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
VOCAB = 4099 if CUDA else 37
SMALL = 1_000_000 if CUDA else 12_000  # bytes: several chunks
KINDS = ["reverse_kl", "forward_kl", "jsd", "skew_kl"]
REDUCTIONS = ["sum", "mixture"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if not CUDA:
        monkeypatch.setattr(rows, "BLOCK", 16)


@pytest.fixture(autouse=True)
def patched_once(monkeypatch):
    """The interpreter replaces the functions of ``triton.language`` at each call of a jitted function by another,
    which takes most of its time; once per launch is enough."""
    if CUDA:
        return
    from triton import language
    from triton.runtime import interpreter

    replace_all = interpreter._patch_lang

    def replace_missing(fn):
        seen = [lang for lang in (language, language.core) if any(value is lang for value in fn.__globals__.values())]
        done = not any(language.core.is_builtin(lang.load) for lang in seen)
        return interpreter._LangPatchScope() if done else replace_all(fn)

    monkeypatch.setattr(interpreter, "_patch_lang", replace_missing)


@dataclass
class Case:
    """A student and K teachers; ``double()`` gives the same numbers in float64."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teachers: list[TeacherHead]
    labels: Tensor

    def double(self) -> Case:
        def up(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().double().requires_grad_(x.requires_grad)

        teachers = [replace(t, hidden=up(t.hidden), weight=up(t.weight), bias=up(t.bias)) for t in self.teachers]
        return Case(up(self.hidden), up(self.weight), up(self.bias), teachers, self.labels)

    def inputs(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]


def make(
    teachers: int = 1, *, count: int = 6, vocab: int = VOCAB, spread: float = 1.0, bias: bool = False, seed: int = 0
) -> Case:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(DEVICE)

    heads = [
        TeacherHead(normal(count, 7 + k, scale=spread), normal(vocab, 7 + k), normal(vocab) if bias else None)
        for k in range(teachers)
    ]
    return Case(
        hidden=normal(count, 6, scale=spread).requires_grad_(),
        weight=normal(vocab, 6).requires_grad_(),
        bias=normal(vocab).requires_grad_() if bias else None,
        teachers=heads,
        labels=torch.randint(0, vocab, (count,), generator=g).to(DEVICE),
    )


def solve(case: Case, impl: str, **options) -> list[Tensor]:
    """Loss, per-token losses, gradients and statistics."""
    out = linear_divergence(
        case.hidden, case.weight, case.teachers, student_bias=case.bias, labels=case.labels, impl=impl, **options
    )
    upstream = torch.linspace(0.5, 1.5, max(1, out.loss.numel()), dtype=out.loss.dtype, device=DEVICE)
    gradients = torch.autograd.grad(out.loss, case.inputs(), upstream.view(out.loss.shape))
    statistics = [] if out.stats is None else [x for x in vars(out.stats).values() if x is not None]
    logprob = [] if out.logprob is None else [out.logprob]
    return [out.loss.detach(), out.token_loss, *gradients, *logprob, *statistics]


def assert_close(got: list[Tensor], want: list[Tensor], floor: float = 2e-6, lost: list[Tensor] | None = None) -> None:
    """Largest error at most 2e-5 of the largest entry, or three times what ``lost`` has."""
    assert len(got) == len(want)
    for place, (mine, exact) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(mine.isnan(), exact.isnan()), place
        allowed = 2e-5 * exact.nan_to_num().abs().max() + floor
        if lost is not None:
            allowed += 3 * (lost[place].double() - exact).nan_to_num().abs().max()
        error = (mine.double() - exact).nan_to_num().abs().max()
        assert error <= allowed, f"result {place}: error {error:.2e}, allowed {allowed:.2e}"


def check(case: Case, **options) -> None:
    assert_close(solve(case, "triton", **options), solve(case.double(), "reference", **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teachers", [1, 2, 3])
@pytest.mark.parametrize("teacher_reduction", REDUCTIONS)
def test_divergence(kind, teachers, teacher_reduction):
    """One chunk, uniform weights, every statistic."""
    check(make(teachers), divergence=kind, teacher_reduction=teacher_reduction, stats=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teachers", [1, 2, 3])
@pytest.mark.parametrize("teacher_reduction", REDUCTIONS)
def test_weights(kind, teachers, teacher_reduction):
    """Rows with different teachers, without teacher and without weight; several chunks."""
    mix = torch.tensor([[0.3, 0.5, 0.2], [0.0, 0.4, 0.0], [0.7, 0.0, 0.0], [0.0, 0.0, 0.0], [0.2, 0.9, 0.0], [1, 2, 3]])
    options = {
        "divergence": kind,
        "teacher_reduction": teacher_reduction,
        "mix": mix[:, :teachers].to(DEVICE),
        "token_weight": torch.tensor([0.5, 2.0, 0.0, 1.0, 1.5, 0.3], device=DEVICE),
        "temperature": 1.3,
        "workspace_bytes": SMALL,
    }
    check(make(teachers), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_reduction", REDUCTIONS)
def test_as_in_a_cuda_graph(kind, teacher_reduction, monkeypatch):
    """Every teacher on every row, whatever the weights, as while a graph is captured."""
    case, mix = make(3), torch.tensor([[0.3, 0.5, 0.2], [0, 0.4, 0], [0.7, 0, 0], [0, 0, 1], [0.2, 0.9, 0], [1, 2, 3]])
    token_weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 1.5, 0.3], device=DEVICE)
    options = {"divergence": kind, "teacher_reduction": teacher_reduction, "mix": mix.to(DEVICE)}
    want = solve(case.double(), "reference", token_weight=token_weight, **options)
    for module in (selection, validation, driver):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    got = solve(case, "triton", token_weight=token_weight, workspace_bytes=SMALL, **options)
    assert got[1].isfinite().all()
    got[1][2] = torch.nan  # the row without weight was computed
    assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_reductions(kind, reduction):
    check(make(2), divergence=kind, reduction=reduction, mix=[0.9, 0.4], stats=reduction == "mean")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_reduction", REDUCTIONS)
def test_bias_scale_and_softcap(kind, teacher_reduction):
    """A head with a softcap, one with columns switched off, a student with both kinds of slopes."""
    case = make(2, bias=True, spread=2.0)
    off = case.teachers[1].bias.clone()
    off[-3:] = -torch.inf
    case.teachers = [
        replace(case.teachers[0], logit_scale=1.4, softcap=2.0),
        replace(case.teachers[1], bias=off, logit_scale=0.3),
    ]
    options = {"student_softcap": 1.5, "student_logit_scale": 0.6, "temperature": 0.8}
    kept = {"divergence": kind, "teacher_reduction": teacher_reduction, "vocab_size": VOCAB - 3}
    check(case, **options, **kept)
    check(case, **options, divergence="forward_kl", stats=True)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_switched_off(kind):
    """-inf in the same columns of all heads equals leaving them out."""
    case, bias = make(2), torch.zeros(VOCAB, device=DEVICE)
    bias[-7:] = -torch.inf
    case.labels = case.labels.clamp(max=VOCAB - 8)
    cut = solve(case.double(), "reference", divergence=kind, vocab_size=VOCAB - 7, stats=True)
    case.bias = bias
    case.teachers = [replace(t, bias=bias) for t in case.teachers]
    case.inputs = lambda: [case.hidden, case.weight]
    assert_close(solve(case, "triton", divergence=kind, stats=True), cut)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_reduction", REDUCTIONS)
def test_extreme_logits(kind, teacher_reduction):
    """Logits of +-100 and more: no NaN, and no more error than plain float32 has."""
    case = make(2, spread=40.0)
    assert (case.hidden @ case.weight.t()).abs().max() > 100
    options = {"divergence": kind, "teacher_reduction": teacher_reduction, "stats": True}
    got, plain = solve(case, "triton", **options), solve(case, "reference", **options)
    assert all(x.isfinite().all() for x in got)
    assert_close(got, solve(case.double(), "reference", **options), floor=2e-5, lost=plain)


@pytest.mark.parametrize("vocab", [1, 16, 33, 48])
def test_widths(vocab):
    """One column, exact multiples of a block, a last block with one column."""
    case = make(2, vocab=vocab, count=3)
    for kind in ("reverse_kl", "jsd"):
        check(case, divergence=kind, stats=True)


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
@pytest.mark.parametrize(("budget", "block"), [(None, 256), (3 * SMALL, 256), (None, 2)])
def test_sampled_gradients_are_those_of_torch(kind, budget, block, monkeypatch):
    """The same columns are drawn, on rows without a teacher or weight and with a label, too; in one block and in
    several of them that are drawn together or after each other."""
    monkeypatch.setitem(sampling.BLOCK_ROWS, DEVICE, block)
    monkeypatch.setattr(sampling, "DRAWN_TOGETHER", 2)
    monkeypatch.setattr(sampled, "DRAWN_TOGETHER", 2)
    case = make(2, spread=4.0, bias=True)
    options = {
        "divergence": kind,
        "mix": torch.tensor([[0.3, 0.5], [0.9, 0.4], [0.7, 0.0], [0.0, 0.0], [0.2, 0.9], [1.0, 2.0]], device=DEVICE),
        "token_weight": torch.tensor([0.5, 2.0, 0.0, 1.0, 1.5, 0.3], device=DEVICE),
        "labels": case.labels,
        "logprob_weight": torch.tensor([0.5, 0.0, 0.0, -0.2, 0.0, 0.1], device=DEVICE),
        "student_softcap": 9.0,
        "stats": True,
        "vocab_sample": 0.3,
        "sample_seed": 5,
        "workspace_bytes": budget,
    }

    def step(impl: str) -> tuple[Tensor, ...]:
        out = linear_divergence(case.hidden, case.weight, case.teachers, student_bias=case.bias, impl=impl, **options)
        assert out.sampling.columns > 0
        noise = (out.sampling.hidden_noise, out.sampling.weight_noise, out.sampling.columns)
        return out.loss, out.stats.student_entropy, *noise, *torch.autograd.grad(out.loss, case.inputs())

    for mine, other in zip(step("triton"), step("torch"), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_sampled_columns_of_one_teacher(kind):
    """Of all rows: its logits are taken as they are, not summed."""
    case, results = make(1, spread=4.0), []
    options = {"divergence": kind, "vocab_sample": 0.3, "labels": case.labels, "logprob_weight": LOGPROB_WEIGHT}
    for impl in ("triton", "torch"):
        out = linear_divergence(case.hidden, case.weight, case.teachers, impl=impl, **options)
        noise = (out.sampling.hidden_noise, out.sampling.weight_noise)
        results.append((*noise, *torch.autograd.grad(out.loss, (case.hidden, case.weight))))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_sampled_columns_of_what_is_not_finite(kind):
    """A student's NaN reaches loss and gradient, a teacher's is named."""
    case = make(1)
    case.teachers[0].hidden[4, 0] = torch.nan
    with pytest.raises(ValueError, match=r"teachers\[0\] has NaN or inf logits, first at row 4"):
        solve(case, "triton", divergence=kind, vocab_sample=0.3)
    case = make(1)
    with torch.no_grad():
        case.hidden[3, 0] = torch.nan
    out = linear_divergence(case.hidden, case.weight, case.teachers, divergence=kind, impl="triton", vocab_sample=0.3)
    rows_of, weight = torch.autograd.grad(out.loss, (case.hidden, case.weight))
    assert out.loss.isnan() and rows_of[3].isnan().any() and weight.isnan().any()


def scores(blocks: int, vocab: int, power: float) -> Tensor:
    """[B, V rounded up] positive float32 numbers over some orders of magnitude, 0 in columns that do not exist."""
    g = torch.Generator().manual_seed(4)
    out = torch.zeros(blocks, -(-vocab // 16) * 16)
    out[:, :vocab] = torch.rand(blocks, vocab, generator=g) ** power
    return out.to(DEVICE)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("seed", [3, 2**63 + 12345, -7])
def test_a_draw_is_that_of_torch(labelled, seed, monkeypatch):
    """In every block; one has fewer columns with a score than may be drawn, one none, one a score that is NaN."""
    monkeypatch.setattr(columns, "SWEEP", 64)
    vocab, block_rows, start, first, share = 301, 3, 40, 1000, 0.2
    score = scores(5, vocab, 8.0)
    score[1, 7:] = 0.0
    score[2] = 0.0
    score[3, 5] = torch.nan
    budget, most = share * vocab, 112
    labels = torch.arange(-1, 13, device=DEVICE) * 20 % vocab
    labels[0] = -1
    table = torch.zeros(table_fields.FIELDS, 14, device=DEVICE)
    table[table_fields.LABEL_SCALE, ::2] = 1.0
    device_seed = triton_columns.seed_on_device(seed, score.device)
    options = {"labels": labels, "table": table} if labelled else {}
    got = triton_columns.draw(score.clone(), vocab, budget, device_seed, start, block_rows, first, most, **options)
    ids = torch.arange(first, first + vocab, device=DEVICE)
    for block in range(5):
        pi = sampling.inclusion(score[block, :vocab], budget)
        if labelled:
            rows_of = slice(3 * block, min(14, 3 * block + 3))
            own = labels[rows_of][table[table_fields.LABEL_SCALE, rows_of] != 0]
            pi[own[own >= 0]] = 1.0
        keep = sampling.uniforms(ids, seed, start + 3 * block) < pi
        want = torch.nonzero(keep)[:, 0]
        count = want.numel()
        assert got.counts[block].sum() == count <= most
        assert torch.equal(got.columns[block, :count], want) and not got.columns[block, count:].any()
        torch.testing.assert_close(got.inverse[block, :count], pi[want].reciprocal().float())
        assert not got.inverse[block, count:].any()
        assert torch.equal(got.known[block, :vocab] > 0, keep)


def test_the_draw_leaves_out_what_has_no_place():
    score = scores(1, 301, 1.0)
    seed = triton_columns.seed_on_device(0, score.device)
    many, few = (triton_columns.draw(score, 301, 100.0, seed, 0, 8, 0, most) for most in (160, 32))
    assert many.counts.sum() > 32 and torch.equal(many.columns[:, :32], few.columns)
    assert torch.equal(many.inverse[:, :32], few.inverse)


@pytest.mark.parametrize("power", [1.0, 20.0])
def test_inclusion_probabilities_sum_up_to_the_budget(power):
    """To the rounding of float64 sums, whatever the order of magnitude of a score, and as torch finds them, which takes
    the budget in float32."""
    vocab, budget = 20_011, 2001.1
    score = scores(2, vocab, power)
    factor = torch.full((2,), budget, dtype=torch.float64, device=DEVICE)
    columns.inclusion_kernel[(2,)](
        score, factor, vocab, score.shape[1] // 16, ROUNDS=triton_columns.ROUNDS, TILES=5, BLOCK=4096, num_warps=16
    )
    for own, line in zip(factor, score, strict=True):
        pi = (line.double() * own).clamp(max=1.0)[:vocab]
        assert abs(pi.sum().item() / budget - 1) < 1e-12
        torch.testing.assert_close(pi, sampling.inclusion(line[:vocab], budget), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_of_dz(dtype, monkeypatch):
    """Sums of squares of every block, the last one with fewer rows, and drawn columns divided by pi."""
    monkeypatch.setattr(rows, "ROWS", 4)
    monkeypatch.setattr(columns, "ROWS", 4)
    monkeypatch.setattr(columns, "PLACES", 16)
    g = torch.Generator().manual_seed(2)
    dz = torch.full((19, 64), torch.nan)[:, :37]
    dz.copy_(torch.randn(19, 37, generator=g))
    dz = torch.empty(19, 64, dtype=dtype, device=DEVICE)[:, :37].copy_(dz)
    found = triton_columns.squares_of_dz(dz, 7)
    want = torch.stack([part.double().square().sum(0) for part in dz.split(7)])
    torch.testing.assert_close(found[:, :37].double(), want, rtol=1e-5, atol=1e-6)
    assert found.shape[1] % 16 == 0 and not found[:, 37:48].any()
    column = torch.zeros(32, dtype=torch.int64, device=DEVICE)
    inverse = torch.zeros(32, device=DEVICE)
    column[:20], inverse[:20] = torch.arange(3, 23, device=DEVICE), torch.linspace(1, 4, 20, device=DEVICE)
    got, sums = triton_columns.scaled(dz, column, inverse, dtype)
    want = dz[:, column].float() * inverse
    torch.testing.assert_close(got, want.to(dtype))
    spread = torch.where(inverse > 0, 1 - 1 / inverse.clamp(min=1), 0.0)
    torch.testing.assert_close(sums, (want.square().sum(0) * spread)[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 40])
def test_rows_of_weights(dtype, width, monkeypatch):
    """Taken from a weight whose rows lie apart, and added to a gradient; places without a column change nothing."""
    monkeypatch.setattr(columns, "WIDTH", 16)
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(50, 48, generator=g).to(DEVICE, dtype)[:, :width]
    column = torch.tensor([3, 4, 49, 0, 0], device=DEVICE)
    inverse = torch.tensor([1.0, 2.0, 5.0, 0.0, 0.0], device=DEVICE)
    own, sizes = triton_columns.take(weight, column, torch.float32)
    assert torch.equal(own, weight[column].float())
    torch.testing.assert_close(sizes, own.square().sum(1))
    target = torch.randn(50, width, generator=g).to(DEVICE)
    want = target.clone().index_add_(0, column[:3], own[:3])
    own[3:] = torch.nan
    spreads = triton_columns.add_rows(own, column, inverse, target)
    assert torch.equal(target, want)
    torch.testing.assert_close(spreads, sizes * torch.tensor([0, 0.5, 0.8, 0, 0], device=DEVICE))


class Launches(TorchDispatchMode):
    """Counts what starts kernels on a GPU: torch operations that are not views, and launches of Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.within = 0, False

    def launch(self, kernel, *args, **kwargs):
        """Run a kernel; what the interpreter does with torch does not count."""
        self.count, self.within = self.count + 1, True
        kernel(*args, **kwargs)
        self.within = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        empty = func.overloadpacket.__name__ in ("empty", "empty_like", "new_empty", "empty_strided", "detach")
        self.count += not (func.is_view or empty or self.within)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "most"), [("reverse_kl", 20), ("jsd", 12)])
def test_launches_for_a_block(kind, most, monkeypatch):
    """What another block of rows costs the host. The search for pi alone, in torch operations, would take hundreds."""
    case, counts = make(1, count=8, spread=4.0), []

    def get(kernel, grid):
        return lambda *args, **kwargs: mode.launch(plain(kernel, grid), *args, **kwargs)

    plain = jit.KernelInterface.__getitem__
    monkeypatch.setattr(jit.KernelInterface, "__getitem__", get)
    for block in (8, 2):
        monkeypatch.setitem(sampling.BLOCK_ROWS, DEVICE, block)
        with Launches() as mode:
            out = linear_divergence(
                case.hidden, case.weight, case.teachers, divergence=kind, impl="triton", vocab_sample=0.3
            )
            torch.autograd.grad(out.loss, (case.hidden, case.weight))
        counts.append(mode.count)
    assert (counts[1] - counts[0]) / 3 <= most, counts
    assert counts[0] <= 300, counts


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_smallest_workspace(share):
    """The bytes that the error names are enough."""
    case = make(2)
    with pytest.raises(ValueError, match=r"pass workspace_bytes >= \d+$") as error:
        solve(case, "triton", workspace_bytes=1, vocab_sample=share)
    enough = int(str(error.value).split()[-1])
    solve(case, "triton", workspace_bytes=enough, vocab_sample=share)


def near_teacher(case: Case, sigma: float, seed: int = 3) -> TeacherHead:
    """t = z + sigma * noise: KL about sigma^2 / 2."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = case.hidden.detach(), case.weight.detach()
    wide = torch.randn(hidden.shape[0], 4, generator=g).to(hidden) * 0.5
    noise = sigma * torch.randn(weight.shape[0], 4, generator=g).to(weight)
    return TeacherHead(torch.cat([hidden, wide], 1), torch.cat([weight, noise], 1))


@pytest.mark.parametrize("sigma", [0.42, 0.2, 0.04])
@pytest.mark.parametrize("kind", KINDS)
def test_small_divergences(kind, sigma, monkeypatch):
    """Gradients between close models keep their digits: at most three times the error of plain
    float32."""
    monkeypatch.setattr(rows, "BLOCK", 2048)
    case = make(count=4, vocab=4099, spread=0.5)
    case.teachers = [near_teacher(case, sigma)]
    want = solve(case.double(), "reference", divergence=kind)
    plain = solve(case, "reference", divergence=kind)
    got = solve(case, "triton", divergence=kind)
    for mine, lost, exact in zip(got[2:], plain[2:], want[2:], strict=True):
        error, other = (x.double().sub(exact).norm() / exact.norm() for x in (mine, lost))
        assert error <= 3 * other + 1e-5, (float(error), float(other))


def test_statistics_of_tokens():
    """``token_stats``, rows left out included; a label's log-prob never enters another row."""
    case, mix = make(2), torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0], [1, 1], [1, 1.0]], device=DEVICE)

    def call(case, impl):
        out = token_stats(
            case.hidden.detach(),
            case.weight.detach(),
            case.teachers,
            labels=case.labels,
            mix=mix,
            token_weight=torch.tensor([1, 1, 1, 1, 0, 1.0], device=DEVICE),
            temperature=0.7,
            impl=impl,
            workspace_bytes=SMALL,
        )
        return [x for x in vars(out).values() if x is not None]

    assert_close(call(case, "triton"), call(case.double(), "reference"))


@pytest.mark.parametrize("view", ["column", "every second", "expanded"])
def test_views_of_vectors(view):
    """Labels, biases and weights that are not dense."""
    from test_vectors import VIEWS, results

    options = {"device": DEVICE, "impl": "triton"}
    dense = results(lambda x: VIEWS[view](x).contiguous(), **options)
    for mine, other in zip(results(VIEWS[view], **options), dense, strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_logprob(entropy, softcap):
    """Log-probs, entropies and gradients; one row has no upstream gradient."""
    case = make(bias=True)

    def call(case, impl):
        out = linear_logprob(
            case.hidden,
            case.weight,
            case.labels,
            bias=case.bias,
            softcap=softcap,
            logit_scale=1.2,
            temperature=0.9,
            impl=impl,
            workspace_bytes=SMALL,
        )
        up = torch.linspace(-1.0, 1.5, case.hidden.shape[0], dtype=out.logprob.dtype, device=DEVICE)
        up[2] = 0.0
        loss = (up * out.logprob).sum() + ((0.3 * up * out.entropy).sum() if entropy else 0.0)
        assert not out.top1_prob.requires_grad
        gradients = torch.autograd.grad(loss, case.inputs())
        return [out.logprob.detach(), out.entropy.detach(), out.top1_prob, *gradients]

    assert_close(call(case, "triton"), call(case.double(), "reference"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("teacher_reduction", REDUCTIONS)
def test_teacher_that_is_not_finite(value, kind, teacher_reduction):
    case = make(2)
    case.teachers[1].hidden[4] = value
    with pytest.raises(ValueError, match=r"teachers\[1\] has NaN or inf logits, first at row 4"):
        solve(case, "triton", divergence=kind, teacher_reduction=teacher_reduction)


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_teacher_with_a_logit_of_minus_infinity(kind):
    """The normaliser is finite, the teacher is not."""
    case = make(2)
    case.teachers[1].hidden[:, 0] = 1.0
    case.teachers[1].weight[5, 0] = -torch.inf
    for impl in ("triton", "reference"):
        with pytest.raises(ValueError, match=r"teachers\[1\] has NaN or inf logits, first at row 0"):
            solve(case, impl, divergence=kind)


def test_student_that_is_not_finite():
    case = make(2)
    with torch.no_grad():
        case.hidden[3, 0] = float("nan")
    assert solve(case, "triton", divergence="jsd")[0].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [False, True])
def test_gradient_in_half_precision(kind, dtype, whole):
    """dZ rounded on the way out, into rows of another stride, stage by stage and as a whole; columns beyond V
    are not read."""
    g = torch.Generator().manual_seed(1)
    logits = torch.full((2, 4, 48 + (VOCAB // 16) * 16), torch.nan, device=DEVICE)[..., :VOCAB]
    logits.copy_(torch.randn(2, 4, VOCAB, generator=g))
    table = torch.zeros(2, table_fields.FIELDS, 4, device=DEVICE)
    table[1, table_fields.WEIGHT], table[0, table_fields.SCALE] = 1.0, 2.0
    out = torch.full((4, 96 + (VOCAB // 16) * 16), torch.nan, dtype=dtype, device=DEVICE)[:, :VOCAB]
    task = Task(Rule(kind, 0.3, 0.2), gradient=True)
    ops, chunk = TritonRowOps(task, VOCAB), Chunk(logits, table, None, out)
    if whole:
        ops.solve(chunk)
    else:
        ops.statistics(chunk)
        if not task.one_sweep:
            ops.terms(chunk)
        ops.gradient(chunk)
    z = logits[0].double().requires_grad_()
    reference = divergence_of(task.rule, z.log_softmax(1), logits[1].double().log_softmax(1))
    (want,) = torch.autograd.grad(2.0 * reference.sum(), z)
    of = {"reverse_kl": table_fields.reverse_kl, "forward_kl": table_fields.forward_kl}
    value = of[kind](table, 1) if kind in of else table[0, table_fields.VALUE]
    torch.testing.assert_close(value.double(), reference.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.double(), want, rtol=1 / 100, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teachers", [1, 3])
def test_everything_at_once(kind, teachers):
    """Statistics, the log-prob term and the divergence in one call; and a mixture."""
    check(make(teachers), divergence=kind, stats=True, logprob_weight=LOGPROB_WEIGHT)
    check(make(teachers), divergence=kind, teacher_reduction="mixture")


LOGPROB_WEIGHT = torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0, -0.3], device=DEVICE)


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logprob_term(kind, softcap, reduction):
    """In the same pass; one row has no divergence, one no log-prob, one neither."""
    options = {
        "divergence": kind,
        "reduction": reduction,
        "token_weight": torch.tensor([0.5, 2.0, 0.0, 0.0, 1.5, 0.3], device=DEVICE),
        "logprob_weight": LOGPROB_WEIGHT,
        "student_softcap": softcap,
        "workspace_bytes": SMALL,
    }
    check(make(2, bias=True), **options)


@pytest.mark.parametrize("parts", [(0, 5, 37), (0, 0, 37), (0, 16, 32, 37)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_parts_of_a_vocabulary(parts, kind, reduction):
    """Shards run the same stages: their tables merge into that of the whole rows."""
    case, labels = make(2), torch.tensor([0, 4, 5, 16, 36, 31], device=DEVICE)
    logits = torch.stack([case.hidden @ case.weight.t(), *(t.hidden @ t.weight.t() for t in case.teachers)]).detach()
    logits = logits[..., :37]
    table = torch.zeros(3, table_fields.FIELDS, 6, device=DEVICE)
    table[1:, table_fields.WEIGHT], table[0, table_fields.SCALE] = torch.tensor([[0.3], [0.7]], device=DEVICE), 1.0
    table[0, table_fields.LABEL_SCALE] = 0.4
    mixed, rule = reduction == "mixture", Rule(kind, 0.3, 0.2)
    whole = padded(logits)
    out = blank_like(whole)
    ops = TritonRowOps(Task(rule, mixed, True, True, True), 37)
    ops.solve(Chunk(whole, table, labels, out))
    tables, chunks = [], []
    for left, right in itertools.pairwise(parts):
        here = (labels >= left) & (labels < right)
        own = Task(rule, mixed, True, True, True, first_column=left, first_rank=left == right or left == 0)
        part = padded(logits[..., left:right])
        chunk = Chunk(part, table.clone(), torch.where(here, labels - left, -1), blank_like(part))
        chunks.append((TritonRowOps(own, right - left), chunk))
        chunks[-1][0].statistics(chunk)
        tables.append(chunk.table[:, : table_fields.MERGED].clone())
    merged = table_fields.merge(torch.stack(tables))
    sums = 0.0
    for ops, chunk in chunks:
        chunk.table[:, : table_fields.MERGED] = merged
        if not ops.task.one_sweep:
            ops.terms(chunk)
        sums = sums + chunk.table[0, table_fields.VALUE : table_fields.MEAN + 1]
    for ops, chunk in chunks:
        chunk.table[0, table_fields.VALUE : table_fields.MEAN + 1] = sums
        ops.gradient(chunk)
    torch.testing.assert_close(torch.cat([chunk.out for _, chunk in chunks], 1), out, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(merged[1:], table[1:, : table_fields.MERGED], rtol=1e-4, atol=1e-5)


def padded(logits: Tensor) -> Tensor:
    """The same in rows that are a multiple of 16 elements long."""
    heads, count, vocab = logits.shape
    wide = logits.new_full((heads, count, max(16, -(-vocab // 16) * 16)), torch.nan)[..., :vocab]
    return wide.copy_(logits)


def blank_like(logits: Tensor) -> Tensor:
    """NaN in place of one head's logits, in rows as long as theirs: kernels count rows in multiples of 16."""
    return padded(torch.full_like(logits[:1], torch.nan))[0]


def test_scale_on_device():
    x = torch.randn(5, 999, device=DEVICE).bfloat16()
    for factor in (1.0, 1 / 3):
        y = x.clone()
        triton_impl.scale_on_device(y, torch.tensor(factor, device=DEVICE))
        torch.testing.assert_close(y, (x.float() * factor).bfloat16(), rtol=1e-2, atol=0)
