"""Save and resume a run: safetensors and JSON only, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from opdengine.lora import save_model


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int | None = None,
) -> Path:
    """Write ``folder/step_N`` atomically and remove the oldest beyond ``keep``.

    Args:
        folder: of the checkpoints.
        step: optimiser steps taken.
        model, tokenizer: saved under ``model/``, of an adapted model the adapter alone.
        optimizer: its state goes to ``optimizer.safetensors``.
        state: JSON-able rest (scheduler, data stream, versions).
        keep: number of checkpoints to keep; None keeps all.
    """
    final = folder / f"step_{step}"
    partial = folder / f".step_{step}.{os.getpid()}.partial"
    for left_by_a_killed_run in folder.glob(".step_*.partial"):
        shutil.rmtree(left_by_a_killed_run)
    partial.mkdir(parents=True)
    save_model(model, partial / "model")
    tokenizer.save_pretrained(partial / "model")
    save_file(_optimizer_tensors(optimizer), partial / "optimizer.safetensors")
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    save_file(rng, partial / "rng.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    for file in partial.rglob("*"):
        if file.is_file():
            _flush(file)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _flush(folder)
    if keep is not None:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; what a killed save left behind is not one."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.glob("step_*") if (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The checkpoint named by ``resume_from_checkpoint``.

    Raises:
        CheckpointError: there is none.
    """
    if wanted != "latest":
        path = Path(wanted)
        if not (path / "state.json").is_file():
            raise CheckpointError(f"{wanted!r} is not a checkpoint: it has no state.json")
        return path
    found = list_checkpoints(output_dir / "checkpoints")
    if not found:
        raise CheckpointError(
            f"no checkpoint in {str(output_dir / 'checkpoints')!r}; start without "
            "resume_from_checkpoint (and set save_steps to have one next time)"
        )
    return found[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return dict(json.loads((checkpoint / "state.json").read_text()))


def restore_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load optimiser state and random state; shapes must match.

    Raises:
        CheckpointError: the parameters are not those of the checkpoint.
    """
    tensors = load_file(checkpoint / "optimizer.safetensors")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)] if int(index) < len(parameters) else None
        if parameter is None or (value.dim() and value.shape != parameter.shape):
            raise CheckpointError(
                f"{checkpoint}: optimiser state {key} of shape {tuple(value.shape)} fits no "
                "parameter of this model; resume with the same model and settings"
            )
        target = value if name == "step" else value.to(parameter.device)
        optimizer.state[parameter][name] = target
    rng = load_file(checkpoint / "rng.safetensors")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """``"<parameter index>.<state name>" -> tensor``; empty before the first step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {
        f"{i}.{name}": value.contiguous()
        for i, p in enumerate(parameters)
        for name, value in optimizer.state.get(p, {}).items()
    }
    return tensors


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
