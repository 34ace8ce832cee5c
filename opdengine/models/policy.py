"""The weights that the sampler receives after every update."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from opdengine.models.lora import LowRank, adapter_factors, base_weights, is_adapted
from opdengine.models.sharding import whole_weights


def policy(model: Any) -> tuple[Iterable[tuple[str, torch.Tensor]], LowRank | None]:
    """Return what a sampler needs: the whole model by its ``state_dict`` names, and what an adapter adds.

    Returns:
        All weights (of the base, which never change, where there is an adapter; nothing is read before
        it is asked for), and the adapter's factors or None.
    """
    if not is_adapted(model):
        return whole_weights(model), None
    return base_weights(model), {name: factors for name, factors in adapter_factors(model)}
