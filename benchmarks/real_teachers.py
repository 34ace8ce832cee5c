"""What a teacher that is known by few tokens loses, on distributions of a real language model.

    python benchmarks/real_teachers.py --model models/smollm2 [--save] [--prompts 12] [--tokens 24] [--draws 16]

Rows are the model's own samples (temperature 1) after the prompts of ``real_rows.py``. Two teachers judge them:
``context`` is the same model after a system message that the student does not see (as a debate's transcript is), and
``noise`` is the model with noise in every matrix. Beside the exact divergence stand a list of the k most likely tokens
with one bucket for the rest (how a served teacher judges: the sampled token and the k - 1 likeliest others), and the
sampled token alone (the policy gradient whose mean is the gradient of the reverse KL).

``trained`` is what each form teaches: a linear map of rank 4 on the student's last hidden states is trained on three
quarters of the prompts, and the exact divergence is measured on the others. ``--save`` writes
``benchmarks/results/real/teachers.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
import torch
from conftest import real_model_parser, save_results
from real_rows import NOISE, PROMPTS
from torch import Tensor

from opd_kernels import TeacherHead, linear_divergence, linear_logprob, topk_divergence

KS = (8, 64, 256)
KINDS = ("reverse_kl", "forward_kl", "jsd")
PRIVILEGED = "You are a careful teacher. Answer in plain words, in at most three short sentences."
RANK, STEPS, RATE = 4, 25, 2e-3


@dataclass(frozen=True)
class Rows:
    """What student and teachers hold at the same tokens.

    Args:
        student: [N, d] states of the student.
        teachers: name -> [N, d].
        head: [V, d] of all of them.
        labels: [N] the tokens that were sampled.
        prompt: [N] number of the prompt.
    """

    student: Tensor
    teachers: dict[str, Tensor]
    head: Tensor
    labels: Tensor
    prompt: Tensor

    def of(self, chosen: Tensor) -> Rows:
        """Some of the rows."""
        teachers = {name: states[chosen] for name, states in self.teachers.items()}
        return Rows(self.student[chosen], teachers, self.head, self.labels[chosen], self.prompt[chosen])


@torch.no_grad()
def read_rows(folder: str, prompts: int, tokens: int) -> Rows:
    """Sample, and read the samples as the student and as each teacher does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)

    def asked(prompt: str, system: str = "") -> Tensor:
        messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return rendered["input_ids"]

    def states(ids: Tensor, start: int) -> Tensor:
        return model.model(ids).last_hidden_state[0, start - 1 : -1]

    plain = [asked(prompt) for prompt in PROMPTS[:prompts]]
    sampled = [
        model.generate(x, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens) for x in plain
    ]
    written = [x[:, start.shape[1] :] for x, start in zip(sampled, plain, strict=True)]
    student = torch.cat([states(x, start.shape[1]) for x, start in zip(sampled, plain, strict=True)])
    told = [asked(prompt, PRIVILEGED) for prompt in PROMPTS[:prompts]]
    context = torch.cat([states(torch.cat([x, y], 1), x.shape[1]) for x, y in zip(told, written, strict=True)])
    head = model.lm_head.weight.detach().clone()
    for matrix in model.model.layers.parameters():
        if matrix.dim() == 2:
            matrix.add_(torch.randn_like(matrix), alpha=NOISE * float(matrix.std()))
    noise = torch.cat([states(x, start.shape[1]) for x, start in zip(sampled, plain, strict=True)])
    number = torch.cat([torch.full((x.shape[1],), i) for i, x in enumerate(written)])
    return Rows(student, {"context": context, "noise": noise}, head, torch.cat(written, 1)[0], number)


def top_k(logprobs: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """([N, k] ids, their log-probs): the sampled token and the likeliest others, as the engine keeps of a server."""
    others = logprobs.scatter(1, labels[:, None], -torch.inf).topk(k - 1, dim=1).indices
    ids = torch.cat([labels[:, None], others], 1)
    return ids, logprobs.gather(1, ids)


Loss = Callable[[Tensor, Tensor], Tensor]
"""(hidden [N, d], head [V, d]) -> the mean over rows."""


def exact(rows: Rows, teacher: str, kind: str) -> Loss:
    """The divergence over the whole vocabulary."""
    judge = [TeacherHead(rows.teachers[teacher], rows.head)]
    return lambda hidden, head: linear_divergence(hidden, head, judge, divergence=kind, reduction="mean").loss


def listed(rows: Rows, teacher: str, kind: str, k: int) -> Loss:
    """The divergence on k tokens and a bucket."""
    ids, logprobs = top_k((rows.teachers[teacher] @ rows.head.t()).log_softmax(1), rows.labels, k)
    return lambda hidden, head: topk_divergence(hidden, head, ids, logprobs, divergence=kind, reduction="mean").loss


def sampled(rows: Rows, teacher: str, labels: Tensor) -> Loss:
    """The policy gradient of one sampled token a row, whose mean over samples is the gradient of the reverse KL."""
    with torch.no_grad():
        judged = linear_logprob(rows.teachers[teacher], rows.head, labels).logprob

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        logprob = linear_logprob(hidden, head, labels).logprob
        return ((logprob.detach() - judged) * logprob).mean()

    return loss


def draw(rows: Rows, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """[N] tokens sampled from the student's distributions."""
    with torch.no_grad():
        return torch.multinomial((hidden @ rows.head.t()).softmax(1), 1, generator=generator)[:, 0]


def gradients(rows: Rows, loss: Loss) -> tuple[float, tuple[Tensor, Tensor]]:
    """The value, and the gradients in hidden states and head."""
    hidden, head = rows.student.clone().requires_grad_(), rows.head.clone().requires_grad_()
    value = loss(hidden, head)
    hidden_gradient, head_gradient = torch.autograd.grad(value, (hidden, head))
    return value.item(), (hidden_gradient, head_gradient)


def compare(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, float]:
    """Distance of the gradients over the length of the wanted one, of hidden states and head."""
    names = ("hidden_error", "head_error")
    return {name: float((x - y).norm() / y.norm()) for name, x, y in zip(names, found, wanted, strict=True)}


def forms(rows: Rows, teacher: str, draws: int) -> dict[str, Any]:
    """Value and gradient of every form against the exact one's."""
    q = (rows.teachers[teacher] @ rows.head.t()).log_softmax(1)
    found: dict[str, Any] = {"teacher_entropy": float(-(q.exp() * q).sum(1).mean())}
    for k in KS:
        found[f"mass of {k}"] = float(top_k(q, rows.labels, k)[1].exp().sum(1).mean())
    for kind in KINDS:
        value, wanted = gradients(rows, exact(rows, teacher, kind))
        found[kind] = {"exact": value}
        for k in KS:
            part, gradient = gradients(rows, listed(rows, teacher, kind, k))
            found[kind][f"k={k}"] = {"value": part, "share": part / value, **compare(gradient, wanted)}
        if kind != "reverse_kl":
            continue
        generator = torch.Generator().manual_seed(1)
        errors: list[dict[str, float]] = []
        total = [torch.zeros_like(x) for x in wanted]
        for _ in range(draws):
            labels = draw(rows, rows.student, generator)
            _, gradient = gradients(rows, sampled(rows, teacher, labels))
            errors.append(compare(gradient, wanted))
            total = [x + y / draws for x, y in zip(total, gradient, strict=True)]
        found[kind]["sampled token"] = {
            name: float(np.sqrt(np.mean([e[name] ** 2 for e in errors]))) for name in ("hidden_error", "head_error")
        } | {f"mean of {draws}": compare(total, wanted)}
    return found


def trained(rows: Rows, teacher: str, draws_seed: int = 2) -> dict[str, float]:
    """Exact reverse KL on held-out prompts after a short training with every form of the reverse KL."""
    train, test = rows.of(rows.prompt % 4 != 0), rows.of(rows.prompt % 4 == 0)
    held_out = exact(test, teacher, "reverse_kl")
    with torch.no_grad():
        found = {"before": float(held_out(test.student, rows.head))}
    names: dict[str, Loss | None] = {"exact": exact(train, teacher, "reverse_kl")}
    names |= {f"k={k}": listed(train, teacher, "reverse_kl", k) for k in KS}
    names["sampled token"] = None
    for name, fixed in names.items():
        torch.manual_seed(0)
        width = rows.student.shape[1]
        left = torch.randn(width, RANK).div_(width**0.5).requires_grad_()
        right = torch.zeros(RANK, width).requires_grad_()
        optimizer = torch.optim.Adam([left, right], lr=RATE)
        generator = torch.Generator().manual_seed(draws_seed)
        for _ in range(STEPS):
            hidden = train.student + train.student @ left @ right
            loss = fixed or sampled(train, teacher, draw(train, hidden.detach(), generator))
            optimizer.zero_grad()
            loss(hidden, rows.head).backward()
            optimizer.step()
        with torch.no_grad():
            found[name] = float(held_out(test.student + test.student @ left @ right, rows.head))
    return found


def main(arguments: list[str]) -> int:
    parser = real_model_parser(__doc__, prompts=12, tokens=24)
    parser.add_argument("--draws", type=int, default=16, help="samples of the sampled form")
    options = parser.parse_args(arguments)
    rows = read_rows(options.model, options.prompts, options.tokens)
    results: dict[str, Any] = {"rows": len(rows.labels), "prompts": options.prompts, "draws": options.draws}
    for teacher in rows.teachers:
        results[teacher] = forms(rows, teacher, options.draws) | {"trained": trained(rows, teacher)}
        print(teacher, json.dumps(results[teacher], indent=1), flush=True)
    if options.save:
        save_results(ROOT / "benchmarks" / "results" / "real" / "teachers.json", results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
