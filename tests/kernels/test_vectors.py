"""Vector arguments that are strided, expanded or reversed give what their dense copies give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd_kernels import TeacherHead, linear_divergence, linear_logprob, token_stats, topk_divergence

ROWS, VOCAB, WIDTH = 7, 37, 5

VIEWS = {
    "column": lambda x: torch.stack((x, -x), 1)[:, 0],
    "every second": lambda x: torch.stack((x, -x), 1).flatten()[::2],
    "expanded": lambda x: x[:1].clone().expand(len(x)),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(view, device: str = "cpu", **options) -> list[Tensor]:
    """Everything the ops return when every vector argument went through ``view``."""

    def normal_there(*shape: int, seed: int = 0) -> Tensor:
        return normal(*shape, seed=seed).to(device)

    hidden, weight = (normal_there(n, WIDTH, seed=seed).requires_grad_() for seed, n in enumerate((ROWS, VOCAB)))
    bias, teacher_bias = view(normal_there(VOCAB, seed=2)), view(normal_there(VOCAB, seed=3))
    labels = view(torch.arange(1, ROWS + 1, device=device) * 4)
    token_weight = view(torch.linspace(0.5, 2.0, ROWS, device=device))
    mix = view(torch.tensor([0.4, 0.9], device=device))
    teachers = [
        TeacherHead(normal_there(ROWS, WIDTH, seed=4), normal_there(VOCAB, WIDTH, seed=5), teacher_bias),
        TeacherHead(normal_there(ROWS, WIDTH, seed=6), normal_there(VOCAB, WIDTH, seed=7)),
    ]
    shared = {"labels": labels, "token_weight": token_weight, "mix": mix, "student_bias": bias, **options}
    found: list[Tensor] = []
    for reduction in ("sum", "none"):
        out = linear_divergence(hidden, weight, teachers, stats=True, reduction=reduction, **shared)
        found += [out.loss.detach(), out.token_loss, *torch.autograd.grad(out.loss.sum(), (hidden, weight))]
        found += [x for x in vars(out.stats).values() if x is not None]
    found += [x for x in vars(token_stats(hidden, weight, teachers, **shared)).values() if x is not None]
    logprob = linear_logprob(hidden, weight, labels, bias=bias, **options).logprob
    found += [logprob.detach(), *torch.autograd.grad(logprob.sum(), (hidden, weight))]
    return found


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_vectors(view):
    views = VIEWS[view]
    dense = results(lambda x: views(x).contiguous())
    for mine, other in zip(results(views), dense, strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True)


@pytest.mark.parametrize("view", ["column", "every second"])
def test_views_of_a_list_of_log_probs(view):
    """The weights of ``topk_divergence``, and several labels a row."""
    views, hidden, weight = VIEWS[view], normal(ROWS, WIDTH), normal(VOCAB, WIDTH, seed=1)
    logprobs, ids = normal(ROWS, VOCAB, seed=2).log_softmax(1).topk(5, 1)
    token_weight = torch.linspace(0.5, 2.0, ROWS)
    mine, other = (
        topk_divergence(hidden, weight, ids, logprobs, token_weight=x).loss for x in (views(token_weight), token_weight)
    )
    torch.testing.assert_close(mine, other)
    turned = ids.t().contiguous().t()
    torch.testing.assert_close(
        linear_logprob(hidden, weight, turned).logprob, linear_logprob(hidden, weight, ids).logprob
    )
