"""Train, kill, start again, until the run is done. By hand, with any configuration, or several:

python tests/engine/kill_run.py killed.json whole.yaml killed.yaml --kills 0 20 --seed 1 [--processes 2]

Every life of the run has processes of its own, forked from this one before anything was trained (which saves the
imports), and ended by SIGKILL at a moment that a seed chooses: soon after some phase has begun for the n-th time.
Of several processes one dies first, as on a machine that fails; then the others, as torchrun would end them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import opdengine.training.build
import opdengine.training.run  # noqa: F401  # noqa: F401
from opdengine import cli
from opdengine.methods.debate import debate
from opdengine.models import checkpoint, manifest
from opdengine.rollout.transformers import TransformersSampler
from opdengine.training import step as engine

for slow in ("torch._dynamo", "torch.distributed.fsdp", "transformers.models.qwen3.modeling_qwen3", "peft"):
    importlib.import_module(slow)  # what a run imports when it needs it: once for all lives

PHASES = {
    "rollout": (engine.Engine, "sample"),
    "episodes": (engine.Engine, "play"),
    "grades": (engine.Engine, "reward"),
    "debate": (debate.Debater, "debate"),
    "store of a debate": (debate.Debater, "_store"),
    "scores": (engine.Engine, "score"),
    "update": (engine.Engine, "update"),
    "weight sync": (TransformersSampler, "load_policy"),
    "start of saving": (checkpoint, "write_model"),
    "files of a checkpoint": (checkpoint, "save_file"),
    "flush of a checkpoint": (manifest, "flush"),
    "rename of a checkpoint": (checkpoint, "_replace"),
    "removal of a checkpoint": (checkpoint, "_remove"),
}
MOST_SECONDS = 0.03
ONCE = ("start of saving", "rename of a checkpoint", "removal of a checkpoint")
"""Phases whose second beginning lies behind :data:`LAST`."""

LAST = ("update", 2)
"""No life gets further: the phase that was chosen may not come (debates that are all in the cache, say)."""


def announce(descriptor: int) -> None:
    """Have every phase written to the pipe when it begins."""
    for phase, (owner, name) in PHASES.items():
        plain = getattr(owner, name)

        def spoken(*args: Any, phase: str = phase, plain: Callable[..., Any] = plain, **kwargs: Any) -> Any:
            os.write(descriptor, f"{phase}\n".encode())
            return plain(*args, **kwargs)

        setattr(owner, name, spoken)


def begin(config: str, log: Path, descriptor: int, environment: dict[str, str]) -> int:
    """Fork one process of the run; returns its number."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    announce(descriptor)
    code = 1
    try:
        code = cli.main(["train", "--config", config, "--resume_from_checkpoint", "latest"])
    finally:
        os._exit(code)


def ranks(processes: int) -> list[dict[str, str]]:
    """What torchrun would tell each process."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def live(
    config: str, log: Path, moment: tuple[str, int, float] | None, processes: int, first: int
) -> tuple[int, str, set[str]]:
    """One life: how it ended (0: the run is done, -9: killed), the last phase that was noticed, and all of them.

    Args:
        moment: phase, which of its beginnings, and seconds after it; None lets the run live.
        first: the process that dies first.
    """
    reader, writer = os.pipe()
    children = [begin(config, log, writer, environment) for environment in ranks(processes)]
    os.close(writer)
    seen, line = Counter[str](), ""
    with os.fdopen(reader) as lines:
        for line in lines:
            seen[line.strip()] += 1
            if moment is not None and (seen[moment[0]] == moment[1] or seen[LAST[0]] == LAST[1] * processes):
                time.sleep(moment[2])
                for child in [children[first], *children]:
                    os.kill(child, signal.SIGKILL)
                break
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return next((code for code in codes if code), 0), line.strip(), set(seen)


def run(config: str, log: Path, kills: int, lots: random.Random, processes: int, phases: list[str]) -> dict[str, Any]:
    """All lives of one run: its last exit code, what it was killed in, and the phases that it had."""
    killed: list[dict[str, Any]] = []
    order: list[str] = []
    had: set[str] = set()
    while True:
        moment = None
        if len(killed) < kills:
            order = order or lots.sample(phases, len(phases))  # every phase before any comes again
            phase = order.pop()
            moment = (phase, 1 if phase in ONCE else lots.randint(1, 2), lots.uniform(0, MOST_SECONDS))
        code, phase, seen = live(config, log, moment, processes, lots.randrange(processes))
        had |= seen
        if code != -signal.SIGKILL or moment is None:
            return {"code": code, "killed": killed, "phases": [name for name in phases if name in had]}
        killed.append({"phase": phase, "seconds": moment[2]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", help="JSON file to write: for every run its exit code and kills")
    parser.add_argument("configs", nargs="+", help="YAML files of runs")
    parser.add_argument("--kills", type=int, nargs="+", required=True, help="of every run; 0 leaves it alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    log = Path(options.report).with_suffix(".log")
    done, phases = {}, list(PHASES)
    for config, kills in zip(options.configs, options.kills, strict=True):
        if not kills:
            phases = list(PHASES)
        found = run(config, log, kills, random.Random(options.seed), options.processes, phases)
        done[config] = found
        if not kills:  # the runs after it are taken for the same one
            phases = found["phases"]
    Path(options.report).write_text(json.dumps(done, indent=1))
    return max(abs(found["code"]) for found in done.values())


if __name__ == "__main__":
    sys.exit(main())
