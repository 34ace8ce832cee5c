"""What a model has read of chats, kept from one turn to the next, so that a turn costs its own tokens only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of every layer, [rows, heads, tokens, width] each."""


@dataclass(frozen=True)
class Read:
    """What attention needs of the beginning of one chat.

    Args:
        ids: of its tokens.
        layers: keys and values of these tokens, with one row.
    """

    ids: tuple[int, ...]
    layers: Layers


def read_of(cache: Any, row: int, mask: torch.Tensor, ids: Sequence[int]) -> Read | None:
    """What a cache holds of one row; None where it is not simply all keys and values (windows, states).

    Args:
        cache: of a pass.
        row: whose chat it is.
        mask: [rows, columns], which columns of the cache are tokens of the row.
        ids: of these tokens.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    held: Sequence[Any] = cache.layers
    filled = [(layer.keys, layer.values) for layer in held]
    columns = mask[row].bool()
    if any(keys is None or keys.dim() != 4 or keys.shape[2] != len(columns) for keys, _ in filled):
        return None  # layers may share what another one holds
    layers = [(keys[row : row + 1, :, columns], values[row : row + 1, :, columns]) for keys, values in filled]
    return Read(tuple(ids), layers)


def cache_of(reads: Sequence[Read | None]) -> Any:
    """A cache of several chats, padded on the left; those without a read are padding only. At least one has one."""
    from transformers.cache_utils import DynamicCache

    width = max(len(read.ids) for read in reads if read)
    number = next(len(read.layers) for read in reads if read)

    def padded(layer: int, part: int) -> torch.Tensor:
        rows = [read.layers[layer][part] if read else None for read in reads]
        one = next(row for row in rows if row is not None)
        joined = one.new_zeros(len(rows), one.shape[1], width, one.shape[3])
        for place, row in enumerate(rows):
            if row is not None:
                joined[place, :, width - row.shape[2] :] = row[0]
        return joined

    return DynamicCache(ddp_cache_data=[(padded(layer, 0), padded(layer, 1)) for layer in range(number)])


@dataclass
class Chats:
    """The chats of the last call, found by their tokens.

    Args:
        budget: most tokens that are kept.
    """

    budget: int
    reads: dict[tuple[int, ...], Read] = field(default_factory=dict)
    size: int = 0

    def take(self, prompts: Sequence[Sequence[int]]) -> list[Read | None]:
        """The longest read that each prompt goes on from, if there is one; all are let go."""
        lengths = sorted({len(ids) for ids in self.reads}, reverse=True)
        found = [
            next((self.reads[begin] for n in lengths if n < len(ids) and (begin := tuple(ids[:n])) in self.reads), None)
            for ids in prompts
        ]
        self.reads.clear()
        self.size = 0
        return found

    def put(self, length: int, read: Callable[[], Read | None]) -> None:
        """Keep what was read of a chat of ``length`` tokens, if there is room."""
        if self.size + length <= self.budget and (kept := read()) is not None:
            self.reads[kept.ids] = kept
            self.size += length
