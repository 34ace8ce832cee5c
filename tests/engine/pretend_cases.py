"""The engine on a pretend device, where a tensor that is left on the CPU raises.

Not collected under this name: ``test_pretend_device.py`` runs it in a process of its own, since the device is
registered for the whole process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
sys.path.insert(0, str(Path(__file__).parent))

import engine_cases
from engine_cases import Bench
from pretend_device import DEVICE, Pretend
from run_settings import OF_METHODS, settings_of
from test_gpu_rehearsal import (  # noqa: F401 - run here on the pretend device
    test_a_resumed_run_goes_on,
    test_a_step_of_a_debate,
    test_an_adapter_learns,
    test_checkpointing_changes_nothing,
    test_every_method_of_weighing,
    test_offloaded_teachers_judge_the_same,
    test_the_same_loss_as_on_the_cpu,
)

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.models import backbone
from opdengine.training import build, build_student
from opdengine.training.run import train


@pytest.fixture
def bench(models: dict[str, str], prompt_file: str, tmp_path: Path) -> Bench:
    bench = Bench("cpu", models, prompt_file, tmp_path)
    bench.device = DEVICE
    return bench


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (backbone, build, build_student):
        monkeypatch.setattr(module, "default_device", lambda: DEVICE)


def test_tensors_in_two_places_raise() -> None:
    here, there = torch.ones(3, device=DEVICE), torch.ones(3)
    for mixed in (
        lambda: here + there,
        lambda: here.index_add(0, torch.arange(3), here),
        lambda: torch.cat([here, there]),
    ):
        with pytest.raises(RuntimeError, match=f"expected all tensors on {DEVICE}"):
            mixed()
    with pytest.raises(TypeError, match="to numpy"):
        here.numpy()
    assert isinstance(here[torch.tensor([0])] * torch.tensor(2.0), Pretend)
    assert here.cpu().device.type == "cpu" and there.to(DEVICE).device == DEVICE


@pytest.mark.parametrize("method", OF_METHODS)
def test_a_run_of_every_method(method: str, models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    """Rollouts, scores, updates, evaluation and checkpoints."""
    settings = settings_of(method, models, prompt_file, steps=2) | {"output_dir": str(tmp_path)}
    assert train(from_mapping(TrainConfig, settings), progress=False).step == 2


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_sampled_columns(bench: Bench, kind: str) -> None:
    engine = bench.engine(divergence=kind, vocab_sample=0.3)
    assert engine_cases.step(engine, bench.prompts[:4]).metrics["grad_norm"] > 0
