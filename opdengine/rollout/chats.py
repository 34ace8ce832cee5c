"""What a model has read of chats, kept from one turn to the next, so that a turn costs its own tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of every layer, [1, heads, tokens, width] each."""


@dataclass(frozen=True)
class Read:
    """What attention needs of the beginning of one chat.

    Args:
        ids: of its tokens.
        layers: keys and values of these tokens.
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


def cache_of(reads: Sequence[Read]) -> Any:
    """A cache with one row for each of some chats, padded on the left."""
    from transformers.cache_utils import DynamicCache

    def padded(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        width = max(part.shape[2] for part in parts)
        return torch.cat([torch.nn.functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])

    layers = zip(*(read.layers for read in reads), strict=True)
    return DynamicCache(ddp_cache_data=[tuple(map(padded, zip(*layer, strict=True))) for layer in layers])


@dataclass
class Chats:
    """The chats of the last call, found by their tokens.

    Args:
        budget: most tokens that are kept; chats beyond are read again.
    """

    budget: int
    reads: dict[tuple[int, ...], Read] = field(default_factory=dict)

    def take(self, prompts: Sequence[Sequence[int]]) -> list[Read | None]:
        """The longest read that each prompt goes on from, if there is one; all are let go."""
        lengths = sorted({len(ids) for ids in self.reads}, reverse=True)
        found = [
            next((self.reads[begin] for n in lengths if n < len(ids) and (begin := tuple(ids[:n])) in self.reads), None)
            for ids in prompts
        ]
        self.reads.clear()
        return found

    def has_room(self, length: int) -> bool:
        """Whether a chat of so many tokens can be kept."""
        return sum(map(len, self.reads)) + length <= self.budget

    def put(self, read: Read | None) -> None:
        """Keep what was read of a chat, if a cache could tell it."""
        if read is not None:
            self.reads[read.ids] = read
