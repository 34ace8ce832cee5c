"""Save and resume a run: safetensors and JSON only, written whole or not at all.

A checkpoint does not know on how many ranks it was written: every tensor is whole and stored by the
name of its parameter. Only the states of the random generators are those of each rank.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opdengine.distributed import Ranks
from opdengine.errors import WriteError
from opdengine.models.lora import save_model
from opdengine.models.manifest import MANIFEST, STATE, find_damage, flush, has_manifest, seal
from opdengine.models.processor import save_tokenizer
from opdengine.models.random_state import random_state, set_random_state
from opdengine.models.sharding import split_like, whole

logger = logging.getLogger(__name__)

TEACHERS = "teachers.safetensors"
NAME = re.compile(r"step_(0|[1-9][0-9]*)")


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
    spare: Collection[int | None] = (),
    ranks: Ranks | None = None,
    teachers: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write ``folder/step_N`` atomically, then remove what is older beyond ``keep``. All ranks call this.

    Checkpoints of later steps, left by a run that was continued from an earlier one, are removed, too.

    Args:
        folder: of the checkpoints.
        step: optimiser steps taken.
        model, tokenizer: saved under ``model/``, of an adapted model the adapter alone.
        optimizer: its state goes to ``optimizer.safetensors``.
        state: JSON-able rest (scheduler, data stream, versions).
        keep: number of checkpoints to keep; None keeps all.
        spare: steps whose checkpoints are kept besides.
        ranks: of the run; the first one writes.
        teachers: what changes in teachers; goes to ``teachers.safetensors`` where there is any.

    Raises:
        WriteError: nothing was written (a full disk, say); the checkpoints before are as they were.
    """
    ranks = ranks or Ranks()
    final = folder / f"step_{step}"
    moments = _optimizer_tensors(model, optimizer, ranks.is_first)
    states = ranks.gather(random_state())
    randoms = {f"{rank}.{name}": value for rank, part in enumerate(states) for name, value in part.items()}

    def write(partial: Path) -> None:
        save_tokenizer(tokenizer, partial / "model")
        save_file(moments, partial / "optimizer.safetensors")
        save_file(randoms, partial / "rng.safetensors")
        if teachers:
            save_file(dict(teachers), partial / TEACHERS)
        (partial / STATE).write_text(json.dumps({"step": step, "manifest": True, **state}, indent=1))

    write_model(final, model, ranks, write, place="model", finish=lambda partial: seal(partial, step))
    if ranks.is_first:
        saved = list_checkpoints(folder)
        at = saved.index(final)
        old = saved[: max(at + 1 - keep, 0)] if keep is not None else []
        old = [checkpoint for checkpoint in old if step_of(checkpoint) not in spare]
        for path in (*old, *saved[at + 1 :]):
            _remove(path)
    return final


def write_model(
    final: Path,
    model: Any,
    ranks: Ranks,
    also: Callable[[Path], object],
    place: str = "",
    save: Any = save_model,
    finish: Callable[[Path], object] | None = None,
) -> None:
    """Write a folder with a model in it, whole or not at all. All ranks call this; the first one writes.

    Args:
        final: the folder; what is there is replaced.
        model: possibly split over the ranks.
        ranks: of the run.
        also: writes the rest into the folder that it is given.
        place: of the model in the folder.
        save: (model, folder, ranks) -> None, called by all ranks.
        finish: writes the whole folder to the disk; default: file by file.

    Raises:
        WriteError: names the remedy.
    """
    partial = _hidden(final, "partial")
    with ranks.agree():
        if ranks.is_first:
            final.parent.mkdir(parents=True, exist_ok=True)
            for left_by_a_killed_run in final.parent.glob(f".{final.name.split('_')[0]}*.partial"):
                _delete(left_by_a_killed_run)
    try:
        save(model, partial / place, ranks)
        with ranks.agree():
            if ranks.is_first:
                also(partial)
                (finish or _flush_files)(partial)
                _replace(partial, final)
    except Exception as error:  # of the file system, or of a library in its own words
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise WriteError(
            f"{str(final)!r} could not be written ({error}). Whatever was saved before is whole: make room (or allow "
            "writing), then continue the run with --resume_from_checkpoint latest"
        ) from error


def copy_model(final: Path, checkpoint: Path, ranks: Ranks, also: Callable[[Path], object]) -> None:
    """Write a folder with the model of a checkpoint, whole or not at all. All ranks call this; the first one writes.

    Args:
        final: the folder; what is there is replaced.
        checkpoint: whose model and tokenizer are copied.
        ranks: of the run.
        also: writes the rest into the folder that it is given.

    Raises:
        WriteError: it cannot be written.
    """

    def copy(partial: Path) -> None:
        shutil.copytree(checkpoint / "model", partial, dirs_exist_ok=True)
        also(partial)

    write_model(final, None, ranks, copy, save=lambda *_: None)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, whole or damaged; what a killed save left behind is none.

    Only what a save names is one: ``step_8``, but no ``step_08`` or ``step_8.bak``, and no file.
    """
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint named by ``resume_from_checkpoint``; None for "latest" where there is none yet.

    "latest" is the newest that is whole. One without a manifest, of an earlier version, is taken with a warning.

    Raises:
        CheckpointError: the named one is none, or is damaged; of "latest", every one is. The message names the
            file and what can be resumed instead.
    """
    if wanted != "latest":
        return _require_whole(Path(wanted))
    known = list_checkpoints(output_dir / "checkpoints")
    damages: list[str] = []
    for checkpoint in reversed(known):
        damage = find_damage(checkpoint)
        if damage is None:
            for text in damages:
                logger.warning("%s", text)
            if damages:
                logger.warning("the newest checkpoint that is whole is %s: continuing from there", checkpoint)
            return _warn_of_old(checkpoint)
        damages.append(f"the checkpoint {str(checkpoint)!r} is damaged: {damage}")
    if damages:
        raise CheckpointError(
            f"{'; '.join(damages)}. None is whole: restore one from a copy, or start again in another output_dir"
        )
    return None


def _require_whole(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise CheckpointError(f"{str(checkpoint)!r} is not a checkpoint: no such folder; name one, or 'latest'")
    if not any((checkpoint / name).exists() for name in (STATE, MANIFEST)):
        raise CheckpointError(f"{str(checkpoint)!r} is not a checkpoint: it has no {STATE}")
    damage = find_damage(checkpoint)
    if damage is None:
        return _warn_of_old(checkpoint)
    others = [other for other in list_checkpoints(checkpoint.parent) if other.resolve() != checkpoint.resolve()]
    if NAME.fullmatch(checkpoint.name):
        others = [other for other in others if step_of(other) < step_of(checkpoint)]
    whole = next((other for other in reversed(others) if find_damage(other) is None), None)
    remedy = "no older checkpoint beside it is whole: restore one from a copy, or start again in another output_dir"
    if whole is not None:
        remedy = f"{whole.name} is whole: resume with --resume_from_checkpoint {whole}"
    raise CheckpointError(f"the checkpoint {str(checkpoint)!r} is damaged: {damage}; {remedy}")


def _warn_of_old(checkpoint: Path) -> Path:
    if not has_manifest(checkpoint):
        logger.warning(
            "%s has no %s, as an earlier version wrote it: whether its files are what was saved cannot be checked",
            checkpoint,
            MANIFEST,
        )
    return checkpoint


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return dict(json.loads((checkpoint / STATE).read_text()))


def read_teachers(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What changes in teachers, as it was saved; empty where nothing does."""
    file = checkpoint / TEACHERS
    return load_file(file) if file.is_file() else {}


def restore_optimizer(
    checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer, ranks: Ranks | None = None
) -> None:
    """Load optimiser state and random states. A rank that the saved run did not have keeps its own of the latter.

    Raises:
        CheckpointError: the parameters are not those of the checkpoint.
    """
    parameters = _trained(model)
    # A fused optimiser counts its steps on the device, any other on the host.
    counts = {p: p.device if group["fused"] else "cpu" for group in optimizer.param_groups for p in group["params"]}
    for name in ("optimizer.safetensors", "rng.safetensors"):
        if not (checkpoint / name).is_file():
            raise CheckpointError(f"the checkpoint {str(checkpoint)!r} is damaged: {name} is missing")
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            name, _, moment = key.rpartition(".")
            value = file.get_tensor(key).clone()  # what it gives is a view of the file
            parameter = parameters.get(name)
            if parameter is None or (value.dim() and value.shape != parameter.shape):
                raise CheckpointError(
                    f"{checkpoint}: optimiser state {key} of shape {tuple(value.shape)} fits no "
                    "parameter of this model; resume with the same model and settings"
                )
            optimizer.state[parameter][moment] = (
                value.to(counts[parameter]) if moment == "step" else split_like(value, parameter)
            )
    prefix = f"{(ranks or Ranks()).rank}."
    randoms = load_file(checkpoint / "rng.safetensors")
    own = {key.removeprefix(prefix): value for key, value in randoms.items() if key.startswith(prefix)}
    if own:
        set_random_state(own)


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _optimizer_tensors(model: Any, optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, torch.Tensor]:
    """``"<parameter>.<state name>" -> whole tensor on the host``; empty before the first step, or unless ``keep``."""
    tensors = {}
    for name, parameter in _trained(model).items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensor = whole(value)
            if keep:
                tensors[f"{name}.{moment}"] = tensor.cpu().contiguous()
    return tensors


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _replace(partial: Path, final: Path) -> None:
    """Put a finished folder in its place; at no time is there a half one."""
    if final.exists():
        _remove(final)
    partial.rename(final)
    flush(final.parent)


def _remove(path: Path) -> None:
    """Take a folder away as a whole, then delete it."""
    gone = _hidden(path, "old.partial")
    path.rename(gone)
    _delete(gone)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flush_files(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            flush(file)
