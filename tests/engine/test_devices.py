"""Which device things are on, and what is still held between the phases of a step."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import make_config, make_engine

from opdengine import engine as engine_module
from opdengine.backbone import Backbone, default_device, load_model
from opdengine.build import build_optimizer
from opdengine.checkpoint import restore_optimizer, save_checkpoint
from opdengine.config import TeacherConfig, TrainConfig
from opdengine.data import load_prompts
from opdengine.scoring import Judged
from opdengine.teachers import local
from opdengine.types import Hidden, TeacherContext

Models = dict[str, str]


def test_a_gpu_is_named_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.cuda.set_device`` refuses a device without one, and new threads start on the first GPU."""
    assert default_device() == torch.device("cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    assert default_device() == torch.device("cuda:3")


def test_an_offloaded_teacher_works_in_the_thread_of_its_device(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are elsewhere when it is called."""
    teacher = local.LocalTeacher(TeacherConfig(models["big"], name="t"))
    asked = []

    async def work_on(device: torch.device, function: Any, *arguments: Any) -> Any:
        asked.append(device)
        return function(*arguments)

    monkeypatch.setattr(local, "work_on", work_on)
    home = teacher.backbone.device
    monkeypatch.setattr(Backbone, "device", property(lambda self: torch.device("meta")))
    monkeypatch.setattr(teacher._scorer, "score", lambda ids, positions: [torch.zeros(2, 4)])
    ids = np.arange(5)
    asyncio.run(teacher.score([TeacherContext("r", "t", ids, np.array([3, 4]))]))
    assert asked == [home]


@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_optimiser_counts_its_steps_where_it_needs_them(
    models: Models, tokenizer: Any, tmp_path: Path, fused: bool
) -> None:
    """A fused one on the parameter's device; a meta device stands for a GPU."""
    config = TrainConfig(models["student"], str(tmp_path), train_data=["x"], use_vllm=False)
    model = load_model(models["student"])
    optimizer = build_optimizer(config, model)
    model(input_ids=torch.arange(5)[None]).logits.sum().backward()
    optimizer.step()
    saved = save_checkpoint(tmp_path, step=1, model=model, tokenizer=tokenizer, optimizer=optimizer, state={})
    elsewhere = load_model(models["student"], device="meta")
    other = build_optimizer(config, elsewhere)
    for group in other.param_groups:
        group["fused"] = fused
    restore_optimizer(saved, elsewhere, other)
    counts = [state["step"] for state in other.state.values()]
    assert len(counts) == len(list(model.parameters()))
    assert {count.device.type for count in counts} == {"meta" if fused else "cpu"}
    assert {state["exp_avg"].device.type for state in other.state.values()} == {"meta"}


def test_a_fused_optimiser_goes_on_where_it_stopped(models: Models, tokenizer: Any, tmp_path: Path) -> None:
    config = TrainConfig(models["student"], str(tmp_path), train_data=["x"], learning_rate=1e-2)

    def made() -> tuple[Any, torch.optim.AdamW]:
        model = load_model(models["student"])
        optimizer = build_optimizer(config, model)
        for group in optimizer.param_groups:
            group["fused"] = True
        return model, optimizer

    def step(model: Any, optimizer: torch.optim.AdamW, first: int) -> None:
        optimizer.zero_grad()
        model(input_ids=torch.arange(first, first + 5)[None]).logits.square().mean().backward()
        optimizer.step()

    model, optimizer = made()
    step(model, optimizer, 0)
    saved = save_checkpoint(tmp_path, step=1, model=model, tokenizer=tokenizer, optimizer=optimizer, state={})
    again, other = made()
    again.load_state_dict(model.state_dict())
    restore_optimizer(saved, again, other)
    for m, o in ((model, optimizer), (again, other)):
        step(m, o, 7)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_nothing_of_a_step_is_held_after_it(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gradient, no hidden state of a teacher, no cache of the sampler; nor does any wait for the cycle collector."""
    held: list[weakref.ref[Any]] = []
    judge = engine_module.judge

    async def noting(*arguments: Any) -> Sequence[Judged]:
        judged = await judge(*arguments)
        held.extend(weakref.ref(t.states) for item in judged for t in item.targets if isinstance(t, Hidden))
        return judged

    monkeypatch.setattr(engine_module, "judge", noting)
    engine = make_engine(make_config(models, prompt_file, tmp_path, max_tokens_per_batch=40))
    forward = engine.student.model.forward

    def remember(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        held.append(weakref.ref(output.past_key_values))
        return output

    monkeypatch.setattr(engine.student.model, "forward", remember)
    gc.collect()
    gc.disable()
    try:
        result = asyncio.run(engine.step(load_prompts([prompt_file]).prompts[:4]))
        alive = [found for found in held if found() is not None]
    finally:
        gc.enable()
    assert result.metrics["grad_norm"] > 0
    assert len(held) == 2 * 4 + 6  # two teachers, four rollouts of up to six tokens
    assert alive == []
    assert all(p.grad is None for p in engine.student.model.parameters())
