"""Weights by the names of a model's checkpoint files, which are the names that vLLM knows.

In memory transformers holds the weights of all experts of a layer as one tensor, for example, and the language
part of a vision-language checkpoint without the prefix that it has there. What turns one into the other is chosen
by its result: every name must be one of the checkpoint's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from opdengine.errors import ConfigError
from opdengine.models.processor import reader_of

LAYER = re.compile(r"(.*?\.\d+(?=\.))?")
"""The part of a weight's name up to its layer's number; empty outside the layers."""


@cache
def empty_model(model: str, trust_remote_code: bool, sees: bool = False) -> Any:
    """The transformers model without its weights; allocates nothing. ``sees``: with the tower that reads pictures."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    kind = reader_of(config, sees)
    with torch.device("meta"):
        empty = kind.from_config(config, trust_remote_code=trust_remote_code)
    empty.tie_weights()
    return empty


def model_weights(
    model: str, trust_remote_code: bool, sees: bool = False
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of the ``state_dict``, and which names share storage."""
    shapes: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    owner: dict[int, str] = {}
    for name, tensor in empty_model(model, trust_remote_code, sees).state_dict(keep_vars=True).items():
        shapes[name] = tuple(tensor.shape)
        first = owner.setdefault(id(tensor), name)
        if first != name:
            tied[name] = first
    return shapes, tied


Conversion = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A ``state_dict``, or a whole layer of it -> names and tensors of the checkpoint."""


@cache
def find_naming(model: str, trust_remote_code: bool, sees: bool = False) -> Conversion:
    """The conversion after which every name is one of the checkpoint's, or that of a weight tied to one.

    A tied weight that the checkpoint leaves out is sent all the same: vLLM, which ties the two at its first load
    only, would keep the old one.

    Args:
        model: folder or hub name of the checkpoint.
        trust_remote_code: run code that comes with the model.
        sees: whether the model is loaded with its tower.

    Raises:
        ConfigError: there is none; says which names the checkpoint does not have.
    """
    empty = empty_model(model, trust_remote_code, sees)
    weights, (_, tied) = dict(empty.state_dict()), model_weights(model, trust_remote_code, sees)
    known = checkpoint_names(model)
    nearest: list[str] = []
    for convert in _conversions(empty):
        twins = _twins(convert, weights, tied)
        unknown = [name for name in convert(weights) if name not in known and twins.get(name, name) not in known]
        if not unknown:
            return convert
        if not nearest or len(unknown) < len(nearest):
            nearest = unknown
    kind = type(empty).__name__
    raise ConfigError(
        f"{len(nearest)} weights of {kind} have names that the checkpoint {model!r} does not have, such as "
        f"{', '.join(map(repr, nearest[:3]))} (it has {', '.join(map(repr, sorted(known)[:3]))}), so vLLM could not be "
        f"given the trained weights: set use_vllm to false, or train from a checkpoint that {kind} itself has saved"
    )


def as_in_checkpoint(
    weights: Iterable[tuple[str, Any]], model: str, trust_remote_code: bool, sees: bool = False
) -> Iterator[tuple[str, Any]]:
    """Weights by the names and shapes of the model's checkpoint files.

    Args:
        weights: by the names of the ``state_dict``; at most one layer at a time is held.
        model, trust_remote_code, sees: see :func:`find_naming`.
    """
    convert = find_naming(model, trust_remote_code, sees)
    for _, layer in groupby(weights, key=lambda item: LAYER.match(item[0])[0]):  # type: ignore[index]
        yield from convert(dict(layer)).items()


def checkpoint_names(model: str) -> frozenset[str]:
    """Names of all weights in the safetensors files of a folder or hub name.

    Raises:
        ConfigError: there are none.
    """
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    for file in ("model.safetensors.index.json", "model.safetensors"):
        path = cached_file(
            model, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if path is None:
            continue
        if file.endswith(".json"):
            return frozenset(json.loads(Path(path).read_text("utf-8"))["weight_map"])
        with safe_open(path, "pt") as tensors:
            return frozenset(tensors.keys())
    raise ConfigError(f"{model!r} has no safetensors files, whose names vLLM's weights are given by; save it with them")


def _conversions(empty: Any) -> Iterator[Conversion]:
    """What transformers may do when it saves the model: nothing, or undo what it does when it loads one."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, revert_weight_conversion

    yield dict
    plain = get_model_conversion_mapping(empty, add_legacy=False)
    inner = [step for step in plain if not isinstance(step, PrefixChange)]
    for steps in (inner, plain, get_model_conversion_mapping(empty)):

        def convert(weights: Mapping[str, Any], steps: Sequence[Any] = steps) -> Mapping[str, Any]:
            empty._weight_conversions = list(steps) or None
            converted: Mapping[str, Any] = revert_weight_conversion(empty, dict(weights))
            return converted

        yield convert


def _twins(convert: Conversion, weights: Mapping[str, Any], tied: Mapping[str, str]) -> dict[str, str]:
    """Converted name -> converted name of the weight that shares its storage, both ways."""
    pairs: dict[str, str] = {}
    for name, first in tied.items():
        (one,), (other,) = (tuple(convert({n: weights[n]})) for n in (name, first))
        pairs |= {one: other, other: one}
    return pairs
