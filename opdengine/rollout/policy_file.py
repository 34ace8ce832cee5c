"""A whole policy in one file, from the trainer's process to the engine's.

The engine is never touched before the file is complete and known to be the whole model: vLLM cannot
recover from an update that fails half-way.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StoredPolicy:
    """One version of the weights on disk: ``names`` maps each weight to its key in the file."""

    version: int
    path: str
    names: Mapping[str, str]


def collect_policy(
    weights: Iterable[tuple[str, Any]],
    shapes: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Check that ``weights`` are the whole model and bring them to the host, shared storage once.

    A tied weight that is left out (``named_parameters()`` leaves it out) stands for its twin: the
    engine must receive both names, or it keeps a stale copy of one.

    Returns:
        The tensors to store by key, and the key of every name in ``shapes``.

    Raises:
        ValueError: a name is unknown, repeated or missing, or a shape differs.
    """
    tensors: dict[str, Any] = {}
    names: dict[str, str] = {}
    places: dict[tuple[Any, ...], str] = {}
    for name, tensor in weights:
        _check_weight(name, tuple(tensor.shape), shapes, names)
        tensor = tensor.detach().cpu()
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        key = places.setdefault(place, name) if tensor.numel() else name
        names[name] = key
        if key == name:
            tensors[name] = tensor
    for name, twin in tied.items():
        if name not in names and twin in names:
            names[name] = names[twin]
    if missing := [name for name in shapes if name not in names]:
        raise ValueError(
            f"the policy lacks {len(missing)} of {len(shapes)} weights, first {missing[0]!r}; "
            "pass the model's whole state_dict (a partial update leaves the engine with undefined "
            "rows)"
        )
    return tensors, {name: names[name] for name in shapes}


def _check_weight(
    name: str,
    shape: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    seen: Mapping[str, str],
) -> None:
    if name not in shapes:
        near = difflib.get_close_matches(name, shapes, n=1, cutoff=0)
        raise ValueError(
            f"the engine's model has no weight {name!r} (nearest: {near[0] if near else None!r}); "
            "pass the names of the Hugging Face state_dict, without the prefixes of wrappers "
            "('module.', '_orig_mod.', 'base_model.model.')"
        )
    if shape != tuple(shapes[name]):
        raise ValueError(
            f"weight {name!r} has shape {shape}, the engine's model {tuple(shapes[name])}; sampler "
            "and trainer must be built from the same model"
        )
    if name in seen:
        raise ValueError(f"weight {name!r} was given twice")


def write_policy(version: int, tensors: Mapping[str, Any], names: Mapping[str, str], path: str) -> StoredPolicy:
    """Write the result of :func:`collect_policy` to ``path`` (safetensors)."""
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return StoredPolicy(version, path, dict(names))


def read_policy(path: str, names: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Every name of a stored policy with its tensor, in the order of ``names``."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name, key in names.items():
            yield name, file.get_tensor(key)
