"""What the ops read on the host: a fixed number of values a call, and nothing while a CUDA graph is captured.

Captures are played on a CPU by telling every module that one is going on; ``tests/gpu`` captures real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from opd_kernels import driver, label_sets, linear_divergence, linear_logprob, selection, token_stats, validation

READERS = [(torch.Tensor, name) for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")]
READERS += [(torch, "nonzero"), (torch, "unique_consecutive")]


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, read: Callable[[str], None]) -> Iterator[None]:
    """Calls ``read`` with the name of everything that waits for a device."""
    with monkeypatch.context() as patch:
        for owner, name in READERS:
            patch.setattr(owner, name, noted(name, getattr(owner, name), read))
        yield


def noted(name: str, plain: Callable, read: Callable[[str], None]) -> Callable:
    def call(*args, **kwargs):
        read(name)
        return plain(*args, **kwargs)

    return call


@pytest.fixture
def captured(monkeypatch):
    """Every module believes that a graph is captured; reading is an error within ``captured()``."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} while a graph is captured")

    @contextmanager
    def within() -> Iterator[None]:
        with monkeypatch.context() as patch:
            for module in (selection, validation, driver, label_sets):
                patch.setattr(module, "capturing", lambda device: True)
            with watched(monkeypatch, refuse):
                yield

    return within


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize("teacher_reduction", ["sum", "mixture"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_captured_call_gives_the_same(make_case, captured, kind, teacher_reduction, reduction):
    """Rows without weight and teachers without weight are computed, and count for nothing."""
    case = make_case(3)
    if teacher_reduction == "mixture":  # of at least one
        case.mix[case.mix.sum(1) == 0, 1] = 0.2
    for mix in (case.mix, None, [0.5, 0.0, 1.5]):
        options = {"divergence": kind, "teacher_reduction": teacher_reduction, "reduction": reduction, "mix": mix}
        options |= {"token_weight": case.token_weight, "labels": case.labels, "stats": True, "impl": "torch"}
        with captured():
            got = linear_divergence(*case.student, case.teachers, **options)
        want = linear_divergence(*case.student, case.teachers, **options)
        torch.testing.assert_close(got.loss, want.loss)
        for mine, other in zip(
            torch.autograd.grad(got.loss, case.student), torch.autograd.grad(want.loss, case.student), strict=True
        ):
            torch.testing.assert_close(mine, other)
        used = ~want.token_loss.isnan()
        torch.testing.assert_close(got.token_loss[used], want.token_loss[used])
        assert got.token_loss.isfinite().all() and got.stats.gap.isfinite().all() and not used.all()


def test_captured_statistics_and_log_probs(make_case, captured):
    case = make_case(2)
    with captured():
        found = token_stats(*case.student, case.teachers, labels=case.labels, impl="torch")
        out = linear_logprob(*case.student, case.labels, impl="torch")
    torch.testing.assert_close(found.student_logprob, out.logprob.detach())
    upstream = torch.linspace(-1, 1, len(case.labels), dtype=torch.float64)  # one of them is 0
    want = torch.autograd.grad(out.logprob, case.student, upstream, retain_graph=True)
    with captured():
        got = torch.autograd.grad(out.logprob, case.student, upstream)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_sample_cannot_be_captured(make_case, captured):
    case = make_case(1)
    with pytest.raises(ValueError, match="would draw the same columns: pass 0 while one is captured"), captured():
        linear_divergence(*case.student, case.teachers, vocab_sample=0.1, impl="torch")


@pytest.mark.parametrize("given", [False, True])
def test_the_host_does_not_wait_for_chunks(make_case, monkeypatch, given):
    """As many values are read for many chunks as for one, and few; without weights only whether a teacher is finite."""
    case = make_case(3, rows=64, dtype=torch.float32)
    options = {"mix": case.mix, "token_weight": case.token_weight, "labels": case.labels} if given else {}
    counts = []
    for budget in (60_000, 1 << 30):
        seen: list[str] = []
        with watched(monkeypatch, seen.append):
            linear_divergence(*case.student, case.teachers, workspace_bytes=budget, impl="torch", **options)
        counts.append(seen)
    assert counts[0] == counts[1]
    if given:
        assert len(counts[0]) <= 5, counts[0]
    else:
        assert counts[0] == ["__bool__"]
