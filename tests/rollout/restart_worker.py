"""``opdengine train`` whose server is killed and started again before a batch is sampled.

RESTART_AT=2 RESTART="path log port" before the second batch; the first rank does it and leaves the process id of the
new server in the file log.pid.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from vllm_helpers import VLLMServer

from opdengine.cli import main
from opdengine.training.step import Engine

prepare = Engine.prepare


async def after_a_restart(self: Engine, prompts: Any, batch: int | None = None) -> Any:
    if batch == int(os.environ["RESTART_AT"]) - 1:
        with self.ranks.agree():
            if self.ranks.is_first:
                restart(*os.environ["RESTART"].split())
    return await prepare(self, prompts, batch)


def restart(path: str, log: str, port: str) -> None:
    pid = Path(f"{log}.pid")
    VLLMServer.kill(int(pid.read_text()))
    server = VLLMServer(path, Path(log), int(port))
    pid.write_text(str(server.process.pid))
    server.wait()


Engine.prepare = after_a_restart  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
