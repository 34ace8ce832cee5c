"""An environment as one writes it for TRL: reset, typed tools, get_reward."""

from __future__ import annotations

import random


class CounterGame:
    def __init__(self) -> None:
        self._value = 0
        self._target = 0

    def reset(self, start: int = 0, **row) -> str | None:
        self._value = start
        self._target = row.get("target") or random.randrange(100)
        return None if row.get("silent") else f" Count from {start} to {self._target}."

    def add(self, amount: int, twice: bool = False) -> str:
        """Add to the counter.

        Args:
            amount: How much.
            twice: Whether to add it two times.

        Returns:
            The new value.
        """
        if amount < 0:
            raise ValueError("Negative amounts are not allowed.")
        self._value += amount * (2 if twice else 1)
        return f"value {self._value}"

    async def peek(self) -> int:
        """Look at the counter.

        Returns:
            Its value.
        """
        return self._value

    def get_reward(self) -> float | None:
        if self._value == 13:
            return None
        return 1.0 if self._value == self._target else 0.5 if self._value > self._target else -1.0

    def _hidden(self) -> None:
        raise AssertionError("never a tool")


class NoReward:
    def reset(self) -> None:
        pass
