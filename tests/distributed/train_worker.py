"""``opdengine train`` whose second rank may fail, as the environment says.

FAIL_AT=2: a service of the second rank fails while it samples the second batch. KILL_AT=2: the rank is killed there.
TERM_AT=2: it alone gets SIGTERM there. STOP_AT=2: it is stopped there and never goes on.
SYNC_FAIL_AT=2: its sampler fails to take the weights of the second version.
GRADES="1/0 0.5/0.2": what each rank grades its answers with, evaluation by evaluation.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from opdengine.cli import main
from opdengine.errors import ServiceError
from opdengine.models.sharding import split_like
from opdengine.rollout.transformers import TransformersSampler
from opdengine.training import run
from opdengine.training.step import Engine
from opdengine.verifiers.grader import Grader, Score

rollout = Engine.rollout


def is_due(name: str, number: int) -> bool:
    return os.environ.get("RANK") == "1" and number == int(os.environ.get(name, "-1")) - 1


async def failing(self: Engine, prompts: Any, number: int) -> Any:
    if is_due("FAIL_AT", number):
        raise ServiceError("the service of one rank is gone")
    if is_due("KILL_AT", number):
        os.kill(os.getpid(), signal.SIGKILL)
    if is_due("TERM_AT", number):
        os.kill(os.getpid(), signal.SIGTERM)
    if is_due("STOP_AT", number):
        os.kill(os.getpid(), signal.SIGSTOP)
    return await rollout(self, prompts, number)


Engine.rollout = failing  # type: ignore[method-assign]

load_policy = TransformersSampler.load_policy


def refusing(self: TransformersSampler, version: int, *weights: Any) -> None:
    load_policy(self, version, *weights)
    if os.environ.get("RANK") == "1" and version == int(os.environ.get("SYNC_FAIL_AT", "-1")):
        raise ServiceError("the sampler of one rank is gone")


TransformersSampler.load_policy = refusing  # type: ignore[method-assign]

grades = [float(part.split("/")[int(os.environ["RANK"])]) for part in os.environ.get("GRADES", "").split()]


def grade(self: Grader, texts: Sequence[str], prompts: Sequence[Any]) -> list[Score]:
    return [Score(grades.pop(0))] * len(texts)


if grades:
    Grader.grade = grade  # type: ignore[method-assign]

restore_model = run.restore_model


def checked(model: Any, folder: Path, *rest: Any) -> None:
    """This rank's part of the model is that of the folder's weights."""
    restore_model(model, folder, *rest)
    stored = load_file(folder / "model.safetensors")
    found = {name: value for name, value in model.state_dict(keep_vars=True).items() if name in stored}
    assert found.keys() == stored.keys()
    for name, value in found.items():
        assert torch.equal(value.to_local(), split_like(stored[name], value).to_local())
    print(f"rank {os.environ.get('RANK')} has the model of {folder.parent.name}", file=sys.stderr)


run.restore_model = checked

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
