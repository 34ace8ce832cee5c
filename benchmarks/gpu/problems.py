"""Shapes of the protocol and the data on them.

Symbols: N tokens, V vocabulary, d hidden size of the student, d_k of teacher k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_kernels import TeacherHead

KINDS = ("reverse_kl", "forward_kl", "jsd")


@dataclass(frozen=True)
class Shape:
    """One case of the protocol; ``masked`` gives every second row weight 0."""

    name: str
    rows: int
    vocab: int
    width: int
    teachers: tuple[int, ...]
    masked: bool = False

    @property
    def flops(self) -> int:
        """The least number of GEMM operations: logits, dX and dW of the student, logits of each
        teacher."""
        rows = self.rows // 2 if self.masked else self.rows
        return 2 * rows * self.vocab * (3 * self.width + sum(self.teachers))

    def smaller(self) -> Shape:
        """The same case at a size for a CPU."""
        widths = tuple(max(8, d // 128) for d in self.teachers)
        return replace(self, rows=32, vocab=515, width=max(8, self.width // 128), teachers=widths)


S1 = Shape("S1", 8192, 151936, 2560, (4096,))
S2 = Shape("S2", 8192, 151936, 2560, (5120, 4096))
S3 = Shape("S3", 2048, 151936, 2560, (4096,))
S4 = Shape("S4", 8192, 151936, 1024, (2560,))
S5 = Shape("S5", 8192, 128256, 4096, (4096,))
S6 = Shape("S6", 32768, 151936, 2560, (5120, 4096))
S7 = Shape("S7", 8192, 151936, 2560, (4096,), masked=True)

CPU1 = Shape("K=1", 256, 151936, 512, (1024,))
CPU2 = Shape("K=2", 256, 151936, 512, (1024, 768))


@dataclass
class Problem:
    """Tensors of one case; the student's require gradients."""

    shape: Shape
    hidden: Tensor
    weight: Tensor
    teachers: list[TeacherHead]
    token_weight: Tensor | None = None

    @property
    def device(self) -> str:
        return self.hidden.device.type

    @property
    def gradient_bytes(self) -> int:
        return (self.hidden.numel() + self.weight.numel()) * self.hidden.itemsize

    def with_teachers(self, teachers: list[TeacherHead]) -> Problem:
        return replace(self, teachers=teachers)


class Source:
    """Random tensors of one device, dtype and seed."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        out = torch.empty(*shape, device=self.device, dtype=self.dtype)
        # In parts: a float32 copy of a whole head is not needed.
        for part in out.split(max(1, (1 << 27) // shape[-1])):
            part.copy_(torch.randn(part.shape, generator=self.generator, device=self.device).mul_(scale))
        return out

    def head(self, vocab: int, width: int, spread: float = 2.0) -> Tensor:
        """A weight whose logits have standard deviation ``spread`` on unit-variance states."""
        return self.normal(vocab, width, scale=spread / width**0.5)


def strangers(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Student and teachers drawn independently."""
    source = Source(device, dtype, seed)
    token_weight = None
    if shape.masked:
        token_weight = torch.ones(shape.rows, device=device)
        token_weight[1::2] = 0
    return Problem(
        shape,
        source.normal(shape.rows, shape.width).requires_grad_(),
        source.head(shape.vocab, shape.width).requires_grad_(),
        [TeacherHead(source.normal(shape.rows, d), source.head(shape.vocab, d)) for d in shape.teachers],
        token_weight,
    )


def neighbours(shape: Shape, device: str, dtype: torch.dtype, sigma: float, seed: int = 0) -> Problem:
    """Teachers whose logits are the student's plus noise of standard deviation ``sigma``, exact in
    any dtype: the teacher's hidden states and head are the student's, widened. KL is sigma^2 / 2."""
    source, extra = Source(device, dtype, seed), 64
    hidden, weight = source.normal(shape.rows, shape.width), source.head(shape.vocab, shape.width)

    def teacher() -> TeacherHead:
        steer, noise = source.normal(shape.rows, extra), source.head(shape.vocab, extra, sigma)
        return TeacherHead(torch.cat([hidden, steer], 1), torch.cat([weight, noise], 1))

    heads = [teacher() for _ in shape.teachers]
    return Problem(shape, hidden.requires_grad_(), weight.requires_grad_(), heads)


PEAKS = [(20, 1.1), (10, 1.2), (30, 1.0)]
"""(live columns of a row, exponent of Zipf's law) of distributions like those of real models."""


def peaked(
    shape: Shape, device: str, dtype: torch.dtype, live: int = 20, exponent: float = 1.1, seed: int = 0
) -> Problem:
    """Rows with ``live`` live columns drawn by Zipf's law over a Zipf background, and teachers as wide as
    the student that disagree about them: the shape of a trained model's distributions.

    Coordinate 0 of the head holds the background, -log(rank); the others are random, and the
    hidden state solves for the wanted logits of the live columns.
    """
    source = Source(device, torch.float32, seed)
    live = min(live, shape.width // 4, shape.vocab // 4)
    rank = torch.arange(1, shape.vocab + 1, device=device, dtype=torch.float32)
    weight = source.head(shape.vocab, shape.width, 1.0)
    weight[:, 0] = -rank.log()
    hidden = torch.empty(shape.rows, shape.width, device=device)
    # Entries of a sample that repeat a column would make its equations singular: drawn from a
    # permutation by Gumbel's trick, a few rows at a time.
    for start in range(0, shape.rows, 64):
        stop = min(start + 64, shape.rows)
        noise = torch.rand(stop - start, shape.vocab, generator=source.generator, device=device).clamp_(1e-20)
        columns = (-exponent * rank.log() - noise.log().neg_().log_()).topk(live, dim=1).indices
        wanted = 11 - 0.35 * torch.arange(live, device=device) + source.normal(stop - start, live)
        system, goal = weight[columns][..., 1:], wanted - weight[columns][..., 0]
        gram = system @ system.transpose(1, 2) + 1e-4 * torch.eye(live, device=device)
        part = torch.linalg.solve(gram, goal[..., None])
        hidden[start:stop, 1:] = (system.transpose(1, 2) @ part)[..., 0]
    hidden[:, 0] = 1.0
    nudges = [source.normal(shape.rows, shape.width, scale=0.3) for _ in shape.teachers]
    weight, student = weight.to(dtype), hidden.to(dtype)
    heads = [TeacherHead((hidden + nudge).to(dtype), weight) for nudge in nudges]
    shape = replace(shape, teachers=(shape.width,) * len(heads))
    return Problem(shape, student.requires_grad_(), weight.clone().requires_grad_(), heads)
