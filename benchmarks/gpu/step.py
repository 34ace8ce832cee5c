"""A whole optimiser step at real size: a Qwen3-4B student, 14B and 8B teachers, 8192 response tokens.

All weights are random. Every phase is timed by the clock between two synchronisations, with its own
peak of allocated memory; the loss is the fused one or whole logits in plain torch. With 120 GiB or
more the student's parameters are float32 under bfloat16 autocast, as in training, and both teachers
stay on the device. With less the student's parameters, gradients and AdamW moments are bfloat16, and
a teacher is on the device only while it works (``opdengine.teachers.offload``); its head stays.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from measure import release, synchronise
from models import QWEN3_4B, QWEN3_8B, QWEN3_14B, REAL, TINY, NoText, make_model, parameters, smaller
from torch import Tensor

from opdengine.loss.objective import Objective
from opdengine.models.backbone import Backbone
from opdengine.models.packing import Packed, pack
from opdengine.rollout.transformers import TransformersSampler
from opdengine.teachers.offload import Offload
from opdengine.types import Hidden, SamplingParams, TeacherContext

Case = tuple[str, Callable[[], dict[str, Any]]]
Loss = Callable[[Tensor], tuple[Tensor, Callable[[], None]]]
ROOMY = 120 << 30
MICRO_TOKENS = 16384
SLICE = 2048
UPDATE = ("forward", "loss", "backward", "optimiser")


class Phases:
    """Seconds and peak bytes of named parts of a step."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        cuda = torch.cuda.is_available()
        synchronise()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        synchronise()
        self.found[name] = {"seconds": time.perf_counter() - start}
        if cuda:
            self.found[name]["peak_bytes"] = torch.cuda.max_memory_allocated()


class World:
    """The models of a step, made at first use and kept for all cases."""

    def __init__(self, smoke: bool) -> None:
        cuda = torch.cuda.is_available()
        self.device, self.smoke, self.sizes = "cuda" if cuda else "cpu", smoke, TINY if smoke else REAL
        total = torch.cuda.get_device_properties(0).total_memory if cuda else 0
        self.roomy = smoke or total >= ROOMY
        self.narrow = torch.bfloat16 if cuda else torch.float32
        self.made: dict[str, float] = {}

    def make(self, name: str, shape: dict[str, Any], dtype: torch.dtype) -> Any:
        start = time.perf_counter()
        model = make_model(smaller(shape) if self.smoke else shape, self.sizes.vocab, dtype, self.device)
        synchronise()
        self.made[name] = time.perf_counter() - start
        return model

    @cached_property
    def teachers(self) -> dict[str, tuple[Backbone, Offload | None]]:
        """Before the student: each needs the device to itself until it is offloaded."""
        found = {}
        for name, shape in (("14B", QWEN3_14B), ("8B", QWEN3_8B)):
            model = self.make(name, shape, self.narrow).requires_grad_(False).eval()
            backbone = Backbone(model, name, MICRO_TOKENS)
            place = None if self.roomy and not self.smoke else Offload(model, torch.device(self.device))
            release()
            found[name] = (backbone, place)
        return found

    @cached_property
    def student(self) -> Backbone:
        assert self.teachers
        model = self.make("student", QWEN3_4B, torch.float32 if self.roomy else self.narrow)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return Backbone(model.train(), "student", MICRO_TOKENS)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """A learning rate of 0 does all the work and keeps the losses of all cases comparable."""
        return torch.optim.AdamW(self.student.model.parameters(), lr=0.0, fused=True)

    @cached_property
    def sampler(self) -> TransformersSampler:
        return TransformersSampler(self.student.model, NoText(self.sizes.vocab), 4 * MICRO_TOKENS)

    @cached_property
    def hidden(self) -> dict[str, list[Tensor]]:
        """What the teachers said, by teacher and sequence; ``judge`` sets it."""
        self.judge(Phases())
        return self.hidden

    def autocast(self) -> AbstractContextManager[Any]:
        on = self.roomy and self.device == "cuda"
        return torch.autocast(self.device, dtype=torch.bfloat16) if on else nullcontext()

    def judge(self, phases: Phases) -> None:
        """Debate and score: each teacher reads prompts with a transcript, then the responses after them."""
        said: dict[str, list[Tensor]] = {}
        s = self.sizes
        before = s.prompt + s.transcript
        context = [np.concatenate(x) for x in zip(s.ids(before, 2), s.ids(s.response, 1), strict=True)]
        asked = [ids[:before] for ids in context]
        for name, (backbone, place) in self.teachers.items():
            with ExitStack() as resident:
                with phases(f"{name}: to the device"):
                    if place is not None:
                        resident.enter_context(place.resident())
                with phases(f"{name}: debate prefill"):
                    backbone.score(asked, [np.array([before - 1])] * s.sequences)
                with phases(f"{name}: score"):
                    said[name] = backbone.score(context, [np.arange(before, before + s.response)] * s.sequences)
        self.hidden = said

    def rollout(self, phases: Phases) -> None:
        """One token and then several, from which the seconds a token follow."""
        for name, count in (("rollout: first token", 1), ("rollout: all tokens", self.sizes.sampled)):
            with phases(name):
                self.sampler.generate(self.sizes.requests(), SamplingParams(max_tokens=count))

    def update(self, phases: Phases, loss_of: Loss) -> float:
        """One micro-batch with every response; returns the loss."""
        student, rollouts = self.student, self.sizes.rollouts()
        (batch,) = pack([r.token_ids for r in rollouts], max_tokens=MICRO_TOKENS, layout=student.layout)
        assert isinstance(batch, Packed) and batch.members == tuple(range(len(rollouts)))
        self.optimizer.zero_grad(set_to_none=True)
        with phases("forward"), self.autocast():
            hidden = student.hidden(batch, [r.target_positions for r in rollouts])
        with phases("loss"):
            loss, backward = loss_of(hidden)
        with phases("backward"):
            backward()
        with phases("optimiser"):
            self.optimizer.step()
        return loss.item()

    def fused(self, hidden: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """The engine's objective: gradients of the head's inputs are ready when it returns."""
        names, tokens = tuple(self.teachers), len(hidden)
        objective = Objective({n: b.head for n, (b, _) in self.teachers.items()}, lambda key: "reverse_kl")
        samples = self.sizes.rollouts()
        for i, sample in enumerate(samples):
            places = sample.target_positions
            sample.contexts = tuple(TeacherContext(sample.id, name, sample.token_ids, places) for name in names)
            sample.teacher_targets = tuple(Hidden(self.hidden[name][i]) for name in names)
            sample.kl_weight = np.full(len(places), 1 / tokens, np.float32)
        loss = objective(hidden, self.student.head, samples)
        return loss.detach(), loss.backward

    def materialised(self, hidden: Tensor, rows: int) -> tuple[Tensor, Callable[[], None]]:
        """The same loss from the logits of ``rows`` tokens at a time, log-softmax in float32."""
        leaf, weight = hidden.detach().requires_grad_(), self.student.head.weight
        teachers = [(torch.cat(self.hidden[n]), b.head.weight) for n, (b, _) in self.teachers.items()]
        total = leaf.new_zeros((), dtype=torch.float32)
        for part in torch.arange(len(leaf)).split(rows):
            some = slice(int(part[0]), int(part[-1]) + 1)
            p = (leaf[some] @ weight.to(leaf.dtype).t()).float().log_softmax(-1)
            loss = p.new_zeros(())
            for states, head in teachers:
                q = (states[some] @ head.t()).float().log_softmax(-1)
                loss = loss + (p.exp() * (p - q)).sum() / (len(leaf) * len(teachers))
            loss.backward()
            total += loss.detach()
        return total, lambda: hidden.backward(leaf.grad)


def measured(world: World, run: Callable[[Phases], float | None], rounds: int) -> dict[str, Any]:
    """Medians over ``rounds`` after one warm-up; a lack of memory is a result."""
    seen, loss = [], None
    try:
        for _ in range(rounds + 1):
            phases = Phases()
            loss = run(phases)
            seen.append(phases.found)
    except torch.OutOfMemoryError as error:
        world.optimizer.zero_grad(set_to_none=True)
        return {"out_of_memory": str(error).splitlines()[0][:200], "phases_done": list(phases.found)}
    found = {
        name: {key: statistics.median(s[name][key] for s in seen[1:]) for key in figures}
        for name, figures in seen[-1].items()
    }
    return {"phases": found, "seconds": sum(f["seconds"] for f in found.values()), "loss": loss}


def share(figures: dict[str, Any]) -> dict[str, Any]:
    """Adds the loss's share of the update."""
    if "phases" in figures:
        update = sum(figures["phases"][name]["seconds"] for name in UPDATE)
        figures["update_seconds"] = update
        figures["loss_share"] = figures["phases"]["loss"]["seconds"] / update
    return figures


def describe(world: World) -> dict[str, Any]:
    models = {"student": world.student.model} | {n: b.model for n, (b, _) in world.teachers.items()}
    return {
        "parameters": {name: parameters(model) for name, model in models.items()},
        "seconds_to_make": world.made,
        "student_dtype": str(next(world.student.model.parameters()).dtype),
        "teachers_offloaded": any(place is not None for _, place in world.teachers.values()),
        "sizes": vars(world.sizes),
        "allocated_bytes": torch.cuda.memory_allocated() if torch.cuda.is_available() else None,
    }


def cases(smoke: bool) -> Iterator[Case]:
    world, rounds = World(smoke), 1 if smoke else 2
    whole = world.sizes.sequences * world.sizes.response
    some = 4 if smoke else SLICE

    def update(loss_of: Loss) -> dict[str, Any]:
        return share(measured(world, lambda phases: world.update(phases, loss_of), rounds))

    yield "models", lambda: describe(world)
    yield "teachers", lambda: measured(world, world.judge, 1)
    yield "rollout", lambda: measured(world, world.rollout, 1)
    yield "update, fused loss", lambda: update(world.fused)
    yield f"update, logits of {some} tokens", lambda: update(lambda h: world.materialised(h, some))
    yield "update, all logits", lambda: update(lambda h: world.materialised(h, whole))
