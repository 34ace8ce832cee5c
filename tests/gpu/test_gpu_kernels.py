"""The fused op on a CUDA device, against float64. Needs torch, triton and pytest, nothing else:

PYTHONPATH=kernels python -m pytest -m gpu tests/gpu/test_gpu_kernels.py
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

# Read at the first product; what deterministic algorithms ask for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from triton_cases import *  # noqa: E402, F403
from triton_cases import KINDS, REDUCTIONS  # noqa: E402

from opd_kernels import TeacherHead, linear_divergence, linear_logprob, token_stats, topk_divergence  # noqa: E402
from opd_kernels import table as fields  # noqa: E402
from opd_kernels.chunk import Chunk, Task  # noqa: E402
from opd_kernels.problem import STATS_ONLY  # noqa: E402
from opd_kernels.triton_impl import TritonRowOps  # noqa: E402

DEVICE = "cuda"
ROWS, VOCAB, WIDTH = 1100, 32003, 256
CHUNK = 512  # rows of one float64 reference call
LARGE_ROWS, LARGE_VOCAB = 15000, 151936  # more than 2^31 logits
POISON_BYTES = 1 << 31


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What an uninitialised buffer holds from here on is NaN."""
    assert torch.cuda.is_available(), "these tests need a CUDA device; leave them out with -m 'not gpu'"
    torch.full((POISON_BYTES // 4,), torch.nan, device=DEVICE)


def normal(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    g = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(*shape, generator=g, device=DEVICE) * scale).to(dtype)


def student(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor]:
    hidden = normal(ROWS, WIDTH, seed=seed, dtype=dtype)
    return hidden.requires_grad_(), normal(VOCAB, WIDTH, seed=seed + 1, scale=0.15, dtype=dtype).requires_grad_()


def strangers(count: int, dtype: torch.dtype = torch.bfloat16) -> list[TeacherHead]:
    """Teachers unrelated to the student."""
    widths = [WIDTH + 64 * k for k in range(count)]
    return [
        TeacherHead(normal(ROWS, w, seed=10 + w, dtype=dtype), normal(VOCAB, w, seed=11 + w, scale=0.15, dtype=dtype))
        for w in widths
    ]


def neighbour(hidden: Tensor, weight: Tensor, sigma: float, seed: int = 30) -> TeacherHead:
    """A teacher with t = z + sigma * noise, exactly: KL about sigma^2 / 2."""
    extra = normal(ROWS, 64, seed=seed, scale=0.125, dtype=hidden.dtype)
    noise = normal(VOCAB, 64, seed=seed + 1, scale=sigma, dtype=weight.dtype)
    return TeacherHead(torch.cat([hidden.detach(), extra], 1), torch.cat([weight.detach(), noise], 1))


def masked(teachers: int) -> dict[str, Tensor]:
    """Per-token teacher weights, some of them 0, and rows without weight."""
    mix = torch.rand(ROWS, teachers, generator=torch.Generator(DEVICE).manual_seed(5), device=DEVICE)
    token_weight = torch.linspace(0.5, 2.0, ROWS, device=DEVICE)
    token_weight[::3] = 0.0
    return {"mix": mix * (mix > 0.3), "token_weight": token_weight}


def fused(hidden: Tensor, weight: Tensor, teachers: list[TeacherHead], **options) -> list[Tensor]:
    out = linear_divergence(hidden, weight, teachers, impl="triton", **options)
    return [out.token_loss, *torch.autograd.grad(out.loss, (hidden, weight))]


def exact(hidden: Tensor, weight: Tensor, teachers: list[TeacherHead], **options) -> list[Tensor]:
    """Per-token losses and gradients in float64, some rows at a time."""
    wide = weight.detach().double().requires_grad_()
    weights = [t.weight.double() for t in teachers]
    losses, rows, total = [], [], torch.zeros_like(wide)
    for start in range(0, ROWS, CHUNK):
        part = slice(start, start + CHUNK)
        mine = hidden[part].detach().double().requires_grad_()
        theirs = [TeacherHead(t.hidden[part].double(), w) for t, w in zip(teachers, weights, strict=True)]
        cut = {key: value[part] if isinstance(value, Tensor) else value for key, value in options.items()}
        out = linear_divergence(mine, wide, theirs, impl="reference", **cut)
        d_rows, d_weight = torch.autograd.grad(out.loss, (mine, wide))
        losses.append(out.token_loss)
        rows.append(d_rows)
        total += d_weight
    return [torch.cat(losses), torch.cat(rows), total]


def assert_near(got: list[Tensor], want: list[Tensor], values: float, gradients: float) -> None:
    """Relative errors in the norm: of the per-token losses, and of both gradients."""
    for place, (mine, truth) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(mine.isnan(), truth.isnan()), place
        truth = truth.nan_to_num()
        error = float((mine.double().nan_to_num() - truth).norm() / truth.norm())
        assert error <= (gradients if place else values), f"result {place}: relative error {error:.2e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teachers", [1, 2, 3])
@pytest.mark.parametrize("teacher_reduction", REDUCTIONS)
def test_bfloat16(kind, teachers, teacher_reduction):
    """Rows without weight, rows without some of the teachers; bfloat16 rounds dZ and the
    results."""
    options = {"divergence": kind, "teacher_reduction": teacher_reduction, **masked(teachers)}
    call = (*student(), strangers(teachers))
    got = fused(*call, temperature=1.5, workspace_bytes=300 << 20, **options)
    assert_near(got, exact(*call, temperature=1.5, **options), values=2e-5, gradients=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.42, 0.2, 0.04])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_divergences(kind, sigma, dtype):
    """KL of 9e-2, 2e-2 and 8e-4: the gradient keeps its digits, whatever the inputs' precision."""
    hidden, weight = student(dtype)
    call = (hidden, weight, [neighbour(hidden, weight, sigma)])
    limit = 1e-2 if dtype == torch.bfloat16 else 2e-4
    assert_near(fused(*call, divergence=kind), exact(*call, divergence=kind), values=2e-3, gradients=limit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked_rows", [False, True])
def test_sampled_gradients(kind, masked_rows):
    """Peaked rows, a few different ones, in several blocks: as far from the exact gradient as is predicted."""
    (hidden, weight), some = student(), torch.arange(ROWS, device=DEVICE) % 16
    hidden = (4.0 * hidden[some]).detach().requires_grad_()
    teachers = [replace(t, hidden=4.0 * t.hidden[some]) for t in strangers(2)]
    options = {"divergence": kind}
    if masked_rows:
        options["token_weight"] = torch.arange(ROWS, device=DEVICE) % 3 / 2
    call = (hidden, weight, teachers)
    out = linear_divergence(*call, vocab_sample=0.2, workspace_bytes=400 << 20, **options)
    noise = (out.sampling.hidden_noise, out.sampling.weight_noise)
    got = torch.autograd.grad(out.loss, (hidden, weight))
    for mine, want, predicted in zip(got, exact(*call, **options)[1:], noise, strict=True):
        error = (mine.double() - want).norm() / want.norm()
        assert 0.5 * predicted < error + 1e-2 and error < 2.0 * predicted + 1e-2


def test_float16():
    call = (*student(torch.float16), strangers(2, torch.float16))
    assert_near(fused(*call, divergence="jsd"), exact(*call, divergence="jsd"), values=2e-5, gradients=2e-3)


def test_ignored_rows_may_hold_anything():
    hidden, weight = student()
    teachers = strangers(2)
    keep = torch.ones(ROWS, device=DEVICE)
    keep[100:400] = 0.0
    clean = fused(hidden, weight, teachers, token_weight=keep)
    with torch.no_grad():
        hidden[100:400] = torch.nan
    teachers = [replace(t, hidden=t.hidden.masked_fill(keep[:, None] == 0, torch.inf)) for t in teachers]
    for mine, other in zip(fused(hidden, weight, teachers, token_weight=keep), clean, strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True)
    assert clean[1][100:400].eq(0).all()


def test_same_result_inside_autocast_and_compile():
    call = (*student(), strangers(2))
    plain = fused(*call, divergence="jsd")
    with torch.autocast(DEVICE, dtype=torch.float16):
        inside = fused(*call, divergence="jsd")

    @torch.compile
    def around(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_divergence(hidden * 2.0, weight, call[2], divergence="jsd").loss * 0.5

    hidden = (call[0].detach() / 2).requires_grad_()
    compiled = torch.autograd.grad(around(hidden, call[1]), (hidden, call[1]))
    for mine, other in zip(inside, plain, strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(compiled[0], plain[1])
    torch.testing.assert_close(compiled[1] * 2, plain[2])


@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graph(kind):
    """A captured step, replayed on other data, gives what an eager call gives."""
    (hidden, weight), teachers, options = student(), strangers(2), masked(2)
    call = {"divergence": kind, "workspace_bytes": 300 << 20, **options}
    whole = call | {name: torch.ones_like(x) for name, x in options.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # the same shapes: no kernel may be compiled within the capture
            fused(hidden, weight, teachers, **whole)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fused(hidden, weight, teachers, **call)
    other = student(seed=7)
    with torch.no_grad():
        hidden.copy_(other[0])
        weight.copy_(other[1])
        options["mix"].copy_(options["mix"].roll(100, 0))
        options["token_weight"].copy_(options["token_weight"].roll(1))
    graph.replay()
    want = fused(hidden, weight, teachers, **call)
    used = ~want[0].isnan()
    torch.testing.assert_close(got[0][used], want[0][used])
    # The rows lie in other chunks, so that the sums round differently.
    assert_near([x.float() for x in got[1:]], [x.double() for x in want[1:]], values=1e-2, gradients=1e-2)


def test_host_waits_as_often_for_many_chunks_as_for_one():
    call = (*student(), strangers(2))
    counts = []
    for budget in (100 << 20, 4 << 30):
        fused(*call, workspace_bytes=budget, **masked(2))
        options = masked(2)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                fused(*call, workspace_bytes=budget, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(len([w for w in seen if "synchroniz" in str(w.message)]))
    assert counts[0] == counts[1] <= 8, counts


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_deterministic_algorithms(share):
    """Nothing refuses to run, and two calls agree to the last bit."""
    (hidden, weight), teachers = student(), strangers(2)
    hidden = (4.0 * hidden[torch.arange(ROWS, device=DEVICE) % 16]).detach().requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (fused(hidden, weight, teachers, vocab_sample=share, **masked(2)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, other in zip(one, two, strict=True):
        assert torch.equal(mine.nan_to_num(), other.nan_to_num())


def test_the_last_device_while_the_first_is_current():
    """Kernels start where the tensors are."""
    last = f"cuda:{torch.cuda.device_count() - 1}"
    call = (*student(), strangers(2))
    want = fused(*call)
    moved = [x.detach().to(last).requires_grad_() for x in call[:2]]
    teachers = [TeacherHead(t.hidden.to(last), t.weight.to(last)) for t in call[2]]
    with torch.cuda.device(0):
        got = fused(*moved, teachers)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine.to(other.device), other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torch_operations(kind, dtype):
    """impl="torch" on the device: the same products, plain torch in between."""
    call, options = (*student(dtype), strangers(2, dtype)), masked(2)
    out = linear_divergence(*call, divergence=kind, impl="torch", workspace_bytes=300 << 20, **options)
    got = [out.token_loss, *torch.autograd.grad(out.loss, call[:2])]
    limit = 1e-2 if dtype == torch.bfloat16 else 2e-4
    assert_near(got, exact(*call, divergence=kind, **options), values=2e-5, gradients=limit)


def test_token_statistics():
    """Every statistic against float64, with labels, on the rows that are computed."""
    (hidden, weight), teachers, options = student(), strangers(2), masked(2)
    labels = torch.arange(ROWS, device=DEVICE) * 29 % VOCAB
    got = token_stats(hidden.detach(), weight.detach(), teachers, labels=labels, impl="triton", **options)
    wide = [TeacherHead(t.hidden.double(), t.weight.double()) for t in teachers]
    call = (hidden.detach().double(), weight.detach().double(), wide)
    want = token_stats(*call, labels=labels, impl="reference", **options)
    for name, truth in vars(want).items():
        mine = getattr(got, name)
        if truth is not None:
            torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=2e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_known_by_its_largest_log_probs(kind):
    (hidden, weight), (teacher,) = student(), strangers(1)
    logprobs, ids = (teacher.hidden.float() @ teacher.weight.float().t()).log_softmax(1).topk(64, 1)
    options = {"divergence": kind, "token_weight": masked(1)["token_weight"]}

    def call(impl: str, hidden: Tensor, weight: Tensor, logprobs: Tensor) -> list[Tensor]:
        out = topk_divergence(hidden, weight, ids, logprobs, impl=impl, **options)
        return [out.token_loss, *torch.autograd.grad(out.loss, (hidden, weight))]

    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = call("reference", *wide, logprobs.double())
    assert_near(call("auto", hidden, weight, logprobs), want, values=1e-4, gradients=1e-2)


def test_two_streams():
    """Also while the default stream fills what it can get with NaN."""
    calls = [(*student(seed=seed), strangers(2)) for seed in (0, 7)]
    alone = [fused(*call) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    together = []
    for _ in range(3):
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                together.append(fused(*call))
            torch.full((POISON_BYTES // 16,), torch.nan, device=DEVICE)
    torch.cuda.synchronize()
    for place, result in enumerate(together):
        for mine, other in zip(result, alone[place % 2], strict=True):
            torch.testing.assert_close(mine, other)


def test_workspace_budget():
    """Peak memory beyond inputs, outputs, gradients and the float32 accumulator of dW."""
    hidden, weight = student()
    teachers, budget = strangers(3), 256 << 20
    fused(hidden, weight, teachers, workspace_bytes=budget)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = fused(hidden, weight, teachers, workspace_bytes=budget)
    peak = torch.cuda.max_memory_allocated() - before
    kept = sum(x.numel() * x.element_size() for x in results) + 4 * weight.numel()
    assert peak <= budget + kept + (32 << 20), (peak, budget, kept)


def test_logprob():
    hidden, weight = student()
    labels = torch.arange(ROWS, device=DEVICE) * 29 % VOCAB
    up = torch.linspace(-1.0, 1.0, ROWS, device=DEVICE)

    def call(impl: str, hidden: Tensor, weight: Tensor) -> list[Tensor]:
        out = linear_logprob(hidden, weight, labels, softcap=20.0, impl=impl)
        loss = (up * out.logprob).sum() + 0.1 * out.entropy.sum()
        return [out.logprob.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    assert_near(call("triton", hidden, weight), call("reference", *wide), values=2e-5, gradients=1e-2)


def test_more_than_2_to_the_31_logits():
    z = torch.empty(LARGE_ROWS, LARGE_VOCAB, device=DEVICE).normal_()
    labels = torch.arange(LARGE_ROWS, device=DEVICE) * 10
    some = torch.tensor([0, LARGE_ROWS // 2, LARGE_ROWS - 1], device=DEVICE)
    logits = z[some].double().requires_grad_()
    logp = logits.log_softmax(1)
    (want,) = torch.autograd.grad(logp.gather(1, labels[some, None]).sum(), logits)
    table = torch.zeros(1, fields.FIELDS, LARGE_ROWS, device=DEVICE)
    table[0, fields.LABEL_SCALE] = -1.0
    ops, chunk = TritonRowOps(Task(STATS_ONLY, full=True), LARGE_VOCAB), Chunk(z[None], table, labels, z)
    ops.statistics(chunk)
    found = fields.logprob(table, 0), fields.entropy(table, 0)
    truth = logp.gather(1, labels[some, None])[:, 0], -(logp.exp() * logp).sum(1)
    for mine, exact_ in zip(found, truth, strict=True):
        torch.testing.assert_close(mine[some].double(), exact_.detach())
    ops.logprob_gradient(chunk, None)
    torch.testing.assert_close(z[some].double(), want, rtol=1e-4, atol=1e-9)
