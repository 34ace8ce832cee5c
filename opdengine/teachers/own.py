"""The student as its own teacher (``model: self``): as the run began, as it is now, or as it was on average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch

from opd_kernels import LMHead
from opdengine.config.sections import TeacherConfig
from opdengine.data.templates import Reader
from opdengine.errors import ConfigError
from opdengine.models.backbone import Backbone
from opdengine.models.lora import base_of, digest, fingerprint
from opdengine.models.policy import policy
from opdengine.models.rendering import thought_opening
from opdengine.models.sharding import split_like, whole, whole_weights
from opdengine.rollout.transformers import TransformersSampler
from opdengine.teachers import Configured, Teacher
from opdengine.teachers.local import LocalTeacher, in_dtype_of_loss
from opdengine.teachers.threads import work_on
from opdengine.types import Completion, Failure, Hidden, Request, SamplingParams, TeacherContext

T = TypeVar("T")


class SharedTeacher(Configured):
    """The student's own parameters as a teacher: as they are ("live"), or without the adapter ("base").

    It reads in evaluation mode and without gradient, in the process that trains; nothing is held twice.

    Args:
        config: with the student's model and template.
        student: that is trained.
        tokenizer: the student's, with this teacher's template.
    """

    def __init__(self, config: TeacherConfig, student: Backbone, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.opening = thought_opening(tokenizer, config.chat_template_kwargs)
        self.steps = 0
        self.backbone = student
        self._reader = Reader(f"teacher {config.name!r}", tokenizer, config.chat_template_kwargs)
        self._sampler = TransformersSampler(
            base_of(student.model), tokenizer, 4 * student.max_tokens, student.bf16, config.chat_template_kwargs
        )
        self._known = (-1, "")
        self._base = fingerprint(student.model)
        with self._weights():
            self._sampler.prove()

    @property
    def fingerprint(self) -> str:
        if self.config.weights == "base":
            return self._base
        if self._known[0] != self.steps:
            self._known = (self.steps, digest(whole_weights(self.backbone.model)))
        return self._known[1]

    @property
    def window(self) -> int | None:
        return self.backbone.window

    @property
    def head(self) -> LMHead:
        """The student's, out of reach of gradients, in the dtype in which the loss takes it."""
        own = in_dtype_of_loss(self.backbone)
        bias = None if own.bias is None else own.bias.detach()
        return LMHead(own.weight.detach(), bias, own.logit_scale, own.softcap)

    async def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion | Failure]:
        return [completions[0] for completions in await self._run(self._sampler.generate, requests, params)]

    async def score(self, contexts: Sequence[TeacherContext]) -> list[Hidden]:
        ids, positions = [c.token_ids for c in contexts], [c.target_positions for c in contexts]
        images = [c.images for c in contexts]
        return [Hidden(rows) for rows in await self._run(self.backbone.score, ids, positions, images)]

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call in the thread of the device, with this teacher's weights in the model."""

        def work() -> T:
            self.backbone.model.eval()
            with self._weights():
                return function(*arguments)

        return await work_on(self.backbone.device, work)

    def _weights(self) -> AbstractContextManager[None]:
        if self.config.weights == "live":
            return nullcontext()
        without: AbstractContextManager[None] = self.backbone.model.disable_adapter()
        return without

    def counts(self) -> dict[str, float]:
        """Nothing can fail here that would not end the run."""
        return {}

    def follow(self) -> None:
        """Note that the optimiser has stepped."""
        self.steps += 1


class AveragedTeacher(LocalTeacher):
    """A copy of the student's weights that follows it: ``average = (1 - rate) * average + rate * student``.

    Averages are of whole weights (of an adapted student: with the adapter in them), in float32 where the teacher
    computes in less. Split weights (``shard``) are averaged where they are.

    Args:
        student: the trained model.
        rate: share of the student; 1 copies it.
        every: optimiser steps between two updates.
        options: of :class:`LocalTeacher`.
    """

    def __init__(self, student: Any, rate: float, every: int, **options: Any) -> None:
        super().__init__(**options)
        self.steps, self.rate, self.every = 0, rate, every
        self._followed = student
        self._places = {name: p for name, p in self.backbone.model.named_parameters()}
        self._averages = {n: p.float() for n, p in self._places.items() if p.dtype.itemsize < 4}

    @torch.no_grad()
    def follow(self) -> None:
        """Note that the optimiser has stepped, and update the average where that is due. All processes call this."""
        self.steps += 1
        if self.steps % self.every == 0:
            self._move(policy(self._followed), self.rate)

    def _move(self, weights: tuple[Any, Mapping[str, Any] | None], rate: float) -> None:
        whole_of, low_rank = weights
        left_out = set(self._places)
        for name, value in whole_of:
            if name not in self._places:  # a tied head has the name of the embedding
                continue
            left_out.discard(name)
            if low_rank is not None and name in low_rank:
                left, right = low_rank[name]
                value = value.float() + left @ right
            place = self._places[name]
            average = self._averages.get(name, place.data)
            _own(average).lerp_(_own(split_like(value.to(average.dtype), place)), rate)
            if name in self._averages:
                place.copy_(average)
        if left_out:
            raise RuntimeError(
                f"teacher {self.name!r} cannot follow the student, which has no weights {sorted(left_out)[:3]} "
                f"({len(left_out)} in all)"
            )
        self.fingerprint = digest(whole_weights(self.backbone.model))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The averages, whole, on the host; of a copy nothing. All processes call this."""
        if self.config.weights == "live":
            return {}
        return {n: whole(self._averages.get(n, p.data)).cpu().contiguous() for n, p in self._places.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        """Take the averages of a checkpoint, or copy the student again. All processes call this.

        Raises:
            ConfigError: a weight is missing or of another shape.
        """
        self.steps = steps
        if self.config.weights == "live":
            return self._move(policy(self._followed), 1.0)
        shapes = {name: p.shape for name, p in self._places.items()}
        if shapes != {name: t.shape for name, t in tensors.items()}:
            raise ConfigError(f"the checkpoint does not hold the averaged weights of teacher {self.name!r}")
        self._move((tensors.items(), None), 1.0)


def build_own(
    config: TeacherConfig, student: Backbone, shared: bool, tokenizer: Any, options: Mapping[str, Any]
) -> Teacher:
    """The student as a teacher.

    Args:
        config: with the student's model and template.
        student: that is trained.
        shared: read its own parameters. Where they are split over processes, "live" is a copy that is renewed after
            every step, and "base" one that stays.
        tokenizer: of the student, with this teacher's template.
        options: of :class:`LocalTeacher` for one that has weights of its own.
    """
    if shared and student.sharded is None:
        return SharedTeacher(config, student, tokenizer)
    if config.weights == "base":
        return LocalTeacher(config, tokenizer=tokenizer, **options)
    rate, every = (1.0, 1) if config.weights == "live" else (config.teacher_update_rate, config.teacher_sync_steps)
    return AveragedTeacher(student.model, rate, every, config=config, tokenizer=tokenizer, **options)


def follow(teachers: Sequence[Teacher], optimizer: torch.optim.Optimizer) -> None:
    """Have the teachers that change with the student told of every step of its optimiser."""
    for teacher in teachers:
        if isinstance(teacher, SharedTeacher | AveragedTeacher):
            optimizer.register_step_post_hook(partial(_stepped, teacher))


def _stepped(teacher: SharedTeacher | AveragedTeacher, *_: object) -> None:
    teacher.follow()


def tensors_of(teachers: Sequence[Teacher]) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of the teachers: their averages, as ``"<name of the teacher>/<weight>"``."""
    averaged = [t for t in teachers if isinstance(t, AveragedTeacher)]
    return {f"{t.name}/{name}": tensor for t in averaged for name, tensor in t.tensors().items()}


def starts_of(teachers: Sequence[Teacher]) -> dict[str, str]:
    """Fingerprints of the weights that the run began with, by the names of the teachers that keep them."""
    found = {}
    for teacher in teachers:
        if isinstance(teacher, SharedTeacher | LocalTeacher) and teacher.config.weights == "base":
            found[teacher.name] = fingerprint(teacher.backbone.model)
    return found


def restore_own(
    teachers: Sequence[Teacher], tensors: Mapping[str, torch.Tensor], starts: Mapping[str, str], steps: int
) -> None:
    """Continue as the teachers of a checkpoint.

    Args:
        teachers: of the run.
        tensors: :func:`tensors_of` then.
        starts: :func:`starts_of` then.
        steps: of the optimiser since the run began.

    Raises:
        ConfigError: the student's model is no longer the one that the run began with, or that is not known.
    """
    for name, mark in starts_of(teachers).items():
        if name not in starts:
            raise ConfigError(
                f"the checkpoint does not say which weights teacher {name!r} began with, so it cannot be told whether "
                "the model has them still; start a new run"
            )
        if starts[name] != mark:
            raise ConfigError(
                f"teacher {name!r} has the weights that the run began with, but the model's are others now than at the "
                "first step; put the model back, or start a new run"
            )
    for teacher in teachers:
        if isinstance(teacher, AveragedTeacher):
            place = f"{teacher.name}/"
            own = {n.removeprefix(place): t for n, t in tensors.items() if n.startswith(place)}
            teacher.restore(own, steps)
        elif isinstance(teacher, SharedTeacher):
            teacher.steps = steps


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
