"""Random numbers from a counter: SplitMix64, in 64-bit words and in tensors of them."""

from __future__ import annotations

from torch import Tensor

WORD = (1 << 64) - 1
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return word - (1 << 64) if word >> 63 else word


def scrambled(word: int) -> int:
    """The finaliser of SplitMix64."""
    word = (word ^ word >> 30) * FIRST & WORD
    word = (word ^ word >> 27) * SECOND & WORD
    return word ^ word >> 31


def uniforms(ids: Tensor, seed: int, block: int) -> Tensor:
    """float64 numbers in [0, 1), one for every id (int64), by SplitMix64 as a counter."""
    key = scrambled((seed & WORD) ^ scrambled(block * GOLDEN + 1 & WORD))

    def shifted(x: Tensor, places: int) -> Tensor:
        return (x >> places) & ((1 << 64 - places) - 1)

    x = ids * signed(GOLDEN) + signed(key)
    x = (x ^ shifted(x, 30)) * signed(FIRST)
    x = (x ^ shifted(x, 27)) * signed(SECOND)
    return shifted(x ^ shifted(x, 31), 11).double() * 2.0**-53
