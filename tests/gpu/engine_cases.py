"""What the engine must do on a device. ``test_gpu_engine.py`` runs this on a GPU; the CPU rehearses it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from engine_helpers import assert_same_gradients, loss_and_gradient, make_config, make_samples

from opdengine.data.prompts import load_prompts
from opdengine.distributed import Ranks
from opdengine.methods import build_method
from opdengine.models.backbone import Backbone
from opdengine.models.chat import load_tokenizer
from opdengine.models.checkpoint import read_state, restore_optimizer, save_checkpoint
from opdengine.models.random_state import random_state
from opdengine.models.sharding import Sharded, whole
from opdengine.training import build
from opdengine.training.step import Engine
from opdengine.training.step_result import StepResult
from opdengine.types import Hidden, Prompt, TeacherContext

DEBATE: dict[str, Any] = {"method": "mad_opd", "divergence": {"code": "reverse_kl", "agentic": "jsd"}}


class Bench:
    """Builds engines on a device.

    Args:
        device: where.
        models, prompt_file: see ``tests/conftest.py``.
        folder: for what the engines write.
    """

    def __init__(self, device: str, models: dict[str, str], prompt_file: str, folder: Path) -> None:
        self.device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self.models, self.prompt_file, self.folder = models, prompt_file, folder
        self.made = 0

    @property
    def prompts(self) -> Sequence[Prompt]:
        return load_prompts([self.prompt_file]).prompts

    def engine(self, checkpoint: Path | None = None, device: torch.device | None = None, **changes: Any) -> Engine:
        self.made += 1
        config = make_config(self.models, self.prompt_file, self.folder / f"run{self.made}", **changes)
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "default_device", lambda: device or self.device)
            return build.build_engine(config, build_method(config), load_tokenizer(config.model), checkpoint)


def step(engine: Engine, prompts: Sequence[Prompt]) -> StepResult:
    return asyncio.run(engine.step(prompts))


def a_step_of_a_debate(bench: Bench, bf16: bool) -> None:
    """Rollouts, debate, scores and update; sampler and trainer agree; everything is on the device."""
    engine = bench.engine(bf16=bf16, num_generations=2, **DEBATE)
    before = [p.detach().clone() for p in engine.student.model.parameters()]
    metrics = [step(engine, bench.prompts[4 * i : 4 * i + 4]).metrics for i in range(2)]
    for found in metrics:
        assert found["completions/kept"] == 8 and found["debate/generated"] == 4
        assert found["grad_norm"] > 0 and "bad_steps" not in found
        assert found["sampling/logprob_difference"] < (0.2 if bf16 else 1e-3)
        assert min(found["teacher_kl/big"], found["teacher_kl/small"]) > 0
    parameters = list(engine.student.model.parameters())
    assert {p.device for p in parameters} == {bench.device} and {p.dtype for p in parameters} == {torch.float32}
    assert not all(torch.equal(one, other) for one, other in zip(before, parameters, strict=True))
    assert all(group["fused"] for group in engine.optimizer.param_groups)


def the_same_loss_as_on_the_cpu(bench: Bench, bf16: bool, **changes: Any) -> None:
    """Of the same rollouts under the same judgements; gradients, too."""
    reference = bench.engine(device=torch.device("cpu"), **changes)
    samples = make_samples(reference, bench.prompts[:4])
    loss, gradients = loss_and_gradient(reference, samples)
    found, here = loss_and_gradient(bench.engine(bf16=bf16, **changes), samples)
    here = {name: gradient.cpu() for name, gradient in here.items()}
    if not bf16:
        assert found == pytest.approx(loss, rel=1e-4)
        assert_same_gradients(here, gradients, rtol=1e-3)
        return
    assert found == pytest.approx(loss, rel=0.02)
    one, other = (torch.cat([g.flatten() for g in named.values()]) for named in (here, gradients))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


def checkpointing_changes_nothing(bench: Bench) -> None:
    """Recomputed activations are those of the first pass."""
    plain = bench.engine(bf16=True)
    samples = make_samples(plain, bench.prompts[:4])
    loss, gradients = loss_and_gradient(plain, samples)
    again, others = loss_and_gradient(bench.engine(bf16=True, gradient_checkpointing=True), samples)
    assert again == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(others, gradients, rtol=1e-2)


def a_split_student_has_the_same_gradients(bench: Bench, bf16: bool) -> None:
    """FSDP2 over one process: what it gathers and reduces changes neither the loss nor a gradient."""
    plain = bench.engine(bf16=bf16)
    samples = make_samples(plain, bench.prompts[:4])
    loss, gradients = loss_and_gradient(plain, samples)
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{bench.folder / 'store'}", rank=0, world_size=1)
    try:
        engine = bench.engine(bf16=bf16)
        model = engine.student.model
        sharded = Sharded(model, Ranks(), bench.device, bf16)
        engine.student = Backbone(model, "student", engine.student.max_tokens, sharded, bf16)
        again, split = loss_and_gradient(engine, samples)
        assert all(isinstance(gradient, torch.distributed.tensor.DTensor) for gradient in split.values())
        others = {name: whole(gradient) for name, gradient in split.items()}
    finally:
        torch.distributed.destroy_process_group()
    assert again == pytest.approx(loss, rel=1e-3 if bf16 else 1e-5)
    if not bf16:
        assert_same_gradients(others, gradients, rtol=1e-3)
        return
    one, other = (torch.cat([named[name].flatten() for name in gradients]) for named in (gradients, others))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


def a_resumed_run_goes_on(bench: Bench, **changes: Any) -> None:
    """What a checkpoint holds comes back to the last bit; the next step is the same up to rounding.

    A GPU adds up some gradients in an order that varies. AdamW's epsilon is large, or it would turn the
    rounding of gradients near 0 into steps.
    """
    options = {"adam_epsilon": 1e-2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", **changes}
    engine = bench.engine(**options)
    step(engine, bench.prompts[:4])
    saved = save_checkpoint(
        bench.folder / "saved",
        step=1,
        model=engine.student.model,
        tokenizer=engine.tokenizer,
        optimizer=engine.optimizer,
        state={"version": engine.version, "scheduler": engine.scheduler.state_dict()},
    )
    randoms = random_state()
    resumed = bench.engine(checkpoint=saved, **options)
    resumed.version = read_state(saved)["version"]
    resumed.scheduler.load_state_dict(read_state(saved)["scheduler"])
    restore_optimizer(saved, resumed.student.model, resumed.optimizer)
    asyncio.run(resumed.sync())
    for name, value in random_state().items():
        assert torch.equal(value, randoms[name]) or torch.isnan(value).all(), name
    pairs = list(zip(engine.student.model.parameters(), resumed.student.model.parameters(), strict=True))
    for one, other in pairs:
        assert torch.equal(one, other)
        for name, value in engine.optimizer.state.get(one, {}).items():
            there = resumed.optimizer.state[other][name]
            assert torch.equal(value, there) and value.device == there.device, name
    results = [step(each, bench.prompts[4:8]) for each in (engine, resumed)]
    said = [[r.target_ids.tolist() for r in result.samples] for result in results]
    assert said[0] == said[1]
    assert results[1].metrics["loss"] == pytest.approx(results[0].metrics["loss"], rel=1e-4)
    for one, other in pairs:
        torch.testing.assert_close(other, one, rtol=0, atol=1e-3 * options["learning_rate"])


def offloaded_teachers_judge_the_same(bench: Bench) -> None:
    """Their weights come from pinned memory for every call and are not on the device between calls."""
    plain = bench.engine()
    away = bench.engine(teachers=[{"model": bench.models[name], "offload": True} for name in ("big", "small")])
    contexts = [
        TeacherContext(str(i), "t", ids, torch.arange(3, len(ids)).numpy())
        for i, ids in enumerate(torch.arange(40, 70).split(12)[k].numpy() for k in (0, 1))
    ]

    async def judge(engine: Engine) -> list[Hidden]:
        answers = await asyncio.gather(*(teacher.score(contexts) for teacher in engine.teachers))
        return [judgement for answer in answers for judgement in answer]  # type: ignore[misc]

    for _ in range(2):
        for one, other in zip(asyncio.run(judge(plain)), asyncio.run(judge(away)), strict=True):
            assert other.states.device.type == "cpu"  # until their micro-batch
            torch.testing.assert_close(other.states, one.states)
        for teacher in away.teachers:
            model = teacher.backbone.model  # type: ignore[attr-defined]
            head = model.get_output_embeddings().weight
            assert head.device == bench.device
            waiting = [p for p in model.parameters() if p is not head]
            assert {p.device.type for p in waiting} == {"cpu"}
            assert {p.is_pinned() for p in waiting} == {bench.device.type == "cuda"}
    assert step(away, bench.prompts[:4]).metrics["completions/kept"] == 4


def an_adapter_learns(bench: Bench) -> None:
    """LoRA on bfloat16 weights, with checkpointing: only the adapter moves."""
    engine = bench.engine(dtype="bfloat16", bf16=True, lora={"r": 4}, gradient_checkpointing=True, learning_rate=1e-2)
    before = {n: p.detach().clone() for n, p in engine.student.model.named_parameters()}
    assert all(step(engine, bench.prompts[:4]).metrics["grad_norm"] > 0 for _ in range(2))
    moved = {n for n, p in engine.student.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".lora_" in name for name in moved)


def every_method_of_weighing(bench: Bench) -> None:
    """Measures, advantages and a selection, by a method that uses all of them."""
    teachers = [{"model": bench.models["big"], "key": ["agentic"]}, {"model": bench.models["small"], "key": ["code"]}]
    engine = bench.engine(method="camopd", camopd={"domain": ["agentic"]}, teachers=teachers)
    assert step(engine, bench.prompts[:8]).metrics["grad_norm"] > 0


def memory_does_not_grow(bench: Bench) -> None:
    """What is allocated after a step is what was allocated after the one before."""
    engine = bench.engine(bf16=True, gradient_checkpointing=True, **DEBATE)
    held = []
    for _ in range(4):
        step(engine, bench.prompts[:4])
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2] == held[3], held
