"""SIGINT, SIGTERM and SIGHUP while a run trains: nothing that was learned is lost, and no step is left half done."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from opdengine.distributed import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """The run was told to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """Within this context the first of these signals ends the run at the next moment at which its weights are whole.

    Rollouts and debates are given up at once, an update that has begun is finished first. Several processes end
    together, after the step in which the signal has reached any of them. A second SIGINT ends a single process at
    once. Outside the main thread nothing is caught, and under ``nohup`` no SIGHUP.

    Args:
        ranks: of the run.

    Attributes:
        is_whole: whether the run is in a part that must not be cut in two.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.caught = 0
        self._held = ranks.world_size > 1
        self.is_whole = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            wanted = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in wanted}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Guard a part of the run that must not be cut in two; all ranks enter and leave it together.

        Raises:
            Interrupted: at the end, if a signal came meanwhile (on several ranks: since the last time, on any).
        """
        before, self._held = self._held, True
        self.is_whole = True
        try:
            yield
        finally:
            self.is_whole = False
        self._held = before
        caught = self.ranks.max(self.caught)
        if caught:
            self.end()
            raise Interrupted(caught)

    def end(self) -> None:
        """From now on signals wait: the run is ending."""
        self._held = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            if number == signal.SIGINT and self.ranks.world_size == 1:
                raise KeyboardInterrupt
            return
        self.caught = number
        when = "when this step is finished" if self._held else "now"
        if self.ranks.is_first:  # not through logging, which may be what was interrupted
            try:
                os.write(2, f"{signal.Signals(number).name}: the run ends {when}\n".encode())
            except OSError:  # the terminal is gone, and printing to it would fail from now on
                _print_nowhere()
        if not self._held:
            self.end()
            raise Interrupted(number)


def _print_nowhere() -> None:
    """Give standard output and error another place where they were a terminal."""
    with open(os.devnull, "wb") as nowhere:
        for stream in (1, 2):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere.fileno(), stream)
