"""Several processes that train one student, started by ``torchrun``.

Rollouts, debates and scores are data-parallel: every rank has its share of a step's prompts. What a
method computes over a step, and every denominator, is computed from the gathered step, so it is the
same on any number of ranks. The student's parameters, gradients and optimiser state are split over the
ranks by FSDP2; gradients are summed, since the loss is normalised over the whole step already.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from opdengine.errors import ConfigError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another rank failed, so this one ends, too.

    Args:
        message: which rank, and its error.
        kind: class of that error.
    """

    def __init__(self, message: str, kind: type[BaseException]) -> None:
        super().__init__(message)
        self.kind = kind


class LostPeerError(PeerError):
    """Another rank has ended, hangs or was stopped: nothing can be done together any more."""


def _lost(error: Exception, timeout: float) -> LostPeerError | None:
    """What an error of the communication between ranks means; None for any other error.

    Args:
        error: of this rank.
        timeout: seconds that it has waited for another one at most.
    """
    import torch

    if isinstance(error, LostPeerError):
        return error
    if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
        return None
    what = "has ended (see its own message)"
    if "timed out" in str(error).lower():
        what = (
            f"did not answer within ddp_timeout={timeout:g} seconds: it hangs, was stopped, or needs longer for a step"
        )
    return LostPeerError(
        f"another process {what}. The run ends here, too; continue it with --resume_from_checkpoint latest "
        f"({next(iter(str(error).splitlines()), type(error).__name__)})",
        RuntimeError,
    )


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. All methods but :meth:`share` are called by every rank, in the same order.

    A single process needs no process group, and nothing here costs it anything.

    Args:
        rank: of this process.
        world_size: number of processes.
        local_rank: of this process on its machine.
        local_world_size: number of processes on its machine.
        timeout: seconds that one rank may wait for another.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    timeout: float = field(default=7200.0, kw_only=True)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` things are this rank's: consecutive, at most one more than another's."""
        return range(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed  # here: a single process does without

        values: list[Any] = [None] * self.world_size
        try:
            torch.distributed.all_gather_object(values, value)
        except RuntimeError as error:
            if lost := _lost(error, self.timeout):
                raise lost from error
            raise
        return values

    def join(self, values: Sequence[T]) -> list[T]:
        """The sequences of all ranks, one after the other."""
        return [value for part in self.gather(values) for value in part]

    def own(self, count: int) -> slice:
        """Where this rank's ``count`` values stand in what :meth:`join` gives."""
        first = sum(self.gather(count)[: self.rank])
        return slice(first, first + count)

    def sum(self, value: float) -> float:
        """Sum over the ranks, the same to the last bit on all of them."""
        return sum(self.gather(value))

    def max(self, value: int) -> int:
        """Largest of the ranks' values."""
        return max(self.gather(value))

    def raise_on_all_ranks(self, error: Exception | None = None) -> None:
        """Go on only if no rank failed.

        Args:
            error: of this rank.

        Raises:
            Exception: this rank's error; where another one failed first, or does not answer, :class:`PeerError`.
        """
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        if error is not None and (lost := _lost(error, self.timeout)):
            raise lost from error  # there is nobody to agree with
        already_agreed = isinstance(error, PeerError)  # by an agreement within this one
        reports = self.gather(None if error is None or already_agreed else (type(error), str(error)))
        failed = [(rank, *report) for rank, report in enumerate(reports) if report is not None]
        if not failed:
            return
        rank, kind, message = failed[0]
        if error is not None and (already_agreed or rank == self.rank):
            raise error
        # The first rank's error decides, so that all ranks do the same about it.
        raise PeerError(f"rank {rank} failed ({kind.__name__}): {message}", kind) from error

    @contextmanager
    def agree(self) -> Iterator[None]:
        """What is inside fails on every rank or on none; it must not wait for other ranks."""
        try:
            yield
        except Exception as error:
            self.raise_on_all_ranks(error)
        else:
            self.raise_on_all_ranks()

    def in_turn(self, work: Callable[[], T]) -> T:
        """Call what needs much of the host's memory for a while: on each machine one rank after the other.

        It must not wait for other ranks; it fails on every rank or on none.
        """
        results: list[T] = []
        for turn in range(self.max(self.local_world_size)):
            with self.agree():
                if turn == self.local_rank:
                    results.append(work())
        return results[0]

    def mesh(self, device: torch.device) -> Any:
        """All ranks in a row, for what is split over them."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(device.type, (self.world_size,))

    async def agreed(self, work: Awaitable[T]) -> T:
        """Like :meth:`agree`; while this rank waits for the others, its event loop goes on."""
        try:
            result = await work
        except Exception as error:
            await self._raise_in_thread(error)
            raise
        await self._raise_in_thread(None)
        return result

    async def _raise_in_thread(self, error: Exception | None) -> None:
        if self.world_size == 1:
            self.raise_on_all_ranks(error)
        else:
            await asyncio.to_thread(self.raise_on_all_ranks, error)


@contextmanager
def start(timeout: float = 7200.0) -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started; a single process without it.

    Args:
        timeout: seconds that one rank may wait for another.

    Raises:
        PeerError: a rank does not answer in that time.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    import torch.distributed

    backend = "gloo"
    if torch.cuda.is_available():
        if local_world_size > torch.cuda.device_count():
            raise ConfigError(
                f"{local_world_size} processes on a machine with {torch.cuda.device_count()} GPUs "
                f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}) are not possible; start torchrun "
                "with as many as there are GPUs"
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    try:
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
        yield Ranks(rank, world_size, local_rank, local_world_size, timeout=timeout)
        _settle()
    except RuntimeError as error:
        if lost := _lost(error, timeout):
            raise lost from error
        raise
    # After an error the others may be waiting for this rank: it just ends.
    torch.distributed.destroy_process_group()


def _settle() -> None:
    """Wait until the threads of gloo have let go of the tensors of every exchange.

    They take the interpreter's lock for that, and one that asks for it while the interpreter ends aborts the process
    (before Python 3.14): a run that is finished would fail. Exchanges are taken in turn, so when the last ones are
    let go of, those before them have been.
    """
    import torch.distributed

    tensors = [torch.zeros(1) for _ in range(8)]
    exchanges = [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
    while exchanges:
        exchanges.pop().wait()
    held = [weakref.ref(tensor) for tensor in tensors]
    tensors.clear()
    until = time.monotonic() + 10
    while any(tensor() is not None for tensor in held):
        if time.monotonic() > until:
            logger.warning("gloo has not let go of an exchange for 10 s: this finished process may abort as it ends")
            return
        time.sleep(0.001)
    time.sleep(0.1)  # the thread that let go of the last one may still be on its way out of the interpreter
