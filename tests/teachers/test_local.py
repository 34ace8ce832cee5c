"""Teachers in this process: dtype of their judgement, and weights that wait on the CPU."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from teacher_helpers import Server, context, served

from opdengine.config.train import TeacherConfig
from opdengine.models.backbone import Backbone
from opdengine.teachers.local import LocalTeacher
from opdengine.teachers.offload import Offload
from opdengine.types import Failure, Request, SamplingParams

IDS = [40, 41, 42, 43, 44, 45]


class Spied(Offload):
    """A "device" that lies in the same memory: tensors there are copies, tensors at home are not."""

    def __init__(self, model: Any) -> None:
        self.moves: list[str] = []
        super().__init__(model, torch.device("meta"))

    def _to_device(self, host: torch.Tensor) -> torch.Tensor:
        self.moves.append("in")
        return host.clone()

    def _leave(self) -> None:
        self.moves.append("out")
        super()._leave()


def run(teacher: LocalTeacher) -> tuple[torch.Tensor, np.ndarray]:
    (hidden,) = asyncio.run(teacher.score([context(IDS, 3)]))
    (said,) = asyncio.run(teacher.generate([Request("r", tuple(IDS), 1)], SamplingParams(max_tokens=4)))
    return hidden.states, said.token_ids


@pytest.mark.parametrize("name", ["big", "small"])  # own and tied output embedding
def test_offloaded_weights_visit_the_device_while_they_are_used(models: dict[str, str], name: str) -> None:
    plain = LocalTeacher(TeacherConfig(models[name], name="t"))
    teacher = LocalTeacher(TeacherConfig(models[name], name="t"))
    model = teacher.backbone.model
    home = {n: p.data_ptr() for n, p in model.named_parameters()}
    teacher._place = spied = Spied(model)
    moved = len([*model.parameters(), *model.buffers()]) - 1  # the output embedding stays
    assert spied.moves == ["out"] and len(spied._host) == moved
    where: list[bool] = []

    def note(module: Any, inputs: Any) -> None:
        away = {n for n, p in model.named_parameters() if p.data_ptr() != home[n]}
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        where.append(away == set(home) - ({"model.embed_tokens.weight"} if tied else {"lm_head.weight"}))

    teacher.backbone.trunk.layers[0].register_forward_pre_hook(note)
    states, ids = run(teacher)
    expected, theirs = run(plain)
    torch.testing.assert_close(states, expected, rtol=0, atol=0)
    assert ids.tolist() == theirs.tolist()
    assert where and all(where)
    assert spied.moves.count("in") == 2 * moved and spied.moves.count("out") == 3
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == home


def test_weights_go_back_after_an_error(models: dict[str, str]) -> None:
    teacher = LocalTeacher(TeacherConfig(models["big"], name="t"))
    teacher._place = spied = Spied(teacher.backbone.model)
    with pytest.raises(IndexError):
        asyncio.run(teacher.score([context([10**6] * 5, 2)]))
    assert spied.moves[-1] == "out"


def test_offload_on_the_cpu_moves_nothing(models: dict[str, str]) -> None:
    teacher = LocalTeacher(TeacherConfig(models["big"], name="t", offload=True))
    assert teacher._place is not None and teacher._place._host == []
    run(teacher)


@pytest.mark.parametrize("call", ["score", "generate"])
def test_served_calls_go_on_while_a_local_teacher_works(
    models: dict[str, str], bigrams: Server, tokenizer: Any, call: str
) -> None:
    """The local forward pass ends only once the server was asked, and it is begun first."""
    local, remote = LocalTeacher(TeacherConfig(models["big"], name="t")), served(bigrams, tokenizer)
    bigrams.control()

    def wait(*arguments: Any) -> None:
        until = time.monotonic() + 20
        while not bigrams.seen[call] and time.monotonic() < until:
            time.sleep(0.01)
        met.append(bool(bigrams.seen[call]))

    met: list[bool] = []
    local.backbone.trunk.register_forward_pre_hook(wait)
    arguments: tuple[Any, ...] = ([context(IDS, 3)],)
    if call == "generate":
        arguments = ([Request("r", tuple(IDS), 1)], SamplingParams(max_tokens=2))

    async def both() -> list[Any]:
        return await asyncio.gather(getattr(local, call)(*arguments), getattr(remote, call)(*arguments))

    (mine,), (theirs,) = asyncio.run(both())
    assert met and all(met)
    assert not isinstance(theirs, Failure)
    plain = LocalTeacher(TeacherConfig(models["big"], name="t"))
    (alone,) = asyncio.run(getattr(plain, call)(*arguments))
    if call == "score":
        torch.testing.assert_close(mine.states, alone.states, rtol=0, atol=0)
    else:
        assert mine.token_ids.tolist() == alone.token_ids.tolist()


def test_local_teachers_take_turns_in_the_order_of_the_calls(models: dict[str, str]) -> None:
    log: list[str] = []

    def teacher(name: str) -> LocalTeacher:
        made = LocalTeacher(TeacherConfig(models[name], name=name))

        def enter(*arguments: Any) -> None:
            log.append(f"{name} begins")
            time.sleep(0.05)

        made.backbone.trunk.register_forward_pre_hook(enter)
        made.backbone.trunk.register_forward_hook(lambda *arguments: log.append(f"{name} ends"))
        return made

    teachers = [teacher(name) for name in ("small", "big", "student")]
    log.clear()

    async def all_at_once() -> None:
        await asyncio.gather(*(t.score([context(IDS, 3)]) for t in teachers))

    asyncio.run(all_at_once())
    assert log == [f"{name} {what}" for name in ("small", "big", "student") for what in ("begins", "ends")]


def test_an_offloaded_teacher_works_in_the_thread_of_its_device(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between calls its weights are elsewhere; a call from there would run beside one on the device."""
    teacher = LocalTeacher(TeacherConfig(models["big"], name="t"))
    monkeypatch.setattr(Backbone, "device", property(lambda self: torch.device("meta")))
    assert asyncio.run(teacher._run(lambda: threading.current_thread().name)).startswith("teachers on cpu")


def test_hidden_states_keep_the_dtype_of_the_teacher(models: dict[str, str]) -> None:
    for dtype in ("bfloat16", "float32"):
        teacher = LocalTeacher(TeacherConfig(models["big"], name="t", dtype=dtype))
        (hidden,) = asyncio.run(teacher.score([context(IDS, 3)]))
        assert str(hidden.states.dtype) == f"torch.{dtype}"
        assert teacher.head.weight.dtype == hidden.states.dtype
