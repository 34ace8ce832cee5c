"""Local teachers whose weights are split over the ranks (FSDP2); their passes are collective.

Every rank has requests of its own, and how often a method asks a teacher differs between ranks. Two
agreements keep the ranks in step:

- *Calls.* Within a session the ranks agree which teacher is called next. A rank that has no call for it
  takes part without one, until no rank wants to call any more.
- *Passes.* Within a call every forward pass is announced. A rank that has finished its own takes part
  in the others' with one token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from opdengine.distributed import Ranks
from opdengine.models.lora import base_of
from opdengine.models.sharding import Sharded
from opdengine.teachers.threads import work_on

T = TypeVar("T")

NO_CALL, NO_MORE = -1, -2
PAUSE_SECONDS = 0.005
"""Between two questions while no rank has a call."""


class ShardedTeacher:
    """The weights of a frozen model, all but its head split over the ranks.

    Args:
        model: a causal LM; split in place.
        device: of this rank.
        session: in which it is called.
    """

    def __init__(self, model: Any, device: torch.device, session: Session) -> None:
        self.sharded = Sharded(model, session.ranks, device, head="whole")
        self.trunk = base_of(model).base_model
        self.device = device
        self._session = session

    def run(self, function: Callable[[], T]) -> T:
        """Call what runs passes of the model. All ranks call this, each with a function of its own.

        A function may fail between passes; the other ranks then go on without it.
        """
        results: list[T] = []
        error = self.sharded(lambda: self._in_step(function, results))  # no exception may cross FSDP's hooks
        self.sharded.release()
        if error is not None:
            raise error
        return results[0]

    def _in_step(self, function: Callable[[], T], results: list[T]) -> Exception | None:
        def announce(*_: Any) -> None:
            self._session.any(True)

        failed = None
        announcing = self.trunk.register_forward_pre_hook(announce)
        try:
            results.append(function())
        except Exception as error:
            failed = error
        announcing.remove()
        while self._session.any(False):
            self._idle()
        return failed

    @torch.no_grad()
    def _idle(self) -> None:
        """Take part in a pass of the others."""
        self.trunk(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device), use_cache=False)


class Session:
    """Brings the calls of all ranks into one order.

    Args:
        ranks: of the run; all of them create it, and open it equally often.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.teachers: list[ShardedTeacher] = []
        self._group = dist.new_group(backend="gloo")
        self._waiting: list[tuple[int, Callable[[], Any], asyncio.Future[Any]]] = []
        self._closing = True

    def add(self, model: Any, device: torch.device) -> ShardedTeacher:
        """Split a teacher's weights; all ranks add the same ones in the same order."""
        self.teachers.append(ShardedTeacher(model, device, self))
        return self.teachers[-1]

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        """Teachers can be called within; it ends when all ranks have come to its end."""
        self._closing = False
        serving = asyncio.create_task(self._serve())
        try:
            yield
        finally:
            self._closing = True
            await serving

    async def call(self, teacher: ShardedTeacher, function: Callable[[], T]) -> T:
        """What a function that runs passes of the teacher returns.

        Raises:
            RuntimeError: no session is open.
        """
        if self._closing:
            raise RuntimeError("a sharded teacher can only be called within a session of all ranks")
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((self.teachers.index(teacher), function, result))
        return await result

    async def _serve(self) -> None:
        try:
            while True:
                idle = NO_MORE if self._closing else NO_CALL
                wanted = await asyncio.to_thread(self._gather, min((n for n, *_ in self._waiting), default=idle))
                calls = [number for number in wanted if number >= 0]
                if calls:
                    await self._take_part(min(calls))
                elif all(number == NO_MORE for number in wanted):
                    return
                else:
                    await asyncio.sleep(PAUSE_SECONDS)
        except BaseException as error:
            self._closing = True
            for _, _, result in self._waiting:
                result.set_exception(RuntimeError(f"the ranks lost each other: {error}"))
            self._waiting.clear()
            raise

    async def _take_part(self, number: int) -> None:
        """One call of a teacher on every rank; on this one possibly without a request."""
        mine = next((call for call in self._waiting if call[0] == number), None)
        teacher = self.teachers[number]
        if mine is None:
            await work_on(teacher.device, teacher.run, lambda: None)
            return
        self._waiting.remove(mine)
        _, function, result = mine
        try:
            result.set_result(await work_on(teacher.device, teacher.run, function))
        except Exception as error:
            result.set_exception(error)

    def any(self, mine: bool) -> bool:
        """Whether any rank says so."""
        flag = torch.tensor([int(mine)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def _gather(self, number: int) -> list[int]:
        numbers = torch.zeros(self.ranks.world_size, dtype=torch.int64)
        numbers[self.ranks.rank] = number
        dist.all_reduce(numbers, group=self._group)
        return [int(n) for n in numbers.tolist()]
