"""A whole policy in files, from the trainer's process to the engine's.

Full training writes one file for each version. With an adapter the base is written once, and a version is
a small file of low-rank factors; the engine adds their product to the base in float32.

The engine is never touched before the file is complete and known to be the whole model: vLLM cannot
recover from an update that fails half-way.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opdengine.models.lora import LowRank

LEFT, RIGHT = "::left", "::right"


@dataclass(frozen=True)
class StoredPolicy:
    """One version of the weights on disk.

    Args:
        version: optimiser steps taken.
        path: file of the weights.
        names: maps each weight to its key in that file.
        low_rank: file of what is added to them, or None.
    """

    version: int
    path: str
    names: Mapping[str, str]
    low_rank: str | None = None

    @property
    def files(self) -> set[str]:
        """Everything on disk."""
        return {self.path} if self.low_rank is None else {self.path, self.low_rank}


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
        elif names.get(name) != names.get(twin) and not _equal(tensors, names.get(name), names.get(twin)):
            raise ValueError(
                f"the policy has other values for {name!r} than for {twin!r}, which the engine's model ties, so it "
                "would keep one of them alone (an adapter with modules_to_save may have parted them): save the merged "
                "model and name its folder, or set use_vllm to false"
            )
    if missing := [name for name in shapes if name not in names]:
        raise ValueError(
            f"the policy lacks {len(missing)} of {len(shapes)} weights, first {missing[0]!r}; "
            "pass the model's whole state_dict (a partial update leaves the engine with undefined "
            "rows)"
        )
    return tensors, {name: names[name] for name in shapes}


def _equal(tensors: Mapping[str, Any], one: str | None, other: str | None) -> bool:
    """Whether two weights that were given apart have the same values; one that is missing is another's concern."""
    return one is None or other is None or bool((tensors[one] == tensors[other]).all())


def _check_weight(
    name: str,
    shape: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    seen: Container[str],
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


def check_low_rank(low_rank: LowRank, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless every product can be added to a weight of the model."""
    for name, (left, right) in low_rank.items():
        _check_weight(name, (*left.shape[:-1], right.shape[-1]), shapes, ())


def write_policy(tensors: Mapping[str, Any], path: str) -> None:
    """Write tensors by key to ``path`` (safetensors)."""
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def pack_low_rank(low_rank: LowRank) -> dict[str, Any]:
    """The factors by the keys that :func:`read_policy` looks for, on the host."""
    pairs = {name: {LEFT: left, RIGHT: right} for name, (left, right) in low_rank.items()}
    return {name + side: tensor.cpu() for name, pair in pairs.items() for side, tensor in pair.items()}


def read_policy(
    path: str, names: Mapping[str, str], low_rank: str | None = None, device: Any = "cpu"
) -> Iterator[tuple[str, Any]]:
    """Every name of a stored policy with its tensor, in the order of ``names``.

    Args:
        path, names, low_rank: of the :class:`StoredPolicy`.
        device: where sums are formed, in float32.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    factors = {} if low_rank is None else load_file(low_rank, device=str(device))
    with safe_open(path, "pt") as file:
        for name, key in names.items():
            tensor = file.get_tensor(key)
            if name + LEFT in factors:
                tensor = tensor.to(device).float() + factors[name + LEFT] @ factors[name + RIGHT]
            yield name, tensor
