"""Calls a sharded teacher and a whole copy of it, on every rank another number of times; writes what differs.

python -m torch.distributed.run --nproc-per-node 2 sharded_worker.py model out.json
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdengine.config.train import TeacherConfig
from opdengine.distributed import Ranks, start
from opdengine.teachers.local import LocalTeacher
from opdengine.teachers.shard import Session
from opdengine.types import Request, SamplingParams, TeacherContext

PARAMS = SamplingParams(max_tokens=6, temperature=1.0)


def contexts(rank: int) -> list[TeacherContext]:
    """More and longer ones on higher ranks; rank 0 has none."""
    ids = [np.arange(5, 12 + 9 * i, dtype=np.int64) for i in range(rank * 2)]
    return [TeacherContext("r", "big", row, np.arange(3, len(row))) for row in ids]


def requests(count: int) -> list[Request]:
    return [Request(f"r{i}", tuple(range(3, 8 + 5 * i)), seed=i) for i in range(count)]


async def calls(teacher: LocalTeacher, session: Session, rank: int) -> dict[str, Any]:
    """Scores, and as many generations as this rank's number."""
    async with session.open():
        scores = await teacher.score(contexts(rank)) if rank else []
        written = [await teacher.generate(requests(i + 1), PARAMS) for i in range(rank)]
    async with session.open():
        error = ""
        if rank == 0:
            try:
                await teacher.generate([Request("long", tuple(range(2000)))], PARAMS)
            except ValueError as found:
                error = str(found)
        after = await teacher.generate(requests(2), PARAMS)
    return {"scores": scores, "written": [*written, after], "error": error}


async def compare(model: str, ranks: Ranks) -> dict[str, Any]:
    session = Session(ranks)
    whole = LocalTeacher(TeacherConfig(model=model, name="big"))
    split = LocalTeacher(TeacherConfig(model=model, name="big", shard=True), session=session)
    one, other = await calls(whole, session, ranks.rank), await calls(split, session, ranks.rank)
    try:
        await split.score(contexts(1))
        outside = ""
    except RuntimeError as error:
        outside = str(error)
    parameters = split.backbone.model.named_parameters()
    return {
        "difference": max(
            [float((a.states - b.states).abs().max()) for a, b in zip(one["scores"], other["scores"], strict=True)],
            default=0.0,
        ),
        "scored": len(other["scores"]),
        "written": [[c.token_ids.tolist() for c in row] for row in other["written"]],
        "expected": [[c.token_ids.tolist() for c in row] for row in one["written"]],
        "errors": [one["error"], other["error"]],
        "outside": outside,
        "held": {n: p.to_local().numel() if hasattr(p, "to_local") else p.numel() for n, p in parameters},
        "whole": {n: p.numel() for n, p in whole.backbone.model.named_parameters()},
    }


def main(model: str, out: str) -> None:
    torch.manual_seed(0)
    with start() as ranks:
        found = ranks.gather(asyncio.run(compare(model, ranks)))
        if ranks.is_first:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
