"""The parts of a model that sees: its language model, and the tower that makes features of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from opdengine.models.processor import can_see


def tower(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules beside the language model and its head, by name; none of a model of text.

    In transformers the language model of a model that sees is its decoder; what is left reads pictures and brings
    their features to the decoder's width.

    Args:
        model: as loaded, without an adapter.
    """
    if not can_see(model.config):
        return
    trunk = model.base_model
    language = trunk.get_decoder()
    if language is trunk:  # the language model alone
        return
    for name, part in trunk.named_children():
        if part is not language and any(True for _ in part.parameters()):
            yield f"{model.base_model_prefix}.{name}", part


def freeze_vision_tower(model: Any) -> None:
    """Train no weight of the tower; a model of text has none."""
    for _, part in tower(model):
        part.requires_grad_(False)


def vision_layers(model: Any) -> list[str]:
    """Names of all layers in the tower, which get no adapter where it is frozen."""
    return [f"{name}.{inner}" if inner else name for name, part in tower(model) for inner, _ in part.named_modules()]
