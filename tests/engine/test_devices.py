"""Which device things are on, and what is still held between the phases of a step."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import make_config, make_engine

from opdengine.config.train import TeacherConfig, TrainConfig
from opdengine.data.prompts import load_prompts
from opdengine.models.backbone import Backbone, default_device, load_model
from opdengine.models.batching import cache_argument
from opdengine.models.checkpoint import restore_optimizer, save_checkpoint
from opdengine.teachers import local
from opdengine.teachers.prefix import PrefixScorer
from opdengine.training import scoring
from opdengine.training import step as engine_module
from opdengine.training.optimizer import build_optimizer
from opdengine.training.step import Engine
from opdengine.types import Batch, Hidden, Prompt, Sample, TeacherContext

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
    monkeypatch.setattr(teacher._scorer, "score", lambda ids, positions, images: [torch.zeros(2, 4)])
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
    score = engine_module.score

    async def noting(batch: Batch, *arguments: Any) -> None:
        await score(batch, *arguments)
        held.extend(weakref.ref(t.states) for sample in batch for t in sample.teacher_targets if isinstance(t, Hidden))

    monkeypatch.setattr(engine_module, "score", noting)
    engine = make_engine(make_config(models, prompt_file, tmp_path, max_tokens_per_batch=40))
    forward = engine.student.model.forward

    def remember(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        held.append(weakref.ref(getattr(output, cache_argument(engine.student.model))))
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


@pytest.mark.parametrize("shared", [False, True])
def test_scored_states_are_brought_to_the_host(models: Models, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """Of every pass, whether contexts share a prefix or not: those of a whole step would fill a GPU."""
    scorer = PrefixScorer(Backbone(load_model(models["student"])))
    if shared:
        monkeypatch.setattr("opdengine.teachers.prefix.LEAST_SAVED", 1)
    ids, targets = [np.arange(1, 30), np.arange(1, 40)], [np.arange(20, 29), np.arange(20, 39)]
    scorer.score(ids, targets)  # proves itself
    brought = []

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        brought.append(tensor.clone())
        return brought[-1]

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    found = scorer.score(ids, targets)
    assert scorer._exact == (True if shared else None)
    assert [len(states) for states in found] == [9, 19]
    places = {tensor.untyped_storage().data_ptr() for tensor in brought}
    assert {states.untyped_storage().data_ptr() for states in found} <= places


@pytest.mark.parametrize("rows", [1, 10, 10**6])
def test_measures_are_read_in_pieces(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, method="mt_opd"))
    prompts = load_prompts([prompt_file]).prompts[:4]
    judged = asyncio.run(judged_of(engine, prompts))
    heads = {t.name: t.head for t in engine.teachers if t.head is not None}
    measures = ("student_logprob", "teacher_logprob", "teacher_entropy")
    scoring.Measurer(engine.student, heads, engine.vocab_size)(judged, measures)
    expected = [dataclasses.replace(sample) for sample in judged]
    sizes = []
    linear_logprob = scoring.linear_logprob

    def noting(hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(len(hidden))
        return linear_logprob(hidden, *arguments, **options)

    monkeypatch.setattr(scoring, "linear_logprob", noting)
    monkeypatch.setattr(scoring, "MOST_ROWS", rows)
    scoring.Measurer(engine.student, heads, engine.vocab_size)(judged, measures)
    lengths = [len(sample.target_ids) for sample in judged]
    assert sum(sizes) == 3 * sum(lengths) and max(sizes) <= max(rows, *lengths)
    assert len(sizes) == {1: 3 * len(lengths), 10**6: 3}.get(rows, len(sizes))
    for one, other in zip(judged, expected, strict=True):
        for measure in measures:
            np.testing.assert_allclose(getattr(one, measure), getattr(other, measure), rtol=1e-5, atol=1e-6)


async def judged_of(engine: Engine, prompts: Sequence[Prompt]) -> list[Sample]:
    batch = await engine.prepare(prompts, 0)
    await engine.score(batch)
    return list(batch)
