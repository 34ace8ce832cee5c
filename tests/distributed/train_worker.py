"""``opdengine train`` whose second rank may fail, as the environment says.

FAIL_AT=2: a service of the second rank fails while it prepares the second batch. KILL_AT=2: the rank is killed there.
TERM_AT=2: it alone gets SIGTERM there.
SYNC_FAIL_AT=2: its sampler fails to take the weights of the second version.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from opdengine.cli import main
from opdengine.engine import Engine
from opdengine.errors import ServiceError
from opdengine.rollout.transformers import TransformersSampler

prepare = Engine.prepare


async def failing(self: Engine, prompts: Any, batch: int | None = None) -> Any:
    if self.ranks.rank == 1 and batch == int(os.environ.get("FAIL_AT", "0")) - 1:
        raise ServiceError("the service of one rank is gone")
    if self.ranks.rank == 1 and batch == int(os.environ.get("KILL_AT", "0")) - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if self.ranks.rank == 1 and batch == int(os.environ.get("TERM_AT", "0")) - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return await prepare(self, prompts, batch)


Engine.prepare = failing  # type: ignore[method-assign]

load_policy = TransformersSampler.load_policy


def refusing(self: TransformersSampler, version: int, *weights: Any) -> None:
    load_policy(self, version, *weights)
    if os.environ.get("RANK") == "1" and version == int(os.environ.get("SYNC_FAIL_AT", "-1")):
        raise ServiceError("the sampler of one rank is gone")


TransformersSampler.load_policy = refusing  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
